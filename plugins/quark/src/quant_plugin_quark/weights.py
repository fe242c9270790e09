"""From arguments and header to a scheme: the tensors of each kind of weight.

    kind                     weight                  weight_scale            weight_zero_point
    int8, uint8              int8 [N, K]             [], [N]                 [], [N]
      per_group              int8 [K, N]             [G, N]                  [G, N]
    int4, uint4              int32 [N, K/8]          [], [N]                 [], int32 [N/8]
      per_group              int32 [K, N/8]          [G, N]                  int32 [G, N/8]
    uint2 per_group          uint8 [K, N/4]          [G, N]                  uint8 [G, N/4]
    fp8 + int4               int32 [N, K/8]          [], weight_scale_2 [N]  .._2 int32 [N/8]
    fp8                      float8 [N, K]           [], [N], [N, G], [N/r, K/c]
    fp8, fp6, fp4 with e8m0  float8 [N, K],          uint8 [N, K/32], [N/r, K/c]
                             uint8 [N, 3K/4], [N, K/2]
    fp4 + fp8 (NVFP4)        uint8 [N, K/2]          fp8 [N, K/16], weight_scale_2 []

Zero points of symmetric weights are stored as zeros, or not at all.

Source: amd-quark 0.13 ``torch/utils/pack.py``, ``torch/quantization/constants.py``
(PER_GROUP_INT_TRANSPOSE_DTYPES), ``torch/export/constants.py`` (names).
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

from quant_core.intspec import INTERLEAVE, SCALE_ELEMENTS
from quant_core.spec import (
    CANONICAL,
    TENSOR,
    Axis,
    Element,
    Packing,
    ParamSpec,
    QuantSpec,
    Scale,
    Zero,
)
from quant_plugin_quark.args import LayerArgs, TensorArgs
from quant_plugin_quark.beside import BYTES, KV_MODULES, cache_params, input_fields
from quant_plugin_quark.header import Header
from quant_plugin_quark.inputs import input_spec, is_nvfp4
from quant_plugin_quark.scheme import QuarkScheme
from quant_plugin_quark.transforms import rotation_of

__all__ = ["build"]

_EXPECTED = (
    "int8, int4, uint4 or uint2 weights with a scale per tensor, output channel or group of "
    "inputs, fp8 so or per block, fp8, fp6 or fp4 in groups of 32 with e8m0 scales, fp4 in groups "
    "of 16 under fp8 scales, or int4 per channel under fp8 per tensor"
)
_WORDS = {2: ("uint8", 4), 4: ("int32", 8)}  # bits -> word, codes a word
_E8M0 = ("uint8", "float8_e8m0fnu")
_FP8 = {"fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}


def _is_int4_fp8(weight: tuple[TensorArgs, ...]) -> bool:
    """fp8 per tensor, whose values are int4 per channel."""
    if len(weight) != 2:
        return False
    outer, inner = weight
    return (
        (outer.dtype, outer.qscheme) == ("fp8_e4m3", "per_tensor")
        and (inner.dtype, inner.qscheme, inner.axis) == ("int4", "per_channel", 0)
        and inner.symmetric
        and not (outer.of_scales or inner.of_scales or outer.dynamic or inner.dynamic)
    )


def _is_supported(args: TensorArgs) -> bool:
    """A weight of one quantization."""
    if args.dynamic or args.of_scales:
        return False
    along = {"per_channel": (0, None), "per_group": (-1, 1, None)}
    if args.qscheme in along and args.axis not in along[args.qscheme]:
        return False
    if args.element.kind != "float":
        signed_float = args.float_zero and not args.symmetric and args.element.kind == "int"
        return args.qscheme != "per_block" and not args.e8m0 and not signed_float
    if args.dtype in _FP8:
        return args.symmetric and (not args.e8m0 or args.qscheme in ("per_group", "per_block"))
    return args.e8m0 and (args.qscheme, args.group_size) == ("per_group", 32) and args.symmetric


def build(h: Header) -> QuarkScheme:
    """The scheme of one module.

    Raises:
        ConfigError, LayoutError, CheckpointError: config and header disagree, or the arguments
            are not supported.
    """
    args, weight = h.args, h.args.weight
    if args.bias:
        raise h.unsupported("a quantized bias", "a float bias")
    if args.outputs and h.path.rpartition(".")[2] not in KV_MODULES:
        raise h.unsupported("quantized outputs", "float outputs, but for keys and values")
    if is_nvfp4(weight) or (len(weight) == 1 and weight[0].element.kind == "float"):
        known = is_nvfp4(weight) or _is_supported(weight[0])
        make = _floats
    else:
        known = _is_int4_fp8(weight) or (len(weight) == 1 and _is_supported(weight[0]))
        make = _integers
    if not known:
        raise h.unsupported(args.label, _EXPECTED)
    spec, fields = make(h)
    k = fields["shape"][1]
    extra = input_fields(h)
    rotation = rotation_of(h.leaves, h.path, k, h.config.file)
    operands = {"weight": spec}
    scale_dtype = h.dtype("input_scale", SCALE_ELEMENTS, "bfloat16")
    if (inputs := input_spec(args, scale_dtype, h.path, h.config.file)) is not None:
        operands["input"] = inputs
    tensors = (*fields.pop("tensors"), *extra.pop("tensors"), *cache_params(h))
    return QuarkScheme(
        name=_name(args),
        operands=operands,
        transforms=rotation.transforms if rotation else (),
        rotation=rotation,
        tensors=(*tensors, *(rotation.params if rotation else ())),
        args=args,
        source=h.config.file,
        **fields,
        **extra,
    )


# ---------------------------------------------------------------------------------------- integers


def _zero_fields(
    h: Header, args: TensorArgs, name: str, packed: Packing | None, shape: tuple[int, ...]
) -> tuple[Zero | None, dict[str, Any], tuple[ParamSpec, ...]]:
    """Meaning, fields and stored tensor of the zero points of a weight.

    Args:
        shape: (), (N,) or (G, N): one value for each scale.
    """
    centre = Zero(kind="const", value=8) if args.dtype == "int4" else None
    if args.symmetric and not h.expects(name):
        return centre, {}, ()
    out = Axis(tag="out")
    axes = (Axis(tag="group", per=Fraction(args.group_size or 1)), out)[2 - len(shape) :]
    if args.float_zero and not args.symmetric:
        dtype = h.dtype(name, SCALE_ELEMENTS, "float32")
        param = h.tensor(name, shape, dtype, axes, "zeros")
        floats = Zero(kind="code", element=SCALE_ELEMENTS[dtype])
        return floats, {"zero_name": name, "zeros": "float"}, (param,)
    if packed is None or not shape:
        allowed = dict.fromkeys((args.dtype, *BYTES) if packed is None else ("int32",))
        dtype, packed = h.dtype(name, allowed, next(iter(allowed))), None
    else:
        dtype, per = _WORDS[args.element.bits]
        shape = (*shape[:-1], -(-shape[-1] // per))
        axes = (*axes[:-1], replace(out, per=Fraction(per)))
    param = h.tensor(name, shape, dtype, axes, "zeros")
    element = "uint4" if args.dtype == "int4" else args.element.name
    zero = centre if args.symmetric else Zero(kind="code", element=element)
    kind = "null" if args.symmetric else "code"
    return zero, {"zero_name": name, "zeros": kind, "zero_packing": packed}, (param,)


def _integers(h: Header) -> tuple[QuantSpec, dict[str, Any]]:
    """Spec and fields of integer codes, those under fp8 among them."""
    args, two = h.args.weight[-1], len(h.args.weight) == 2
    bits, grouped = args.element.bits, args.qscheme == "per_group"
    suffix = "_2" if two else ""
    word, per = _WORDS.get(bits, (args.dtype, 1))
    order = (3, 2, 1, 0) if bits == 2 else INTERLEAVE if bits == 4 and h.config.reorder else None
    packing, zero_packing = Packing(k_major=grouped), None
    if bits < 8:
        axis: Literal["in", "out"] = "out" if grouped else "in"
        packing = Packing(word=word, axis=axis, order=order, k_major=grouped)  # type: ignore[arg-type]
        zero_packing = Packing(word=word, order=order)  # type: ignore[arg-type]
    n, k = h.sizes(_stored_sizes(h, grouped, per))
    groups = h.check_groups(k, args.group_size, 0) if grouped else 1
    dtype = h.dtype(f"weight_scale{suffix}", SCALE_ELEMENTS, "float32")
    out, inp = Axis(tag="out"), Axis(tag="in")
    if grouped:
        shape: tuple[int, ...] = (groups, n)
        axes: tuple[Axis, ...] = (Axis(tag="group", per=Fraction(args.group_size)), out)
        scale = h.tensor("weight_scale", shape, dtype, axes, "scales")
        codes = h.tensor(
            "weight", (k, -(-n // per)), word, (inp, replace(out, per=Fraction(per))), "codes"
        )
    else:
        shape, axes = ((), ()) if args.grain == TENSOR else ((n,), (out,))
        scale = h.tensor(f"weight_scale{suffix}", shape, dtype, axes, "scales")
        codes = h.tensor(
            "weight", (n, -(-k // per)), word, (out, replace(inp, per=Fraction(per))), "codes"
        )
    name = f"weight_zero_point{suffix}"
    zero, fields, zeros = _zero_fields(h, args, name, zero_packing, shape)
    levels = [Scale(element=SCALE_ELEMENTS[dtype], grain=args.grain)]
    tensors = [codes, scale, *zeros]
    if two:
        outer = h.dtype("weight_scale", SCALE_ELEMENTS, "float32")
        levels.append(Scale(element=SCALE_ELEMENTS[outer], grain=TENSOR))
        tensors.insert(1, h.tensor("weight_scale", (), outer, (), "scales"))
    element = Element.uint(4) if args.dtype == "int4" else args.element
    return QuantSpec(element=element, scales=tuple(levels), zero=zero), {
        "shape": (n, k),
        "tensors": tuple(tensors),
        "packing": packing,
        "signed": args.dtype == "int4",
        "transposed": grouped,
        "scale_names": ("weight_scale_2", "weight_scale") if two else ("weight_scale",),
        **fields,
    }


def _stored_sizes(h: Header, grouped: bool, per: int) -> tuple[int, int] | None:
    """(N, K) from stored shapes; scales tell N exactly where it is packed."""
    weight, scale = h.leaves.get("weight"), h.leaves.get("weight_scale")
    if weight is None or len(weight.shape) != 2:
        return None
    if not grouped:
        return (weight.shape[0], weight.shape[1] * per)
    exact = scale is not None and len(scale.shape) == 2
    return (scale.shape[1] if scale and exact else weight.shape[1] * per, weight.shape[0])


# ------------------------------------------------------------------------------------------ floats


def _scale_dtype(h: Header, args: TensorArgs) -> tuple[str, str]:
    """Stored dtype of ``weight_scale`` and its element."""
    if args.e8m0:
        return h.dtype("weight_scale", dict.fromkeys(_E8M0), "uint8"), "e8m0"
    if len(h.args.weight) == 2:
        return "float8_e4m3fn", "fp8_e4m3"
    dtype = h.dtype("weight_scale", SCALE_ELEMENTS, "float32")
    return dtype, SCALE_ELEMENTS[dtype]


def _floats(h: Header) -> tuple[QuantSpec, dict[str, Any]]:
    """Spec and fields of small-float codes."""
    args, info = h.args.weight[0], h.leaves.get("weight")
    bits, (r, c) = args.element.bits, args.grain
    shape = info.shape if info is not None and len(info.shape) == 2 else None
    n, k = h.sizes(None if shape is None else (shape[0], shape[1] * 8 // bits))
    if args.qscheme == "per_group":
        h.check_groups(k, args.group_size, 1)
    codes = h.tensor(
        "weight",
        (n, -(-k * bits // 8)),
        _FP8.get(args.dtype, "uint8"),
        (Axis(tag="out"), Axis(tag="in", per=Fraction(8, bits))),
        "codes",
    )
    out, columns = Axis(tag="out", per=Fraction(r or 1)), Axis(tag="group", per=Fraction(c or 1))
    dtype, element = _scale_dtype(h, args)
    if args.qscheme == "per_tensor":
        scale = h.tensor("weight_scale", (), dtype, (), "scales")
    elif args.qscheme == "per_channel":
        scale = h.tensor("weight_scale", (n,), dtype, (out,), "scales")
    else:
        grid = (-(-n // r), -(-k // c))
        scale = h.tensor("weight_scale", grid, dtype, (out, columns), "scales")
    levels, tensors = [Scale(element=element, grain=args.grain)], [codes, scale]
    if len(h.args.weight) == 2:
        levels.append(Scale(element="f32", grain=TENSOR))
        tensors.append(h.tensor("weight_scale_2", (), "float32", (), "scales"))
    return QuantSpec(element=args.element, scales=tuple(levels)), {
        "shape": (n, k),
        "tensors": tuple(tensors),
        "packing": CANONICAL,
        "scale_names": ("weight_scale", "weight_scale_2")[: len(levels)],
    }


def _word(args: tuple[TensorArgs, ...]) -> str:
    """``8``, ``fp8``, ``mxfp4``, ``nvfp4``."""
    if not args:
        return "16"
    if is_nvfp4(args):
        return "nvfp4"
    bits = args[-1].element.bits
    if args[-1].element.kind != "float":
        return str(bits)
    return f"mxfp{bits}" if args[-1].e8m0 and args[-1].group_size == 32 else f"fp{bits}"


def _name(args: LayerArgs) -> str:
    """``w4a16``, ``w8a8``, ``w4afp8``, ``wmxfp4amxfp4``, ``wnvfp4anvfp4``."""
    return f"w{_word(args.weight)}a{_word(args.inputs)}"
