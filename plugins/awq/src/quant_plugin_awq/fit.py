"""Which AWQ scheme holds a canonical matrix: 4 bits, one group size, zeros as codes or floats.

    option      values                            default
    version     gemm, gemv, gemv_fast, llm-awq    gemm
    group_size  a divisor of the groups there     the layer's own; one for all layers in the end

``gemv_fast`` and ``llm-awq`` store -z*s as float16, which is exact for few scales only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import fit_linear
from quant_core.convert.fit import Allowed, Fit, Losses, cannot_hold, check_options
from quant_core.errors import LayoutError
from quant_core.scheme import Scheme
from quant_plugin_awq.geometry import TILED, padded_groups
from quant_plugin_awq.scheme import AwqScheme, build_scheme

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["fit", "settle"]

_BITS = 4
_OPTIONS: Mapping[str, Allowed] = {
    "version": ("gemm", "gemv", "gemv_fast", "llm-awq"),
    "group_size": int,
}
_DTYPES = {"f16": "float16", "bf16": "bfloat16"}


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, _OPTIONS, "awq")
    return fit_linear(
        layer, tensors, allow_inexact, lambda ok: _fit(layer, tensors, operands, options, ok)
    )


def _fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    from quant_core.convert import steps

    where, losses = layer.name, Losses(layer.name, allow_inexact)
    lt = steps.weight_only(tensors, operands, losses)
    qt = lt.weight
    steps.plain_codes(qt, where)
    assert layer.inp is not None
    qt = steps.in_order(qt, layer.inp.total, where)
    qt = steps.one_scale(qt, tuple(_DTYPES), losses)
    qt = _unsigned(steps.integer_zero(qt, losses), where)
    layout = options.get("version", "gemm")
    size = int(options.get("group_size", qt.spec.scales[0].grain[1] or qt.shape[1]))
    _check_sizes(qt, layout, size, where)
    qt = _in_groups(qt, size, where)
    if layout in TILED:
        qt = _float_zeros(qt, losses)
    scheme = build_scheme(
        layout=layout,
        shape=(qt.shape[0], qt.shape[1]),
        bits=_BITS,
        group_size=size,
        scale_dtype=_DTYPES[qt.spec.scales[0].element],
        zeros="scaled_zeros" if layout == "llm-awq" else "qzeros",
    )
    return Fit(
        scheme=scheme,
        tensors=replace(lt, operands={"weight": qt}),
        losses=losses.taken(),
    )


def _unsigned(qt: QuantizedTensor, where: str) -> QuantizedTensor:
    """4-bit codes with 4-bit zeros: as they are, else around 8."""
    from quant_core.convert import steps

    out = steps.code_zeros(qt, _BITS)
    if out is None and (sym := steps.recenter(qt, _BITS, 1 << (_BITS - 1))) is not None:
        out = steps.code_zeros(sym, _BITS)
    if out is None:
        raise cannot_hold(
            where,
            f"codes or zero points of {qt.spec.label} need more than {_BITS} bits",
            f"{_BITS}-bit codes and zero points",
            "Choose a target with wider codes, or quantize the original model to 4 bits.",
        )
    return out


def _check_sizes(qt: QuantizedTensor, layout: str, size: int, where: str) -> None:
    n, k = qt.shape
    need = {"gemm": (n % 8, "out_features % 8"), "gemv": (k % 8, "in_features % 8")}
    left, what = need.get(layout, (n % 4 or k % 64, "out_features % 4, in_features % 64"))
    if layout != "gemm" and not padded_groups(k, size):
        left, what = 1, "a group size of 32, 64, or 128 and more"
    if k % size:
        left, what = 1, f"in_features divided by group_size {size}"
    if left:
        found = f"a weight of {n} x {k} in groups of {size}"
        raise cannot_hold(where, found, f"{what} for {layout!r}", "Choose another target format.")


def _in_groups(qt: QuantizedTensor, size: int, where: str) -> QuantizedTensor:
    """Grain (1, size), also where one group is a whole row."""
    from quant_core.convert import steps

    qt = steps.group_columns(qt, size, where)
    level = replace(qt.spec.scales[0], grain=(1, size))
    return replace(qt, spec=replace(qt.spec, scales=(level,)))


def _float_zeros(qt: QuantizedTensor, losses: Losses) -> QuantizedTensor:
    """Zero codes as the float offset -z*s, in the type of the scales."""
    from quant_core.numerics import decode_scale, scale_dtype
    from quant_core.rewrites import code_to_offset
    from quant_core.spec import Zero

    element = qt.spec.scales[0].element
    try:
        return code_to_offset(qt, element)
    except LayoutError:
        losses.lose(
            f"zero points times scales are no {element}",
            f"offsets of {element}",
            f"zero points stored as {element} products with the scale",
        )
    assert qt.zeros is not None
    scale = decode_scale(qt.scales[0], element)
    offset = (-qt.zeros.float() * scale).to(scale_dtype(element))
    zero = Zero(kind="offset", levels=(qt.spec.scales[0],))
    return replace(qt, spec=replace(qt.spec, zero=zero), zeros=None, offset=(offset,))


def settle(
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """See the hook ``settle_options``: one group size for all layers.

    Layers of one group a row keep that together (group_size -1), if all layers have it.
    """
    flat = [s for many in schemes.values() for s in many if isinstance(s, AwqScheme)]
    sizes = {s.group_size for s in flat}
    if len(sizes) < 2 or all(s.group_size == s.shape[1] for s in flat):
        return options
    return {**options, "group_size": math.gcd(*sizes)}
