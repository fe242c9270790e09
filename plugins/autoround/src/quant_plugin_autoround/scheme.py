"""One AutoRound layer: which tensors are stored for it, and what they mean.

    W[n, k] = scales[g, n] * (code - zero[g, n]),   g = k // group_size

Imports no torch; ``layout`` holds the tensor code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import (
    INTERLEAVE,
    SCALE_ELEMENTS,
    check_tensors,
    weight_spec,
    word_count,
)
from quant_core.scheme import Scheme
from quant_core.spec import Axis, LayerDesc, Packing, ParamSpec
from quant_plugin_autoround.config import Dialect

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["AutoRoundScheme", "build_scheme"]


@dataclass(frozen=True, kw_only=True)
class AutoRoundScheme(Scheme):
    """How one layer is stored.

    Attributes:
        group_size: input features per scale; the layer's in_features when there is one group.
        sym: all zeros are 2**(bits-1).
        dialect: "minus_one" and "raw" pack codes along the inputs and store z - 1 or z,
            "interleaved" packs them along the outputs and stores z.
        has_g_idx: whether this layer stores a g_idx; it is written back if so.
        scale_dtype: stored dtype of the scales.
        source: file of the config, for messages.
        stated: the config names the dialect.
    """

    bits: int
    group_size: int
    sym: bool
    dialect: Dialect
    has_g_idx: bool = False
    scale_dtype: str = "float16"
    source: str = field(default="", compare=False)
    stated: bool = field(default=True, compare=False)

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    @property
    def interleaved(self) -> bool:
        return self.dialect == "interleaved"

    @property
    def minus_one(self) -> bool:
        return self.dialect == "minus_one"

    @property
    def packing(self) -> Packing:
        """Order of qweight; stored words are kept as they are."""
        if self.interleaved:
            return Packing(word="int32", axis="out", order=INTERLEAVE, k_major=True)
        return Packing(word="int32", k_major=True)

    @property
    def zeros_packing(self) -> Packing:
        """Order of qzeros, seen as a matrix [G, N] packed along N."""
        return Packing(word="int32", order=INTERLEAVE if self.interleaved else None)

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        n, k = self.shape
        out, inp = Axis(tag="out"), Axis(tag="in")
        groups = Axis(tag="group", per=Fraction(self.group_size))
        per_word = Fraction(32, self.bits)
        packed_out, packed_in = Axis(tag="out", per=per_word), Axis(tag="in", per=per_word)
        n_words = word_count(n, self.bits, run=len(INTERLEAVE) if self.interleaved else 1)
        shape, axes = (word_count(k, self.bits), n), (packed_in, out)
        if self.interleaved:
            shape, axes = (k, n_words), (inp, packed_out)
        return (
            ParamSpec(name="qweight", shape=shape, dtypes=("int32",), axes=axes, role="codes"),
            ParamSpec(
                name="qzeros",
                shape=(self.groups, n_words),
                dtypes=("int32",),
                axes=(groups, packed_out),
                role="zeros",
            ),
            ParamSpec(
                name="scales",
                shape=(self.groups, n),
                dtypes=(self.scale_dtype, *(d for d in SCALE_ELEMENTS if d != self.scale_dtype)),
                axes=(groups, out),
                role="scales",
            ),
            ParamSpec(
                name="g_idx",
                shape=(k,),
                dtypes=("int32",),
                axes=(inp,),
                role="gather",
                need="cohort",
                rule="only packing_format auto_round:gptqmodel stores the group of each column",
            ),
            ParamSpec(
                name="bias",
                shape=(n,),
                dtypes=tuple(SCALE_ELEMENTS),
                axes=(out,),
                role="bias",
                need="required" if layer.bias else "optional",
                rule="only layers with a bias store one",
            ),
        )

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_autoround import layout

        check_tensors(layer, self.params(layer), tensors, plugin="autoround")
        return layout.canonicalize(self, layer.stored, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_autoround import layout

        return layout.serialize(self, layer.stored, tensors)


def build_scheme(
    *,
    shape: tuple[int, int],
    bits: int,
    group_size: int,
    sym: bool,
    dialect: Dialect,
    has_g_idx: bool = False,
    scale_dtype: str = "float16",
    source: str = "",
    stated: bool = True,
) -> AutoRoundScheme:
    """A scheme with the meaning that its storage implies; ``group_size`` -1 = one group."""
    size = shape[1] if group_size == -1 else min(group_size, shape[1])
    return AutoRoundScheme(
        name=f"w{bits}a16",
        shape=shape,
        operands={"weight": weight_spec(bits, shape[1], size, sym=sym, scale_dtype=scale_dtype)},
        bits=bits,
        group_size=size,
        sym=sym,
        dialect=dialect,
        has_g_idx=has_g_idx,
        scale_dtype=scale_dtype,
        source=source,
        stated=stated,
    )
