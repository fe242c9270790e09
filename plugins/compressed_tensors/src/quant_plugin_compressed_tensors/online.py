"""What this format makes of float weights while they are loaded, by rounding to the nearest.

    name        preset         activations=         stored as
    int8        W8A8           False: int8 per row  int-quantized | pack-quantized
    int4        W4A16          default              pack-quantized, groups of ``group_size``
                W4A8, W4AFP8   "int8", "fp8"        int-quantized; pack-quantized
    fp8         FP8_DYNAMIC    False: fp8 per row   float-quantized
    fp8_block   FP8_BLOCK      False: fp8 blocks    float-quantized
    nvfp4       NVFP4A16       -                    nvfp4-pack-quantized
    mxfp4       MXFP4A16       True: MXFP4          mxfp4-pack-quantized
    mxfp8       MXFP8          False: MXFP8A16      mxfp8-quantized

The last two and the integers claim their bare names. W4A8 is stored as this format's own tool does,
a byte per weight; W4AFP8 in words, which is what vLLM 0.32 reads of it (``weight_packed``). A scale
of integers is max|W| over half the range of the codes (7.5, 127.5), of the dtype of the weights, as
this format's own tool makes it.
Imports no torch.

Source: compressed-tensors 0.19.0 ``quantization/utils/helpers.py`` (calculate_qparams),
``quantization/quant_scheme.py`` (presets).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from quant_core.errors import ConfigError, LayoutError
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.online import OnlineScheme
from quant_core.spec import TENSOR, Element, LayerDesc, QuantSpec, Scale, Unquantized, Zero
from quant_core.tensors import LayerTensors
from quant_plugin_compressed_tensors.args import FLOAT_SCALES, FLOATS, PRESETS, parse_args
from quant_plugin_compressed_tensors.args import QuantArgs as Args
from quant_plugin_compressed_tensors.floats import FloatScheme
from quant_plugin_compressed_tensors.inputs import input_spec
from quant_plugin_compressed_tensors.packed import PackedScheme
from quant_plugin_compressed_tensors.plain import PlainScheme
from quant_plugin_compressed_tensors.scheme import CtScheme, grain_of, scheme_name

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ONLINE", "quantize"]

_WHERE = "online_options"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """Attributes:
    preset: weights and activations.
    format: as stored with quantized activations, and without.
    named: activations by name -> (preset, format); such a recipe has none unless asked.
    """

    preset: str
    format: str
    weights_only: str = ""
    named: Mapping[str, tuple[str, str]] = field(default_factory=dict)


_RECIPES: Mapping[str, _Recipe] = {
    "int8": _Recipe(preset="W8A8", format="int-quantized", weights_only="pack-quantized"),
    "int4": _Recipe(
        preset="W4A16",
        format="pack-quantized",
        named={"int8": ("W4A8", "int-quantized"), "fp8": ("W4AFP8", "pack-quantized")},
    ),
    "fp8": _Recipe(preset="FP8_DYNAMIC", format="float-quantized"),
    "fp8_block": _Recipe(preset="FP8_BLOCK", format="float-quantized"),
    "nvfp4": _Recipe(preset="NVFP4A16", format="nvfp4-pack-quantized"),
    "mxfp4": _Recipe(preset="MXFP4", format="mxfp4-pack-quantized"),
    "mxfp8": _Recipe(preset="MXFP8", format="mxfp8-quantized"),
}


def _bad(key: str, found: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"{_WHERE}: {key} is {found!r}, expected {expected}. Correct it.",
        code="Q-CFG-VALUE",
        tensor=key,
        expected=expected,
        actual=found,
        plugin="compressed_tensors",
    )


def _arguments(recipe: _Recipe, options: Mapping[str, Any]) -> tuple[Args, Args | None, str]:
    """Weights, activations and storage format of a recipe under the user's options."""
    wanted = options.get("activations", True)
    if recipe.named and isinstance(wanted, str) and wanted in recipe.named:
        name, stored = recipe.named[wanted]
        recipe, wanted = _Recipe(preset=name, format=stored), True
    elif recipe.named and wanted is not False:
        names = " or ".join(f'"{n}"' for n in recipe.named)
        raise _bad("activations", wanted, f"false, {names}")
    preset = PRESETS[recipe.preset]
    keys = dict(preset["weights"])
    if "group_size" in options:
        size = options["group_size"]
        if type(size) is not int or not 0 < size <= 1 << 20:
            raise _bad("group_size", size, "a positive integer")
        keys["group_size"] = size
    if not isinstance(wanted, bool):
        raise _bad("activations", wanted, "true or false")
    given = preset.get("input_activations") if wanted else None
    inputs = None if given is None else parse_args(given, _WHERE, "input_activations")
    stored = recipe.format if inputs is not None else recipe.weights_only or recipe.format
    return parse_args(keys, _WHERE, "weights"), inputs, stored


