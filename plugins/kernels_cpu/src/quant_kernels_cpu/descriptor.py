"""Layouts as the C structs of csrc/qk.h and csrc/int8.h, which the structs here mirror."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import Any

import torch
from torch import Tensor

from quant_core.numerics import decode, decode_scale, element_table
from quant_core.spec import Element
from quant_kernels_cpu.support import FLOAT8, ORDERS, Factor, Layout
from quant_kernels_cpu.support_int8 import Int8Layout

__all__ = ["BYTES", "CALL", "DTYPES", "Segment", "c_op", "c_op_int8", "tensor_slots"]

_F32, _F16, _BF16, _U8, _I8, _TABLE, _SINGLE, _DIVISOR, _E8M0, _E4M3 = range(1, 11)
DTYPES = {torch.float32: _F32, torch.float16: _F16, torch.bfloat16: _BF16}
BYTES = _U8
"""The type of a mask of booleans."""
_WIDE = {"f32": _F32, "f16": _F16, "bf16": _BF16}
_OWN_TABLE, _CODEBOOK = 1, 2
_BIAS = {"": 0, "float32": _F32, "float16": _F16, "bfloat16": _BF16}


class _Factor(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int64), ("group", ctypes.c_int64), ("table", ctypes.c_void_p)]


class _Float8(ctypes.Structure):
    _fields_ = [
        *(("values", ctypes.c_float * 256), ("unit", ctypes.c_float), ("least", ctypes.c_float)),
        *((name, ctypes.c_int32) for name in ("shift", "mask", "wide", "wide_mask", "wide_base")),
        *((name, ctypes.c_uint8 * 128) for name in ("high", "low")),
    ]


class _Op(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "k_in", "width", "group")),
        *((name, ctypes.c_int64) for name in ("zero_kind", "zero_type", "bias_type", "lut")),
        ("float8", ctypes.c_void_p),
        ("scale", _Factor * 2),
        ("offset", _Factor * 2),
        ("table", ctypes.c_float * 16),
        ("bias", ctypes.c_float),
        ("shift", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("order", "block", "at", "head")),
    ]


class _Int8Op(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "k", "group", "scale_type", "scale_single")),
        *((name, ctypes.c_int64) for name in ("bias_type", "input_type", "has_zero", "stored")),
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
    """For each of the 8 tensors of a call the buffer that holds it; None: not there.

    A table takes the place of zero points, factors made while loading that of the stored ones.
    """
    slots = list(_INT8_SLOTS if int8 else _SLOTS)
    if not int8 and "codebook_0" in names:
        slots[slots.index("zeros")] = "codebook_0"
    if "factors" in names:
        slots[slots.index("scales_0")], slots[slots.index("scales_1")] = "factors", ""
    return tuple(names.index(slot) if slot in names else None for slot in slots)


@functools.cache
def _scale_table(element: str) -> Any:
    """256 float32 values of a byte-wide scale type; kept for the life of the process."""
    values = decode_scale(torch.arange(256, dtype=torch.uint8), element)
    return (ctypes.c_float * 256)(*values.tolist())


@functools.cache
def _float8(element: str) -> _Float8:
    """What C needs of a float in a byte; kept for the life of the process."""
    table = element_table(element)
    values = table.repeat_interleave(256 // table.numel())  # by the code's upper bits
    bits = values[:128].bfloat16().view(torch.int16).tolist()  # exact: at most 3 bits of fraction
    exponent, bias = FLOAT8[element]
    made = _Float8(unit=2.0 ** (15 - bias), shift=5 - exponent)
    # the sign, and the magnitude where the shift has moved it
    made.mask = -(1 << 15) | 0x7F00 >> made.shift
    # the last exponent of float16 says infinity or NaN: one that is of numbers here needs float32
    if exponent == 5 and values[127].isfinite():
        made.wide, made.unit = 1, 1.0
    made.wide_mask, made.wide_base = 0x7F000000 >> made.shift + 3, 127 - bias << 23
    made.least = 2.0**-bias
    made.values[:] = values.tolist()
    made.high[:], made.low[:] = [b >> 8 & 0xFF for b in bits], [b & 0xFF for b in bits]
    return made


def _c_factor(f: Factor) -> _Factor:
    if f.single:
        return _Factor(_DIVISOR if f.inverse else _SINGLE, f.group, None)
    if f.element in _WIDE:
        return _Factor(_WIDE[f.element], f.group, None)
    if f.element.startswith("uint"):
        return _Factor(_U8, f.group, None)
    if f.element == "int8":
        return _Factor(_I8, f.group, None)
    kind = {"e8m0": _E8M0, "fp8_e4m3": _E4M3}.get(f.element, _TABLE)
    return _Factor(kind, f.group, ctypes.addressof(_scale_table(f.element)))


def _code_values(layout: Layout) -> Tensor:
    """Value less bias of the 16 codes of a nibble (zeros where C reads others)."""
    if layout.width == 8 or layout.kind == "lut":
        return torch.zeros(16)
    element = Element(name=layout.element, bits=layout.bits, kind=layout.kind)  # type: ignore[arg-type]
    codes = torch.arange(16, dtype=torch.uint8) % (1 << layout.bits)
    return decode(codes, element) - layout.bias


def _lookup(layout: Layout) -> int:
    """Whether codes of 4 bits are no integers less a bias."""
    if layout.width == 8 or layout.kind == "uint":
        return 0
    return _CODEBOOK if layout.kind == "lut" else _OWN_TABLE


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
        zero_type=_WIDE.get(layout.zero_element, 0),
        bias_type=_BIAS[layout.bias_dtype],
        lut=_lookup(layout),
        bias=layout.bias,
        shift=layout.shift,
        order=ORDERS.index(layout.order),
        block=layout.block,
        at=layout.at,
        head=layout.head,
    )
    if layout.element in FLOAT8:
        op.float8 = ctypes.addressof(_float8(layout.element))
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
        stored=layout.stored,
        peak=layout.peak,
        least=layout.least,
        most=layout.most,
        lowest=layout.lowest,
        highest=layout.highest,
    )
