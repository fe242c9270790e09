"""The torch ops: one node each under torch.compile, a thin call into C otherwise.

    quant_cpu::linear(x, tensors, layout) -> y                   x [..., K] -> [..., N]
    quant_cpu::linear_shared(x, tensors, layouts) -> y           several layers of one x; traced
                                                                 calls become it (kernels.merged)
    quant_cpu::grouped_linear(x, experts, tensors, layout) -> y  x [T, K], experts [T] -> [T, N]
    quant_cpu::linear_int8, quant_cpu::grouped_linear_int8       the same, x rounded to int8
    quant_cpu::linear_w8a8, linear_w8a8_shared, grouped_linear_w8a8  int8 codes as layers name them
    quant_cpu::linear_shared_many  linear_shared of more layers than csrc/dispatch.c takes
    quant_cpu::embedding(ids, tensors, layout) -> rows           ids [...] -> [..., K]
    quant_cpu::decoder_layer(...) -> y                           see layer.py
    quant_cpu::decoder_layers(...) -> y                          see layers.py
    quant_cpu::held_layers(...) -> y                             see held.py; in C only

``layout`` is ``Layout.text()`` (w8a8: ``Int8Layout.text()``); ``tensors`` are the buffers in the
order of ``buffer_shapes`` (``int8_buffer_shapes``), those of several layers one after another.

Where nobody watches the dispatcher, the function behind an op is called without going through it,
which halves what a call of a small layer costs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from ctypes import Array, addressof
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quant_core.errors import LayoutError, LimitError
from quant_core.kernels.merged import merge_calls, parts
from quant_kernels_cpu.blocks import buffer_shapes, int8_buffer_shapes
from quant_kernels_cpu.descriptor import CALL, DTYPES, Segment, c_op, c_op_int8, tensor_slots
from quant_kernels_cpu.held import HELD_SCHEMA, HOLD_SCHEMA, fake_held, held_at
from quant_kernels_cpu.layer import (
    LAYER_SCHEMA,
    BlockLayout,
    fake_layer,
    fill_table,
    run_layer,
    table_numbers,
)
from quant_kernels_cpu.layers import LAYERS_SCHEMA, fake_layers, run_layers
from quant_kernels_cpu.library import library, unavailable
from quant_kernels_cpu.native import BLOCK, INT8, Block, Layer, register_native
from quant_kernels_cpu.support import layout_from_text
from quant_kernels_cpu.support_int8 import int8_layout_from_text
from quant_kernels_cpu.watch import watched

__all__ = [
    "has_native",
    "run_embedding",
    "run_grouped",
    "run_grouped_int8",
    "run_grouped_w8a8",
    "run_linear",
    "run_linear_int8",
    "run_linear_w8a8",
    "run_shared",
    "run_shared_w8a8",
]


@dataclass(frozen=True, slots=True)
class _Call:
    """What a call needs besides its tensors, looked up once per layout text."""

    op: Any  # the C struct; kept alive here
    address: int  # of it
    slots: tuple[int | None, ...]
    buffers: int
    n: int
    k: int
    k_in: int
    experts: int
    dtype: torch.dtype


@functools.lru_cache(maxsize=4096)
def _call(text: str) -> _Call:
    layout = layout_from_text(text)
    dtype: torch.dtype = getattr(torch, layout.act_dtype)
    names = tuple(buffer_shapes(layout))
    slots, count = tensor_slots(names), len(names)
    op = c_op(layout)
    n, k, k_in, experts = layout.n, layout.k, layout.k_in, layout.experts
    return _Call(op, addressof(op), slots, count, n, k, k_in, experts, dtype)


@functools.lru_cache(maxsize=4096)
def _call_w8a8(text: str) -> _Call:
    layout = int8_layout_from_text(text)
    dtype: torch.dtype = getattr(torch, layout.act_dtype)
    names = tuple(int8_buffer_shapes(layout))
    slots, count = tensor_slots(names, int8=True), len(names)
    op = c_op_int8(layout)
    n, k, experts = layout.n, layout.k, layout.experts
    return _Call(op, addressof(op), slots, count, n, k, k, experts, dtype)


def _packed(
    isa: int, call: _Call, tensors: list[Tensor], x: int, dtype: torch.dtype, y: Tensor,
    segments: int, count: int,
) -> bytes:  # fmt: skip
    """The arguments of one call of C; see ``CALL``."""
    at = [0 if i is None else tensors[i].data_ptr() for i in call.slots]
    return CALL.pack(
        call.address, *at, x, DTYPES[dtype], y.data_ptr(), isa, segments,
        count,
    )  # fmt: skip


def _check_status(status: int, what: str) -> None:
    if status == 0:
        return
    if status == 2:
        raise IndexError(f"{what}: an id is outside the table. Check the token ids.")
    raise LimitError(
        f"{what}: no memory for the kernel's scratch space (status {status}). Free memory or "
        "use fewer tokens a call.",
        code="Q-LIMIT-MEMORY",
        actual=status,
    )


def _run_linear(
    name: str, describe: Callable[[str], _Call], x: Tensor, tensors: list[Tensor], text: str
) -> Tensor:
    call = describe(text)
    x = x.contiguous()
    y = x.new_empty((*x.shape[:-1], call.n))
    count = x.numel() // call.k_in
    if count:
        lib = library()
        packed = _packed(lib.isa, call, tensors, x.data_ptr(), x.dtype, y, 0, count)
        _check_status(getattr(lib.c, name)(packed), "linear")
    return y


def _run_shared(
    name: str, describe: Callable[[str], _Call],
    x: Tensor, tensors: list[Tensor], texts: Sequence[str],
) -> Tensor:  # fmt: skip
    """See ``quant_core.kernels.merged``."""
    x = x.contiguous()
    calls = [describe(text) for text in texts]
    count = x.numel() // calls[0].k_in
    lib, dtype, where, first = library(), x.dtype, x.data_ptr(), 0
    whole, packed = x.new_empty(sum(call.n for call in calls), count), []
    ys = whole.split([call.n for call in calls])
    for call, y in zip(calls, ys, strict=True):
        mine = tensors[first : first + call.buffers]
        first += call.buffers
        packed.append(_packed(lib.isa, call, mine, where, dtype, y, 0, count))
    if count:
        _check_status(getattr(lib.c, name)(b"".join(packed), len(calls)), "linear")
    return whole


def _segments(experts: Tensor, total: int) -> tuple[Tensor, Array[Segment], int]:
    """Token order sorted by expert, a segment for each active one, and how many tokens those are.

    An index outside [0, total) is a sentinel for "no expert here"; such tokens are left out.
    """
    here = (experts >= 0) & (experts < total)
    order = torch.argsort(torch.where(here, experts, total), stable=True)
    counts = torch.bincount(experts[here].long(), minlength=total).tolist()
    segments, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            segments.append(Segment(expert, start, count))
            start += count
    return order[:start], (Segment * len(segments))(*segments), start


def _run_grouped(
    name: str, describe: Callable[[str], _Call],
    x: Tensor, experts: Tensor, tensors: list[Tensor], text: str,
) -> Tensor:  # fmt: skip
    call = describe(text)
    order, segments, active = _segments(experts.reshape(-1), call.experts)
    y = x.new_zeros(x.shape[0], call.n)
    if active:
        rows = x.new_empty(active, call.n)
        sorted_x = x[order].contiguous()
        at, count = addressof(segments), len(segments)
        lib = library()
        packed = _packed(lib.isa, call, tensors, sorted_x.data_ptr(), x.dtype, rows, at, count)
        _check_status(getattr(lib.c, name)(packed), "grouped_linear")
        y[order] = rows
    return y


def _embedding(ids: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    call = _call(text)
    out = torch.empty(*ids.shape, call.k, dtype=call.dtype)
    flat = ids.reshape(-1).long().contiguous()
    if flat.numel():
        lib = library()
        packed = _packed(lib.isa, call, tensors, flat.data_ptr(), call.dtype, out, 0, flat.numel())
        _check_status(lib.c.qk_rows(packed), "embedding")
    return out


def _fake_linear(x: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], layout_from_text(text).n)


def _fake_grouped(x: Tensor, experts: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    return x.new_empty(x.shape[0], layout_from_text(text).n)


def _fake_shared(x: Tensor, tensors: list[Tensor], texts: Sequence[str]) -> Tensor:
    rows = sum(layout_from_text(text).n for text in texts)
    return x.new_empty(rows, math.prod(x.shape[:-1]))


def _fake_linear_w8a8(x: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], int8_layout_from_text(text).n)


def _fake_shared_w8a8(x: Tensor, tensors: list[Tensor], texts: Sequence[str]) -> Tensor:
    rows = sum(int8_layout_from_text(text).n for text in texts)
    return x.new_empty(rows, math.prod(x.shape[:-1]))


def _fake_grouped_w8a8(x: Tensor, experts: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    return x.new_empty(x.shape[0], int8_layout_from_text(text).n)


def _fake_embedding(ids: Tensor, tensors: list[Tensor], text: str) -> Tensor:
    layout = layout_from_text(text)
    dtype: torch.dtype = getattr(torch, layout.act_dtype)
    return torch.empty(*ids.shape, layout.k, dtype=dtype, device=ids.device)


_linear = functools.partial(_run_linear, "qk_linear", _call)
_linear_int8 = functools.partial(_run_linear, "qk_linear_int8", _call)
_linear_w8a8 = functools.partial(_run_linear, "qk_linear_w8a8", _call_w8a8)
_linear_shared = functools.partial(_run_shared, "qk_linear_shared", _call)
_linear_w8a8_shared = functools.partial(_run_shared, "qk_linear_w8a8_shared", _call_w8a8)
_grouped_linear = functools.partial(_run_grouped, "qk_linear", _call)
_grouped_linear_int8 = functools.partial(_run_grouped, "qk_linear_int8", _call)
_grouped_linear_w8a8 = functools.partial(_run_grouped, "qk_linear_w8a8", _call_w8a8)

_LINEAR = "(Tensor x, Tensor[] tensors, str layout) -> Tensor"
_SHARED = "(Tensor x, Tensor[] tensors, str[] layouts) -> Tensor"
_GROUPED = "(Tensor x, Tensor experts, Tensor[] tensors, str layout) -> Tensor"
_EMBEDDING = "(Tensor ids, Tensor[] tensors, str layout) -> Tensor"
_OPS: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("linear", _LINEAR, _linear, _fake_linear),
    ("linear_shared", _SHARED, _linear_shared, _fake_shared),
    ("linear_shared_many", _SHARED, _linear_shared, _fake_shared),
    ("linear_int8", _LINEAR, _linear_int8, _fake_linear),
    ("linear_w8a8", _LINEAR, _linear_w8a8, _fake_linear_w8a8),
    ("linear_w8a8_shared", _SHARED, _linear_w8a8_shared, _fake_shared_w8a8),
    ("grouped_linear", _GROUPED, _grouped_linear, _fake_grouped),
    ("grouped_linear_int8", _GROUPED, _grouped_linear_int8, _fake_grouped),
    ("grouped_linear_w8a8", _GROUPED, _grouped_linear_w8a8, _fake_grouped_w8a8),
    ("embedding", _EMBEDDING, _embedding, _fake_embedding),
    ("decoder_layer", LAYER_SCHEMA, run_layer, fake_layer),
    ("decoder_layers", LAYERS_SCHEMA, run_layers, fake_layers),
)
# their inputs are shared, not copied
_LAYERS = ("decoder_layer", "decoder_layers", "held_layers")
_TAGS = dict.fromkeys(_LAYERS, (torch.Tag.flexible_layout,))
_NATIVE = (
    *("linear", "linear_shared", "linear_w8a8", "linear_w8a8_shared"),
    *("decoder_layer", "decoder_layers", "embedding", "hold", "held_layers"),
)
_lib = torch.library.Library("quant_cpu", "DEF")
_held = (("hold", HOLD_SCHEMA), ("held_layers", HELD_SCHEMA))
for _name, _schema in (*(o[:2] for o in _OPS), *_held):
    _lib.define(_name + _schema, tags=_TAGS.get(_name, ()))


def _layer(text: str, kind: int) -> Layer | Block:
    """A layout as C wants it."""
    if kind == BLOCK:
        return _block(text)
    call = _call_w8a8(text) if kind == INT8 else _call(text)
    slots = [-1 if i is None else i for i in call.slots]
    made = Layer(op=call.address, buffers=call.buffers, n=call.n, k=call.k_in)
    made.type = DTYPES[call.dtype]
    made.slots[:] = slots
    return made


def _block(text: str) -> Block:
    """The same of a decoder layer."""
    layout = BlockLayout.of(text)
    kind = DTYPES[getattr(torch, layout.dtype)]
    sizes = (layout.heads, layout.kv_heads, layout.dim, layout.rotated, len(layout.forms))
    how = (layout.act, layout.qkv, layout.sides, layout.up_first)
    head = Layer(n=table_numbers(layout.calls), k=layout.k)
    return Block(head, layout.mark, kind, *sizes, layout.all_forms, *how)


has_native = not unavailable() and register_native(library(), _NATIVE, _layer, fill_table, held_at)
torch.library.register_fake("quant_cpu::held_layers", fake_held, lib=_lib)
for _name, _, _impl, _fake in _OPS:
    if not (has_native and _name in _NATIVE):
        _lib.impl(_name, _impl, "CPU")
    torch.library.register_fake(f"quant_cpu::{_name}", _fake, lib=_lib)


def _check_x(x: Tensor, k: int) -> None:
    if x.dim() < 1 or x.shape[-1] != k or x.dtype not in DTYPES:
        raise LayoutError(
            f"input has shape {tuple(x.shape)} {x.dtype}, expected [..., {k}] of bfloat16, float16 "
            "or float32. Pass the layer's own activations.",
            code="Q-LAYOUT-INPUT",
            expected=k,
            actual=tuple(x.shape),
        )


_ops = torch.ops.quant_cpu
_shared_op = _ops.linear_shared.default
_linear_op, _linear_int8_op = _ops.linear.default, _ops.linear_int8.default
_grouped_op, _grouped_int8_op = _ops.grouped_linear.default, _ops.grouped_linear_int8.default
_linear_w8a8_op, _grouped_w8a8_op = _ops.linear_w8a8.default, _ops.grouped_linear_w8a8.default
_embedding_op = _ops.embedding.default
_shared_w8a8_op = _ops.linear_w8a8_shared.default
merge_calls(_lib, _linear_op, _shared_op)
merge_calls(_lib, _linear_w8a8_op, _shared_w8a8_op)


def run_linear(text: str, k: int, tensors: list[Tensor], x: Tensor) -> Tensor:
    _check_x(x, k)
    if watched(x, tensors[0]):
        return _linear_op(x, tensors, text)
    return _run_linear("qk_linear", _call, x, tensors, text)


def run_shared(
    texts: tuple[str, ...], k: int, tensors: list[list[Tensor]], x: Tensor
) -> list[Tensor]:
    _check_x(x, k)
    flat = [t for mine in tensors for t in mine]
    run = _shared_op if watched(x, flat[0]) else _linear_shared
    return parts(run(x, flat, texts), x, [_call(text).n for text in texts])


def run_shared_w8a8(
    texts: tuple[str, ...], k: int, tensors: list[list[Tensor]], x: Tensor
) -> list[Tensor]:
    _check_x(x, k)
    flat = [t for mine in tensors for t in mine]
    run = _shared_w8a8_op if watched(x, flat[0]) else _linear_w8a8_shared
    return parts(run(x, flat, texts), x, [_call_w8a8(text).n for text in texts])


def run_linear_int8(text: str, k: int, tensors: list[Tensor], x: Tensor) -> Tensor:
    _check_x(x, k)
    return _linear_int8_op(x, tensors, text)


def run_grouped(text: str, k: int, tensors: list[Tensor], x: Tensor, experts: Tensor) -> Tensor:
    _check_x(x, k)
    return _grouped_op(x, experts, tensors, text)


def run_grouped_int8(
    text: str, k: int, tensors: list[Tensor], x: Tensor, experts: Tensor
) -> Tensor:
    _check_x(x, k)
    return _grouped_int8_op(x, experts, tensors, text)


def run_linear_w8a8(text: str, k: int, tensors: list[Tensor], x: Tensor) -> Tensor:
    _check_x(x, k)
    if watched(x, tensors[0]):
        return _linear_w8a8_op(x, tensors, text)
    return _run_linear("qk_linear_w8a8", _call_w8a8, x, tensors, text)


def run_grouped_w8a8(
    text: str, k: int, tensors: list[Tensor], x: Tensor, experts: Tensor
) -> Tensor:
    _check_x(x, k)
    return _grouped_w8a8_op(x, experts, tensors, text)


def run_embedding(text: str, k: int, tensors: list[Tensor], ids: Tensor) -> Tensor:
    if watched(ids, tensors[0]):
        return _embedding_op(ids, tensors, text)
    return _embedding(ids, tensors, text)
