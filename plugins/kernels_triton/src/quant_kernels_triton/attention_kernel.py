"""Attention of one new token behind core's contract: operations without weights of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.between import Weightless
from quant_core.spec import OpSpec
from quant_kernels_triton.between_kernel import refused

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AttentionStep", "AttentionUpdate"]

_MOST = 256  # features of a head
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


class AttentionUpdate(Weightless):
    """The same with rotation before it and the new key and value written to the cache."""

    name = "triton_attention_update"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if no := refused(op, "attention_update"):
            return no
        if op.act_dtype not in _FLOATS:
            return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_FLOATS))
        dim, rotated = op.size("k"), op.size("rotated")
        if dim % 16 or rotated % 16 or dim > _MOST:
            need = f"multiples of 16, at most {_MOST}"
            return Rejected(axis="k", have=f"{dim}, {rotated} rotated", need=need)
        return Accepted(cost=6.0)

    def bind(self, op: OpSpec) -> Callable[..., Tensor | None]:
        from quant_kernels_triton.attention_run import run_decode

        return run_decode
