"""Which compressed-tensors scheme holds a canonical matrix: integers of 2 to 8 bits, small floats.

    float activations        pack-quantized
    quantized activations    int-quantized, arguments made from their meaning
    small floats             see ``fit_floats``

    option      values                        default
    group_size  a divisor of the groups       the layer's own
    zero_points integer, float                integer

Zero points of ``float`` are what offsets and float zeros become, with a scale per block of one row
and ``group_size`` columns, both float32: the only arguments under which the format packs codes and
leaves zero points as they are. Serving engines read integers only.

Activation order is kept as ``weight_g_idx`` (actorder "group").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import fit_linear, nearest_fit, wide_dtype
from quant_core.convert.fit import Allowed, Fit, Losses, check_options
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.spec import Element, QuantSpec, Scale, Zero
from quant_plugin_compressed_tensors.args import INT_BITS, QuantArgs
from quant_plugin_compressed_tensors.fit_floats import candidates, input_args
from quant_plugin_compressed_tensors.inputs import input_spec
from quant_plugin_compressed_tensors.packed import PackedScheme
from quant_plugin_compressed_tensors.plain import PlainScheme
from quant_plugin_compressed_tensors.scheme import CtScheme, scheme_name

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc
    from quant_core.tensors import LayerTensors, QuantizedTensor

__all__ = ["fit"]

_OPTIONS: Mapping[str, Allowed] = {"group_size": int, "zero_points": ("integer", "float")}
_FLOAT_ZEROS = "With --option zero_points=float they are kept, for what reads such files."
_DTYPES = {element: dtype for dtype, element in SCALE_ELEMENTS.items()}
_SCALES = ("f16", "bf16", "f32")
_HOLDS = "integers of 2 to 8 bits, fp8, NVFP4 and MX floats"


def fit(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
    allow_inexact: bool,
) -> Fit:
    """See the hook ``fit_scheme``."""
    check_options(options, _OPTIONS, "compressed_tensors")
    if tensors.weight.spec.element.kind == "float" and not tensors.weight.spec.blocks:
        schemes = tuple(candidates(layer, tensors, operands, options))
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
    have = operands.get("input")
    input_dtype = wide_dtype(have)
    inputs = input_args(have, where, input_dtype)
    meaning = None if inputs is None else input_spec(inputs, input_dtype, where, "config.json")
    lt = steps.plain_layer(tensors, (), where)
    lt = steps.meet_input(lt, have, meaning, losses)
    qt = lt.weight
    steps.plain_codes(qt, where)
    if inputs is None and _has_offset(qt):
        if options.get("zero_points") == "float":
            scheme, qt = _with_float_zeros(layer, qt, options, losses)
            weight = replace(lt, operands={"weight": qt})
            return Fit(scheme=scheme, tensors=weight, losses=losses.taken())
        losses.instead = _FLOAT_ZEROS
    qt = steps.one_scale(qt, _SCALES, losses)
    qt = steps.integer_zero(qt, losses, wide=True)
    qt, sym = steps.narrowest(qt, INT_BITS, where)
    assert layer.inp is not None
    k = layer.inp.total
    stated = int(options.get("group_size", qt.spec.scales[0].grain[1]))  # 0: whole rows
    if qt.gather is not None and stated in (0, k):
        qt = steps.in_order(qt, k, where)  # one group: the order has no meaning
    qt = steps.group_columns(qt, stated or k, where)
    if stated:  # a group as wide as the row stays a group: one config group for all layers
        level = replace(qt.spec.scales[0], grain=(1, stated))
        qt = replace(qt, spec=replace(qt.spec, scales=(level,)))
    weights = QuantArgs(
        bits=qt.spec.element.bits,
        symmetric=sym,
        strategy="group" if stated else "channel",
        group_size=stated,
        actorder="" if qt.gather is None else "group",
    )
    scheme, qt = _scheme(qt, weights, inputs, input_dtype, (qt.shape[0], k), meaning)
    taken = losses.taken()
    weight = replace(lt, operands={"weight": qt})
    return Fit(scheme=scheme, tensors=weight, losses=taken, hint=losses.instead if taken else "")


def _has_offset(qt: QuantizedTensor) -> bool:
    """Whether zeros are offsets or floats."""
    from quant_core.convert import steps

    zero = qt.spec.zero
    return steps.has_float_zeros(qt) or (zero is not None and zero.kind == "offset")


def _with_float_zeros(
    layer: LayerDesc, qt: QuantizedTensor, options: Mapping[str, Any], losses: Losses
) -> tuple[CtScheme, QuantizedTensor]:
    """A scheme with float zero points, and the weight as it means it."""
    from quant_core.convert import steps

    assert layer.inp is not None
    zero = qt.spec.zero
    levels = () if zero is None else zero.levels
    k, bits = layer.inp.total, max(qt.spec.element.bits, INT_BITS[0])
    grains = (s.grain[1] or k for s in (*qt.spec.scales, *levels))
    size = int(options.get("group_size", math.gcd(*grains)))
    spec = QuantSpec(
        element=Element.uint(bits),
        scales=(Scale(element="f32", grain=(1, size)),),
        zero=Zero(kind="code", element="f32"),
    )
    qt = steps.meet(qt, spec, k, losses)
    assert qt.zeros is not None
    half = 1 << (bits - 1)
    kept = (qt.zeros - half) + half  # those of signed codes have the digits to be stored
    if not bool((kept == qt.zeros).all()):
        found, expected = "zero points have more digits", f"those of float32 less {half}"
        losses.lose(found, expected, "zero points rounded to f32 around the middle code")
    weights = QuantArgs(
        bits=bits, symmetric=False, strategy="block", block=(1, size), zp_dtype="float32"
    )
    scheme = PackedScheme(
        name=scheme_name(weights, None),
        shape=(qt.shape[0], k),
        operands={"weight": spec},
        weights=weights,
        format="pack-quantized",
        scale_dtype="float32",
        zero_dtype="float32",
        source="config.json",
    )
    return scheme, replace(qt, zeros=kept)


def _scheme(
    qt: QuantizedTensor,
    weights: QuantArgs,
    inputs: QuantArgs | None,
    input_dtype: str,
    shape: tuple[int, int],
    meaning: QuantSpec | None,
) -> tuple[CtScheme, QuantizedTensor]:
    """The scheme, and the weight as its storage format means it."""
    plain = inputs is not None
    if plain and weights.bits == 8:
        qt = _signed(qt)
    common: dict[str, Any] = {
        "name": scheme_name(weights, inputs),
        "shape": shape,
        "operands": {"weight": qt.spec, **({} if meaning is None else {"input": meaning})},
        "weights": weights,
        "inputs": inputs,
        "scale_dtype": _DTYPES[qt.spec.scales[0].element],
        "input_scale_dtype": input_dtype,
        "has_g_idx": qt.gather is not None,
        "source": "config.json",
    }
    if plain:
        zeros = "" if weights.symmetric else "int8"
        return PlainScheme(**common, format="int-quantized", zero_dtype=zeros), qt
    zeros = "" if weights.symmetric else "int32"
    return PackedScheme(**common, format="pack-quantized", zero_dtype=zeros), qt


def _signed(qt: QuantizedTensor) -> QuantizedTensor:
    """uint8 codes around 128, or with uint8 zeros, as int8 values: the top bit flips."""
    from quant_core.rewrites import repack
    from quant_core.spec import CANONICAL

    qt = repack(qt, CANONICAL)
    if qt.zeros is None:
        zero, zeros = None, None
    else:
        zero, zeros = Zero(kind="code", element="int8"), qt.zeros ^ 0x80
    spec = replace(qt.spec, element=Element.int(8), zero=zero)
    return replace(qt, spec=spec, codes=qt.codes ^ 0x80, zeros=zeros)
