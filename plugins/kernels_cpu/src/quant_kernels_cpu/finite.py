"""Core's operation ``finite`` in C: floats are looked at where they lie; csrc/finite.c."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from quant_core.kernels.base import Accepted, Rejected
from quant_core.kernels.between import Weightless
from quant_core.kernels.finite import all_finite
from quant_core.spec import OpSpec
from quant_kernels_cpu.descriptor import DTYPES
from quant_kernels_cpu.library import ISAS, library
from quant_kernels_cpu.offered import no_c_call

__all__ = ["FINITE", "CpuFinite"]


class _Floats(ctypes.Structure):
    """``qk_floats`` of csrc/finite.h."""

    _fields_ = [
        ("values", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("type", "rows", "columns", "span", "row", "column")),
    ]


def _place(value: Tensor) -> tuple[int, ...]:
    """(type, size, rows, columns, bytes between rows, between columns) of a matrix."""
    kind, size = DTYPES[value.dtype], value.element_size()
    if value.is_contiguous() or value.t().is_contiguous():
        return kind, size, 1, value.numel(), value.numel() * size, size
    (rows, columns), (across, along) = value.shape, value.stride()
    if across < along:
        rows, columns, across, along = columns, rows, along, across
    return kind, size, rows, columns, across * size, along * size


def _run(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> bool:
    places: dict[int, tuple[int, ...]] = {}
    for value in values:
        if value.dim() != 2 or value.device.type != "cpu":
            if not all_finite([value]):
                return False
        elif value.numel():
            places[value.data_ptr()] = _place(value)
    found, seen = [], set()
    for at, place in sorted(places.items()):
        if at in seen:
            continue
        kind, size, rows, columns, across, along = place
        beside = along > size and places.get(at + size) == place
        if beside:  # in the same blocks: one pass over them
            seen.add(at + size)
        found.append(_Floats(at, kind, rows, columns, 1 + beside, across, along))
    return not found or bool(library().c.qk_all_finite((_Floats * len(found))(*found), len(found)))


class CpuFinite(Weightless):
    """Floats in one pass over the lines of memory that hold them."""

    name = "cpu_finite"

    def accepts(self, op: OpSpec) -> Accepted | Rejected:
        if odd := no_c_call(op, "finite"):
            return odd
        return Accepted(cost=1.0, note=ISAS[library().isa])

    def bind(self, op: OpSpec) -> Callable[..., Any]:
        return _run


FINITE = CpuFinite()
