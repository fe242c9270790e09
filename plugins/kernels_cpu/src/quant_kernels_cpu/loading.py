"""Which stored orders of codes go into blocks in one pass, and the C struct that names them.

csrc/load.c has the orders drawn. Every other packing is repacked by core first.
"""

from __future__ import annotations

import ctypes

from quant_core.intspec import halves
from quant_core.spec import Packing

__all__ = ["Source", "source_of"]

_BY_ROW, _BY_WORD, _ACROSS, _HALVES = range(4)
_RUNS = (16, 32, 64)


class Source(ctypes.Structure):
    """``qk_source`` of csrc/load.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("order", "k", "width", "bias", "run")),
        ("slot", ctypes.c_int64 * 8),
    ]


def source_of(packing: Packing, *, bits: int, width: int, k: int, bias: int) -> Source | None:
    """How C reads codes in ``packing``; None if it does not.

    Args:
        bits, width: of a stored code and of one in the blocks; other than equal is core's business.
        bias: what 8-bit codes are kept less.
    """
    word = {"uint8": 8, "int16": 16, "int32": 32}[packing.word]
    whole = packing.straddle or word % bits == 0
    if bits != width or packing.planes or not whole:
        return None
    source = Source(k=k, width=width, bias=bias)
    source.slot[:] = range(8)
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
        source.order, source.run = _HALVES, run
    return source
