"""The kernels with 8-bit activations behind core's contract, on the reference kernel's buffers.

They share the layout "rows" with other packages: row-major codes, scales as the checkpoint has
them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from quant_core.kernels.base import ANY_ROWS, Accepted, Rejected
from quant_core.kernels.storage import Rows, misused
from quant_core.spec import OpSpec
from quant_kernels_triton.costs import BUCKETS
from quant_kernels_triton.interpreter import interpreting
from quant_kernels_triton.scaled_plan import ScaledPlan, describe_scaled, scaled_us
from quant_kernels_triton.scaled_ring_plan import MOST, ring_us
from quant_kernels_triton.wna16 import gluon_missing

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scaled", "ScaledRing"]


def _checked(op: OpSpec, plan: ScaledPlan | Rejected) -> ScaledPlan | Rejected:
    """The plan where the chip multiplies such codes."""
    if isinstance(plan, Rejected):
        return plan
    need = (8, 0) if plan.kind == "int8" else (8, 9)
    have = tuple(int(v) for v in op.device[1].split(".")) if op.device[1] else need
    if have < need:
        return Rejected(axis="compute capability", have=op.device[1], need=f"{need[0]}.{need[1]}")
    return plan


class Scaled(Rows):
    """fp8 and int8 activations, quantized by one kernel; see ``scaled_run``."""

    name = "triton_scaled"

    def _plan(self, op: OpSpec) -> ScaledPlan | Rejected:
        if op.device[0] != "cuda" and not (op.device[0] == "cpu" and interpreting()):
            return Rejected(axis="device", have=op.device[0], need="cuda")
        return _checked(op, describe_scaled(op))

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        p = self._plan(op)
        if isinstance(p, Rejected):
            return p
        out = [
            (ANY_ROWS if m == BUCKETS[-1] else m, round(scaled_us(p, min(m, 8192)), 1))
            for m in BUCKETS
        ]
        return Accepted(
            costs=tuple(out), cost=out[0][1], note="activations quantized in one kernel"
        )

    def _bound(self, op: OpSpec) -> ScaledPlan:
        p = self._plan(op)
        if isinstance(p, Rejected):
            raise misused(self.name, p)
        return p

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        from quant_kernels_triton import ops

        p = self._bound(op)
        return functools.partial(ops.bound_scaled, p.text(), p.k)


class ScaledRing(Rows):
    """The same on Hopper, weights by TMA: few rows of fp8, any of int8; see ``scaled_ring``."""

    name = "gluon_scaled"

    def _plan(self, op: OpSpec) -> ScaledPlan | Rejected:
        if op.device[0] != "cuda":
            return Rejected(axis="device", have=op.device[0], need="cuda")
        if not op.device[1].startswith("9."):
            have = op.device[1] or "unknown"
            return Rejected(axis="compute capability", have=have, need="9.0 (Hopper)")
        plan = describe_scaled(op)
        if isinstance(plan, ScaledPlan) and (missing := gluon_missing()):
            return Rejected(axis="triton", have=missing, need="Triton 3.6 or newer")
        return plan

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        p = self._plan(op)
        if isinstance(p, Rejected):
            return p
        rows = [m for m in BUCKETS if m <= MOST[p.kind]]
        table = tuple((m, round(ring_us(p, min(m, 8192)), 1)) for m in rows)
        return Accepted(costs=table, cost=table[0][1], note="activations quantized in one kernel")

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        from quant_kernels_triton import ops

        p = self._plan(op)
        if isinstance(p, Rejected):
            raise misused(self.name, p)
        return functools.partial(ops.bound_ring, p.text(), p.k)