def _weight_spec(args: Args, scale_dtype: str, *, words: bool) -> QuantSpec:
    """``words``: stored as codes in words rather than as one int8 a weight."""
    scales = (Scale(element=FLOAT_SCALES[scale_dtype], grain=grain_of(args)),)
    if args.strategy == "tensor_group":
        scales += (Scale(element="f32", grain=TENSOR, inverse=True),)
    if args.kind == "float":
        element = Element(name=FLOATS[args.bits], bits=args.bits, kind="float")
        return QuantSpec(element=element, scales=scales)
    if args.bits == 8 and not words:
        return QuantSpec(element=Element.int(8), scales=scales)
    half = Zero(kind="const", value=1 << (args.bits - 1))
    return QuantSpec(element=Element.uint(args.bits), scales=scales, zero=half)


def _make(recipe: _Recipe, layer: LayerDesc, options: Mapping[str, Any]) -> CtScheme | Unquantized:
    args, inputs, stored = _arguments(recipe, options)
    n, k = layer.out_features, layer.in_features
    assert n is not None
    assert k is not None
    if args.group_size and k % args.group_size:
        return Unquantized(rule=f"in_features is no multiple of {args.group_size}")
    wide = layer.dtype if layer.dtype in SCALE_ELEMENTS else "float32"
    dtype = args.scale_dtype or wide
    operands = {"weight": _weight_spec(args, dtype, words=stored == "pack-quantized")}
    if inputs is not None:
        operands["input"] = input_spec(inputs, wide, layer.name, _WHERE)
    kinds = {"pack-quantized": PackedScheme, "int-quantized": PlainScheme}
    return kinds.get(stored, FloatScheme)(
        name=scheme_name(args, inputs),
        shape=(n, k),
        operands=operands,
        weights=args,
        inputs=inputs,
        format=stored,
        scale_dtype=dtype,
        input_scale_dtype=wide,
        source=_WHERE,
    )


def quantize(scheme: CtScheme, layer: LayerDesc, dense: Tensor) -> LayerTensors:
    """Float weight [N, K] to canonical tensors, by rounding to the nearest.

    Raises:
        LayoutError: ``Q-VALUE-WEIGHT`` for NaN or infinity, ``Q-LAYOUT-REPRESENT`` for a scheme
            with zero points, a stored input scale or rotations.
    """
    from quant_core.quantize import quantize_weight

    if scheme.input_scale_name or scheme.rotations or not scheme.weights.symmetric:
        raise LayoutError(
            f"{layer.name}: {scheme.weights.label} weights of scheme {scheme.name!r} need measured "
            "activations, zero points or rotations, expected a symmetric scheme without. "
            "Choose an online scheme.",
            code="Q-LAYOUT-REPRESENT",
            tensor=layer.name,
            actual=scheme.name,
            plugin="compressed_tensors",
        )
    peak = ((1 << scheme.bits) - 1) / 2 if scheme.weights.kind == "int" else 0.0
    weight = quantize_weight(f"{layer.stored}.weight", dense, scheme.weight, peak=peak)
    return LayerTensors(operands={"weight": weight})


def _offer(name: str, summary: str, *, bare: bool = False, **options: Any) -> OnlineScheme:
    make = functools.partial(_make, _RECIPES[name])
    return OnlineScheme(summary=summary, make=make, options=options, bare=bare)


ONLINE: Mapping[str, OnlineScheme] = {
    "int8": _offer("int8", "int8 per row; activations int8 per token", bare=True, activations=True),
    "int4": _offer("int4", "int4 in groups; activations stay floats unless asked", bare=True,
                   group_size=128, activations=False),
    "fp8": _offer("fp8", "fp8 per row; activations fp8 per token", activations=True),
    "fp8_block": _offer("fp8_block", "fp8, a scale per 128 x 128; activations fp8 in 128s",
                        activations=True),
    "nvfp4": _offer("nvfp4", "NVFP4 weights; activations stay floats"),
    "mxfp4": _offer("mxfp4", "MXFP4 weights; activations stay floats", bare=True,
                    activations=False),
    "mxfp8": _offer("mxfp8", "MXFP8 weights and activations", bare=True, activations=True),
}  # fmt: skip
