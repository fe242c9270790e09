"""The scheme of one FP8 layer: its stored tensors, their meaning, and the way to and fro.

    W[n, k] = e4m3(weight[n, k]) * scale          also where the scale is called weight_scale_inv

Activations are e4m3 too; how they are scaled is decided by ``Fp8Config``:

    static            max|x| was measured: one stored scale per layer
    dynamic           one scale per token, at least 1 / (448 * 512)
    blocks            one scale per token and block of columns; powers of two for ue8m0
    fbgemm_fp8        one scale per token, max|x| capped at the upper bound

Sources of the run-time rules: vLLM 0.32 ``_custom_ops.scaled_fp8_quant`` and its kernels (least
scale, upper bound), ``quantization/utils/fp8_utils.py`` per_token_group_quant_fp8 (1e-10);
DeepSeek-V3.1 ``inference/kernel.py`` act_quant (1e-4 with power-of-two scales).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import bias_param
from quant_core.scheme import Scheme
from quant_core.spec import (
    CHANNEL,
    TENSOR,
    Axis,
    Element,
    Grain,
    LayerDesc,
    ParamSpec,
    QuantSpec,
    Scale,
    Source,
    block,
    group,
)
from quant_plugin_fp8.config import Fp8Config

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["FLOATS", "KV_RULE", "SCALE_ELEMENTS", "Fp8Scheme", "build_scheme", "input_spec"]

KV_RULE = "scales of the KV cache are not applied"
SCALE_ELEMENTS = {
    "float32": "f32",
    "bfloat16": "bf16",
    "float16": "f16",
    "float8_e8m0fnu": "e8m0",
    "uint8": "e8m0",
}
_E4M3 = Element(name="fp8_e4m3", bits=8, kind="float")
_TOP = 448.0  # largest finite value of e4m3
FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Fp8Scheme(Scheme):
    """How one FP8 layer is stored.

    Attributes:
        method: quant_method of the config.
        ue8m0: what its config says of scales.
        upper_bound: of max|x| per token, 0 = none.
        scale_name, scale_shape, scale_dtype: of the stored weight scale.
        scale_source: the stacked tensor it is a part of, None if it is a tensor of its own.
        input_name, input_shape, input_dtype: of the stored input scale, "" if there is none.
        cache: KV-cache scales stored beside the weight, not applied.
    """

    method: str
    ue8m0: bool
    upper_bound: float
    scale_name: str
    scale_shape: tuple[int, ...]
    scale_dtype: str
    scale_source: Source | None = None
    input_name: str = ""
    input_shape: tuple[int, ...] = ()
    input_dtype: str = "float32"
    cache: tuple[str, ...] = ()

    @property
    def grain(self) -> Grain:
        return self.weight.scales[0].grain

    @property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns of one scale where the weight is scaled in blocks."""
        return self.grain if self.grain not in (TENSOR, CHANNEL) else None

    def _scale_axes(self) -> tuple[Axis, ...]:
        if self.block is not None:
            rows, cols = (Fraction(size) for size in self.block)
            return (Axis(tag="out", per=rows), Axis(tag="group", per=cols))
        first = Axis(tag="out" if self.grain == CHANNEL else "fixed")
        return (first, Axis(tag="fixed"))[: len(self.scale_shape)]

    def params(self, layer: LayerDesc) -> tuple[ParamSpec, ...]:
        out, inp = Axis(tag="out"), Axis(tag="in")
        specs = [
            ParamSpec(name="weight", shape=self.shape, dtypes=("float8_e4m3fn",), axes=(out, inp)),
            ParamSpec(
                name=self.scale_name,
                shape=self.scale_shape,
                dtypes=(self.scale_dtype,),
                axes=self._scale_axes(),
                role="scales",
                sources=() if self.scale_source is None else (self.scale_source,),
            ),
        ]
        if self.input_name:
            specs.append(
                ParamSpec(
                    name=self.input_name,
                    shape=self.input_shape,
                    dtypes=(self.input_dtype,),
                    axes=(Axis(tag="fixed"),) * len(self.input_shape),
                    role="input_scale",
                )
            )
        specs.append(bias_param(layer, self.shape[0]))
        specs += [
            ParamSpec(name=name, shape=(-1,), dtypes=FLOATS, need="ignored", rule=KV_RULE)
            for name in self.cache
        ]
        return tuple(specs)

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_fp8.layout import canonicalize

        return canonicalize(self, layer, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_fp8.layout import serialize

        return serialize(self, layer, tensors)

    def quantize(
        self, layer: LayerDesc, dense: Tensor, stats: Mapping[str, Tensor] | None = None
    ) -> LayerTensors:
        from quant_plugin_fp8.layout import quantize

        return quantize(self, layer, dense, stats)


def input_spec(config: Fp8Config, dtype: str = "float32") -> QuantSpec:
    """How activations are quantized; ``dtype`` is that of a stored input scale."""
    if config.static:
        scale = Scale(element=SCALE_ELEMENTS[dtype], grain=TENSOR)
    elif config.block is not None and config.ue8m0:
        grain = group(config.block[1])
        scale = Scale(element="e8m0", grain=grain, static=False, rule="rceil", least=1e-4 / _TOP)
    elif config.block is not None:
        least = 1e-10 / _TOP
        scale = Scale(element="f32", grain=group(config.block[1]), static=False, least=least)
    else:
        most, least = config.upper_bound / _TOP, 1 / (_TOP * 512)
        scale = Scale(element="f32", grain=CHANNEL, static=False, least=least, most=most)
    return QuantSpec(element=_E4M3, scales=(scale,))


def _name(config: Fp8Config) -> str:
    if config.method != "fp8":
        return "w8a8_fp8_channel"
    if config.block is None:
        return "w8a8_fp8_static" if config.static else "w8a8_fp8_tensor"
    return "w8a8_fp8_block" + ("_ue8m0" if config.ue8m0 else "")


def build_scheme(
    config: Fp8Config,
    shape: tuple[int, int],
    *,
    scale_name: str,
    scale_shape: tuple[int, ...],
    scale_dtype: str = "float32",
    scale_source: Source | None = None,
    input_name: str = "",
    input_shape: tuple[int, ...] = (),
    input_dtype: str = "float32",
    cache: tuple[str, ...] = (),
) -> Fp8Scheme:
    """An ``Fp8Scheme`` with the meaning that config and storage imply."""
    grain = CHANNEL if config.method != "fp8" else TENSOR
    if config.block is not None:
        grain = block(*config.block)
    weight = Scale(element=SCALE_ELEMENTS[scale_dtype], grain=grain)
    return Fp8Scheme(
        name=_name(config),
        shape=shape,
        operands={
            "weight": QuantSpec(element=_E4M3, scales=(weight,)),
            "input": input_spec(config, input_dtype),
        },
        method=config.method,
        ue8m0=config.ue8m0,
        upper_bound=config.upper_bound,
        scale_name=scale_name,
        scale_shape=scale_shape,
        scale_dtype=scale_dtype,
        scale_source=scale_source,
        input_name=input_name,
        input_shape=input_shape,
        input_dtype=input_dtype,
        cache=cache,
    )
