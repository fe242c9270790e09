"""The scheme of one Quark layer: its stored tensors, their meaning, and the way to and fro.

    W[n, k] = (code - zero) * weight_scale [* weight_scale_2]

How the tensors lie differs by the kind of weight; ``weights`` decides that from config and header.
Imports no torch; ``layout`` holds the tensor code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from quant_core.intspec import bias_param, check_tensors
from quant_core.scheme import Scheme
from quant_core.spec import CANONICAL, LayerDesc, Packing, ParamSpec
from quant_plugin_quark.args import LayerArgs
from quant_plugin_quark.transforms import Rotation

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["KV_RULE", "QuarkScheme"]

KV_RULE = "KV-cache scales present, not applied"


@dataclass(frozen=True, kw_only=True)
class QuarkScheme(Scheme):
    """How one layer is stored.

    Attributes:
        tensors: all stored tensors but the bias.
        packing: of the stored codes.
        signed: 4-bit codes are two's complement; canonical ones are unsigned, 8 more.
        transposed: scales and zero points are stored group by group, [G, N].
        scale_names: stored scales, finest first.
        zero_name: stored zero points, "" if there are none.
        zeros: what they are: "null" (all 0 because the weight is symmetric), "code", "float".
        zero_packing: order of packed zero points seen as [G, N]; None: one value each.
        input_scale, input_zero: stored names for static activations, "" if there are none.
        rotation: a map of the inputs that runs with the model.
        args: what the config says of the layer.
        source: file of the config, for messages.
    """

    tensors: tuple[ParamSpec, ...]
    packing: Packing = CANONICAL
    signed: bool = False
    transposed: bool = False
    scale_names: tuple[str, ...] = ("weight_scale",)
    zero_name: str = ""
    zeros: Literal["", "null", "code", "float"] = ""
    zero_packing: Packing | None = None
    input_scale: str = ""
    input_zero: str = ""
    rotation: Rotation | None = None
    args: LayerArgs | None = field(default=None, compare=False)
    source: str = field(default="", compare=False)

    @property
    def bits(self) -> int:
        return self.weight.element.bits

    def stored(self, name: str) -> ParamSpec:
        """The stored tensor ``name``."""
        return next(p for p in self.tensors if p.name == name)

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        bias = bias_param(layer, self.shape[0])
        return (*self.tensors, bias)

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_quark import layout

        check_tensors(layer, self.params(layer), tensors, plugin="quark")
        return layout.canonicalize(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_quark import layout

        return layout.serialize(self, layer.stored, tensors)
