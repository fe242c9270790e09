"""Small-float weights with stored scales: fp8, fp6 and fp4 codes under one or two factors.

    W[n, k] = code[n, k] * scale[grid of n, k] (* or / factor)

What several formats store with the same bytes and other names. A format whose layers hold nothing
else makes its schemes here; others use the tensor code of ``floatpack``. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import SCALE_ELEMENTS, bias_param, check_tensors
from quant_core.scheme import Scheme
from quant_core.spec import Axis, Grain, LayerDesc, ParamSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["FLOAT_SCALES", "FloatScheme", "StoredScale", "scale_grid"]

FLOAT_SCALES: Mapping[str, str] = {
    **SCALE_ELEMENTS,
    "float8_e4m3fn": "fp8_e4m3",
    "uint8": "e8m0",
    "float8_e8m0fnu": "e8m0",
}
"""Stored dtype of a scale -> its element."""

_FIXED = Axis(tag="fixed", cut="replicate")


def scale_grid(shape: tuple[int, int], grain: Grain) -> tuple[int, int]:
    """(rows, columns) of the scales of a matrix."""
    (n, k), (r, c) = shape, grain
    return (-(-n // r) if r else 1, -(-k // c) if c else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredScale:
    """One stored scale; ``shape`` as stored, whose elements are those of the scale's grid."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class FloatScheme(Scheme):
    """Codes of a small float and their scales, perhaps a stored input scale and a bias.

    Attributes:
        codes: name of the stored codes: bytes of 8-bit floats, or packed along the inputs from
            the low bits up.
        scales: of the weight, finest first.
        input_scale: static factor of the activations.
        plugin: named in errors.
    """

    codes: str
    scales: tuple[StoredScale, ...]
    input_scale: StoredScale | None = None
    plugin: str = ""

    @property
    def codes_dtype(self) -> str:
        return "uint8" if self.weight.element.bits < 8 else "float8_e4m3fn"

    def _axes(self, stored: StoredScale, grain: Grain) -> tuple[Axis, ...]:
        r, c = grain
        rows = Axis(tag="out", per=Fraction(r)) if r else _FIXED
        columns = Axis(tag="group", per=Fraction(c)) if c else _FIXED
        one_axis = (rows,) if scale_grid(self.shape, grain)[0] > 1 else (_FIXED,)
        return {0: (), 1: one_axis}.get(len(stored.shape), (rows, columns))

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        n, k = self.shape
        bits = self.weight.element.bits
        out = [
            ParamSpec(
                name=self.codes,
                shape=(n, -(-k * bits // 8)),
                dtypes=(self.codes_dtype,),
                axes=(Axis(tag="out"), Axis(tag="in", per=Fraction(8, bits))),
                role="codes",
            )
        ]
        out += [
            ParamSpec(
                name=stored.name,
                shape=stored.shape,
                dtypes=(stored.dtype,),
                axes=self._axes(stored, scale.grain),
                role="scales",
            )
            for stored, scale in zip(self.scales, self.weight.scales, strict=True)
        ]
        if self.input_scale is not None:
            out.append(
                ParamSpec(
                    name=self.input_scale.name,
                    shape=self.input_scale.shape,
                    dtypes=(self.input_scale.dtype,),
                    axes=(_FIXED,) * len(self.input_scale.shape),
                    role="input_scale",
                )
            )
        out.append(bias_param(layer, n))
        return tuple(out)

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_core import floatpack

        check_tensors(layer, self.params(layer), tensors, plugin=self.plugin)
        return floatpack.canonicalize(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_core import floatpack

        return floatpack.serialize(self, layer.stored, tensors)
