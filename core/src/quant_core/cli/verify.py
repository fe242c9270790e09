"""``quant verify``: read and check every tensor without running the model.

Each matrix is brought to canonical form, which checks its values; opaque blocks, and one matrix of
every kind, are dequantized, so that codes and scales fit each other; float tensors must be finite;
in the end every stored tensor is used or skipped by a named rule. Names and sizes are compared with
the model that the config describes, where transformers is installed and knows it. All problems are
listed, not the first only.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quant_core.cli.inspect import add_path
from quant_core.cli.output import Progress, emit, escaped, size
from quant_core.errors import LayoutError, PluginError, QuantError, printable

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.plan import Member, Plan
    from quant_core.tensors import LayerTensors

__all__ = ["HELP", "add_arguments", "run", "verify"]

HELP = "read and check every tensor without running the model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """PATH, --format and --strict."""
    add_path(parser)
    parser.add_argument("--strict", action="store_true", help="count warnings as problems")


def _dense(member: Member, matrix: LayerTensors) -> Tensor:
    """The weights; tensors that do not fit each other are the scheme's fault."""
    try:
        return matrix.dequantize()
    except QuantError as err:
        found = str(err)
        cause: Exception = err
    except (RuntimeError, ValueError, IndexError, TypeError) as err:
        found = f"{type(err).__name__}: {printable(err)}"
        cause = err
    raise PluginError(
        f"{member.layer.stored}: what its scheme ({type(member.scheme).__module__}) makes of the "
        f"stored tensors cannot be dequantized ({found.rstrip('.')}), expected codes and scales "
        "that fit its shape. This is a bug of the plugin; report it there.",
        code="Q-PLUGIN-RESULT",
        tensor=member.layer.stored,
    ) from cause


def _check_matrix(plan: Plan, member: Member, expert: int | None, seen: set[object]) -> None:
    import torch

    from quant_core.load import read_matrix

    matrix = read_matrix(plan, member, expert)
    kind = (type(member.scheme), matrix.weight.spec, matrix.weight.packing, matrix.weight.shape)
    if kind in seen and not matrix.weight.spec.blocks:
        return
    seen.add(kind)
    bad = int((~torch.isfinite(_dense(member, matrix))).sum())
    if bad:
        raise LayoutError(
            f"{member.layer.stored}: {bad} weights are NaN or infinite, expected finite numbers. "
            "The file is damaged or the quantization overflowed; get it again.",
            code="Q-VALUE-WEIGHT",
            tensor=member.layer.stored,
            expected="finite",
            actual=bad,
        )


def _check_float(plan: Plan, public: str) -> None:
    from quant_core.finite import float_error
    from quant_core.load import read_parameter

    error = float_error(plan, plan.dense[public], read_parameter(plan, public))
    if error is not None:
        raise error


def _check_cache(plan: Plan, member: Any) -> None:
    from quant_core.load import read_matrix

    read_matrix(plan, member)


def _steps(plan: Plan) -> Iterator[tuple[str, Any]]:
    """(what, check) for everything there is to read."""
    seen: set[object] = set()
    for name, member in plan.quantized.items():
        for expert in member.layer.experts or (None,):
            what = name if expert is None else f"{name}[{expert}]"
            yield what, lambda m=member, e=expert: _check_matrix(plan, m, e, seen)
    for name, member in plan.attention.items():
        yield name, lambda m=member: _check_cache(plan, m)
    for public in plan.dense:
        yield public, lambda p=public: _check_float(plan, p)


def _problem(where: str, err: QuantError) -> dict[str, Any]:
    return {"where": where, "code": err.code, "message": str(err), "tensor": err.tensor}


def _compare(plan: Plan, problems: list[dict[str, Any]]) -> tuple[str | None, str]:
    """(class of the model it was compared with, why it was not)."""
    from quant_core.engines.transformers_skeleton import compare

    try:
        return compare(plan)
    except QuantError as err:
        problems.append(_problem("model", err))
    return None, ""


def verify(plan: Plan, *, strict: bool = False) -> dict[str, Any]:
    """Check a planned checkpoint; problems are collected, not raised."""
    steps = list(_steps(plan))
    problems: list[dict[str, Any]] = []
    progress = Progress(len(steps))
    for what, check in steps:
        try:
            check()
        except QuantError as err:
            problems.append(_problem(what, err))
        progress.step(what)
    progress.finish()
    if not problems:  # what failed to load is known already
        try:
            plan.ledger.check_loaded()
        except QuantError as err:
            problems.append(_problem("ledger", err))
    unclaimed = plan.ledger.unclaimed()
    problems += [
        {
            "where": "ledger",
            "code": "Q-TENSOR-UNEXPECTED",
            "message": f"tensor {name!r} is used by no module and skipped by no rule",
            "tensor": name,
        }
        for name in unclaimed
    ]
    model, why = _compare(plan, problems)
    warnings = [*plan.warnings, *([f"not compared with its model: {why}"] if why else ())]
    if strict:
        problems += [
            {"where": "plan", "code": "Q-WARNING", "message": w, "tensor": None} for w in warnings
        ]
    return {
        "path": str(plan.checkpoint.path),
        "format": plan.match.plugin if plan.match else None,
        "ok": not problems,
        "checked": len(steps),
        "modules": len(plan.members),
        "tensors": len(plan.checkpoint.tensors),
        "skipped": dict(plan.ledger.skipped),
        "stored_bytes": sum(t.nbytes for t in plan.checkpoint.tensors.values()),
        "model": model,
        "problems": problems,
        "warnings": warnings,
    }


def _render(data: Mapping[str, Any]) -> Iterator[str]:
    for p in data["problems"]:
        yield f"{p['code']}: {escaped(p['message'])}"
    for warning in data["warnings"]:
        yield f"warning: {escaped(warning)}"
    for name, rule in data["skipped"].items():
        yield f"skipped: {escaped(name)}: {escaped(rule)}"
    verdict = "ok" if data["ok"] else f"{len(data['problems'])} problem(s)"
    fits = f"; fits {data['model']}" if data["model"] else ""
    yield (
        f"{escaped(data['path'])}: {verdict}; {data['format'] or 'float'}, {data['checked']:,} "
        f"matrices and float tensors read, {data['tensors']:,} stored tensors, "
        f"{size(data['stored_bytes'])}{fits}"
    )


def run(args: argparse.Namespace) -> int:
    """Verify; 1 if there is any problem."""
    from quant_core.checkpoint.open import open_checkpoint
    from quant_core.plan import plan

    with open_checkpoint(args.path) as checkpoint:
        data = verify(plan(checkpoint, format=args.format), strict=args.strict)
    emit(args, data, _render(data))
    return 0 if data["ok"] else 1
