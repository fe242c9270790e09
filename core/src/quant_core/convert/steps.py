"""Rewrites that target formats are made of: each exact, or recorded as a loss, or a refusal.

A target's ``fit_scheme`` chains these until the matrix has the spec of one of its schemes:

    weight_only     nothing but a weight and a bias is left
    plain_codes     codes are integers
    in_order        columns lie in the order of the input
    one_scale       one multiplying factor, of a type the target stores
    integer_zero    an offset (c*s + o) becomes zero codes (c - z)*s
    recenter        unsigned codes around a constant zero: int8 -> uint8, narrow -> wide
    code_zeros      unsigned codes with zeros as codes
    narrowest       one of these two, in the fewest bits that the target has
    group_columns   one value per row and ``size`` columns

All of them return new objects and take matrices, not stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quant_core.convert.fit import Losses, cannot_hold
from quant_core.dequantize import level_values, unpack_codes
from quant_core.numerics import decode, decode_scale, scale_dtype
from quant_core.packing import pack
from quant_core.rewrites import const_to_code, drop_gather, from_gather, regrain
from quant_core.rewrites.cut import slice_rows_of
from quant_core.rewrites.grains import common_grain, map_levels, repeat_grid
from quant_core.spec import CANONICAL, CHANNEL, TENSOR, Element, Grain, QuantSpec, Scale, Zero
from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = [
    "code_zeros",
    "group_columns",
    "in_order",
    "integer_zero",
    "narrowest",
    "one_scale",
    "plain_codes",
    "recenter",
    "row_blocks",
    "weight_only",
]

_BLOCK_CODES = 2 << 20  # codes held one to a byte (and as float32) at a time
_ANOTHER = "Choose a target that holds it, or quantize the original model for this one."


# ----------------------------------------------------------------------------- what may be there


def weight_only(
    lt: LayerTensors,
    operands: Mapping[str, QuantSpec],
    losses: Losses,
    *,
    keep_input: bool = False,
) -> LayerTensors:
    """A weight and a bias alone. Quantized activations are a loss; the rest is refused.

    With ``keep_input`` the target holds the quantized activations as they are.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT``.
    """
    kept = [n for n in ("acc_bias", "out_scale") if getattr(lt, n) is not None]
    kept += ["transforms"] if lt.transforms else []
    kept += sorted(set(lt.operands) - {"weight"})
    if kept:
        raise cannot_hold(losses.where, f"has {', '.join(kept)}", "a weight and a bias", _ANOTHER)
    if keep_input:
        return lt
    if "input" in operands or lt.input_scale is not None or lt.input_zero is not None:
        label = operands["input"].label if "input" in operands else "a static scale"
        losses.lose(
            f"quantizes its activations ({label})",
            "float activations",
            "activations are no longer quantized",
        )
        lt = replace(lt, input_scale=None, input_zero=None)
    return lt


def plain_codes(qt: QuantizedTensor, where: str) -> None:
    """Refuse opaque blocks, tables, small floats and vector codes."""
    if qt.spec.blocks or qt.spec.element.kind not in ("uint", "int"):
        raise cannot_hold(where, f"weights are {qt.spec.label}", "integer codes", _ANOTHER)


def in_order(qt: QuantizedTensor, in_features: int, where: str) -> QuantizedTensor:
    """Without a gather, where columns of one group lie together in input order. Exact.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if groups are scattered (activation order).
    """
    qt = drop_gather(qt)
    if qt.gather is None:
        return qt
    size = max((c for _, c in _grains(qt)), default=0)
    plain, group = from_gather(qt, in_features)
    if size == 0:
        return plain
    runs = group.split(size)
    order = torch.stack([run[0] for run in runs])
    if any(bool((run != run[0]).any()) for run in runs) or len(order.unique()) != len(order):
        raise cannot_hold(
            where,
            f"groups of {size} columns are scattered over the input (activation order)",
            "columns in order",
            "Choose a target that stores the group of each column.",
        )
    index = order.long()

    def pick(t: Tensor, s: Scale) -> Tensor:
        return t.index_select(-1, index) if s.grain[1] else t

    return replace(plain, **map_levels(plain, pick))  # type: ignore[arg-type]


def _grains(qt: QuantizedTensor) -> list[Grain]:
    zero = qt.spec.zero
    return [s.grain for s in (*qt.spec.scales, *(zero.levels if zero is not None else ()))]


# --------------------------------------------------------------------------------------- scales


def one_scale(qt: QuantizedTensor, elements: tuple[str, ...], losses: Losses) -> QuantizedTensor:
    """One multiplying factor of a type in ``elements``; the first that is exact.

    Products of factors and casts that are not exact are a loss; the first type is taken then.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` without scales, or if a value overflows.
    """
    if not qt.scales:
        raise cannot_hold(losses.where, "has no scales", "one scale a group", _ANOTHER)
    if len(qt.scales) == 1 and not qt.spec.scales[0].inverse and _element(qt) in elements:
        return qt
    grain = TENSOR
    for scale in qt.spec.scales:
        grain = common_grain(grain, scale.grain)
    wanted, one = _product(qt, grain), _on_grain(qt, grain)
    for element in elements:
        cast = wanted.to(scale_dtype(element))
        if torch.equal(cast.double(), wanted):
            return _with_scale(one, cast, element)
    cast = wanted.to(scale_dtype(elements[0]))
    found = " x ".join(s.element for s in qt.spec.scales)
    if not bool(torch.isfinite(cast).all()):
        raise cannot_hold(losses.where, f"scales of {found} overflow", elements[0], _ANOTHER)
    losses.lose(
        f"scales of {found} are not {' or '.join(elements)} exactly",
        f"one scale of {' or '.join(elements)}",
        f"scales rounded to {elements[0]}",
    )
    return _with_scale(one, cast, elements[0])


def _element(qt: QuantizedTensor) -> str:
    return qt.spec.scales[0].element


def _product(qt: QuantizedTensor, grain: Grain) -> Tensor:
    """All factors multiplied (or divided) in float64 on the grid of ``grain``."""
    shape = (qt.shape[0], qt.shape[1])
    total: Tensor | None = None
    for values, scale in reversed(list(zip(qt.scales, qt.spec.scales, strict=True))):
        decoded = level_values(values, scale, qt.codebook).double()
        factor = repeat_grid(decoded, scale.grain, grain, shape)
        before = torch.ones_like(factor) if total is None else total
        if scale.add:
            total = before + factor
        else:
            total = before / factor if scale.inverse else before * factor
    assert total is not None
    return total


def _on_grain(qt: QuantizedTensor, grain: Grain) -> QuantizedTensor:
    """``qt`` described by one multiplying factor on ``grain``, whose values are still to be set."""
    zeros, shape = qt.zeros, (qt.shape[0], qt.shape[1])
    if zeros is not None:
        zeros = repeat_grid(zeros, qt.spec.scales[0].grain, grain, shape)
    spec = replace(qt.spec, scales=(Scale(element="f32", grain=grain),))
    return replace(qt, spec=spec, scales=(qt.scales[0],), zeros=zeros)


def _with_scale(qt: QuantizedTensor, values: Tensor, element: str) -> QuantizedTensor:
    level = replace(qt.spec.scales[0], element=element)
    return replace(qt, spec=replace(qt.spec, scales=(level,)), scales=(values,))


def group_columns(qt: QuantizedTensor, size: int, where: str) -> QuantizedTensor:
    """The one scale (and its zeros) per row and ``size`` columns. Exact.

    ``size`` at or above K gives one value per row, with the grain ``CHANNEL``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if present groups are no multiple of ``size``.
    """
    k = qt.shape[1]
    rows, cols = qt.spec.scales[0].grain
    whole = cols == 0 or cols >= k
    if size >= k and whole:
        level = replace(qt.spec.scales[0], grain=(rows, 0))
        qt = replace(qt, spec=replace(qt.spec, scales=(level,)))
        return qt if rows == 1 else regrain(qt, 0, CHANNEL)
    if not whole and cols % size:
        raise cannot_hold(
            where,
            f"groups of {cols} columns",
            f"a multiple of {size}",
            "Smaller groups cannot be joined; quantize the original model again.",
        )
    return qt if (rows, cols) == (1, size) else regrain(qt, 0, (1, size))


# ---------------------------------------------------------------------------------------- codes


def row_blocks(rows: int, columns: int) -> list[tuple[int, int]]:
    """Row ranges whose codes fit the working memory, one byte each."""
    step = max(1, _BLOCK_CODES // max(columns, 1))
    return [(i, min(i + step, rows)) for i in range(0, rows, step)]


def _map_codes(
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
    assert qt.zeros is not None
    return decode_scale(qt.zeros, zero.element)


def _spread(grid: Tensor, qt: QuantizedTensor) -> Tensor:
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
        return values - (_spread(z, rows) if isinstance(z, Tensor) else z) + center

    codes = _map_codes(qt, bits, shift)
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
    codes = _map_codes(qt, bits, lambda _, rows, values: values + up)
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


# --------------------------------------------------------------------------------------- offset


def integer_zero(qt: QuantizedTensor, losses: Losses, *, wide: bool = False) -> QuantizedTensor:
    """``c*s + o`` as ``(c - z)*s`` with z = -o/s in the range of the codes.

    Where some z is no such integer, that is a loss: zero points are rounded, or, for a target with
    8-bit codes (``wide``), the weights move to a finer grid, which costs a thirtieth of that.
    ``qt`` has one scale (``one_scale``); other zeros are kept.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for codes that are not unsigned.
    """
    if qt.spec.zero is None or qt.spec.zero.kind != "offset":
        return qt
    if qt.spec.element.kind != "uint":
        found = f"{qt.spec.element.name} codes with an offset"
        raise cannot_hold(losses.where, found, "unsigned codes", _ANOTHER)
    qt, offset = _offset_on_scale_grid(qt)
    scale = decode_scale(qt.scales[0], _element(qt)).double()
    wanted = torch.where(scale == 0, torch.zeros_like(offset), -offset / scale)
    zeros = wanted.round().clamp(0, (1 << qt.spec.element.bits) - 1)
    bad = int((zeros * scale != -offset).sum())
    if bad:
        found = f"{bad} of {offset.numel()} offsets are no multiple of their scale"
        if wide:
            losses.lose(found, "integer zero points", "weights rounded to 8-bit codes")
            return _rounded(qt, scale, offset)
        losses.lose(found, "integer zero points", "zero points rounded to integers")
    spec = replace(qt.spec, zero=Zero(kind="code", element=qt.spec.element.name))
    return replace(qt, spec=spec, zeros=zeros.to(torch.uint8), offset=())


def _offset_on_scale_grid(qt: QuantizedTensor) -> tuple[QuantizedTensor, Tensor]:
    """Scale and offset on their common grid, rows apart; the offset in float64."""
    zero, shape = qt.spec.zero, (qt.shape[0], qt.shape[1])
    assert zero is not None
    grain = (1, qt.spec.scales[0].grain[1])
    for s in zero.levels:
        grain = common_grain(grain, s.grain)
    as_scales = replace(qt, spec=QuantSpec(element=qt.spec.element, scales=zero.levels))
    offset = _product(replace(as_scales, scales=qt.offset, zeros=None), grain)
    values = repeat_grid(qt.scales[0], qt.spec.scales[0].grain, grain, shape)
    level = replace(qt.spec.scales[0], grain=grain)
    return replace(qt, spec=replace(qt.spec, scales=(level,)), scales=(values,)), offset


def _rounded(qt: QuantizedTensor, scale: Tensor, offset: Tensor) -> QuantizedTensor:
    """Weights ``c*s + o`` as 8-bit codes around 128, on the best grid that is found per group.

    A whole multiple of the old grid, ``(c*f + b) * s/f``, errs only by what b rounds away; the best
    f for which codes stay in range is taken (0.3 % off on real Q4_1 weights), or each weight is
    rounded to 1/127 of the largest where that is better. A group of equal weights (scale 0) becomes
    64 steps of o/64, which is exact.
    """
    dtype, top = qt.scales[0].dtype, (1 << qt.spec.element.bits) - 1
    ends = torch.maximum(offset.abs(), (offset + top * scale).abs())
    step = torch.where(scale == 0, offset / 64, ends / 127).to(dtype).double()
    by, plus = scale / step, offset / step
    error = step.abs() / 12**0.5  # of rounding to nearest, root mean square
    for factor in range(1, 255 // top + 1):
        grid = (scale / factor).to(dtype).double()
        base = (offset / grid).round()
        low = (base * grid - offset).abs()
        high = ((base + factor * top) * grid - offset - top * scale).abs()
        better = (base >= -128) & (base + factor * top <= 127) & (torch.maximum(low, high) < error)
        error = torch.where(better, torch.maximum(low, high), error)
        step = torch.where(better, grid, step)
        by = torch.where(better, float(factor), by)
        plus = torch.where(better, base, plus)
    by, plus = (torch.where(step == 0, torch.zeros_like(t), t).float() for t in (by, plus))
    spec = replace(qt.spec, zero=None)
    grid8 = replace(qt, spec=spec, offset=(), scales=(step.to(dtype),))

    def move(at: slice, rows: QuantizedTensor, codes: Tensor) -> Tensor:
        values = codes * _spread(by[at], rows) + _spread(plus[at], rows)
        return values.round().clamp(-128, 127) + 128

    codes = _map_codes(grid8, 8, move)
    assert codes is not None  # clamped to the range above
    spec = replace(spec, element=Element.uint(8), zero=Zero(kind="const", value=128))
    return replace(grid8, spec=spec, codes=codes, packing=CANONICAL, zeros=None)
