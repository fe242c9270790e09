"""The schemes of bitsandbytes: 4-bit codes of a table in flat blocks, and int8 rows.

    4 bits   W = quant_map[code] * a      a = absmax of a block of consecutive weights
             nested: a = nested_quant_map[absmax] * nested_absmax + nested_offset
    8 bits   W = weight * SCB / 127       one SCB a row

Imports no torch; ``layout`` holds the tensor code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.flat import flat_count, flat_grain
from quant_core.intspec import bias_param, check_tensors
from quant_core.scheme import Scheme
from quant_core.spec import (
    CHANNEL,
    TENSOR,
    Axis,
    Element,
    LayerDesc,
    Packing,
    ParamSpec,
    QuantSpec,
    Scale,
)
from quant_plugin_bitsandbytes.state import PREFIX, QuantState

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["HIGH_FIRST", "STORAGE", "FourBitScheme", "Int8Scheme", "four_bit", "int8"]

HIGH_FIRST = Packing(order=(1, 0))
"""Two codes a byte along K, the first in the high nibble."""
STORAGE = {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4}
"""Dtypes that packed bytes are stored as, and their size: a view, not a conversion."""
_FIXED = Axis(tag="fixed", cut="replicate")


@dataclass(frozen=True, kw_only=True)
class FourBitScheme(Scheme):
    """A weight of 4-bit codes.

    Attributes:
        state: what the tensor's own description says; ``offset`` is that of the first matrix.
        storage: dtype the packed bytes are stored as.
    """

    state: QuantState
    storage: str = "uint8"
    source: str = field(default="", compare=False)

    def params(self, layer: LayerDesc) -> tuple[ParamSpec, ...]:
        state, (n, k) = self.state, self.shape
        blocks = flat_count(state.block, self.shape)
        words = -(-n * k // 2 // STORAGE[self.storage])
        flat = Axis(tag="fixed", per=Fraction(state.block), cut="replicate")

        def param(name: str, shape: tuple[int, ...], dtype: str, role: str) -> ParamSpec:
            axes = (flat, *(_FIXED for _ in shape[1:]))
            return ParamSpec(name=name, shape=shape, dtypes=(dtype,), axes=axes, role=role)

        nested = bool(state.nested_block)
        scale = "uint8" if nested else "float32"
        out = [
            param("weight", (words, 1), self.storage, "codes"),
            param("weight.absmax", (blocks,), scale, "scales"),
            param("weight.quant_map", (16,), "float32", "codebook"),
            param(f"{PREFIX}{state.quant_type}", (-1,), "uint8", "description"),
        ]
        if nested:
            count = -(-blocks // state.nested_block)
            out.append(param("weight.nested_absmax", (count,), "float32", "scales"))
            out.append(param("weight.nested_quant_map", (256,), "float32", "codebook"))
        return (*out, bias_param(layer, n))

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_bitsandbytes import layout

        check_tensors(layer, self.params(layer), tensors, plugin="bitsandbytes")
        return layout.read_four_bit(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_bitsandbytes import layout

        return layout.write_four_bit(self, layer.stored, tensors)


@dataclass(frozen=True, kw_only=True)
class Int8Scheme(Scheme):
    """A weight of int8 rows.

    Attributes:
        has_format: whether ``weight_format`` is stored; only its value 0 (rows) is read.
    """

    has_format: bool = True
    source: str = field(default="", compare=False)

    def params(self, layer: LayerDesc) -> tuple[ParamSpec, ...]:
        n, k = self.shape
        out = Axis(tag="out")
        specs = [
            ParamSpec(
                name="weight",
                shape=(n, k),
                dtypes=("int8",),
                axes=(out, Axis(tag="in")),
                role="codes",
            ),
            ParamSpec(name="SCB", shape=(n,), dtypes=("float32",), axes=(out,), role="scales"),
        ]
        order = ParamSpec(
            name="weight_format", shape=(), dtypes=("uint8",), role="description", need="cohort"
        )
        return (*specs, order, bias_param(layer, n))

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_bitsandbytes import layout

        check_tensors(layer, self.params(layer), tensors, plugin="bitsandbytes")
        return layout.read_int8(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_bitsandbytes import layout

        return layout.write_int8(self, layer.stored, tensors)


def four_bit(state: QuantState, storage: str, source: str = "") -> FourBitScheme:
    """The scheme that a description implies."""
    k = state.shape[1]
    fine = flat_grain(state.block, k)
    if state.nested_block:
        coarse = flat_grain(state.block * state.nested_block, k)
        scales: tuple[Scale, ...] = (
            Scale(element="f32", grain=TENSOR, add=True),
            Scale(element="lut8", grain=fine),
            Scale(element="f32", grain=coarse),
        )
    else:
        scales = (Scale(element="f32", grain=fine),)
    # bitsandbytes' fp4 is no fp4_e2m1: its values are those of a table
    name = "nf4" if state.quant_type == "nf4" else "fp4_table"
    weight = QuantSpec(element=Element(name=name, bits=4, kind="lut"), scales=scales)
    return FourBitScheme(
        name="w4a16",
        shape=state.shape,
        operands={"weight": weight},
        state=state,
        storage=storage,
        source=source,
    )


def int8(shape: tuple[int, int], *, has_format: bool, source: str = "") -> Int8Scheme:
    """The scheme of int8 rows."""
    scales = (Scale(element="f32", grain=CHANNEL), Scale(element="f32", grain=TENSOR))
    return Int8Scheme(
        name="w8a16",
        shape=shape,
        operands={"weight": QuantSpec(element=Element.int(8), scales=scales)},
        has_format=has_format,
        source=source,
    )
