"""One GPTQ layer: which tensors are stored for it, and what they mean.

    W[n, k] = scales[g, n] * (code - zero[g, n]),   g = g_idx[k], or k // group_size

Imports no torch; ``layout`` holds the tensor code.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import SCALE_ELEMENTS, check_tensors, weight_spec, word_count
from quant_core.scheme import Scheme
from quant_core.spec import Axis, LayerDesc, Packing, ParamSpec

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["PLANES", "SCALE_ELEMENTS", "GptqScheme", "packed_words", "weight_spec"]

PLANES = {3: (2, 1), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}  # other widths are one plane


def packed_words(count: int, bits: int, planar: bool) -> int:
    """int32 words that hold ``count`` codes."""
    return word_count(count, bits, run=32 if planar and bits in PLANES else 1)


@dataclass(frozen=True, kw_only=True)
class GptqScheme(Scheme):
    """How one layer is stored.

    Attributes:
        group_size: input features per scale; the layer's in_features when there is one group.
        sym: True: all zeros are 2**(bits-1). None: no config says; the values must show it.
        v1: stored zeros are z - 1.
        planar: words hold bit planes (format ``gptq_p``).
        desc_act: whether g_idx may reorder columns; None: the stored g_idx decides.
        has_g_idx: whether this layer stores a g_idx; it is written back if so.
        scale_dtype: stored dtype of the scales.
        source: file of the config, for messages.
    """

    bits: int
    group_size: int
    sym: bool | None
    v1: bool
    planar: bool = False
    desc_act: bool | None = None
    has_g_idx: bool = True
    scale_dtype: str = "float16"
    source: str = field(default="", compare=False)

    @property
    def groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    @property
    def packing(self) -> Packing:
        """Order of qweight: one stream per output channel along K, words x N."""
        return Packing(word="int32", k_major=True, planes=self._planes)

    @property
    def zeros_packing(self) -> Packing:
        """Order of qzeros, seen as a matrix [G, N] packed along N."""
        return Packing(word="int32", planes=self._planes)

    @property
    def _planes(self) -> tuple[int, ...]:
        return PLANES.get(self.bits, ()) if self.planar else ()

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        bias = ParamSpec(
            name="bias",
            shape=(self.shape[0],),
            dtypes=tuple(SCALE_ELEMENTS),
            axes=(Axis(tag="out"),),
            role="bias",
            need="required" if layer.bias else "optional",
            rule="only layers with a bias store one; old writers also store zeros",
        )
        return (*self._own_params, bias)

    @functools.cached_property
    def _own_params(self) -> tuple[ParamSpec, ...]:
        """All but the bias: the same for every layer of this scheme."""
        n, k = self.shape
        per_word = Fraction(32, self.bits)
        # act-order: the columns of a rank draw on any group, so every rank keeps all of them
        cut = "replicate" if self.desc_act else "slice"
        groups = Axis(tag="group", per=Fraction(self.group_size), cut=cut)  # type: ignore[arg-type]
        floats = (
            self.scale_dtype,
            *(d for d in SCALE_ELEMENTS if d != self.scale_dtype),
        )
        return (
            ParamSpec(
                name="qweight",
                shape=(packed_words(k, self.bits, self.planar), n),
                dtypes=("int32",),
                axes=(Axis(tag="in", per=per_word), Axis(tag="out")),
                role="codes",
            ),
            ParamSpec(
                name="qzeros",
                shape=(self.groups, packed_words(n, self.bits, self.planar)),
                dtypes=("int32",),
                axes=(groups, Axis(tag="out", per=per_word)),
                role="zeros",
            ),
            ParamSpec(
                name="scales",
                shape=(self.groups, n),
                dtypes=floats,
                axes=(groups, Axis(tag="out")),
                role="scales",
            ),
            ParamSpec(
                name="g_idx",
                shape=(k,),
                dtypes=("int32",),
                axes=(Axis(tag="in"),),
                role="gather",
                need="required" if self.desc_act and self.groups > 1 else "cohort",
                rule="writers store the group of each column for all layers or for none",
            ),
        )

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_gptq import layout

        check_tensors(layer, self.params(layer), tensors, plugin="gptq")
        return layout.canonicalize(self, layer.stored, tensors)

    @property
    def pattern(self) -> tuple[Hashable, Sequence[str]] | None:
        """See ``Scheme.pattern``; stored zeros other than the constant are computed."""
        if self.sym is False:
            return None
        form = (self.bits, self.group_size, self.v1, self.planar, self.desc_act, self.scale_dtype)
        return (self.shape, self.sym, *form), ()

    def alike(self, tensors: Mapping[str, Tensor]) -> bool:
        from quant_plugin_gptq import layout

        return layout.is_usual(self, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_gptq import layout

        return layout.serialize(self, layer.stored, tensors)
