"""Attention of one new token behind core's contract: an operation without weights of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.between import Weightless
from quant_core.spec import OpSpec
from quant_kernels_triton.between_kernel import refused

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AttentionStep"]

_FLOATS = ("bfloat16", "float16")


class AttentionStep(Weightless):
    """One new token per sequence over a float cache; see ``attention``."""

    name = "triton_attention"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if no := refused(op, "attention"):
            return no
        if "one_token" not in op.features:
            return Rejected(axis="features", have="many tokens", need="one_token")
        if op.act_dtype not in _FLOATS:
            return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_FLOATS))
        return Accepted(cost=5.0)

    def bind(self, op: OpSpec) -> Callable[..., Tensor | None]:
        from quant_kernels_triton.attention_run import run_step

        return run_step
