"""What is asked while Dynamo traces gets constants: torch 2.11 refuses anything else."""

from __future__ import annotations

import ast
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
CONSTANTS = {"int", "float", "bool", "str"}


def asked_while_traced():
    """(where, function) of each with a result that Dynamo takes for a constant."""
    for file in sorted([*REPO.glob("core/src/**/*.py"), *REPO.glob("plugins/*/src/**/*.py")]):
        text = file.read_text("utf-8")
        if "assume_constant_result" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and any(
                ast.unparse(d).endswith("assume_constant_result") for d in node.decorator_list
            ):
                yield f"{file.relative_to(REPO)}:{node.name}", node


def test_their_arguments_are_constants():
    found = dict(asked_while_traced())
    assert len(found) >= 4, found
    for where, node in found.items():
        own = node.args
        for arg in [*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg]:
            kind = arg and arg.annotation and ast.unparse(arg.annotation)
            assert arg is None or kind in CONSTANTS, f"{where}: {arg.arg} is {kind}"
