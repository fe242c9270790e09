"""How one ModelSlim layer is stored and what its numbers mean.

    W[n, k] = c[n, k] * weight_scale            run-time activation scales, or float activations
    y = (sum q * c + quant_bias) * deq_scale    stored activation scales (W8A8)

Every tensor of a layer is loaded, or left out by a rule that is named here. Imports no torch;
``layout`` holds the tensor code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import SCALE_ELEMENTS, check_tensors
from quant_core.scheme import Scheme
from quant_core.spec import (
    CHANNEL,
    TENSOR,
    Axis,
    Element,
    Grain,
    LayerDesc,
    Packing,
    ParamSpec,
    QuantSpec,
    Scale,
    Transform,
    Zero,
    group,
)
from quant_plugin_modelslim_npu.detect import KV_LEAVES, KV_RULE
from quant_plugin_modelslim_npu.kinds import Kind

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["BLOCK", "FLAT", "ROW_PAIRS", "WORDS", "MsScheme", "input_spec", "weight_spec"]

BLOCK = 32  # columns of one e8m0 scale
ROW_PAIRS = Packing(axis="out")
"""Two rows a byte: the even row in the low four bits."""
WORDS = Packing(word="int32")
"""Eight codes of a row in one int32, from the low bits up."""

FLAT = Transform(site="input", kind="kron", key="flatquant")
"""FlatQuant: the stored weight already carries the inverse."""

BIAS_RULE = "bias is inside quant_bias"
DECODE_RULE = "static scales of the decode phase; run-time scales are used for every token"
DERIVED_RULE = "deq_scale / input_scale holds it"
HARDWARE_RULE = "scale_bias corrects for a split of int8 in hardware, no part of the result"
_SIZES_RULE = "sizes follow from the other tensors"

_FLOATS = tuple(SCALE_ELEMENTS)
_FP8 = Element(name="fp8_e4m3", bits=8, kind="float")
_FP4 = Element(name="fp4_e2m1", bits=4, kind="float")


def weight_spec(kind: Kind, scales: Sequence[tuple[str, Grain]]) -> QuantSpec:
    """What the codes of a layer mean.

    Args:
        scales: stored dtype and grain of each factor, finest first.
    """
    if kind.store == "int8":
        element, zero = Element.int(8), None
    elif kind.store in ("int4", "int4_words"):
        element, zero = Element.uint(4), Zero(kind="const", value=8)
    else:
        element, zero = (_FP8 if kind.store == "fp8" else _FP4), None
    elements = {**SCALE_ELEMENTS, "uint8": "e8m0"}
    return QuantSpec(
        element=element,
        scales=tuple(Scale(element=elements[d], grain=g) for d, g in scales),
        zero=zero,
    )


def input_spec(kind: Kind, static_dtype: str = "float32") -> QuantSpec | None:
    """What the activations are rounded to; None if they stay float.

    Args:
        static_dtype: stored dtype of ``input_scale`` or ``clip_ratio``, where there is one.

    Source: ModelSlim 26.1.0 ``ir/api/impl/mx_quantization.py`` (blocks: floor for fp8, even by a
    logarithm for fp4, ties away from zero); int8 is max|x|/127, int4 max|x|/7 of each token, times
    the stored clip ratio for FlatQuant (``ir/flatquant.py``; the sigmoid is applied before saving).
    """

    def run_time(element: Element) -> QuantSpec:
        scale = Scale(element="f32", grain=CHANNEL, static=False)
        clip = (Scale(element=SCALE_ELEMENTS[static_dtype], grain=TENSOR),) if kind.flat else ()
        return QuantSpec(element=element, scales=(scale, *clip))

    def blocks(element: Element, rule: str) -> QuantSpec:
        scale = Scale(element="e8m0", grain=group(BLOCK), static=False, rule=rule)
        return QuantSpec(element=element, scales=(scale,), ties="away")

    match kind.acts:
        case "static":
            scale = Scale(element=SCALE_ELEMENTS[static_dtype], grain=TENSOR)
            zero = Zero(kind="code", element="int8")
            return QuantSpec(element=Element.int(8), scales=(scale,), zero=zero)
        case "int8" | "int4":
            return run_time(Element.int(8 if kind.acts == "int8" else 4))
        case "fp8":
            return run_time(_FP8)
        case "mxfp8":
            return blocks(_FP8, "floor")
        case "mxfp4":
            return blocks(_FP4, "even_log2")
        case _:
            return None


@dataclass(frozen=True, kw_only=True)
class MsScheme(Scheme):
    """One layer.

    Attributes:
        kind: what its type string says.
        group: columns of one scale; 0 = one scale a row.
        second: scales are two factors, weight_scale of a row and weight_scale_second of a group.
        row_pairs: 4-bit codes are stored two rows a byte, else one a byte.
        flat: sides of the two matrices of FlatQuant; () = none.
        dtypes: stored dtype of each tensor, by its last name component.
        anew: made for a new file: what reading leaves out is derived and stored too.
        parts: columns of ``scale_bias``, sums over that many parts of the inputs.
    """

    kind: Kind
    group: int = 0
    second: bool = False
    row_pairs: bool = False
    flat: tuple[int, ...] = ()
    dtypes: tuple[tuple[str, str], ...] = ()
    anew: bool = False
    parts: int = 1

    def dtype(self, leaf: str, default: str) -> str:
        """Stored dtype of a tensor."""
        return dict(self.dtypes).get(leaf, default)

    @property
    def static(self) -> bool:
        return self.kind.acts == "static"

    @property
    def codes_name(self) -> str:
        return "weight_packed" if self.kind.store == "int4_words" else "weight"

    def _param(
        self,
        name: str,
        shape: tuple[int, ...],
        dtypes: tuple[str, ...],
        axes: tuple[Axis, ...],
        role: str,
        *,
        optional: str = "",
    ) -> ParamSpec:
        """A tensor that is loaded; the dtype it is stored in comes first."""
        stored = self.dtype(name, dtypes[0])
        kept = (stored,) if stored in dtypes else dtypes
        return ParamSpec(
            name=name,
            shape=shape,
            dtypes=kept,
            axes=axes,
            role=role,
            need="cohort" if optional else "required",
            rule=optional,
        )

    def _ignored(self, name: str, shape: tuple[int, ...], rule: str) -> ParamSpec:
        stored = (self.dtype(name, "float32"),)
        return ParamSpec(
            name=name, shape=shape, dtypes=stored, role=name, need="ignored", rule=rule
        )

    def _codes(self) -> ParamSpec:
        n, k = self.shape
        out, inp = Axis(tag="out"), Axis(tag="in")
        match self.kind.store:
            case "int4_words":
                words = Axis(tag="in", per=Fraction(8))
                return self._param(
                    "weight_packed", (n, -(-k // 8)), ("int32",), (out, words), "codes"
                )
            case "fp8":
                return self._param("weight", (n, k), ("float8_e4m3fn",), (out, inp), "codes")
            case "fp4":
                pairs = Axis(tag="in", per=Fraction(2))
                return self._param("weight", (n, k // 2), ("uint8",), (out, pairs), "codes")
        if self.row_pairs:
            rows = Axis(tag="out", per=Fraction(2))
            return self._param("weight", (n // 2, k), ("int8",), (rows, inp), "codes")
        return self._param("weight", (n, k), ("int8",), (out, inp), "codes")

    def _static(self) -> list[ParamSpec]:
        n, _ = self.shape
        row, one = (Axis(tag="out"),), (Axis(tag="fixed", cut="replicate"),)
        return [
            self._param("quant_bias", (n,), ("int32",), row, "acc_bias"),
            self._param("input_scale", (1,), _FLOATS, one, "input_scale"),
            self._param("input_offset", (1,), _FLOATS, one, "input_zero"),
            self._param("deq_scale", (n,), ("float32", "int64"), row, "out_scale"),
            self._ignored("weight_scale", (n, 1), DERIVED_RULE),
            self._ignored("weight_offset", (n, 1), DERIVED_RULE),
        ]

    def _scales(self) -> list[ParamSpec]:
        n, k = self.shape
        out = Axis(tag="out")
        single = (out, Axis(tag="fixed", cut="replicate"))
        grouped = (out, Axis(tag="group", per=Fraction(self.group or k)))
        wide = ("uint8",) if self.kind.mx else _FLOATS
        groups = -(-k // self.group) if self.group else 1
        zeros = "weights are symmetric"
        if self.second:
            return [
                self._param("weight_scale", (n, 1), _FLOATS, single, "scales"),
                self._param("weight_scale_second", (n, groups), _FLOATS, grouped, "scales"),
                self._param("weight_offset", (n, 1), _FLOATS, single, "zeros", optional=zeros),
                self._param(
                    "weight_offset_second", (n, groups), _FLOATS, grouped, "zeros", optional=zeros
                ),
            ]
        axes = grouped if self.group else single
        found = [self._param("weight_scale", (n, groups), wide, axes, "scales")]
        if not self.kind.mx:
            found.append(
                self._param("weight_offset", (n, groups), _FLOATS, axes, "zeros", optional=zeros)
            )
        return found

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        n, _ = self.shape
        found = [self._codes(), *(self._static() if self.static else self._scales())]
        for name, side in zip(("left_trans", "right_trans"), self.flat):
            whole = (Axis(tag="fixed", cut="replicate"),) * 2
            found.append(self._param(name, (side, side), _FLOATS, whole, "transform"))
        if self.flat:
            one = (Axis(tag="fixed", cut="replicate"),)
            found.append(self._param("clip_ratio", (1,), _FLOATS, one, "input_scale"))
        if self.kind.both:
            found += [
                self._ignored(p.name, p.shape, DECODE_RULE)
                for p in self._static()
                if p.need == "required"
            ]
        if self.kind.store == "int4":
            found.append(self._ignored("scale_bias", (n, self.parts), HARDWARE_RULE))
        if self.kind.store == "int4_words":
            found.append(self._ignored("weight_shape", (2,), _SIZES_RULE))
        found += [self._ignored(leaf, (n,), KV_RULE) for leaf in sorted(KV_LEAVES)]
        if self.static:
            found.append(self._ignored("bias", (n,), BIAS_RULE))
        else:
            found.append(
                ParamSpec(
                    name="bias",
                    shape=(n,),
                    dtypes=(self.dtype("bias", "float32"),),
                    axes=(Axis(tag="out"),),
                    role="bias",
                    need="required" if layer.bias else "optional",
                    rule="" if layer.bias else "linear without bias",
                )
            )
        stored = dict(self.dtypes)
        return tuple(p for p in found if p.need != "ignored" or p.name in stored)

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_modelslim_npu import layout

        check_tensors(layer, self.params(layer), tensors, plugin="modelslim_npu")
        return layout.canonicalize(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_modelslim_npu import layout

        return layout.serialize(self, layer.stored, tensors)
