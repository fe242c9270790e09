"""Several layers in one call of C: a gated MLP, and a decoder layer for one new token a sequence.

What a call needs of the weights is packed once and kept as long as the very same lists of buffers
come; core makes new ones when weights change. A call that somebody watches (``watch``) is declined:
the single operations run then, and can be seen.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quant_core.kernels.between import ACTIVATIONS, Block
from quant_kernels_cpu.descriptor import DTYPES
from quant_kernels_cpu.held import Held, Places, Values
from quant_kernels_cpu.layer import (
    BlockLayout,
    WeightTable,
    call_layer,
    check_status,
    follow_weights,
    packed_layer,
)
from quant_kernels_cpu.library import library
from quant_kernels_cpu.watch import watched

__all__ = ["MOST_ROWS", "BlockRun", "GatedRun", "bind_block"]

MOST_ROWS = 7  # csrc/vec512.h: tokens of the register path; beyond, single calls are as fast
_MOST_HEAD = 512  # csrc/attention.h: features of a head
_MLP = struct.Struct("@9q")  # csrc/between_calls.h
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
                packed_layer(text, mine) for text, mine in zip(self.texts, buffers, strict=True)
            )
            memory = ctypes.create_string_buffer(packed, len(packed))
            held = self._held = (buffers, memory, ctypes.addressof(memory))
        return held[2]


class GatedRun:
    """down(act(gate(x)) * up(x)) in one call; None for what it does not take."""

    def __init__(
        self, texts: Sequence[str], k: int, n: int, activation: str, up_first: bool = False
    ) -> None:
        self.weights, self.k, self.n = _Weights(texts), k, n
        self.act, self.sides, self.up_first = (
            ACTIVATIONS.index(activation),
            len(texts) - 1,
            up_first,
        )

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
        how = (self.act, count, self.sides, self.up_first, lib.isa)
        packed = _MLP.pack(at, x.data_ptr(), y.data_ptr(), kind, *how)
        check_status(lib.c.qk_gated_mlp(packed), "gated MLP")
        return y


class BlockRun:
    """A decoder layer, ``kernels.between.Block``; None for what it does not take."""

    takes_position = True

    def __init__(self, texts: Sequence[str], block: Block) -> None:
        self.weights = _Weights(texts)
        self.layout = BlockLayout.made(texts, block)
        self.text, self.k = self.layout.text(), self.layout.k
        self.kind = replace(self.layout, mark=0).text()  # of all layers that differ in weights only
        self.heads, self.kv_heads = block.heads, block.kv_heads
        self.dim, self.rotated = block.head_dim, block.rotated
        self.plain = len(block.norms) == 2
        self.dtype: torch.dtype = getattr(torch, block.gated.act_dtype)

    def _takes(self, x: Tensor, norms: Sequence[Tensor], cos: Tensor, sin: Tensor) -> bool:
        """Written out: this runs for every layer of every step."""
        dtype, first, second, angle = self.dtype, norms[0], norms[1], cos.shape
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
            and (self.plain or self._takes_heads(norms[2:]))
        )

    def _takes_heads(self, norms: Sequence[Tensor]) -> bool:
        return all(
            n.dtype is self.dtype and n.shape == (self.dim,) and n.is_contiguous() for n in norms
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

    def _takes_mask(self, batch: int, length: int, mask: Tensor) -> bool:
        return (
            mask.dim() == 4
            and mask.shape[0] in (1, batch)
            and mask.shape[1] in (1, self.heads)
            and mask.shape[2:] == (1, length)
            and (mask.dtype == torch.bool or mask.dtype in DTYPES)
            and mask.is_cpu
        )

    def __call__(
        self, buffers: Sequence[Sequence[Tensor]], norms: Sequence[Tensor], x: Tensor, cos: Tensor,
        sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float,
        eps: Sequence[float], at: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        if watched(x, buffers[0][0]) or not self._takes(x, norms, cos, sin):
            return None
        if not self._takes_cache(x.shape[0], keys, values):
            return None
        if mask is not None and not self._takes_mask(x.shape[0], keys.shape[2], mask):
            return None
        if at is not None and not _is_position(at):
            return None
        calls = self.weights.address(buffers)
        return call_layer(
            calls, self.layout, norms, x, cos, sin, keys, values, mask, at, scale, eps
        )

    def table(self, values: Callable[[], Sequence[Sequence[Tensor]]]) -> WeightTable:
        """What stands for the layers' buffers in a graph; ``values`` gives them."""
        follow_weights()
        return WeightTable(self.weights.texts, values)

    def traced(
        self, table: Tensor, norms: Sequence[Tensor], x: Tensor, cos: Tensor, sin: Tensor,
        keys: Tensor, values: Tensor, mask: Tensor, scale: float, eps: Sequence[float],
        at: Tensor,
    ) -> Tensor | None:  # fmt: skip
        """The same as an operator that a graph records."""
        if not self._takes(x, norms, cos, sin) or not (x.is_cpu and table.is_cpu):
            return None
        if not self._takes_cache(x.shape[0], keys, values) or not _is_position(at):
            return None
        if not self._takes_mask(x.shape[0], keys.shape[2], mask):
            return None
        _join_layers()
        op = torch.ops.quant_cpu.decoder_layer.default
        return op(  # type: ignore[no-any-return]
            x, table, list(norms), self.text, cos, sin, keys, values, mask, at, scale, list(eps)
        )

    def held(self, values: Values, places: Places | None = None) -> Held | None:
        """What stands for tensors in a graph; None where torch lacks what C needs for it."""
        from quant_kernels_cpu.ops import has_native

        if not has_native:
            return None
        follow_weights()
        return Held(values, places)

    def traced_held(
        self, layers: Tensor, of: int, cache: Tensor, to: int, room: Sequence[int],
        x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, first: Tensor, scale: float,
        eps: Sequence[float],
    ) -> Tensor | None:  # fmt: skip
        """``traced`` of a layer and a cache that handles stand for; ``room``: sizes of the keys."""
        if x.dtype is not self.dtype or not x.is_cpu or not 0 < x.shape[0] <= MOST_ROWS:
            return None
        if tuple(room) != (x.shape[0], self.kv_heads, room[2], self.dim):
            return None
        if not self._takes_angles(x, cos, sin) or not self._takes_mask(x.shape[0], room[2], mask):
            return None
        if not _is_position(first) or not _joins_held():
            return None
        op = torch.ops.quant_cpu.held_layers.default
        return op(  # type: ignore[no-any-return]
            x, layers, cache, [of], [to], self.kind, cos, sin, mask, first, scale, list(eps)
        )

    def _takes_angles(self, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
        angle = cos.shape
        return (
            x.shape[1:] == (1, self.k)
            and cos.dtype is sin.dtype is self.dtype
            and angle == sin.shape
            and angle[1:] == (1, self.rotated)
            and (angle[0] == 1 or angle[0] == x.shape[0])
        )


@torch.compiler.assume_constant_result
def _join_layers() -> None:
    """Asked for while a graph is traced, since it imports the compiler."""
    from quant_kernels_cpu.join import join_layers

    join_layers()


@torch.compiler.assume_constant_result
def _joins_held() -> bool:
    """Whether layers may be recorded that handles stand for."""
    from quant_kernels_cpu.join import joins_held

    return joins_held()


def _is_position(at: Tensor) -> bool:
    return at.dtype == torch.int64 and at.shape in ((), (1,)) and at.is_cpu


def bind_block(texts: Sequence[str], block: Block) -> BlockRun | None:
    """The run of a decoder layer whose layers C runs; None for dtypes its attention lacks."""
    dtype = getattr(torch, block.gated.act_dtype)
    if dtype not in _SIXTEEN or block.head_dim > _MOST_HEAD or block.rotated > block.head_dim:
        return None
    return BlockRun(texts, block)
