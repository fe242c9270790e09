"""All kernels of this package; imports neither torch nor triton."""

from __future__ import annotations

from collections.abc import Sequence

from quant_core.kernels.base import Kernel
from quant_core.spec import OpSpec
from quant_kernels_triton.ahead import ready
from quant_kernels_triton.attention_kernel import AttentionStep, AttentionUpdate
from quant_kernels_triton.between_kernel import Gated, RmsNorm, Rotary
from quant_kernels_triton.hadamard_kernel import Hadamard
from quant_kernels_triton.mixed_kernel import Mixed, MixedStored
from quant_kernels_triton.rounding_kernel import Round
from quant_kernels_triton.scaled_kernel import Scaled, ScaledRing
from quant_kernels_triton.wna16 import Dense, GluonTiles, PlainTriton

__all__ = ["KERNELS", "kernels_for"]

KERNELS: tuple[Kernel, ...] = (
    GluonTiles(),
    PlainTriton(),
    Dense(),
    Scaled(),
    ScaledRing(),
    Mixed(),
    MixedStored(),
    AttentionStep(),
    AttentionUpdate(),
    RmsNorm(),
    Rotary(),
    Gated(),
    Round(),
    Hadamard(),
)


def kernels_for(op: OpSpec) -> Sequence[Kernel]:
    """All of them; where ``op`` may be the first that is compiled, a compiler starts meanwhile."""
    if op.device[0] == "cuda":
        ready()
    return KERNELS
