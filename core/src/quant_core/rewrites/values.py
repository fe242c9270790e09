"""Other descriptions of the same weights: zeros as codes, zeros as an offset, factors as one.

Each says when it is exact and refuses otherwise, with ``Q-LAYOUT-REPRESENT``. "Exact" is meant in
real numbers, decided on the values at hand: products are formed in float64, where a float32 times
a float32 is exact, and must survive the way back.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quant_core.dequantize import level_values
from quant_core.numerics import decode_scale, scale_dtype
from quant_core.rewrites.grains import common_grain, repeat_grid
from quant_core.rewrites.refuse import refuse
from quant_core.spec import TENSOR, Grain, Scale, Zero
from quant_core.tensors import QuantizedTensor

__all__ = ["code_to_offset", "const_to_code", "fold_scales"]

_WIDE = ("f32", "f16", "bf16")


def const_to_code(qt: QuantizedTensor, element: str | None = None) -> QuantizedTensor:
    """A constant zero (or none, which is 0) as a tensor of zero codes. Exact.

    Args:
        element: of the zeros, ``uint<b>``; default the weight's own if it is unsigned, else uint8.

    Raises:
        LayoutError: if ``element`` does not hold the constant, there is no scale whose grid the
            zeros could take, or the zero is of another kind.
    """
    zero = qt.spec.zero
    if element is None:
        element = qt.spec.element.name if qt.spec.element.kind == "uint" else "uint8"
    value = 0 if zero is None else zero.value
    legal = element.startswith("uint") and 0 <= value < 1 << int(element[4:] or 0)
    if (zero is not None and zero.kind != "const") or not qt.scales or not legal:
        raise refuse(
            "REPRESENT",
            f"const_to_code: {qt.spec.label!r} to zeros of {element!r}, expected a constant zero "
            "that fits it and at least one scale. Choose a wider unsigned element.",
            expected="constant zero",
            actual=qt.spec.label,
        )
    zeros = torch.full(qt.scales[0].shape, value, dtype=torch.uint8, device=qt.scales[0].device)
    spec = replace(qt.spec, zero=Zero(kind="code", element=element))
    return replace(qt, spec=spec, zeros=zeros)


def _joint_grain(scales: tuple[Scale, ...]) -> Grain:
    grain = TENSOR
    for s in scales:
        grain = common_grain(grain, s.grain)
    return grain


def _factor_on(qt: QuantizedTensor, index: int, grain: Grain) -> Tensor:
    """One factor in float32 on the grid of ``grain``."""
    scale = qt.spec.scales[index]
    shape = (qt.shape[-2], qt.shape[-1])
    values = level_values(qt.scales[index], scale, qt.codebook)
    return repeat_grid(values, scale.grain, grain, shape)


def _on_grid(qt: QuantizedTensor, grain: Grain) -> tuple[Tensor, bool]:
    """S on the grid of ``grain`` by the oracle's own order, and whether it is exact."""
    total: Tensor | None = None
    exact = True
    for index in reversed(range(len(qt.scales))):
        factor = _factor_on(qt, index, grain)
        before = torch.ones_like(factor) if total is None else total
        if qt.spec.scales[index].add:
            total = before + factor
            exact &= torch.equal(before.double() + factor.double(), total.double())
        elif qt.spec.scales[index].inverse:
            total = before / factor
            exact &= torch.equal(total.double() * factor.double(), before.double())
        else:
            total = before * factor
            exact &= torch.equal(before.double() * factor.double(), total.double())
    assert total is not None
    return total, exact


def code_to_offset(qt: QuantizedTensor, element: str = "f32") -> QuantizedTensor:
    """Zero codes (or a constant) as an offset: ``(c - z) * s`` becomes ``c * s + o``, o = -z * s.

    Exact precisely when o fits ``element`` and every ``c * s`` and ``(c - z) * s`` is a float32:
    then both sides round nowhere. That holds for every f16 or bf16 scale and codes of up to 8
    bits (11 + 8 <= 24), for float32 scales only with enough trailing zero bits. Weights are then
    equal bit for bit, except that a zero weight under a negative scale is +0 and no longer -0.

    Args:
        element: of the offset: "f32", "f16" or "bf16".

    Raises:
        LayoutError: if it is not exact, a scale is inverse, or the zero is of another kind.
    """
    spec = qt.spec
    zero, kind = spec.zero, spec.element.kind
    usable = zero is not None and zero.kind in ("const", "code") and kind in ("uint", "int")
    if not usable or not qt.scales or any(s.inverse for s in spec.scales) or element not in _WIDE:
        raise refuse(
            "REPRESENT",
            f"code_to_offset: {spec.label!r} to an offset of {element!r}, expected integer codes "
            "with a zero, multiplying scales and an offset of f32, f16 or bf16. Keep the zeros.",
            actual=spec.label,
        )
    assert zero is not None
    grain = _joint_grain(spec.scales)
    scale, folded_exactly = _on_grid(qt, grain)
    if zero.kind == "const":
        z = torch.full_like(scale, float(zero.value))
    else:
        assert qt.zeros is not None
        shape = (qt.shape[-2], qt.shape[-1])
        z = repeat_grid(decode_scale(qt.zeros, zero.element), spec.scales[0].grain, grain, shape)
    wide = -z.double() * scale.double()
    offset = wide.to(scale_dtype(element))
    largest = max((1 << spec.element.bits) - 1, int(z.abs().max()))
    span = (1 << largest.bit_length()) - 1  # all ones: the product with the most bits
    products = scale.double() * span
    exact = (
        folded_exactly
        and torch.equal(z, z.round())
        and torch.equal(offset.double(), wide)
        and torch.equal(products.float().double(), products)
    )
    if not exact:
        raise refuse(
            "REPRESENT",
            f"code_to_offset: -z * s of {spec.label!r} is not exact in {element!r}. "
            "Choose a wider offset element, or keep the zeros.",
            expected="exact offset",
            actual=element,
        )
    level = Scale(element=element, grain=grain)
    spec = replace(spec, zero=Zero(kind="offset", levels=(level,)))
    return replace(qt, spec=spec, zeros=None, offset=(offset,))


def fold_scales(qt: QuantizedTensor, *, allow_inexact: bool = False) -> QuantizedTensor:
    """All factors as one float32 factor on their common grid.

    Exact only if every product is a float32. With ``allow_inexact`` the product is rounded in the
    oracle's own order, so that ``dequantize`` still gives the same bits, but the factors are lost
    and other orders of evaluation differ.

    Raises:
        LayoutError: if a product is not exact in float32 and ``allow_inexact`` is not set.
    """
    if len(qt.scales) < 2:
        return qt
    grain = _joint_grain(qt.spec.scales)
    folded, exact = _on_grid(qt, grain)
    if not exact and not allow_inexact:
        raise refuse(
            "REPRESENT",
            f"fold_scales: the factors of {qt.spec.label!r} have products that no float32 holds. "
            "Keep the factors, or pass allow_inexact=True to round them.",
            expected="exact products",
            actual=qt.spec.label,
        )
    zeros = qt.zeros
    if zeros is not None:
        shape = (qt.shape[-2], qt.shape[-1])
        zeros = repeat_grid(zeros, qt.spec.scales[0].grain, grain, shape)
    spec = replace(qt.spec, scales=(Scale(element="f32", grain=grain),))
    return replace(qt, spec=spec, scales=(folded,), zeros=zeros)
