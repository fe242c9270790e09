"""What every operation without weights asks before C runs it."""

from __future__ import annotations

from quant_core.kernels.base import Rejected
from quant_core.spec import OpSpec
from quant_kernels_cpu.library import unavailable

__all__ = ["no_c_call"]


def no_c_call(op: OpSpec, name: str) -> Rejected | None:
    """Why C does not run ``op`` as the operation ``name`` on the cpu; None if it may."""
    if op.op != name:
        return Rejected(axis="op", have=op.op, need=name)
    if op.device[0] != "cpu":
        return Rejected(axis="device", have=op.device[0], need="cpu")
    if reason := unavailable():
        return Rejected(axis="library", have=f"none ({reason})", need="a compiled library")
    return None
