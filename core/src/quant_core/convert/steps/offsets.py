"""Offsets: ``c*s + o`` as integer zero points, exactly or on a grid that errs least."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant_core.convert.fit import Losses, cannot_hold
from quant_core.convert.steps.codes import map_codes, spread
from quant_core.convert.steps.layer import ANOTHER
from quant_core.convert.steps.scales import product
from quant_core.numerics import decode_scale
from quant_core.rewrites import regrain
from quant_core.rewrites.grains import common_grain, repeat_grid
from quant_core.spec import CANONICAL, Element, QuantSpec, Scale, Zero
from quant_core.tensors import QuantizedTensor

__all__ = ["has_float_zeros", "integer_zero", "zeros_as_offset"]

_WIDE = ("f16", "bf16", "f32")


def integer_zero(qt: QuantizedTensor, losses: Losses, *, wide: bool = False) -> QuantizedTensor:
    """``c*s + o`` as ``(c - z)*s`` with z = -o/s in the range of the codes; float zeros likewise.

    Where some z is no such integer, that is a loss: zero points are rounded, or, for a target with
    8-bit codes (``wide``), the weights move to a finer grid, which costs a thirtieth of that.
    ``qt`` has one scale (``one_scale``); other zeros are kept.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` for codes that are not unsigned.
    """
    if has_float_zeros(qt):
        qt = zeros_as_offset(qt)
    if qt.spec.zero is None or qt.spec.zero.kind != "offset":
        return qt
    if qt.spec.element.kind != "uint":
        found = f"{qt.spec.element.name} codes with a float zero"
        raise cannot_hold(losses.where, found, "unsigned codes", ANOTHER)
    qt, offset = _offset_on_scale_grid(qt)
    scale = decode_scale(qt.scales[0], qt.spec.scales[0].element).double()
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


def has_float_zeros(qt: QuantizedTensor) -> bool:
    """Whether zero points are stored as floats and subtracted from the codes."""
    zero = qt.spec.zero
    return zero is not None and zero.kind == "code" and zero.element in _WIDE


def zeros_as_offset(qt: QuantizedTensor) -> QuantizedTensor:
    """Float zeros as the offset -z*s in float32: equal up to its rounding. ``qt`` has one scale."""
    grain = (1, qt.spec.scales[0].grain[1])
    qt = regrain(qt, 0, grain)
    assert qt.zeros is not None
    scale = decode_scale(qt.scales[0], qt.spec.scales[0].element).double()
    offset = (-qt.zeros.double() * scale).float()
    zero = Zero(kind="offset", levels=(Scale(element="f32", grain=grain),))
    return replace(qt, spec=replace(qt.spec, zero=zero), zeros=None, offset=(offset,))


def _offset_on_scale_grid(qt: QuantizedTensor) -> tuple[QuantizedTensor, Tensor]:
    """Scale and offset on their common grid, rows apart; the offset in float64."""
    zero, shape = qt.spec.zero, (qt.shape[0], qt.shape[1])
    assert zero is not None
    grain = (1, qt.spec.scales[0].grain[1])
    for s in zero.levels:
        grain = common_grain(grain, s.grain)
    as_scales = replace(qt, spec=QuantSpec(element=qt.spec.element, scales=zero.levels))
    offset = product(replace(as_scales, scales=qt.offset, zeros=None), grain)
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
        values = codes * spread(by[at], rows) + spread(plus[at], rows)
        return values.round().clamp(-128, 127) + 128

    codes = map_codes(grid8, 8, move)
    assert codes is not None  # clamped to the range above
    spec = replace(spec, element=Element.uint(8), zero=Zero(kind="const", value=128))
    return replace(grid8, spec=spec, codes=codes, packing=CANONICAL, zeros=None)
