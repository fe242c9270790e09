"""The scheme of one AWQ layer: its stored tensors, their meaning, and the way to and fro."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import INTERLEAVE, SCALE_ELEMENTS, bias_param
from quant_core.scheme import Scheme
from quant_core.spec import (
    Axis,
    Element,
    LayerDesc,
    Packing,
    ParamSpec,
    QuantSpec,
    Scale,
    Zero,
    group,
)
from quant_plugin_awq.geometry import TILED, stored_shapes

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.packing import Packed
    from quant_core.tensors import LayerTensors

__all__ = ["AwqScheme", "build_scheme"]


@dataclass(frozen=True, kw_only=True)
class AwqScheme(Scheme):
    """How one AWQ layer is stored.

    Attributes:
        layout: "gemm", "gemv", "gemv_fast" or "llm-awq".
        bits, group_size: group_size is never -1 here.
        scale_dtype: stored dtype of ``scales``, kept as it is.
        zeros: name of the stored zeros, "" if none are stored.
        zeros_dtype: their stored dtype.
        zero_point: False: the config promises zeros of 2**(bits-1).
        interleaved: gemm channels lie in AWQ order; False: natural order (GPTQModel, bits != 4).
    """

    layout: str
    bits: int
    group_size: int
    scale_dtype: str = "float16"
    zeros: str = "qzeros"
    zeros_dtype: str = "int32"
    zero_point: bool = True
    interleaved: bool = True

    @property
    def groups(self) -> int:
        return self.shape[1] // self.group_size

    @property
    def packing(self) -> Packing:
        """Order of the canonical codes: the stored words where a ``Packing`` can describe them."""
        if self.layout == "gemm":
            order = INTERLEAVE if self.interleaved else None
            return Packing(word="int32", axis="out", order=order, k_major=True)
        return Packing(word="int32") if self.layout == "gemv" else Packing()

    def params(self, layer: LayerDesc) -> tuple[ParamSpec, ...]:
        n, k = self.shape
        g, per_word = self.group_size, Fraction(32, self.bits)
        shapes = stored_shapes(self.layout, self.bits, n, k, g)
        out, inp, groups = Axis(tag="out"), Axis(tag="in"), Axis(tag="group", per=Fraction(g))
        packed_out = Axis(tag="out", per=per_word)
        if self.layout == "gemm":
            axes = {"qweight": (inp, packed_out), "zeros": (groups, packed_out)}
            axes["scales"] = (groups, out)
        elif self.layout == "gemv":
            axes = {
                "qweight": (out, Axis(tag="in", per=per_word)),
                "zeros": (out, Axis(tag="group", per=g * per_word)),
                "scales": (out, groups),
            }
        else:
            rows = Axis(tag="out", per=Fraction(4))
            axes = {"qweight": (rows, inp), "zeros": (groups, out), "scales": (groups, out)}
        word = "int16" if self.layout in TILED else "int32"
        specs = [
            ParamSpec(
                name="qweight", shape=shapes["qweight"], dtypes=(word,), axes=axes["qweight"]
            ),
            ParamSpec(
                name="scales",
                shape=shapes["scales"],
                dtypes=(self.scale_dtype,),
                axes=axes["scales"],
                role="scales",
            ),
        ]
        if self.zeros:
            zeros = ParamSpec(
                name=self.zeros,
                shape=shapes["zeros"],
                dtypes=(self.zeros_dtype,),
                axes=axes["zeros"],
                role="zeros",
            )
            specs.insert(1, zeros)
        specs.append(bias_param(layer, n))
        return tuple(specs)

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_awq.layout import canonicalize

        return canonicalize(self, layer, tensors)

    @property
    def pattern(self) -> tuple[Hashable, Sequence[str]] | None:
        """See ``Scheme.pattern``; other layouts have padding, and zeros may be promised."""
        if self.layout != "gemm" or not (self.zeros and self.zero_point):
            return None
        return (self.shape, self.bits, self.group_size, self.interleaved), ()

    unpacks = ("zeros",)

    def unpacked(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Packed]:
        from quant_plugin_awq.layout import zeros_by_group

        return {"zeros": zeros_by_group(self, tensors)}

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_awq.layout import serialize

        return serialize(self, layer, tensors)


def build_scheme(
    *,
    layout: str,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    scale_dtype: str = "float16",
    zeros: str = "qzeros",
    zeros_dtype: str = "",
    zero_point: bool = True,
    interleaved: bool = True,
) -> AwqScheme:
    """An ``AwqScheme`` with the meaning that its storage implies.

    Stored float zeros are an offset, W = c*s + o; stored codes are subtracted, W = (c - z)*s;
    without stored zeros z is 2**(bits-1).
    """
    grain = group(group_size)
    if zeros and layout in TILED:
        zeros_dtype = zeros_dtype or scale_dtype
        offset = Scale(element=SCALE_ELEMENTS[zeros_dtype], grain=grain)
        zero = Zero(kind="offset", levels=(offset,))
    elif zeros:
        zeros_dtype = "int32"
        zero = Zero(kind="code", element=f"uint{bits}")
    else:
        zero = Zero(kind="const", value=1 << (bits - 1))
    weight = QuantSpec(
        element=Element.uint(bits),
        scales=(Scale(element=SCALE_ELEMENTS[scale_dtype], grain=grain),),
        zero=zero,
    )
    return AwqScheme(
        name=f"w{bits}a16",
        shape=shape,
        operands={"weight": weight},
        layout=layout,
        bits=bits,
        group_size=group_size,
        scale_dtype=scale_dtype,
        zeros=zeros,
        zeros_dtype=zeros_dtype,
        zero_point=zero_point,
        interleaved=interleaved,
    )
