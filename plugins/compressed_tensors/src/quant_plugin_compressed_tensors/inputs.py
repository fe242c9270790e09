"""Quantized input activations: what a config group says of them, and what is stored for them.

integers, fp8   a run-time scale per token, tensor or group; or a stored one per tensor:
                input_scale [1], input_zero_point int8 [1]
fp4, groups of 16 (NVFP4)     fp8 scales at run time under one stored factor:
                              input_global_scale float32 [1], DIVIDES
fp4, fp6, fp8, groups of 32 (MX)    a power of two at run time; nothing is stored
"""

from __future__ import annotations

from quant_core.errors import ConfigError, printable
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.spec import CHANNEL, TENSOR, Element, QuantSpec, Scale, Zero, group
from quant_plugin_compressed_tensors.args import FLOATS, QuantArgs

__all__ = ["input_spec"]

_E8M0 = ("uint8", "float8_e8m0fnu")


def _element(args: QuantArgs) -> Element:
    if args.kind == "int":
        return Element.int(args.bits)
    return Element(name=FLOATS[args.bits], bits=args.bits, kind="float")


def _is_mx(args: QuantArgs) -> bool:
    """Groups of 32 under a power of two. fp4 groups of 32 are, whatever the dtype says."""
    small = args.bits < 8 or args.scale_dtype in _E8M0
    return args.kind == "float" and args.strategy == "group" and args.group_size == 32 and small


def _scales(args: QuantArgs, scale_dtype: str) -> tuple[Scale, ...] | None:
    """The factors, finest first; None if the arguments are not supported."""
    dynamic, is_float = bool(args.dynamic), args.kind == "float"
    if is_float and not args.symmetric:
        return None
    if is_float and args.strategy == "tensor_group":
        if (args.bits, args.group_size, args.dynamic) != (4, 16, "local"):
            return None
        factor = Scale(element="f32", grain=TENSOR, inverse=True)
        return (Scale(element="fp8_e4m3", grain=group(16), static=False), factor)
    if args.dynamic == "local":
        return None
    if _is_mx(args):
        mx = Scale(element="e8m0", grain=group(32), static=False, rule="even_m1")
        return (mx,) if dynamic else None
    grains = {"token": CHANNEL, "tensor": TENSOR, "group": group(args.group_size or 1)}
    if (
        args.strategy not in grains
        or (is_float and args.bits != 8)
        or not (dynamic or args.strategy == "tensor")
        or args.scale_dtype not in ("", *SCALE_ELEMENTS)
    ):
        return None
    half_range = ((1 << args.bits) - 1) / 2  # the producer's max|x| maps to 127.5, not 127
    return (
        Scale(
            element="f32" if dynamic else SCALE_ELEMENTS[scale_dtype],
            grain=grains[args.strategy],
            static=not dynamic,
            peak=half_range if dynamic and args.symmetric and not is_float else 0.0,
        ),
    )


def input_spec(args: QuantArgs, scale_dtype: str, where: str, file: str) -> QuantSpec:
    """What quantized input activations mean.

    Args:
        scale_dtype: stored dtype of ``input_scale``.
        where: module path, for messages.

    Raises:
        ConfigError: ``Q-CFG-VALUE`` for arguments that are not supported.
    """
    scales = _scales(args, scale_dtype)
    if scales is None:
        raise ConfigError(
            f"{file}: input activations of {printable(where)} are {args.label}, expected integers "
            "or fp8 with a run-time scale per token, group or tensor or a stored one per tensor, "
            "fp4 in groups of 16 with dynamic 'local', or run-time fp4, fp6 or fp8 in groups of "
            "32. Other kinds are not supported; export with one of these.",
            code="Q-CFG-VALUE",
            path=file,
            tensor=where,
            actual=args.label,
            plugin="compressed_tensors",
        )
    element = _element(args)
    zero = None if args.symmetric else Zero(kind="code", element=element.name)
    return QuantSpec(element=element, scales=scales, zero=zero)
