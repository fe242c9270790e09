"""How one matrix of MXFP4 experts is stored: rows of a stack, every second one for gate and up.

W[n, k] = e2m1(code[n, k]) * 2 ** (scale[n, k // 32] - 127)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from quant_core.intspec import SCALE_ELEMENTS, check_tensors
from quant_core.scheme import Scheme
from quant_core.spec import (
    EXPERT,
    Axis,
    Element,
    LayerDesc,
    ParamSpec,
    QuantSpec,
    Scale,
    Source,
    group,
)

if TYPE_CHECKING:
    from torch import Tensor

    from quant_core.tensors import LayerTensors

__all__ = ["BLOCK", "BLOCK_BYTES", "ROLES", "WEIGHT", "Mxfp4Scheme", "Rows"]

BLOCK = 32  # codes under one scale
BLOCK_BYTES = 16

WEIGHT = QuantSpec(
    element=Element(name="fp4_e2m1", bits=4, kind="float"),
    scales=(Scale(element="e8m0", grain=group(BLOCK)),),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Rows ``first``, ``first + step`` .. of the stored stack ``stack``."""

    stack: str
    first: int
    step: int


ROLES: Mapping[str, Rows] = {
    "gate": Rows(stack="gate_up_proj", first=0, step=2),
    "up": Rows(stack="gate_up_proj", first=1, step=2),
    "down": Rows(stack="down_proj", first=0, step=1),
}


@dataclass(frozen=True, kw_only=True)
class Mxfp4Scheme(Scheme):
    """Attributes:
    role: key of ``ROLES``.
    flat: the blocks of a row are stored as one row of bytes.
    """

    role: str
    flat: bool = False

    @staticmethod
    def of(n: int, k: int, *, role: str, flat: bool) -> Mxfp4Scheme:
        """The scheme of an [n, k] matrix."""
        return Mxfp4Scheme(
            name="wmxfp4a16",
            shape=(n, k),
            operands={"weight": WEIGHT},
            role=role,
            flat=flat,
        )

    def _param(
        self, layer: LayerDesc, part: str, shape: tuple[int, ...], axes: tuple[Axis, ...]
    ) -> ParamSpec:
        rows = ROLES[self.role]
        index: tuple[str | tuple[int, int, int], ...] = (EXPERT,)
        if rows.step > 1:
            index += ((rows.first, shape[0] * rows.step, rows.step),)
        is_bias = part == "bias"
        module = layer.stored.partition(".{expert}")[0]
        return ParamSpec(
            name=part,
            shape=shape,
            dtypes=tuple(SCALE_ELEMENTS) if is_bias else ("uint8",),
            axes=axes,
            role={"blocks": "codes", "scales": "scales"}.get(part, part),
            need="cohort" if is_bias else "required",
            sources=(Source(name=f"{module}.{rows.stack}_{part}", index=index),),
        )

    def params(self, layer: LayerDesc) -> Sequence[ParamSpec]:
        n, k = self.shape
        out, per_block = Axis(tag="out"), Axis(tag="group", per=Fraction(BLOCK))
        if self.flat:
            blocks = self._param(
                layer, "blocks", (n, k // 2), (out, Axis(tag="in", per=Fraction(2)))
            )
        else:
            inner = Axis(tag="fixed", cut="replicate")
            shape = (n, k // BLOCK, BLOCK_BYTES)
            blocks = self._param(layer, "blocks", shape, (out, per_block, inner))
        return (
            blocks,
            self._param(layer, "scales", (n, k // BLOCK), (out, per_block)),
            self._param(layer, "bias", (n,), (out,)),
        )

    def canonicalize(self, layer: LayerDesc, tensors: Mapping[str, Tensor]) -> LayerTensors:
        from quant_plugin_mxfp4 import layout

        check_tensors(layer, self.params(layer), tensors, plugin="mxfp4")
        return layout.canonicalize(self, tensors)

    def serialize(self, layer: LayerDesc, tensors: LayerTensors) -> dict[str, Tensor]:
        from quant_plugin_mxfp4 import layout

        return layout.serialize(self, layer.stored, tensors)
