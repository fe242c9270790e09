"""Which stored orders of codes go into blocks in one pass, and the C struct that names them.

csrc/load.c has the orders drawn. Every other packing is repacked by core first.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace

from quant_core.intspec import halves
from quant_core.spec import Field, Packing
from quant_kernels_cpu.library import library
from quant_kernels_cpu.support import Layout
from quant_kernels_cpu.support_int8 import Int8Layout

__all__ = ["Grid", "Source", "source_for", "source_of"]

_BY_ROW, _BY_WORD, _ACROSS, _FIELDS, _STREAMS, _WORD_STREAMS, _PAIRS, _SWAPPED = range(8)
_PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}
_RUNS = (16, 32, 64)
_FIRST = {(4, 8), (4, 16), (4, 32), (4, 64), (2, 32), (8, 1)}
_SECOND = {(4, 1, 1), (4, 1, 32), (4, 2, 32), (2, 1, 32)}
"""Fields that csrc/load_fields.h takes apart: (width, stride), of a second one behind the width of
the first."""
_CHUNK = 256  # codes: whole blocks of them, as in csrc/load.c


class _Field(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("at", "bytes", "width", "stride")]


class Source(ctypes.Structure):
    """``qk_source`` of csrc/load.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("order", "k", "width", "bias", "isa")),
        ("slot", ctypes.c_int64 * 8),
        *((name, ctypes.c_int64) for name in ("block", "fields")),
        ("field", _Field * 2),
        *((name, ctypes.c_int64) for name in ("bits", "planes")),
    ]


class Grid(ctypes.Structure):
    """``qk_grid`` of csrc/load.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("groups", "size", "row", "column")]


def _of_fields(source: Source, fields: tuple[Field, ...], block: int) -> Source | None:
    """``source`` with codes in fields of blocks; None where C does not know them."""
    low, count = fields[0], fields[0].count
    whole = _CHUNK % count == 0 and source.k % count == 0 and count % 32 == 0
    known = (low.width, low.stride) in _FIRST and len(fields) <= 2
    known = known and all((low.width, f.width, f.stride) in _SECOND for f in fields[1:])
    known = known and (low.stride == 16 or all(f.stride > 1 for f in fields[1:]))
    pieces = all(f.nbytes % (32 if f.width == 8 else max(f.stride, 4)) == 0 for f in fields)
    if not (whole and known and pieces):
        return None
    source.order, source.block, source.fields = _FIELDS, block, len(fields)
    for i, f in enumerate(fields):
        source.field[i] = _Field(f.at, f.nbytes, f.width, f.stride)
    return source


def _in_pairs(packing: Packing) -> bool:
    """Whether a byte holds codes of two rows."""
    return replace(packing, straddle=True) == Packing(axis="out")


def _of_streams(source: Source, packing: Packing, bits: int) -> Source | None:
    """``source`` with codes of another width than in the blocks, and what csrc/load_streams.c has
    beside; None where C does not know them."""
    source.bits, source.planes = bits, bool(packing.planes)
    if _in_pairs(packing):
        known = bits == 4 and source.k % 32 == 0
        source.order = _PAIRS
    elif packing.order == (1, 0):
        plain = replace(packing, order=None, straddle=True) == Packing()
        known = plain and bits == source.width == 4 and source.k % 64 == 0
        source.order = _SWAPPED
    else:
        wide = packing.word == "int32"
        dense = packing.straddle or {"uint8": 8, "int16": 16, "int32": 32}[packing.word] % bits == 0
        known = bits in (2, 3, 5, 6, 7) and packing.axis == "in" and packing.order is None
        known = known and dense and source.k % 32 == 0 and (wide or not packing.k_major)
        known = known and packing.planes in ((), _PLANES.get(bits))
        source.order = _WORD_STREAMS if packing.k_major else _STREAMS
    return source if known else None


def source_of(
    packing: Packing, *, bits: int, width: int, k: int, bias: int, up: int = 0
) -> Source | None:
    """How C reads codes in ``packing``; None if it does not.

    Args:
        bits, width: of a stored code and of one in the blocks; other than equal is core's business.
        bias: what 8-bit codes are kept less.
        up: zero bits below a code in its byte.
    """
    word = {"uint8": 8, "int16": 16, "int32": 32}[packing.word]
    whole = packing.straddle or word % bits == 0
    source = Source(k=k, width=width, bias=bias, isa=library().isa)
    source.slot[:] = range(8)
    if up:
        return None
    if packing.fields:
        return _of_fields(source, packing.fields, packing.block)
    if bits != width or packing.planes or packing.order == (1, 0) or _in_pairs(packing):
        return _of_streams(source, packing, bits)
    if not whole:
        return None
    if packing.axis == "out":
        order = packing.order or tuple(range(8))
        if not packing.k_major or word != 32 or width != 4 or len(order) != 8:
            return None
        source.order = _ACROSS
        source.slot[:] = order
    elif packing.k_major:
        if packing.order is not None or word != 32:
            return None
        source.order = _BY_WORD
    elif packing.order is None:
        source.order = _BY_ROW
    else:
        run = len(packing.order)
        known = width == 4 and run in _RUNS and packing.order == halves(run)
        if not known or word != 8 or k % run:
            return None
        pieces = 64 // run if k % 64 == 0 else 1  # of what is read at once
        field = Field(0, run // 2 * pieces, 4, run // 2)
        return _of_fields(source, (field,), field.nbytes)
    return source


def source_for(packing: Packing, layout: Layout | Int8Layout) -> Source | None:
    """``source_of`` for the codes of ``layout``."""
    return source_of(
        packing, bits=layout.bits, width=layout.width, k=layout.k, bias=layout.bias, up=layout.up
    )
