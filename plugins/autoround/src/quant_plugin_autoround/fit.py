"""Which AutoRound scheme holds a canonical matrix: 2 to 8 bits, each layer its own, in order.

Small floats are in ``fit_floats``.

    option          values                                     default
    packing_format  auto_round:auto_gptq, auto_round,          see below
                    auto_round:auto_awq
    group_size      a divisor of the groups there              the layer's own

All layers are written in one packing. Symmetric ones go into auto_gptq, which stores z - 1; where
a layer is asymmetric, all go into auto_awq if they have 4 bits, else into auto_round, because the
tool itself cannot tell a stored zero of 0 from 1 in the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import fit_linear, nearest_fit
from quant_core.convert.fit import Allowed, Fit, Losses, cannot_hold, check_options
from quant_core.scheme import Scheme
from quant_plugin_autoround.config import Dialect
from quant_plugin_autoround.fit_floats import candidates
from quant_plugin_autoround.scheme import AutoRoundScheme, build_scheme

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc, QuantSpec
    from quant_core.tensors import LayerTensors

__all__ = ["fit", "settle"]

_HOLDS = "integers of 2 to 8 bits, NVFP4, MXFP4, MXFP8 and fp8"
_WIDTHS = (2, 3, 4, 5, 6, 7, 8)
_DIALECTS: Mapping[str, Dialect] = {
    "auto_round:auto_gptq": "minus_one",
    "auto_round": "raw",
    "auto_round:auto_awq": "interleaved",
}
_OPTIONS: Mapping[str, Allowed] = {"packing_format": tuple(_DIALECTS), "group_size": int}
_DTYPES = {"f16": "float16", "bf16": "bfloat16"}


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, _OPTIONS, "autoround")
    if tensors.weight.spec.element.kind == "float" and not tensors.weight.spec.blocks:
        schemes = tuple(candidates(layer, tensors, operands))
        return nearest_fit(layer, tensors, operands, schemes, allow_inexact, holds=_HOLDS)
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
    qt = steps.integer_zero(qt, losses, wide=True)
    qt, sym = steps.narrowest(qt, _WIDTHS, where)
    n, k = qt.shape
    bits = qt.spec.element.bits
    size = min(int(options.get("group_size", qt.spec.scales[0].grain[1] or k)), k)
    qt = steps.group_columns(qt, size, where)
    if (n * bits) % 32 or (k * bits) % 32:
        found = f"a weight of {n} x {k} with {bits} bits"
        fix = "Choose another target format."
        raise cannot_hold(where, found, "rows and columns that fill 32-bit words", fix)
    default: Dialect = "minus_one" if sym else "interleaved" if bits == 4 else "raw"
    scheme = build_scheme(
        shape=(n, k),
        bits=bits,
        group_size=size,
        sym=sym,
        dialect=_DIALECTS.get(options.get("packing_format", ""), default),
        scale_dtype=_DTYPES[qt.spec.scales[0].element],
        source="config.json",
    )
    return Fit(scheme=scheme, tensors=replace(lt, operands={"weight": qt}), losses=losses.taken())


def settle(
    schemes: Mapping[str, Sequence[Scheme]], options: Mapping[str, Any]
) -> Mapping[str, Any]:
    """See the hook ``settle_options``: one packing for all layers."""
    flat = [s for many in schemes.values() for s in many if isinstance(s, AutoRoundScheme)]
    if len({s.dialect for s in flat}) < 2:
        return options
    narrow = all(s.bits == 4 for s in flat)
    return {**options, "packing_format": "auto_round:auto_awq" if narrow else "auto_round"}
