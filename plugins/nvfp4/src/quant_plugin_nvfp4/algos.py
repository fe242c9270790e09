"""The algorithms a config can name, and what each one stores and computes.

    quant_algo                  weight                            activations
    FP8                         fp8, one scale                    fp8, stored scale
    FP8_PER_CHANNEL_PER_TOKEN   fp8, a scale per output           fp8, a scale per token at run time
    FP8_PB_WO                   fp8, a scale per 128 x 128        float
    NVFP4, NVFP4_AWQ            fp4 in 16s, fp8 x float32         the same, float32 stored
    W4A16_NVFP4                 fp4 in 16s, fp8 x float32         float
    W4A8_NVFP4_FP8              fp4 in 16s, fp8 x float32         fp8, stored scale
    MXFP8                       fp8 in 32s, e8m0                  the same, at run time
    W4A8_MXFP4_FP8              fp4 in 32s, e8m0                  fp8, stored scale
    W4A16_AWQ                   int4 in groups                    float
    W4A8_AWQ                    int4 in groups                    fp8, stored scale
    W8A16                       int8, a scale per output          float
    W8A8_SQ_PER_CHANNEL         int8, a scale per output          int8, stored scale

The AWQ ones and SQ may multiply the input by ``pre_quant_scale`` first.

Source: ModelOpt 0.47.0 ``export/quant_utils.py`` (get_quantization_format,
process_layer_quant_config); vLLM 0.32 ``quantization/modelopt.py`` for FP8_BLOCK_SCALES.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quant_core.spec import (
    CHANNEL,
    TENSOR,
    Element,
    Grain,
    Packing,
    QuantSpec,
    Scale,
    Zero,
    block,
    group,
)

__all__ = ["ALGOS", "REFUSED", "Algo", "find_algo"]

Weight = Literal["fp8", "fp8_channel", "fp8_block", "nvfp4", "mxfp8", "mxfp4", "int4", "int8"]
Input = Literal["", "fp8", "fp8_token", "nvfp4", "mxfp8", "int8"]

_FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
_FP4 = Element(name="fp4_e2m1", bits=4, kind="float")
_ROWS = Packing(axis="out")
_BYTES = Packing()


@dataclass(frozen=True, slots=True, kw_only=True)
class Algo:
    """One algorithm.

    Attributes:
        name: as the config spells it, in upper case.
        scheme: name of its schemes.
        weight, input: what is stored; input "" = activations stay float.
        second: ``weight_scale_2`` is stored.
        smooth: ``pre_quant_scale`` may be stored.
    """

    name: str
    scheme: str
    weight: Weight
    input: Input = ""
    second: bool = False
    smooth: bool = False

    @property
    def element(self) -> Element:
        if self.weight == "int4":
            return Element.uint(4)
        if self.weight == "int8":
            return Element.int(8)
        return _FP4 if self.weight in ("nvfp4", "mxfp4") else _FP8

    @property
    def stored(self) -> tuple[str, str]:
        """Stored dtype of the weight; what its scale is: "float", "float8_e4m3fn" or "uint8"."""
        weight = {"int8": "int8", "fp8": "float8_e4m3fn", "fp4": "uint8", "uint4": "uint8"}
        scale = {"nvfp4": "float8_e4m3fn", "mxfp8": "uint8", "mxfp4": "uint8"}
        return weight[self.element.name.partition("_")[0]], scale.get(self.weight, "float")

    @property
    def packing(self) -> Packing:
        """Order of the stored codes: two rows, or two columns, in a byte."""
        return _ROWS if self.weight == "int4" else _BYTES

    @property
    def group_size(self) -> int:
        """The only size of groups or blocks there is; 0 = the config or the shapes say."""
        return {"fp8_block": 128, "nvfp4": 16, "mxfp8": 32, "mxfp4": 32}.get(self.weight, 0)

    @property
    def static_input(self) -> bool:
        """``input_scale`` is stored."""
        return self.input in ("fp8", "nvfp4", "int8")

    def grain(self, group_size: int) -> Grain:
        """Grain of ``weight_scale``."""
        if self.weight == "fp8":
            return TENSOR
        if self.weight in ("fp8_channel", "int8"):
            return CHANNEL
        return block(group_size, group_size) if self.weight == "fp8_block" else group(group_size)

    def scale_shapes(self, n: int, k: int, group_size: int) -> tuple[tuple[int, ...], ...]:
        """Shapes that ``weight_scale`` may have; the first is the one written."""
        if self.weight == "fp8":
            return ((), (1,))
        if self.weight in ("fp8_channel", "int8"):
            return ((n,), (n, 1))
        columns = -(-k // group_size)
        if self.weight == "fp8_block":
            rows = -(-n // group_size)
            return ((rows, 1, columns, 1), (rows, columns))
        return ((n, columns),)

    def weight_spec(self, group_size: int, scale: str) -> QuantSpec:
        """What the codes mean. ``scale``: element of ``weight_scale``.

        ``weight_scale_2`` of int4 is the scale of an fp8 copy of the weights that kernels make: it
        divides their group scales and multiplies their sums, so it is there twice and cancels.
        """
        scales: tuple[Scale, ...] = (Scale(element=scale, grain=self.grain(group_size)),)
        second = Scale(element="f32", grain=TENSOR)
        if self.second and self.weight == "int4":
            scales += (Scale(element="f32", grain=TENSOR, inverse=True), second)
        elif self.second:
            scales += (second,)
        zero = Zero(kind="const", value=8) if self.weight == "int4" else None
        return QuantSpec(element=self.element, scales=scales, zero=zero)

    def input_spec(self, scale: str) -> QuantSpec | None:
        """What quantized activations mean. ``scale``: element of ``input_scale``."""
        stored = Scale(element=scale, grain=TENSOR)
        match self.input:
            case "":
                return None
            case "nvfp4":  # the producer keeps block scales at or above the least fp8 value
                fine = Scale(element="fp8_e4m3", grain=group(16), static=False, least=2.0**-9)
                return QuantSpec(element=_FP4, scales=(fine, stored))
            case "mxfp8":
                fine = Scale(element="e8m0", grain=group(32), static=False, rule="rceil_log2")
                return QuantSpec(element=_FP8, scales=(fine,))
            case "fp8_token":
                return QuantSpec(
                    element=_FP8, scales=(Scale(element="f32", grain=CHANNEL, static=False),)
                )
        return QuantSpec(element=Element.int(8) if self.input == "int8" else _FP8, scales=(stored,))


def _table(*algos: Algo) -> Mapping[str, Algo]:
    return {algo.name: algo for algo in algos}


ALGOS = _table(
    Algo(name="FP8", scheme="w8a8_fp8", weight="fp8", input="fp8"),
    Algo(
        name="FP8_PER_CHANNEL_PER_TOKEN",
        scheme="w8a8_fp8_channel",
        weight="fp8_channel",
        input="fp8_token",
    ),
    Algo(name="FP8_PB_WO", scheme="w8a16_fp8_block", weight="fp8_block"),
    Algo(name="NVFP4", scheme="w4a4_nvfp4", weight="nvfp4", input="nvfp4", second=True),
    Algo(
        name="NVFP4_AWQ",
        scheme="w4a4_nvfp4_awq",
        weight="nvfp4",
        input="nvfp4",
        second=True,
        smooth=True,
    ),
    Algo(name="W4A16_NVFP4", scheme="w4a16_nvfp4", weight="nvfp4", second=True),
    Algo(name="W4A8_NVFP4_FP8", scheme="w4a8_nvfp4_fp8", weight="nvfp4", input="fp8", second=True),
    Algo(name="MXFP8", scheme="w8a8_mxfp8", weight="mxfp8", input="mxfp8"),
    Algo(name="W4A8_MXFP4_FP8", scheme="w4a8_mxfp4_fp8", weight="mxfp4", input="fp8"),
    Algo(name="W4A16_AWQ", scheme="w4a16_awq", weight="int4", smooth=True),
    Algo(name="W4A8_AWQ", scheme="w4a8_awq", weight="int4", input="fp8", second=True, smooth=True),
    Algo(name="W8A16", scheme="w8a16", weight="int8"),
    Algo(name="W8A8_SQ_PER_CHANNEL", scheme="w8a8", weight="int8", input="int8", smooth=True),
)
"""Name in a config -> what it stores."""

_ALIASES = {"FP8_BLOCK_SCALES": "FP8_PB_WO"}
REFUSED: Mapping[str, tuple[str, str]] = {
    "NVFP4_SVD": (
        "Q-CFG-TRANSFORM",
        "Its low-rank branch svdquant_lora_a/b is not supported; export without SVDQuant.",
    ),
    "MXFP4": (
        "Q-CFG-VALUE",
        "It does not say whether activations are quantized; export as W4A8_MXFP4_FP8 or MXFP8.",
    ),
    "FP8_PB_REAL": ("Q-CFG-VALUE", "Export as FP8_PB_WO."),
}
"""Algorithms that are known and not read: code of the error, and why."""


def find_algo(name: str) -> Algo | None:
    """The algorithm of a config value; None if it is not one of ``ALGOS``."""
    upper = name.strip().upper()
    return ALGOS.get(_ALIASES.get(upper, upper))
