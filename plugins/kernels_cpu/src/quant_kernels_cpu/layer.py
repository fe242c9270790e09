"""A decoder layer for one new token a sequence as one call of C, and as one operator.

    quant_cpu::decoder_layer(x, table, norms, layout, cos, sin, keys, values, mask, at, scale, eps)
        -> y

        x [B, 1, K];  table: ``WeightTable.tensor``
        norms, eps    [K] twice, then [D] twice where each head of queries and keys has one
        layout        ``BlockLayout.text()``
        cos, sin      [B or 1, 1, R];  keys, values [B, Hkv, L, D], WRITTEN at position ``at``
        mask          bool (True = attend) or float (added), [B or 1, H or 1, 1, L]
        at            int64, one number, read when the operator runs: one graph serves all positions

The mask is obeyed whatever it says. Where it shows the positions up to ``at`` and no other, which C
looks at on every call, nothing behind them is read and the result is that of a cache that ends
there. csrc/dispatch.c implements the operator; without torch's stable ABI it is ``run_layer``.

The weights of a layer are some 26 tensors. As inputs of a graph they are fetched, checked and
handed over on every step, all layers together 800 times; one table of their addresses takes their
place. The operator looks whether weights changed since it was filled, and has it filled again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import logging
import struct
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from quant_core.errors import LayoutError, LimitError, QuantError
from quant_core.kernels.between import ACTIVATIONS, Block
from quant_core.shared import on_weights_changed
from quant_kernels_cpu.between import form_of
from quant_kernels_cpu.blocks import buffer_shapes
from quant_kernels_cpu.descriptor import BYTES, CALL, DTYPES, c_op, tensor_slots
from quant_kernels_cpu.library import library
from quant_kernels_cpu.support import layout_from_text

__all__ = [
    "LAYER_SCHEMA",
    "BlockLayout",
    "WeightTable",
    "call_layer",
    "check_status",
    "fake_layer",
    "fill_table",
    "follow_weights",
    "packed_layer",
    "run_layer",
    "table_numbers",
]

log = logging.getLogger("quant_core")

LAYER_SCHEMA = (
    "(Tensor x, Tensor table, Tensor[] norms, str layout, Tensor cos, Tensor sin, "
    "Tensor(a!) keys, Tensor(b!) values, Tensor mask, Tensor at, float scale, float[] eps) "
    "-> Tensor"
)
_HEAD = 3  # csrc/dispatch.c: where a table lies, when it was filled, for which layers
_BLOCK = struct.Struct("@39q5dq")  # csrc/between_calls.h
_OUTSIDE = 2  # csrc/between_calls.h: the position


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """What a call needs to know of a decoder layer; ``mark`` stands for its layers' layouts."""

    mark: int
    dtype: str
    heads: int
    kv_heads: int
    dim: int
    rotated: int
    forms: tuple[int, ...]
    act: int
    k: int
    qkv: int
    sides: int
    up_first: bool

    @classmethod
    def made(cls, texts: Sequence[str], block: Block) -> BlockLayout:
        return cls(
            mark=_mark(texts),
            dtype=block.gated.act_dtype,
            heads=block.heads,
            kv_heads=block.kv_heads,
            dim=block.head_dim,
            rotated=block.rotated,
            forms=tuple(form_of(op) for op in block.norms),
            act=ACTIVATIONS.index(*block.gated.features),
            k=block.linears[0].size("k"),
            qkv=block.qkv,
            sides=block.sides,
            up_first=block.up_first,
        )

    @property
    def calls(self) -> int:
        """Linear layers: of q, k, v, then o, of gate and up, then down."""
        return self.qkv + self.sides + 2

    @property
    def all_forms(self) -> tuple[int, ...]:
        """Of the norms of both branches, of queries and of keys; 0 where there is none."""
        return (*self.forms, 0, 0)[:4]

    def text(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def of(cls, text: str) -> BlockLayout:
        """Inverse of ``text``."""
        return _of(text)


@functools.lru_cache(maxsize=1024)
def _of(text: str) -> BlockLayout:
    found = json.loads(text)
    return BlockLayout(**(found | {"forms": tuple(found["forms"])}))


def _mark(texts: Sequence[str]) -> int:
    """A number for the layouts of some layers, the same in every process."""
    digest = hashlib.sha256("\n".join(texts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def table_numbers(calls: int) -> int:
    """Size of a table of weights: its head, and the packed calls of some layers."""
    return _HEAD + calls * CALL.size // 8


_tables: weakref.WeakValueDictionary[int, WeightTable] = weakref.WeakValueDictionary()
"""Address of a table's tensor -> the table."""


class WeightTable:
    """The calls of C for some layers' buffers, packed in a tensor that stands for all of them.

    ``tensor`` holds addresses: where a table is copied or pickled, the copy makes its own.
    """

    def __init__(self, texts: Sequence[str], values: Callable[[], Sequence[Sequence[Tensor]]]):
        """``values`` gives the buffers of each layer as they are at that time."""
        self.texts, self.values = tuple(texts), values
        self.tensor = torch.zeros(table_numbers(len(texts)), dtype=torch.int64)
        self.address = self.tensor.data_ptr()
        self._kept: Sequence[Sequence[Tensor]] = ()
        self.tensor[0] = self.address
        _tables[self.address] = self

    def __reduce__(self) -> tuple[object, ...]:
        return WeightTable, (self.texts, self.values)

    @property
    def calls(self) -> int:
        """Address of the packed calls."""
        return self.address + 8 * _HEAD

    def is_filled(self) -> bool:
        return self._when() == library().c.qk_weights_now()

    def _when(self) -> int:
        return ctypes.c_int64.from_address(self.address + 8).value

    def fill(self) -> None:
        """Write the addresses of the present buffers; the time of it last.

        Raises:
            LayoutError: ``Q-LAYOUT-INPUT`` if a buffer is not what its layout says.
        """
        now, values = library().c.qk_weights_now(), self.values()
        for text, mine in zip(self.texts, values, strict=True):
            _check_buffers(text, mine)
        packed = b"".join(packed_layer(t, v) for t, v in zip(self.texts, values, strict=True))
        self._kept = values  # what is pointed to must live
        ctypes.memmove(self.calls, packed, len(packed))
        head = struct.pack("@3q", self.address, now, _mark(self.texts))
        ctypes.memmove(self.address, head, len(head))


def _check_buffers(text: str, tensors: Sequence[Tensor]) -> None:
    expected = list(buffer_shapes(layout_from_text(text)).values())
    found = [(tuple(t.shape), t.dtype) for t in tensors]
    if found != expected or not all(t.is_cpu and t.is_contiguous() for t in tensors):
        raise LayoutError(
            f"decoder layer: the buffers of a layer are {found}, expected {expected}, dense and on "
            "the CPU. Compile the model again after layers were moved or replaced.",
            code="Q-LAYOUT-INPUT",
            expected=expected,
            actual=found,
        )


def fill_table(address: int) -> int:
    """What C calls for a table that was not filled since weights changed; 0 if it is now."""
    table = _tables.get(address)
    if table is None:
        log.error("decoder layer: the table of weights at %#x is gone, or was none", address)
        return 1
    try:
        table.fill()
    except QuantError as err:
        log.error("%s", err)
        return 1
    return 0


@functools.cache
def follow_weights() -> None:
    """Let C know of every change of weights, from now on."""
    on_weights_changed(library().c.qk_weights_changed)


def packed_layer(text: str, tensors: Sequence[Tensor]) -> bytes:
    """One linear layer's call without x and y; ``c_op`` keeps the struct it points to."""
    layout = layout_from_text(text)
    slots = tensor_slots(tuple(buffer_shapes(layout)))
    at = [0 if i is None else tensors[i].data_ptr() for i in slots]
    return CALL.pack(ctypes.addressof(c_op(layout)), *at, 0, 0, 0, library().isa, 0, 0)


def check_status(status: int, what: str) -> None:
    """Raise what a status of C other than 0 means."""
    if status == _OUTSIDE:
        raise LayoutError(
            f"{what}: the position is outside of the cache, expected room for the new token. "
            "Use a larger cache, or reset it.",
            code="Q-LAYOUT-INPUT",
        )
    if status:
        raise LimitError(
            f"{what}: no memory for the kernel's scratch space (status {status}). Free memory or "
            "use fewer tokens a call.",
            code="Q-LIMIT-MEMORY",
            actual=status,
        )


def call_layer(
    calls: int, layout: BlockLayout, norms: Sequence[Tensor], x: Tensor, cos: Tensor, sin: Tensor,
    keys: Tensor, values: Tensor, mask: Tensor | None, at: Tensor | None, scale: float,
    eps: Sequence[float],
) -> Tensor:  # fmt: skip
    """One call of C with arguments that were checked; ``calls``: address of packed layers."""
    y = torch.empty_like(x)
    batch, length = x.shape[0], keys.shape[2]
    where, kind, mask_stride = 0, 0, (0, 0, 0)
    if mask is not None:
        kind = BYTES if mask.dtype == torch.bool else DTYPES[mask.dtype]
        mask = mask.expand(batch, layout.heads, 1, length)
        where, mask_stride = mask.data_ptr(), (mask.stride(0), mask.stride(1), mask.stride(3))
    lib = library()
    weights, more = [norm.data_ptr() for norm in norms], (0,) * (4 - len(norms))
    packed = _BLOCK.pack(
        calls, *weights, *more, x.data_ptr(), cos.data_ptr(), sin.data_ptr(), where,
        keys.data_ptr(), values.data_ptr(), y.data_ptr(), 0 if at is None else at.data_ptr(),
        DTYPES[x.dtype], kind, layout.act, *layout.forms, *more, layout.qkv, layout.sides,
        layout.up_first, batch, layout.heads, layout.kv_heads, length, layout.dim, layout.rotated,
        *keys.stride()[:3], *values.stride()[:3], *mask_stride,
        layout.rotated if cos.shape[0] > 1 else 0, scale, *eps, *more, lib.isa,
    )  # fmt: skip
    check_status(lib.c.qk_decoder_block(packed), "decoder layer")
    return y


def run_layer(
    x: Tensor, table: Tensor, norms: Sequence[Tensor], text: str, cos: Tensor, sin: Tensor,
    keys: Tensor, values: Tensor, mask: Tensor, at: Tensor, scale: float, eps: Sequence[float],
) -> Tensor:  # fmt: skip
    """The operator, for a torch without the stable ABI."""
    layout, held = BlockLayout.of(text), _tables.get(int(table[0]))
    if held is None or _mark(held.texts) != layout.mark:
        raise LayoutError(
            "decoder layer: its weights are not those that the graph was made for. Compile the "
            "model again.",
            code="Q-LAYOUT-INPUT",
        )
    if not held.is_filled():
        held.fill()
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    return call_layer(held.calls, layout, norms, x, cos, sin, keys, values, mask, at, scale, eps)


def fake_layer(
    x: Tensor, table: Tensor, norms: Sequence[Tensor], text: str, cos: Tensor, sin: Tensor,
    keys: Tensor, values: Tensor, mask: Tensor, at: Tensor, scale: float, eps: Sequence[float],
) -> Tensor:  # fmt: skip
    """What the operator returns, for whoever traces."""
    return x.new_empty(x.shape)
