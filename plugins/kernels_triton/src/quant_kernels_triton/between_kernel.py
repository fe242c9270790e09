"""Norms, rotations and gates behind core's contract (``quant_core.kernels.between``)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.between import ACTIVATIONS, NORMS, Weightless
from quant_core.spec import OpSpec
from quant_kernels_triton.interpreter import interpreting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Gated", "RmsNorm", "Rotary"]

_FLOATS = ("bfloat16", "float16", "float32")
_MOST_NORM = 32768  # features of a row that one program holds


def refused(op: OpSpec, name: str) -> Rejected | None:
    """Why this package does not run ``op`` as the operation ``name``; None if nothing is wrong."""
    if op.op != name:
        return Rejected(axis="op", have=op.op, need=name)
    if op.device[0] != "cuda" and not (op.device[0] == "cpu" and interpreting()):
        return Rejected(axis="device", have=op.device[0], need="cuda")
    if op.operands:
        roles = ", ".join(role for role, _ in op.operands)
        return Rejected(axis="operands", have=roles, need="floats only")
    if op.act_dtype not in _FLOATS:
        return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_FLOATS))
    return None


def _features(op: OpSpec, known: tuple[frozenset[str], ...]) -> Rejected | None:
    if op.features in known:
        return None
    need = " or ".join("+".join(sorted(f)) or "none" for f in known)
    return Rejected(axis="features", have="+".join(sorted(op.features)) or "none", need=need)


class RmsNorm(Weightless):
    """RMSNorm, with the sum before it where asked."""

    name = "triton_rms_norm"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if no := refused(op, "rms_norm") or _features(op, NORMS):
            return no
        if op.size("k") > _MOST_NORM:
            return Rejected(axis="k", have=str(op.size("k")), need=f"at most {_MOST_NORM}")
        return Accepted(cost=3.0)

    def bind(self, op: OpSpec) -> Callable[..., Tensor | tuple[Tensor, Tensor] | None]:
        from quant_kernels_triton.between_run import run_norm

        return functools.partial(run_norm, "+".join(sorted(op.features)))


class Rotary(Weightless):
    """Rotation of queries and keys in one launch."""

    name = "triton_rotary"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if no := refused(op, "rotary") or _features(op, (frozenset(),)):
            return no
        dim, rotated = op.size("k"), op.size("rotated")
        if dim % 16 or rotated % 16:
            return Rejected(axis="k", have=f"{dim}, {rotated} rotated", need="multiples of 16")
        return Accepted(cost=3.0)

    def bind(self, op: OpSpec) -> Callable[..., tuple[Tensor, Tensor] | None]:
        from quant_kernels_triton.between_run import run_rotary

        return run_rotary


class Gated(Weightless):
    """act(gate) * up."""

    name = "triton_gated"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        known = tuple(frozenset({act}) for act in ACTIVATIONS)
        if no := refused(op, "gated") or _features(op, known):
            return no
        if op.size("k") % 16:
            return Rejected(axis="k", have=str(op.size("k")), need="a multiple of 16")
        return Accepted(cost=3.0)

    def bind(self, op: OpSpec) -> Callable[..., Tensor | None]:
        from quant_kernels_triton.between_run import run_gated

        return functools.partial(run_gated, next(iter(op.features)))
