"""Block types as data: where codes and scales lie in a block. Imports no torch.

All code and sub-scale fields of all types follow the rule of ``quant_core.spec.Field``: stride 16
and width 4 is the split-half nibble order of Q4_0, stride 1 is a plain bit stream, and a code is
its fields' bits put together, low field first. Only the 6-bit pairs of Q4_K and Q5_K have a rule of
their own (``kquant_scales``).

    Q4_0  18 B   d:f16 | 16 B nibbles                          W = d (q - 8)
    Q4_K 144 B   d:f16 m:f16 | 12 B 6-bit pairs | 128 B        W = (d a) q + (-m b)
    Q6_K 210 B   128 B low nibbles | 64 B high 2 bits | 16 int8 | d:f16    W = (d a) (q - 32)

Source: gguf 0.19.0, quants.py, against which every type is tested bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

from quant_core.spec import Element, Field, Packing, QuantSpec, Scale, Zero
from quant_plugin_gguf.types import BY_NAME

__all__ = ["LAYOUTS", "BlockLayout", "packing_of", "spec_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLayout:
    """One scaled block type.

    ``d`` and ``m`` are byte offsets of the float16 scale and minimum (None: absent). ``sub`` are
    the fields of the finer scales; with ``sub_mins`` their second half is the minima's. Finer
    scales are stored with ``sub_bias`` added. Minima of K-quants are subtracted: the canonical
    offset is ``-m``, with its sign bit flipped and nothing else.
    """

    name: str
    element: Element
    codes: tuple[Field, ...]
    const: int | None = None
    d: int | None = None
    m: int | None = None
    sub: tuple[Field, ...] = ()
    sub_element: str = ""
    sub_bias: int = 0
    sub_mins: bool = False
    kquant_scales: int | None = None  # byte offset of the 12 bytes of 6-bit pairs
    codebook: tuple[int, ...] = ()

    @property
    def weights(self) -> int:
        return BY_NAME[self.name].weights

    @property
    def nbytes(self) -> int:
        return BY_NAME[self.name].bytes

    @property
    def has_sub(self) -> bool:
        return bool(self.sub) or self.kquant_scales is not None

    @property
    def subs(self) -> int:
        """Finer scales a block (not counting minima)."""
        if self.kquant_scales is not None:
            return 8
        return self.sub[0].count // (2 if self.sub_mins else 1)

    @property
    def packing(self) -> Packing:
        """Order of the canonical codes: they stay in their blocks."""
        return Packing(fields=self.codes, block=self.nbytes)

    def spec(self) -> QuantSpec:
        """What the canonical numbers mean."""
        coarse = Scale(element="f16", grain=(1, self.weights))
        fine: tuple[Scale, ...] = ()
        if self.has_sub:
            fine = (Scale(element=self.sub_element, grain=(1, self.weights // self.subs)),)
        zero = None
        if self.const is not None:
            zero = Zero(kind="const", value=self.const)
        elif self.m is not None:
            zero = Zero(kind="offset", levels=(*fine, coarse))
        scales = (*fine, coarse) if self.d is not None else fine
        return QuantSpec(element=self.element, scales=scales, zero=zero)


_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_IQ4 = Element(name="iq4_nl", bits=4, kind="lut")
_FP4 = Element(name="fp4_e2m1", bits=4, kind="float")
_U = Element.uint

LAYOUTS: Mapping[str, BlockLayout] = {
    layout.name: layout
    for layout in (
        BlockLayout(name="q4_0", element=_U(4), codes=(Field(2, 16, 4, 16),), const=8, d=0),
        BlockLayout(name="q4_1", element=_U(4), codes=(Field(4, 16, 4, 16),), d=0, m=2),
        BlockLayout(
            name="q5_0",
            element=_U(5),
            codes=(Field(6, 16, 4, 16), Field(2, 4, 1, 1)),
            const=16,
            d=0,
        ),
        BlockLayout(
            name="q5_1", element=_U(5), codes=(Field(8, 16, 4, 16), Field(4, 4, 1, 1)), d=0, m=2
        ),
        BlockLayout(name="q8_0", element=Element.int(8), codes=(Field(2, 32, 8, 1),), d=0),
        BlockLayout(
            name="q2_k",
            element=_U(2),
            codes=(Field(16, 64, 2, 32),),
            d=80,
            m=82,
            sub=(Field(0, 16, 4, 16),),
            sub_element="uint4",
            sub_mins=True,
        ),
        BlockLayout(
            name="q3_k",
            element=_U(3),
            codes=(Field(32, 64, 2, 32), Field(0, 32, 1, 32)),
            const=4,
            d=108,
            sub=(Field(96, 8, 4, 8), Field(104, 4, 2, 4)),
            sub_element="int8",
            sub_bias=32,
        ),
        BlockLayout(
            name="q4_k",
            element=_U(4),
            codes=(Field(16, 128, 4, 32),),
            d=0,
            m=2,
            kquant_scales=4,
            sub_element="uint6",
            sub_mins=True,
        ),
        BlockLayout(
            name="q5_k",
            element=_U(5),
            codes=(Field(48, 128, 4, 32), Field(16, 32, 1, 32)),
            d=0,
            m=2,
            kquant_scales=4,
            sub_element="uint6",
            sub_mins=True,
        ),
        BlockLayout(
            name="q6_k",
            element=_U(6),
            codes=(Field(0, 128, 4, 64), Field(128, 64, 2, 32)),
            const=32,
            d=208,
            sub=(Field(192, 16, 8, 1),),
            sub_element="int8",
        ),
        BlockLayout(
            name="iq4_nl", element=_IQ4, codes=(Field(2, 16, 4, 16),), d=0, codebook=_IQ4_VALUES
        ),
        BlockLayout(
            name="iq4_xs",
            element=_IQ4,
            codes=(Field(8, 128, 4, 16),),
            d=0,
            sub=(Field(4, 4, 4, 1), Field(2, 2, 2, 1)),
            sub_element="int8",
            sub_bias=32,
            codebook=_IQ4_VALUES,
        ),
        BlockLayout(
            name="mxfp4",
            element=_FP4,
            codes=(Field(1, 16, 4, 16),),
            sub=(Field(0, 1, 8, 1),),
            sub_element="e8m0",
        ),
        BlockLayout(
            name="nvfp4",
            element=_FP4,
            codes=(Field(4, 32, 4, 8),),
            sub=(Field(0, 4, 8, 1),),
            sub_element="fp8_e4m3",
        ),
    )
}


@functools.cache
def packing_of(name: str) -> Packing:
    """Order of the canonical codes of a scaled type; one object, which compares fast."""
    return LAYOUTS[name].packing


@functools.cache
def spec_of(name: str) -> QuantSpec:
    """Canonical meaning of a scaled or opaque block type ("q4_k", "iq3_s")."""
    if BY_NAME[name].kind == "opaque":
        return QuantSpec(element=_U(8), blocks=f"gguf_{name}")
    return LAYOUTS[name].spec()
