"""Scales: several factors as one, of another type, on a finer grid."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant_core.convert.fit import Losses, cannot_hold
from quant_core.convert.steps.layer import ANOTHER
from quant_core.dequantize import level_values
from quant_core.numerics import scale_dtype
from quant_core.rewrites import regrain
from quant_core.rewrites.grains import common_grain, repeat_grid
from quant_core.spec import CHANNEL, TENSOR, Grain, Scale
from quant_core.tensors import QuantizedTensor

__all__ = ["divisor_of", "group_columns", "one_scale", "product"]

_TOP = 2688.0  # 6 * 448: what a factor above fp8 scales of fp4 codes is made of
_NEAR = (0, -1, 1, -2, 2)  # float32 neighbours of 1/x, in the order they are tried


def one_scale(qt: QuantizedTensor, elements: tuple[str, ...], losses: Losses) -> QuantizedTensor:
    """One multiplying factor of a type in ``elements``; the first that is exact.

    Products of factors and casts that are not exact are a loss; the first type is taken then.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` without scales, or if a value overflows.
    """
    if not qt.scales:
        raise cannot_hold(losses.where, "has no scales", "one scale a group", ANOTHER)
    if len(qt.scales) == 1 and not qt.spec.scales[0].inverse and _element(qt) in elements:
        return qt
    grain = TENSOR
    for scale in qt.spec.scales:
        grain = common_grain(grain, scale.grain)
    wanted, one = product(qt, grain), _on_grain(qt, grain)
    for element in elements:
        cast = wanted.to(scale_dtype(element))
        if torch.equal(cast.double(), wanted):
            return _with_scale(one, cast, element)
    cast = wanted.to(scale_dtype(elements[0]))
    found = " x ".join(s.element for s in qt.spec.scales)
    if not bool(torch.isfinite(cast).all()):
        raise cannot_hold(losses.where, f"scales of {found} overflow", elements[0], ANOTHER)
    losses.lose(
        f"scales of {found} are not {' or '.join(elements)} exactly",
        f"one scale of {' or '.join(elements)}",
        f"scales rounded to {elements[0]}",
    )
    return _with_scale(one, cast, elements[0])


def _element(qt: QuantizedTensor) -> str:
    return qt.spec.scales[0].element


def product(qt: QuantizedTensor, grain: Grain) -> Tensor:
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


def divisor_of(values: Tensor) -> tuple[Tensor, bool]:
    """y with 1/y = x in float32, and whether each x has one (86 % of all float32 values do).

    Where two do, that one is taken whose producer is likelier to have written it: a divisor is
    made as 2688 * (1 / max|W|), and max|W| of most weights is a bfloat16 number.

    Source: compressed-tensors 0.20.0 ``quantization/utils/helpers.py`` (generate_gparam); torch
    divides a number by a tensor in these two roundings.
    """
    first = (1 / values.double()).float().contiguous()
    bits = first.view(torch.int32)
    near = torch.stack([(bits + d).view(torch.float32) for d in _NEAR])
    fits = 1 / near == values
    largest = _TOP / near.double()
    amax = largest.bfloat16()
    odd = (largest - amax.double()).abs() / largest
    written = amax.float().reciprocal() * _TOP == near
    best = torch.where(fits, torch.where(written, -1.0, odd), torch.inf).argmin(0, keepdim=True)
    found = fits.any(dim=0)
    return torch.where(found, near.gather(0, best)[0], first), bool(found.all())
