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
from quant_kernels_triton.scaled_plan import ScaledPlan, describe_scaled, few_rows
from quant_kernels_triton.wna16 import interpreting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Scaled"]


class Scaled(Rows):
    """fp8 and int8 activations, quantized by one kernel; see ``scaled_run``."""

    name = "triton_scaled"

    def _plan(self, op: OpSpec) -> ScaledPlan | Rejected:
        if op.device[0] != "cuda" and not (op.device[0] == "cpu" and interpreting()):
            return Rejected(axis="device", have=op.device[0], need="cuda")
        plan = describe_scaled(op)
        if isinstance(plan, Rejected):
            return plan
        need = (8, 0) if plan.kind == "int8" else (8, 9)
        have = tuple(int(v) for v in op.device[1].split(".")) if op.device[1] else need
        if have < need:
            return Rejected(
                axis="compute capability", have=op.device[1], need=f"{need[0]}.{need[1]}"
            )
        return plan

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        p = self._plan(op)
        if isinstance(p, Rejected):
            return p
        size, out = p.n * p.k, []
        rate = 700.0 if p.kind == "int8" else 1150.0  # TFLOP/s, measured on an H100
        few = few_rows(p.kind, p.n)
        long = max(0, p.k - 4096) / 10240  # a token is quantized in one program
        for bound in BUCKETS:
            rows = min(bound, 8192)
            started = 15.0 if rows > few else 10.0 if p.kind == "block" else 7.0
            started += long * (14.0 if rows > few or p.kind == "block" else 4.0)
            us = started + max(size / 2.4e6, 2.0 * rows * size / rate / 1e6)
            out.append((ANY_ROWS if bound == BUCKETS[-1] else bound, round(us, 1)))
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
