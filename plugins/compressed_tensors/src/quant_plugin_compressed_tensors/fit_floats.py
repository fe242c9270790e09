"""Which compressed-tensors scheme holds a matrix of small floats, and arguments for activations.

codes    scales                          format
fp8      float, of any grain             float-quantized
fp8      e8m0, groups of 32              mxfp8-quantized
fp6      e8m0, groups of 32              mxfp6-pack-quantized
fp4      e8m0, groups of 32              mxfp4-pack-quantized
fp4      fp8 in 16s under a divisor      nvfp4-pack-quantized
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from quant_core.convert.choose import sizes_of, wide_dtype
from quant_core.errors import ConfigError
from quant_core.spec import CHANNEL, TENSOR, Element, Grain, QuantSpec, Scale
from quant_plugin_compressed_tensors.args import (
    FLOAT_SCALES,
    FLOATS,
    PRESETS,
    QuantArgs,
    parse_args,
)
from quant_plugin_compressed_tensors.floats import FloatScheme
from quant_plugin_compressed_tensors.inputs import input_spec
from quant_plugin_compressed_tensors.scheme import grain_of, scheme_name

if TYPE_CHECKING:
    from quant_core.spec import LayerDesc
    from quant_core.tensors import LayerTensors

__all__ = ["candidates", "input_args"]

_FILE = "config.json"


def _preset(name: str, operand: str = "weights") -> QuantArgs:
    return parse_args(PRESETS[name][operand], _FILE, operand)


_PACKED: Mapping[str, QuantArgs] = {
    "nvfp4-pack-quantized": _preset("NVFP4A16"),
    "mxfp4-pack-quantized": _preset("MXFP4A16"),
    "mxfp6-pack-quantized": parse_args({**PRESETS["MXFP4A16"]["weights"], "num_bits": 6},
                                       _FILE, "weights"),
    "mxfp8-quantized": _preset("MXFP8A16"),
}  # fmt: skip
"""Formats with scales of their own -> arguments of the weights."""


def _args(bits: int, kind: str, grain: Grain, **more: Any) -> QuantArgs:
    """Arguments of one scale a tensor, row (token), group or block."""
    r, c = grain
    strategy = {TENSOR: "tensor", CHANNEL: "channel"}.get(grain, "group" if r == 1 else "block")
    return QuantArgs(
        bits=bits,
        kind=kind,  # type: ignore[arg-type]
        strategy=strategy,
        group_size=c if strategy == "group" else 0,
        block=grain if strategy == "block" else (0, 0),
        **more,
    )


def input_args(spec: QuantSpec | None, where: str, dtype: str) -> QuantArgs | None:
    """Arguments that mean ``spec``, or all but the way it is rounded.

    None without quantized activations, or with some that this format has no arguments for.

    Args:
        dtype: stored dtype of a static scale.
    """
    from quant_core.convert.steps import input_distance

    if spec is None:
        return None
    fine = spec.scales[0]
    kind = "int" if spec.element.kind == "int" else "float"
    plain: dict[str, Any] = {"dynamic": not fine.static, "symmetric": spec.zero is None}
    args = _args(spec.element.bits, kind, fine.grain, **plain)
    if len(spec.scales) == 2:
        args = _preset("NVFP4", "input_activations")
    elif fine.element == "e8m0":
        args = _args(spec.element.bits, kind, fine.grain, **plain, scale_dtype="uint8")
    elif fine.grain == CHANNEL:
        args = QuantArgs(bits=args.bits, kind=args.kind, strategy="token", **plain)
    try:
        means = input_spec(args, dtype, where, _FILE)
    except (ConfigError, KeyError):  # KeyError: a width that no float of this format has
        return None
    return args if input_distance(spec, means) <= 1 else None


def _weights(spec: QuantSpec, group_size: int) -> Iterator[tuple[str, QuantArgs]]:
    """Formats that may hold weights of small floats, with arguments."""
    from quant_core.rewrites.grains import common_grain

    yield from _PACKED.items()
    if spec.element.bits < 8:  # wider codes would hold them, in twice the bytes
        return
    grain = TENSOR
    for scale in spec.scales:
        grain = common_grain(grain, scale.grain)
    rows, cols = grain
    if rows not in (0, 1) and cols == 0:
        grain = CHANNEL  # some rows with one scale: one for each row
    if group_size:
        grain = (1, group_size)
    yield "float-quantized", _args(8, "float", grain if grain[0] or not cols else (1, cols))


def candidates(
    layer: LayerDesc,
    tensors: LayerTensors,
    operands: Mapping[str, QuantSpec],
    options: Mapping[str, Any],
) -> Iterator[FloatScheme]:
    """Schemes that come into question for a weight of small floats."""
    n, k = sizes_of(layer, tensors)
    wide = wide_dtype(tensors.weight.spec)
    input_dtype = wide_dtype(operands.get("input"))
    found = input_args(operands.get("input"), layer.name, input_dtype)
    for fmt, args in _weights(tensors.weight.spec, int(options.get("group_size", 0))):
        if args.group_size and k % args.group_size:
            continue
        dtype = args.scale_dtype or wide
        scales = (Scale(element=FLOAT_SCALES[dtype], grain=grain_of(args)),)
        if args.strategy == "tensor_group":
            scales += (Scale(element="f32", grain=TENSOR, inverse=True),)
        element = Element(name=FLOATS[args.bits], bits=args.bits, kind="float")
        weight = QuantSpec(element=element, scales=scales)
        for inputs in (found, None) if found is not None else (None,):
            spec = None
            if inputs is not None:
                spec = input_spec(inputs, input_dtype, layer.name, _FILE)
            yield FloatScheme(
                name=scheme_name(args, inputs),
                shape=(n, k),
                operands={"weight": weight, **({} if spec is None else {"input": spec})},
                weights=args,
                inputs=inputs,
                format=fmt,
                scale_dtype=dtype,
                input_scale_dtype=input_dtype,
                source=_FILE,
            )
