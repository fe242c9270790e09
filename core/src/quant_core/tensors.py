"""The canonical form: what every format is translated to and every kernel takes.

Codes are raw bits in uint8 (or the words of the stored ``Packing``), so no dtype change of a
module can touch them. Small-float scales are uint8 views too; f16, bf16 and f32 scales keep their
own torch dtype and are never cast.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from quant_core.spec import CANONICAL, Packing, QuantSpec, Transform

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LayerTensors", "QuantizedTensor"]


@dataclass(slots=True, kw_only=True)
class QuantizedTensor:
    """One quantized operand: its meaning (``spec``), its order (``packing``) and its tensors.

    Shapes (a leading E for stacks of experts):
        shape    (N, K): logical size; with gather, K counts stored columns
        codes    words of ``packing``; for opaque blocks uint8 (N, bytes per row)
        scales   one per ``spec.scales``: (ceil(N/r), ceil(K/c))
        zeros    kind "code": raw codes in uint8, or floats, on the grid of scales[0]
        offset   kind "offset": one per ``spec.zero.levels``
        gather   int32 (K,): input feature of each stored column, -1 = padding
    """

    spec: QuantSpec
    shape: tuple[int, ...]
    codes: Tensor
    packing: Packing = CANONICAL
    scales: tuple[Tensor, ...] = ()
    zeros: Tensor | None = None
    offset: tuple[Tensor, ...] = ()
    gather: Tensor | None = None
    codebook: tuple[Tensor, ...] = ()

    def dequantize(self) -> Tensor:
        """float32 weights in storage column order; see ``quant_core.dequantize``."""
        from quant_core.dequantize import dequantize

        return dequantize(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors held."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """All tensors under flat names: codes, scales_0, zeros, offset_0, gather, codebook_0."""
        out = {"codes": self.codes}
        out |= {f"scales_{i}": s for i, s in enumerate(self.scales)}
        if self.zeros is not None:
            out["zeros"] = self.zeros
        out |= {f"offset_{i}": o for i, o in enumerate(self.offset)}
        if self.gather is not None:
            out["gather"] = self.gather
        out |= {f"codebook_{i}": c for i, c in enumerate(self.codebook)}
        return out

    def with_tensors(self, tensors: dict[str, Tensor], **changes: object) -> QuantizedTensor:
        """A copy that holds ``tensors`` (the names of ``tensors()``) instead."""
        return replace(
            self,
            codes=tensors["codes"],
            scales=tuple(tensors[f"scales_{i}"] for i in range(len(self.scales))),
            zeros=tensors.get("zeros"),
            offset=tuple(tensors[f"offset_{i}"] for i in range(len(self.offset))),
            gather=tensors.get("gather"),
            codebook=tuple(tensors[f"codebook_{i}"] for i in range(len(self.codebook))),
            **changes,  # type: ignore[arg-type]
        )


@dataclass(slots=True, kw_only=True)
class LayerTensors:
    """What canonicalize returns, what kernels take, and what they give back.

    operands     "weight" (attention: "q", "k", "v", "latent")
    bias         float (N,), after scaling
    acc_bias     int32 (N,), before scaling
    out_scale    float32 (N,), combined s_x * s_w when the file stores only that
    input_scale  static activation scale
    """

    operands: dict[str, QuantizedTensor]
    bias: Tensor | None = None
    acc_bias: Tensor | None = None
    out_scale: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero: Tensor | None = None
    transforms: tuple[tuple[Transform, tuple[Tensor, ...]], ...] = field(default=())

    @property
    def weight(self) -> QuantizedTensor:
        return self.operands["weight"]

    def dequantize(self) -> Tensor:
        """float32 weight [N, K] in the input features' own order (gather undone)."""
        from quant_core.dequantize import dense_weight

        return dense_weight(self.weight)
