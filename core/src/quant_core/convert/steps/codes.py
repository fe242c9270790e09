"""Codes: around another zero, with zeros as codes, in other widths; a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.convert.fit import cannot_hold
from quant_core.dequantize import unpack_codes
from quant_core.numerics import decode, decode_scale
from quant_core.packing import pack
from quant_core.rewrites import const_to_code
from quant_core.rewrites.cut import slice_rows_of
from quant_core.spec import CANONICAL, Element, Zero
from quant_core.tensors import QuantizedTensor

__all__ = ["code_zeros", "map_codes", "narrowest", "recenter", "row_blocks", "spread"]

_BLOCK_CODES = 2 << 20  # codes held one to a byte (and as float32) at a time


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges whose codes fit the working memory, one byte each."""
    step = max(1, _BLOCK_CODES // max(columns, 1))
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def map_codes(
    qt: QuantizedTensor, bits: int, change: Callable[[slice, QuantizedTensor, Tensor], Tensor]
) -> Tensor | None:
    """Canonical codes of ``change(at, rows, values)``; None if one is outside [0, 2**bits).

    ``change`` gets a block of rows, which rows these are, and their codes as float32.
    """
    parts = []
    for start, stop in row_blocks(*qt.shape):
        rows = slice_rows_of(qt, start, stop)
        values = change(slice(start, stop), rows, decode(unpack_codes(rows), qt.spec.element))
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= 1 << bits):
            return None
        parts.append(pack(values.to(torch.uint8), bits, CANONICAL))
    return torch.cat(parts)


def _zeros(qt: QuantizedTensor) -> Tensor | float:
    """Zero points as float32 on the grid of the scale, or the constant."""
    zero = qt.spec.zero
    if zero is None:
        return 0.0
    if zero.kind == "const":
        return float(zero.value)
    if qt.zeros is None or not zero.element.startswith(("uint", "int")):
        raise cannot_hold(
            "zero points",
            f"are {zero.element} {zero.kind}s",
            "integers",
            "Use integer_zero first.",
        )
    return decode_scale(qt.zeros, zero.element)


def spread(grid: Tensor, qt: QuantizedTensor) -> Tensor:
    """A grid on that of the one scale, for every column: [N or 1, K]."""
    rows, cols = qt.spec.scales[0].grain
    n, k = qt.shape
    if rows > 1:
        grid = grid.repeat_interleave(rows, 0)[:n]
    return grid if cols == 0 else grid.repeat_interleave(cols, 1)[:, :k]


def recenter(qt: QuantizedTensor, bits: int, center: int) -> QuantizedTensor | None:
    """The same weights as unsigned codes of ``bits`` bits with the constant zero ``center``.

    Zero codes are subtracted into the codes: 4-bit codes and zeros need 5 bits. Exact.

    Returns:
        None if some code does not fit.
    """
    zero = qt.spec.zero
    same = qt.spec.element == Element.uint(bits)
    if same and zero is not None and (zero.kind, zero.value) == ("const", center):
        return qt

    def shift(_: slice, rows: QuantizedTensor, values: Tensor) -> Tensor:
        z = _zeros(rows)
        return values - (spread(z, rows) if isinstance(z, Tensor) else z) + center

    codes = map_codes(qt, bits, shift)
    if codes is None:
        return None
    spec = replace(qt.spec, element=Element.uint(bits), zero=Zero(kind="const", value=center))
    return replace(qt, spec=spec, codes=codes, packing=CANONICAL, zeros=None)


def code_zeros(qt: QuantizedTensor, bits: int) -> QuantizedTensor | None:
    """The same weights as unsigned codes of ``bits`` bits with zeros of ``bits`` bits. Exact.

    Returns:
        None if codes or zeros do not fit.
    """
    element, zero = Element.uint(bits), qt.spec.zero
    if qt.spec.element == element:
        if zero is not None and zero.kind == "code" and zero.element == element.name:
            return qt
        if zero is None or (zero.kind == "const" and 0 <= zero.value < 1 << bits):
            return const_to_code(qt, element.name)
    up = 1 << (qt.spec.element.bits - 1) if qt.spec.element.kind == "int" else 0
    z = _zeros(qt)
    z = z if isinstance(z, Tensor) else torch.full(qt.scales[0].shape, z)
    z = z + up
    if z.numel() and (int(z.min()) < 0 or int(z.max()) >= 1 << bits):
        return None
    codes = map_codes(qt, bits, lambda _, rows, values: values + up)
    if codes is None:
        return None
    spec = replace(qt.spec, element=element, zero=Zero(kind="code", element=element.name))
    return replace(qt, spec=spec, codes=codes, packing=CANONICAL, zeros=z.to(torch.uint8))


def narrowest(
    qt: QuantizedTensor, widths: tuple[int, ...], where: str
) -> tuple[QuantizedTensor, bool]:
    """Unsigned codes of the first width that holds them, and whether they are symmetric. Exact.

    A constant zero becomes 2**(bits-1), the codes move along; zero codes stay zero codes. The
    answer depends on the spec and the range of the codes, so experts of one stack agree unless
    their codes differ in range.

    Args:
        widths: bits the target has, ascending; those below the present ones are not tried.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``.
    """
    zero = qt.spec.zero
    for bits in (b for b in widths if b >= qt.spec.element.bits):
        if zero is None or zero.kind == "const":
            sym = recenter(qt, bits, 1 << (bits - 1))
            if sym is not None:
                return sym, True
        asym = code_zeros(qt, bits)
        if asym is not None:
            return asym, False
    raise cannot_hold(
        where,
        f"codes or zero points of {qt.spec.label}",
        f"unsigned codes of {', '.join(map(str, widths))} bits",
        "Choose another target format.",
    )
