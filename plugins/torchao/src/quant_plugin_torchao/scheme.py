"""The scheme of one TorchAO weight: plain codes, a scale and perhaps a zero for each block.

    W = (qdata - zero_point) * scale

Imports no torch; ``layout`` holds the tensor code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import SCALE_ELEMENTS, bias_param, check_tensors
from quant_core.scheme import Scheme
from quant_core.spec import Axis, Element, LayerDesc, ParamSpec, QuantSpec, Scale, Zero
from quant_plugin_torchao.entry import Entry

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["TorchaoScheme", "build_scheme"]

FP8 = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}


@dataclass(frozen=True, kw_only=True)
class TorchaoScheme(Scheme):
    """How one weight is stored.

    Attributes:
        entry: what the header says of it.
        code_dtype, scale_dtype: stored dtypes.
        scale_shape: as stored; the zeros have the same.
        zero_dtype: stored dtype of the zeros, "" if none are stored. Integer zeros that are all 0
            are a constant in canonical form, others are codes.
    """

    entry: Entry
    code_dtype: str
    scale_dtype: str
    scale_shape: tuple[int, ...]
    zero_dtype: str = ""
    source: str = field(default="", compare=False)

    @property
    def half(self) -> int:
        """Added to integers of less than 8 bits, so that their codes are unsigned."""
        integer = self.zero_dtype not in SCALE_ELEMENTS
        return 1 << (self.entry.bits - 1) if self.entry.bits < 8 and integer else 0

    def params(self, layer: LayerDesc) -> tuple[ParamSpec, ...]:
        n, k = self.shape
        out, fixed = Axis(tag="out"), Axis(tag="fixed", cut="replicate")
        r, c = self.weight.scales[0].grain
        rows = Axis(tag="out", per=Fraction(r)) if r else fixed
        grid = (rows, Axis(tag="group", per=Fraction(c)) if c else fixed)[: len(self.scale_shape)]
        specs = [
            ParamSpec(
                name="_weight_qdata",
                shape=(n, k),
                dtypes=(self.code_dtype,),
                axes=(out, Axis(tag="in")),
                role="codes",
            ),
            ParamSpec(
                name="_weight_scale",
                shape=self.scale_shape,
                dtypes=(self.scale_dtype,),
                axes=grid,
                role="scales",
            ),
        ]
        if self.zero_dtype:
            specs.append(
                ParamSpec(
                    name="_weight_zero_point",
                    shape=self.scale_shape,
                    dtypes=(self.zero_dtype,),
                    axes=grid,
                    role="zeros",
                )
            )
        specs.append(bias_param(layer, n))
        return tuple(specs)

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_torchao import layout

        check_tensors(layer, self.params(layer), tensors, plugin="torchao")
        return layout.canonicalize(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_torchao import layout

        return layout.serialize(self, layer.stored, tensors)


def build_scheme(
    entry: Entry,
    shape: tuple[int, int],
    *,
    code_dtype: str,
    scale_dtype: str,
    scale_shape: tuple[int, ...],
    zero_dtype: str = "",
    source: str = "",
) -> TorchaoScheme:
    """A ``TorchaoScheme`` with the meaning that its storage implies; integer zeros count as 0."""
    zero: Zero | None = None
    if code_dtype in FP8:
        element = Element(name=FP8[code_dtype], bits=8, kind="float")
    elif zero_dtype in SCALE_ELEMENTS:
        element = Element.int(entry.bits)
        zero = Zero(kind="code", element=SCALE_ELEMENTS[zero_dtype])
    elif entry.bits < 8:
        element = Element.uint(entry.bits)
        zero = Zero(kind="const", value=1 << (entry.bits - 1))
    else:
        element = Element.int(8)
    scale = Scale(element=SCALE_ELEMENTS[scale_dtype], grain=entry.grain(shape, scale_shape))
    operands = {"weight": QuantSpec(element=element, scales=(scale,), zero=zero)}
    acts = "16"
    if entry.inputs is not None:
        operands["input"] = entry.inputs
        acts = "8" if entry.inputs.element.kind == "int" else "fp8"
    prefix = "fp" if code_dtype in FP8 else ""
    return TorchaoScheme(
        name=f"w{prefix}{entry.bits}a{acts}",
        shape=shape,
        operands=operands,
        entry=entry,
        code_dtype=code_dtype,
        scale_dtype=scale_dtype,
        scale_shape=scale_shape,
        zero_dtype=zero_dtype,
        source=source,
    )
