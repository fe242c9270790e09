"""The rounding of activations behind core's contract (op "quantize")."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.quantizer import Weightless
from quant_core.kernels.storage import misused
from quant_core.spec import OpSpec
from quant_kernels_triton.costs import BUCKETS
from quant_kernels_triton.interpreter import interpreting
from quant_kernels_triton.rounding_plan import RoundPlan, describe_round

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Round"]

# Microseconds in front of a product in a CUDA graph, fitted to an H100 (benchmarks/gpu.py).
_US = 1.3  # of one small launch, and what its neighbours overlap no more
_EARLY_US = 0.9  # less, where the product starts early
_COLUMN_US = 1.0e-4  # of each column of a row, which one program reads
_ROW_US = 0.035  # of each of the first 64 rows
_BYTES_PER_US = 2.0e6


class Round(Weightless):
    """x to codes and back in one kernel, two where a factor of the whole tensor comes first."""

    name = "triton_round"

    def _plan(self, op: OpSpec) -> RoundPlan | Rejected:
        if op.op != "quantize":
            return Rejected(axis="op", have=op.op, need="quantize")
        if op.device[0] != "cuda" and not (op.device[0] == "cpu" and interpreting()):
            return Rejected(axis="device", have=op.device[0], need="cuda")
        from quant_core.kernels.activations import unsupported_input

        return unsupported_input(op) or describe_round(op)

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        p = self._plan(op)
        if isinstance(p, Rejected):
            return p
        each = op.size("k") * (2 if op.act_dtype != "float32" else 4) * (3 if p.first else 2)
        launches = (_US + _COLUMN_US * op.size("k")) * (2 if p.first else 1)
        launches -= _EARLY_US if p.early else 0.0
        costs = tuple(
            (m, round(launches + _ROW_US * min(m, 64) + min(m, 8192) * each / _BYTES_PER_US, 1))
            for m in BUCKETS
        )
        return Accepted(cost=costs[0][1], costs=costs, note="one kernel" if not p.first else "two")

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        p = self._plan(op)
        if isinstance(p, Rejected):
            raise misused(self.name, p)
        from quant_kernels_triton.rounding_run import bound_round

        return functools.partial(bound_round, p.text(), op.size("k"))
