"""Public names exist, and the names of ``quant_core`` itself change only on purpose."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import quant_core
from checkpoint_sets import REPO

# What users import from the top level. Removing a name breaks them: bump the version and say so.
GOLDEN = [
    "QuantError",
    "__version__",
    "as_config",
    "convert",
    "diff",
    "hookimpl",
    "install",
    "load_model",
    "load_tensor",
    "open_checkpoint",
    "plan",
    "registry",
]

# Engines that have an environment of their own; their adapters are imported there.
ENGINES = {"vllm", "sglang"}


def modules() -> list[str]:
    roots = [REPO / "core" / "src", *sorted(REPO.glob("plugins/*/src"))]
    found = []
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def declared(file: Path) -> list[str] | None:
    """The literal ``__all__`` of a source file."""
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets
        ):
            return [c.value for c in ast.walk(node.value) if isinstance(c, ast.Constant)]
    return None


def test_top_level_names_are_the_golden_list() -> None:
    assert sorted(quant_core.__all__) == GOLDEN
    assert dir(quant_core) == GOLDEN


@pytest.mark.parametrize("name", GOLDEN)
def test_top_level_name_can_be_imported(name: str) -> None:
    assert getattr(quant_core, name) is not None


@pytest.mark.parametrize("name", ["plan", "registry"])
def test_top_level_function_is_not_hidden_by_the_module_of_its_name(name: str) -> None:
    module = importlib.import_module(f"quant_core.{name}")
    assert getattr(quant_core, name) is getattr(module, name)
    assert callable(getattr(quant_core, name))


def test_top_level_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        quant_core.no_such_name  # noqa: B018


@pytest.mark.parametrize("name", modules())
def test_all_names_of_a_module_exist(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as err:
        if str(err.name).partition(".")[0] not in ENGINES:
            raise
        pytest.skip(f"{err.name} is not installed")
    names = getattr(module, "__all__", [])
    assert [n for n in names if not hasattr(module, n)] == []
    assert len(names) == len(set(names))
    assert [n for n in names if n.startswith("_") and not n.startswith("__")] == []


def test_every_core_module_with_public_functions_declares_all() -> None:
    core = REPO / "core" / "src" / "quant_core"
    missing = []
    for file in sorted(core.rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"))
        public = [
            n.name
            for n in tree.body
            if isinstance(n, ast.FunctionDef | ast.ClassDef) and not n.name.startswith("_")
        ]
        if public and declared(file) is None:
            missing.append(file.relative_to(core).as_posix())
    assert missing == []
