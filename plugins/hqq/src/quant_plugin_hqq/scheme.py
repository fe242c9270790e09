"""The scheme of one HQQ layer: codes in groups of the flattened matrix, a float zero each.

    W = (code - zero) * scale       in this order, zero a float

Imports no torch; ``layout`` holds the tensor code.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.flat import flat_grain
from quant_core.intspec import SCALE_ELEMENTS, bias_param, check_tensors
from quant_core.scheme import Scheme
from quant_core.spec import Axis, Element, LayerDesc, ParamSpec, QuantSpec, Scale, Zero
from quant_plugin_hqq.meta import NAMES, Meta

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["HqqScheme", "build_scheme"]

_FIXED = Axis(tag="fixed", cut="replicate")


@dataclass(frozen=True, kw_only=True)
class HqqScheme(Scheme):
    """How one HQQ layer is stored.

    Attributes:
        meta: what the small tensors say; equal for the experts of a stack.
        word_dtype, word_shape: of ``W_q``; a float dtype where the words are viewed as floats.
        scale_dtype, zero_dtype: stored dtypes.
    """

    meta: Meta
    word_dtype: str
    word_shape: tuple[int, int]
    scale_dtype: str = "float32"
    zero_dtype: str = "float32"
    source: str = field(default="", compare=False)

    def _descriptions(self) -> Iterator[ParamSpec]:
        """The small tensors: all layers have one, or none has it."""
        stored = {name: (dtype, shape) for name, dtype, shape, _ in self.meta.stored}
        for name in sorted(NAMES):
            dtype, shape = stored.get(name, ("uint8", ()))
            yield ParamSpec(
                name=name,
                shape=shape,
                dtypes=(dtype,),
                axes=(_FIXED,) * len(shape),
                role="description",
                need="cohort",
            )

    def params(self, layer: LayerDesc) -> tuple[ParamSpec, ...]:
        meta = self.meta
        groups = (Axis(tag="fixed", per=Fraction(meta.group_size), cut="replicate"), _FIXED)

        def param(name: str, shape: tuple[int, ...], dtype: str, role: str) -> ParamSpec:
            axes = groups if len(shape) == 2 else (_FIXED,) * len(shape)
            return ParamSpec(name=name, shape=shape, dtypes=(dtype,), axes=axes, role=role)

        return (
            param("W_q", self.word_shape, self.word_dtype, "codes"),
            param("scale", (meta.rows, 1), self.scale_dtype, "scales"),
            param("zero", (meta.rows, 1), self.zero_dtype, "zeros"),
            *self._descriptions(),
            bias_param(layer, self.shape[0]),
        )

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_hqq import layout

        check_tensors(layer, self.params(layer), tensors, plugin="hqq")
        return layout.canonicalize(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_hqq import layout

        return layout.serialize(self, layer.stored, tensors)


def build_scheme(
    meta: Meta,
    *,
    word_dtype: str,
    word_shape: tuple[int, int],
    scale_dtype: str,
    zero_dtype: str,
    source: str = "",
) -> HqqScheme:
    """An ``HqqScheme`` with the meaning that its storage implies."""
    grain = flat_grain(meta.group_size, meta.shape[1])
    weight = QuantSpec(
        element=Element.uint(meta.bits),
        scales=(Scale(element=SCALE_ELEMENTS[scale_dtype], grain=grain),),
        zero=Zero(kind="code", element=SCALE_ELEMENTS[zero_dtype]),
    )
    return HqqScheme(
        name=f"w{meta.bits}a16",
        shape=meta.shape,
        operands={"weight": weight},
        meta=meta,
        word_dtype=word_dtype,
        word_shape=word_shape,
        scale_dtype=scale_dtype,
        zero_dtype=zero_dtype,
        source=source,
    )
