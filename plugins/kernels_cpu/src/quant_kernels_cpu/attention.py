"""Attention of one new token per sequence over a float cache of keys and values; csrc/attention.h.

    quant_cpu::attention_step(q, k, v, mask, scale) -> y

        q [B, H, 1, D]   k [B, Hkv, L, D]   v [B, Hkv, L, Dv]   ->   y [B, 1, H, Dv]
        mask  bool (True = attend) or float (added), broadcast to [B, H, 1, L]

torch's own op for bfloat16 and float16 packs keys and values for matrix units on every call, which
pays for many tokens and costs more than the arithmetic of one. For float32 it is as fast as this
one, which therefore does not take it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

import torch
from torch import Tensor

from quant_core.errors import LimitError
from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.between import Weightless
from quant_core.spec import OpSpec
from quant_kernels_cpu.descriptor import DTYPES
from quant_kernels_cpu.library import ISAS, library
from quant_kernels_cpu.offered import no_c_call
from quant_kernels_cpu.watch import watched

__all__ = ["AttentionStep", "run_step"]

_CALL = struct.Struct("@5q2q6q2q3q3q3qdq")  # csrc/step.h
_U8 = 4  # csrc/qk.h: a mask of bytes
_MOST = 512  # features of a head that fit the kernel's stack
_FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def _fits(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    return (
        q.shape[2] == 1
        and q.dtype in _FLOATS.values()
        and q.dtype == k.dtype == v.dtype
        and q.stride(3) == k.stride(3) == v.stride(3) == 1
        and q.shape[1] % k.shape[1] == 0
        and (mask is None or mask.dtype == torch.bool or mask.dtype in DTYPES)
    )


def _step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, _, dim = q.shape
    length, wide = k.shape[2], v.shape[3]
    y = q.new_empty((batch, 1, heads, wide))
    at, kind, mask_stride = 0, 0, (0, 0, 0)
    if mask is not None:
        mask = mask.expand(batch, heads, 1, length)
        at, kind = mask.data_ptr(), DTYPES.get(mask.dtype, _U8)
        mask_stride = (mask.stride(0), mask.stride(1), mask.stride(3))
    if y.numel() == 0:
        return y
    lib = library()
    packed = _CALL.pack(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), at, y.data_ptr(), DTYPES[q.dtype], kind,
        batch, heads, k.shape[1], length, dim, wide, q.stride(0), q.stride(1),
        *k.stride()[:3], *v.stride()[:3], *mask_stride, scale, lib.isa,
    )  # fmt: skip
    if lib.c.qk_attention(packed):
        raise LimitError(
            f"attention: no memory for the scores of {heads} heads and {length} positions. Free "
            "memory or use a shorter context.",
            code="Q-LIMIT-MEMORY",
            actual=length,
        )
    return y


def _fake_step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return q.new_empty((q.shape[0], 1, q.shape[1], v.shape[3]))


_lib = torch.library.Library("quant_cpu", "FRAGMENT")
_lib.define("attention_step(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor")
_lib.impl("attention_step", _step, "CPU")
torch.library.register_fake("quant_cpu::attention_step", _fake_step, lib=_lib)
_op = torch.ops.quant_cpu.attention_step.default


def run_step(
    buffers: list[Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> Tensor | None:
    """As in the module's docstring; None for what this kernel does not take."""
    if not _fits(q, k, v, mask) or q.shape[3] > _MOST or v.shape[3] > _MOST:
        return None
    if watched(q, k):
        return _op(q, k, v, mask, scale)  # type: ignore[no-any-return]
    return _step(q, k, v, mask, scale)


class AttentionStep(Weightless):
    """Behind core's contract: an operation without weights of its own."""

    name = "cpu_attention"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if odd := no_c_call(op, "attention"):
            return odd
        if op.operands:
            roles = ", ".join(role for role, _ in op.operands)
            return Rejected(axis="operands", have=roles, need="float queries, keys and values")
        if "one_token" not in op.features:
            return Rejected(axis="features", have="many tokens", need="one_token")
        if op.act_dtype not in _FLOATS:
            return Rejected(axis="act_dtype", have=op.act_dtype, need=" or ".join(_FLOATS))
        return Accepted(cost=5.0, note=ISAS[library().isa])

    def bind(self, op: OpSpec) -> Callable[..., Tensor | None]:
        return run_step
