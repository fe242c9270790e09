"""The scheme of one MXFP8 layer: its stored tensors, their meaning, and the way to and fro.

    W[n, k] = e4m3(weight[n, k]) * 2 ** (weight_scale_inv[n, k // 32] - 127)

The name notwithstanding, the scale multiplies. Activations are rounded in the same way while the
model runs, with the exponent ceil(log2(max|x| / 448)) of each 32 values, taken from the bits.

Source: SGLang 0.5.23 ``quantization/fp8_utils.py`` (mxfp8_group_quantize).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import SCALE_ELEMENTS, bias_param, check_tensors
from quant_core.scheme import Scheme
from quant_core.spec import Axis, Element, LayerDesc, ParamSpec, QuantSpec, Scale, group

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["BLOCK", "KV_RULE", "RULE", "SCALE_DTYPES", "Mxfp8Scheme"]

BLOCK = 32
RULE = "rceil"
SCALE_DTYPES = ("uint8", "float8_e8m0fnu")
KV_RULE = "scales of the KV cache are not applied"

_E4M3 = Element(name="fp8_e4m3", bits=8, kind="float")
_WEIGHT = QuantSpec(element=_E4M3, scales=(Scale(element="e8m0", grain=group(BLOCK)),))
_INPUT = QuantSpec(
    element=_E4M3,
    scales=(Scale(element="e8m0", grain=group(BLOCK), static=False, rule=RULE),),
)


@dataclass(frozen=True, kw_only=True)
class Mxfp8Scheme(Scheme):
    """Attributes:
    scale_name, scale_dtype: of the stored scale.
    cache: KV-cache scales stored beside the weight, not applied.
    """

    scale_name: str = "weight_scale_inv"
    scale_dtype: str = "uint8"
    cache: tuple[str, ...] = ()

    @staticmethod
    def of(
        shape: tuple[int, int],
        *,
        scale_name: str = "weight_scale_inv",
        scale_dtype: str = "uint8",
        cache: tuple[str, ...] = (),
    ) -> Mxfp8Scheme:
        """The scheme of a matrix of ``shape``."""
        return Mxfp8Scheme(
            name="wmxfp8amxfp8",
            shape=shape,
            operands={"weight": _WEIGHT, "input": _INPUT},
            scale_name=scale_name,
            scale_dtype=scale_dtype,
            cache=cache,
        )

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        n, k = self.shape
        out = Axis(tag="out")
        fixed = (Axis(tag="fixed", cut="replicate"),)
        return (
            ParamSpec(
                name="weight",
                shape=(n, k),
                dtypes=("float8_e4m3fn",),
                axes=(out, Axis(tag="in")),
                role="codes",
            ),
            ParamSpec(
                name=self.scale_name,
                shape=(n, -(-k // BLOCK)),
                dtypes=(self.scale_dtype,),
                axes=(out, Axis(tag="group", per=Fraction(BLOCK))),
                role="scales",
            ),
            bias_param(layer, n),
            *(
                ParamSpec(
                    name=name,
                    shape=(1,),
                    dtypes=tuple(SCALE_ELEMENTS),
                    axes=fixed,
                    role="kv_scale",
                    need="ignored",
                    rule=KV_RULE,
                )
                for name in self.cache
            ),
        )

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_mxfp8 import layout

        check_tensors(layer, self.params(layer), tensors, plugin="mxfp8")
        return layout.canonicalize(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_mxfp8 import layout

        return layout.serialize(self, layer.stored, tensors)

    def quantize(
        self, layer: LayerDesc, dense: Tensor, stats: Mapping[str, Tensor] | None = None
    ) -> LayerTensors:
        from quant_plugin_mxfp8 import layout

        return layout.quantize(self, layer.name, dense)
