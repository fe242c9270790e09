"""Quantized input activations: what the config says of them, and what is stored for them.

    int8, uint8, fp8     a run-time scale per tensor or token (fp8 also per group), or a stored one:
                         input_scale [], input_zero_point int8 []
    fp4, fp6, fp8 e8m0   groups of 32 under a run-time power of two; nothing is stored
    fp4 + fp8            groups of 16 under run-time fp8 scales, one stored factor:
                         input_scale_2 float32 []

A run-time symmetric int8 scale is max|x| / 127.5. "per_channel" of an activation is per token.

Source: amd-quark 0.13 ``torch/quantization/observer/observer.py`` (calculate_int_quant_params,
get_scale), ``torch/quantization/utils.py`` (even_round).
"""

from __future__ import annotations

from quant_core.errors import ConfigError, printable
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.spec import TENSOR, QuantSpec, Scale, Zero, group
from quant_plugin_quark.args import LayerArgs, TensorArgs

__all__ = ["input_spec", "input_tensor", "is_nvfp4"]

_MX_BLOCK, _NV_BLOCK = 32, 16
_WIDE = ("int8", "uint8", "fp8_e4m3", "fp8_e5m2")


def is_nvfp4(args: tuple[TensorArgs, ...]) -> bool:
    """fp4 in groups of 16, whose scales are fp8 under one factor of the tensor."""
    if len(args) != 2:
        return False
    codes, scales = args
    return (
        codes.dtype == "fp4"
        and (codes.qscheme, codes.group_size, codes.e8m0) == ("per_group", _NV_BLOCK, False)
        and (scales.dtype, scales.qscheme, scales.of_scales) == ("fp8_e4m3", "per_tensor", True)
        and not scales.dynamic
    )


def input_tensor(inputs: tuple[TensorArgs, ...]) -> str:
    """Stored tensor with the static scale of activations; "" if there is none."""
    if len(inputs) == 2:
        return "input_scale_2"
    return "input_scale" if inputs and not inputs[0].dynamic else ""


def _scales(inputs: tuple[TensorArgs, ...], scale_dtype: str) -> tuple[Scale, ...] | None:
    """The factors, finest first; None if the arguments are not supported."""
    args = inputs[0]
    if len(inputs) == 2:
        if not is_nvfp4(inputs) or not args.dynamic:
            return None
        fine = Scale(element="fp8_e4m3", grain=group(_NV_BLOCK), static=False)
        return (fine, Scale(element="f32", grain=TENSOR))
    is_float = args.element.kind == "float"
    if args.e8m0:
        block = (args.qscheme, args.group_size) == ("per_group", _MX_BLOCK)
        if not (is_float and block and args.dynamic):
            return None
        return (Scale(element="e8m0", grain=args.grain, static=False, rule=args.mode),)
    along = {"per_tensor": (None, 0, 1, -1), "per_channel": (0, 1), "per_group": (None, -1, 1, 2)}
    if (
        args.dtype not in _WIDE
        or args.axis not in along.get(args.qscheme, ())
        or (args.qscheme == "per_group" and not is_float)
        or not (args.dynamic or args.qscheme == "per_tensor")
        or (is_float and not args.symmetric)
        or (args.float_zero and not args.symmetric)
        or (args.dtype == "uint8" and args.symmetric)
    ):
        return None
    half_range = ((1 << args.element.bits) - 1) / 2
    return (
        Scale(
            element="f32" if args.dynamic else SCALE_ELEMENTS[scale_dtype],
            grain=args.grain,
            static=not args.dynamic,
            peak=half_range if args.dynamic and args.symmetric and not is_float else 0.0,
        ),
    )


def input_spec(args: LayerArgs, scale_dtype: str, where: str, file: str) -> QuantSpec | None:
    """What quantized input activations mean; None if they stay float.

    Args:
        scale_dtype: stored dtype of ``input_scale``.
        where: module path, for messages.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` for arguments that are not supported.
    """
    if not args.inputs:
        return None
    scales = _scales(args.inputs, scale_dtype)
    if scales is None:
        label = " + ".join(a.label for a in args.inputs)
        raise ConfigError(
            f"{file}: input activations of {printable(where)} are {label} ({args.where}), expected "
            "int8 or fp8 with a run-time scale per tensor, token or group or a stored one per "
            "tensor, run-time fp4, fp6 or fp8 in groups of 32 with e8m0 scales, or fp4 in groups "
            "of 16 under fp8 scales. Other kinds are not supported; export with one of these.",
            code="Q-CFG-VALUE",
            path=file,
            tensor=where,
            actual=label,
            plugin="quark",
        )
    element = args.inputs[0].element
    zero = None if args.inputs[0].symmetric else Zero(kind="code", element=element.name)
    return QuantSpec(element=element, scales=scales, zero=zero)
