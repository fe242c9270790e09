"""Several layers in one call of C: a gated MLP, and a decoder layer for one new token a sequence.

What a call needs of the weights is packed once and kept as long as the very same lists of buffers
come; core makes new ones when weights change. A call that somebody watches (``watch``) is declined:
the single operations run then, and can be seen.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_core.errors import LimitError
from quant_core.kernels.between import ACTIVATIONS, Block
from quant_kernels_cpu.between import form_of
from quant_kernels_cpu.blocks import buffer_shapes
from quant_kernels_cpu.descriptor import CALL, DTYPES, c_op, tensor_slots
from quant_kernels_cpu.library import library
from quant_kernels_cpu.support import layout_from_text
from quant_kernels_cpu.watch import watched

__all__ = ["MOST_ROWS", "BlockRun", "GatedRun", "bind_block"]

MOST_ROWS = 7  # csrc/vec512.h: tokens of the register path; beyond, single calls are as fast
_MOST_HEAD = 512  # csrc/attention.h: features of a head
_MLP = struct.Struct("@7q")  # csrc/between_calls.h
_BLOCK = struct.Struct("@31q3dq")
_U8 = 4  # csrc/qk.h: a mask of bytes
_SIXTEEN = (torch.bfloat16, torch.float16)


class _Weights:
    """The calls of C for some layers' buffers, packed for the lists that came last."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = tuple(texts)
        self._held: tuple[Any, Any, int] = (None, None, 0)

    def __getstate__(self) -> Any:
        return self.texts

    def __setstate__(self, texts: Any) -> None:
        self.texts, self._held = texts, (None, None, 0)

    def address(self, buffers: Sequence[Sequence[Tensor]]) -> int:
        """Of the packed calls, which live as long as ``buffers`` stay the same object."""
        held = self._held
        if held[0] is not buffers:
            packed = b"".join(
                _static(text, mine) for text, mine in zip(self.texts, buffers, strict=True)
            )
            memory = ctypes.create_string_buffer(packed, len(packed))
            held = self._held = (buffers, memory, ctypes.addressof(memory))
        return held[2]


def _static(text: str, tensors: Sequence[Tensor]) -> bytes:
    """One layer's call without x and y; ``c_op`` keeps the struct it points to."""
    layout = layout_from_text(text)
    slots = tensor_slots(tuple(buffer_shapes(layout)))
    at = [0 if i is None else tensors[i].data_ptr() for i in slots]
    return CALL.pack(ctypes.addressof(c_op(layout)), *at, 0, 0, 0, library().isa, 0, 0)


def _check(status: int, what: str) -> None:
    if status:
        raise LimitError(
            f"{what}: no memory for the kernel's scratch space (status {status}). Free memory or "
            "use fewer tokens a call.",
            code="Q-LIMIT-MEMORY",
            actual=status,
        )


class GatedRun:
    """down(act(gate(x)) * up(x)) in one call; None for what it does not take."""

    def __init__(self, texts: Sequence[str], k: int, n: int, activation: str) -> None:
        self.weights, self.k, self.n = _Weights(texts), k, n
        self.act = ACTIVATIONS.index(activation)

    def __call__(self, buffers: Sequence[Sequence[Tensor]], x: Tensor) -> Tensor | None:
        kind = DTYPES.get(x.dtype)
        count = x.numel() // self.k
        if kind is None or x.shape[-1] != self.k or not 0 < count <= MOST_ROWS:
            return None
        if watched(x, buffers[0][0]):
            return None
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self.n))
        lib = library()
        at = self.weights.address(buffers)
        packed = _MLP.pack(at, x.data_ptr(), y.data_ptr(), kind, self.act, count, lib.isa)
        _check(lib.c.qk_gated_mlp(packed), "gated MLP")
        return y


class BlockRun:
    """A decoder layer, ``kernels.between.Block``; None for what it does not take."""

    def __init__(self, texts: Sequence[str], block: Block) -> None:
        self.weights = _Weights(texts)
        self.k = block.linears[0].size("k")
        self.heads, self.kv_heads = block.heads, block.kv_heads
        self.dim, self.rotated = block.head_dim, block.rotated
        self.forms = tuple(form_of(op) for op in block.norms)
        self.act = ACTIVATIONS.index(*block.gated.features)
        self.dtype: torch.dtype = getattr(torch, block.gated.act_dtype)

    def _takes(self, x: Tensor, norms: Sequence[Tensor], cos: Tensor, sin: Tensor) -> bool:
        """Written out: this runs for every layer of every step."""
        dtype, (first, second), angle = self.dtype, norms, cos.shape
        return (
            x.dtype is first.dtype is second.dtype is cos.dtype is sin.dtype is dtype
            and x.shape[1:] == (1, self.k)
            and 0 < x.shape[0] <= MOST_ROWS
            and first.shape == second.shape == (self.k,)
            and angle == sin.shape
            and angle[1:] == (1, self.rotated)
            and (angle[0] == 1 or angle[0] == x.shape[0])
            and x.is_contiguous()
            and first.is_contiguous()
            and second.is_contiguous()
            and cos.is_contiguous()
            and sin.is_contiguous()
        )

    def _takes_cache(self, batch: int, keys: Tensor, values: Tensor) -> bool:
        shape = keys.shape
        return (
            keys.dtype is values.dtype is self.dtype
            and shape == values.shape
            and shape == (batch, self.kv_heads, shape[2], self.dim)
            and keys.stride(3) == values.stride(3) == 1
            and keys.is_cpu
            and values.is_cpu
        )

    def __call__(
        self, buffers: Sequence[Sequence[Tensor]], norms: Sequence[Tensor], x: Tensor, cos: Tensor,
        sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float,
        eps: tuple[float, float],
    ) -> Tensor | None:  # fmt: skip
        if watched(x, buffers[0][0]) or not self._takes(x, norms, cos, sin):
            return None
        batch, length = x.shape[0], keys.shape[2]
        if not self._takes_cache(batch, keys, values):
            return None
        y = torch.empty_like(x)
        at, kind, mask_stride = 0, 0, (0, 0, 0)
        if mask is not None:
            kind = _U8 if mask.dtype == torch.bool else DTYPES.get(mask.dtype, 0)
            if mask.shape[-1] != length or mask.dim() != 4 or mask.shape[2] != 1:
                return None
            if not kind or not mask.is_cpu:
                return None
            mask = mask.expand(batch, self.heads, 1, length)
            at = mask.data_ptr()
            mask_stride = (mask.stride(0), mask.stride(1), mask.stride(3))
        lib = library()
        packed = _BLOCK.pack(
            self.weights.address(buffers), norms[0].data_ptr(), norms[1].data_ptr(), x.data_ptr(),
            cos.data_ptr(), sin.data_ptr(), at, keys.data_ptr(), values.data_ptr(), y.data_ptr(),
            DTYPES[x.dtype], kind, self.act, *self.forms,
            batch, self.heads, self.kv_heads, length, self.dim, self.rotated,
            *keys.stride()[:3], *values.stride()[:3], *mask_stride,
            self.rotated if cos.shape[0] > 1 else 0, scale, *eps, lib.isa,
        )  # fmt: skip
        _check(lib.c.qk_decoder_block(packed), "decoder layer")
        return y


def bind_block(texts: Sequence[str], block: Block) -> BlockRun | None:
    """The run of a decoder layer whose layers C runs; None for dtypes its attention lacks."""
    dtype = getattr(torch, block.gated.act_dtype)
    if dtype not in _SIXTEEN or block.head_dim > _MOST_HEAD or block.rotated > block.head_dim:
        return None
    return BlockRun(texts, block)
