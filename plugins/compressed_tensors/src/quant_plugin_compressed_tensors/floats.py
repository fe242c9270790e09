"""Small floats: fp8, fp6 and fp4 codes with scales per tensor, channel, group or block.

    float-quantized, naive-quantized        weight         float8_e4m3fn [N, K]
                                            weight_scale   [1], [N, 1], [N, K/g], [N/r, K/c]
    mxfp8-quantized                         weight         float8_e4m3fn [N, K]
                                            weight_scale   uint8 (e8m0) [N, K/32]
    mxfp4-pack-quantized                    weight_packed  uint8 [N, K/2], e2m1
    mxfp6-pack-quantized                    weight_packed  uint8 [N, 3K/4], e2m3
                                            weight_scale   uint8 (e8m0) [N, K/32]
    nvfp4-pack-quantized                    weight_packed  uint8 [N, K/2], e2m1
                                            weight_scale   float8_e4m3fn [N, K/16]
                                            weight_global_scale  float32 [1], DIVIDES

Packed codes of a row are one stream of bits from the low end, which is the canonical order: no
stored byte is moved. Stored scales are used as they are, never derived again.

Source: compressed-tensors 0.19.0 ``compressors/{naive_quantized,nvfp4,mxfp4,mxfp6,mxfp8}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.errors import ConfigError, printable
from quant_core.intspec import SCALE_ELEMENTS
from quant_core.spec import TENSOR, Axis, Element, Packing, ParamSpec, QuantSpec, Scale
from quant_plugin_compressed_tensors.args import FLOAT_SCALES, FLOATS
from quant_plugin_compressed_tensors.header import Header
from quant_plugin_compressed_tensors.scheme import CtScheme, grain_of, scalar_or

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FloatScheme", "build"]

_PLAIN = ("tensor", "channel", "group", "block")
_STRATEGIES: Mapping[str, tuple[int, tuple[str, ...], int]] = {
    "float-quantized": (8, _PLAIN, 0),
    "naive-quantized": (8, _PLAIN, 0),
    "mxfp8-quantized": (8, ("group",), 32),
    "mxfp6-pack-quantized": (6, ("group",), 32),
    "mxfp4-pack-quantized": (4, ("group",), 32),
    "nvfp4-pack-quantized": (4, ("tensor_group",), 16),
}
"""format -> bits, strategies of the weights, group size (0 = any)."""


@dataclass(frozen=True, kw_only=True)
class FloatScheme(CtScheme):
    """Codes of a small float."""

    @property
    def packed(self) -> bool:
        return self.bits < 8

    def codes_params(self) -> tuple[ParamSpec, ...]:
        n, k = self.shape
        codes = ParamSpec(
            name="weight_packed" if self.packed else "weight",
            shape=(n, k * self.bits // 8),
            dtypes=("uint8" if self.packed else "float8_e4m3fn",),
            axes=(Axis(tag="out"), Axis(tag="in", per=Fraction(8, self.bits))),
            role="codes",
        )
        if len(self.weight.scales) == 1:
            return (codes,)
        factor = ParamSpec(
            name="weight_global_scale",
            shape=scalar_or(self, "weight_global_scale", (1,)),
            dtypes=("float32",),
            axes=(Axis(tag="fixed", cut="replicate"),),
            role="scales",
        )
        return (codes, factor)

    def read_codes(
        self, where: str, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, Packing, Tensor | None]:
        from quant_plugin_compressed_tensors.layout import read_float

        return read_float(self, tensors)

    def write_codes(
        self, codes: Tensor, packing: Packing, zeros: Tensor | None
    ) -> dict[str, Tensor]:
        from quant_plugin_compressed_tensors.layout import write_float

        return write_float(self, codes, packing)


def _check(header: Header) -> None:
    """Arguments that the storage format cannot have."""
    args, fmt = header.weights, header.group.format
    bits, strategies, size = _STRATEGIES[fmt]
    good = (
        args.bits == bits
        and args.strategy in strategies
        and args.group_size in ((size,) if size else (args.group_size,))
        and args.symmetric
        and not args.dynamic
        and args.actorder != "group"
    )
    if not good:
        groups = f" of {size}" if size else ""
        raise ConfigError(
            f"{header.config.file}: format {fmt!r} of {printable(header.path)!r} has weights "
            f"{args.label}, expected symmetric float{bits} with strategy "
            f"{' or '.join(strategies)}{groups}. Restore the config of these weights.",
            code="Q-CFG-VALUE",
            path=header.config.file,
            tensor=header.path,
            expected=(bits, strategies, size),
            actual=args.label,
            plugin="compressed_tensors",
        )
    header.check_zero_points()


def _scale_dtype(header: Header) -> str:
    """Stored dtype of ``weight_scale`` if the format allows it, else its default."""
    fmt = header.group.format
    if fmt == "nvfp4-pack-quantized":
        return "float8_e4m3fn"
    if fmt.startswith("mxfp"):
        return header.dtype("weight_scale", {"uint8": 0, "float8_e8m0fnu": 0}, "uint8")
    return header.dtype("weight_scale", SCALE_ELEMENTS, "bfloat16")


def build(header: Header) -> FloatScheme:
    """The scheme of one module with float codes.

    Raises:
        ConfigError, LayoutError, CheckpointError: config and shapes disagree, see ``Header``.
    """
    _check(header)
    args, layer = header.weights, header.layer
    leaf = "weight_packed" if args.bits < 8 else "weight"
    shape = header.shape(leaf)
    if shape is None:
        raise header.unsized(leaf)
    n = shape[0] if layer.out_features is None else layer.out_features
    k = shape[1] * 8 // args.bits if layer.in_features is None else layer.in_features
    header.check_groups(n, k)
    common = header.common(n, k) | {"scale_dtype": _scale_dtype(header)}
    scales = (Scale(element=FLOAT_SCALES[common["scale_dtype"]], grain=grain_of(args)),)
    if args.strategy == "tensor_group":
        scales += (Scale(element="f32", grain=TENSOR, inverse=True),)
    name, bits = FLOATS[args.bits], args.bits
    weight = QuantSpec(element=Element(name=name, bits=bits, kind="float"), scales=scales)
    return FloatScheme(**common, operands=header.operands(weight))
