"""Layouts as the C structs of csrc/qk.h and csrc/int8.h, which the structs here mirror."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

import torch
from torch import Tensor

from quant_core.numerics import decode, decode_scale
from quant_core.spec import Element
from quant_kernels_cpu.support import Factor, Layout
from quant_kernels_cpu.support_int8 import Int8Layout

__all__ = ["CALL", "DTYPES", "Segment", "c_op", "c_op_int8", "tensor_slots"]

_F32, _F16, _BF16, _U8, _I8, _TABLE, _SINGLE = range(1, 8)
DTYPES = {torch.float32: _F32, torch.float16: _F16, torch.bfloat16: _BF16}
_WIDE = {"f32": _F32, "f16": _F16, "bf16": _BF16}
_BIAS = {"": 0, "float32": _F32, "float16": _F16, "bfloat16": _BF16}


class _Factor(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int64), ("group", ctypes.c_int64), ("table", ctypes.c_void_p)]


class _Op(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "k_in", "width", "group")),
        *((name, ctypes.c_int64) for name in ("zero_kind", "bias_type", "affine")),
        ("scale", _Factor * 2),
        ("offset", _Factor * 2),
        ("table", ctypes.c_float * 16),
        ("bias", ctypes.c_float),
        ("shift", ctypes.c_float),
    ]


class _Int8Op(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "group", "scale_type", "scale_single")),
        *((name, ctypes.c_int64) for name in ("bias_type", "input_type", "has_zero")),
        *((name, ctypes.c_float) for name in ("peak", "least", "most", "lowest", "highest")),
        ("unused", ctypes.c_float),
    ]


class Segment(ctypes.Structure):
    """Rows [start, start + count) of x belong to ``expert``."""

    _fields_ = [(name, ctypes.c_int64) for name in ("expert", "start", "count")]


_SLOTS = ("codes", "scales_0", "scales_1", "zeros", "offset_0", "offset_1", "gather", "bias")
_INT8_SLOTS = (
    *("codes", "scales_0", "sums", "bias"),
    *("acc_bias", "out_scale", "input_scale", "input_zero"),
)

CALL = struct.Struct("@15q")
"""Arguments of one call of C as 64-bit words: op, 8 tensors, x, its type, y, isa, segments, count.

One packed argument takes a third of the time that ctypes needs for fifteen.
"""


def tensor_slots(names: tuple[str, ...], *, int8: bool = False) -> tuple[int | None, ...]:
    """For each of the 8 tensors of a call the buffer that holds it; None: not there."""
    slots = _INT8_SLOTS if int8 else _SLOTS
    return tuple(names.index(slot) if slot in names else None for slot in slots)


@functools.cache
def _scale_table(element: str) -> Any:
    """256 float32 values of a byte-wide scale type; kept for the life of the process."""
    values = decode_scale(torch.arange(256, dtype=torch.uint8), element)
    return (ctypes.c_float * 256)(*values.tolist())


def _c_factor(f: Factor) -> _Factor:
    if f.single:
        return _Factor(_SINGLE, f.group, None)
    if f.element in _WIDE:
        return _Factor(_WIDE[f.element], f.group, None)
    if f.element.startswith("uint"):
        return _Factor(_U8, f.group, None)
    if f.element == "int8":
        return _Factor(_I8, f.group, None)
    return _Factor(_TABLE, f.group, ctypes.addressof(_scale_table(f.element)))


def _code_values(layout: Layout) -> Tensor:
    """Value less bias of the 16 codes of a nibble (zeros for wider codes)."""
    if layout.width == 8:
        return torch.zeros(16)
    kind = layout.element.rstrip("0123456789")
    if kind not in ("uint", "int"):
        kind = "float"
    element = Element(name=layout.element, bits=layout.bits, kind=kind)  # type: ignore[arg-type]
    codes = torch.arange(16, dtype=torch.uint8) % (1 << layout.bits)
    return decode(codes, element) - layout.bias


@functools.lru_cache(maxsize=4096)
def c_op(layout: Layout) -> _Op:
    """The struct that describes the operation to C."""
    op = _Op(
        n=layout.n,
        k=layout.k,
        k_in=layout.k_in,
        width=layout.width,
        group=layout.scales[0].group,
        zero_kind=layout.zero,
        bias_type=_BIAS[layout.bias_dtype],
        affine=int(layout.element.startswith("uint") or layout.width == 8),
        bias=layout.bias,
        shift=layout.shift,
    )
    op.table[:] = _code_values(layout).tolist()
    for i, f in enumerate(layout.scales):
        op.scale[i] = _c_factor(f)
    for i, f in enumerate(layout.offsets):
        op.offset[i] = _c_factor(f)
    return op


@functools.lru_cache(maxsize=4096)
def c_op_int8(layout: Int8Layout) -> _Int8Op:
    """The struct that describes an operation with int8 activations to C."""
    return _Int8Op(
        n=layout.n,
        k=layout.k,
        group=layout.k if layout.out_scale else layout.group,  # one scale a row serves then
        scale_type=_WIDE[layout.scale],
        scale_single=int(layout.single),
        bias_type=_BIAS[layout.bias_dtype],
        input_type=_WIDE.get(layout.input_scale, 0),
        has_zero=int(layout.input_zero),
        peak=layout.peak,
        least=layout.least,
        most=layout.most,
        lowest=layout.lowest,
        highest=layout.highest,
    )
