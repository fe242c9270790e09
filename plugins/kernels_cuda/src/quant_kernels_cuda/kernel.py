"""The decode kernel behind core's contract; torch is imported where it is needed.

cuda_decode   codes of 2 to 8 bits and small floats, exact weights, float32 sums, 1 to 16 rows
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from quant_core.kernels.base import Accepted, Kernel, Rejected
from quant_core.kernels.storage import Tiles16, misused
from quant_core.spec import OpSpec
from quant_kernels_cuda import compiler, driver
from quant_kernels_cuda.costs import bucket_costs
from quant_kernels_cuda.variant import Variant, describe

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KERNELS", "Decode"]

_OLDEST = (8, 0)  # cp.async, ldmatrix, bf16 mma


def _capability(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else (0, 0)


class Decode(Tiles16):
    """Few rows of float activations times packed weights; see csrc/decode.cu."""

    name = "cuda_decode"
    OPS = ("linear", "grouped_linear")
    starts_early = True

    def _variant(self, op: OpSpec) -> Variant | Rejected:
        if op.device[0] != "cuda":
            return Rejected(axis="device", have=op.device[0], need="cuda")
        v = describe(op, ops=self.OPS)
        if isinstance(v, Rejected):
            return v
        if _capability(op.device[1]) < _OLDEST:
            have = op.device[1] or "unknown"
            return Rejected(axis="capability", have=have, need="8.0 or newer")
        if reason := driver.unavailable():
            return Rejected(axis="driver", have=f"none ({reason})", need="libcuda.so.1")
        if reason := compiler.unavailable():
            return Rejected(axis="library", have=f"no NVRTC ({reason})", need="NVRTC 12.1 or newer")
        arch = op.device[1].replace(".", "")
        if int(arch) not in compiler.compiler().architectures():
            return Rejected(
                axis="library", have=f"an NVRTC without sm_{arch}", need="a newer NVRTC"
            )
        return v

    def _bound(self, op: OpSpec) -> Variant:
        v = self._variant(op)
        if isinstance(v, Rejected):
            raise misused(self.name, v)
        return v

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        v = self._variant(op)
        if isinstance(v, Rejected):
            return v
        costs = bucket_costs(v, op.device[1])
        return Accepted(cost=costs[0][1], costs=costs, note="tensor cores, weights read once")

    def bind(self, op: OpSpec) -> Callable[..., Tensor]:
        import torch

        from quant_kernels_cuda import ops

        v = self._bound(op)
        run = ops.run_grouped if op.op == "grouped_linear" else ops.run_linear
        return functools.partial(run, v.text(), v.k_in, getattr(torch, v.act))


KERNELS: tuple[Kernel, ...] = (Decode(),)
