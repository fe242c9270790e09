"""How far two matrices are apart, in row blocks, so that no whole matrix is ever dense."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_core.convert.steps import row_blocks
from quant_core.dequantize import dense_weight
from quant_core.rewrites.cut import slice_rows_of
from quant_core.tensors import QuantizedTensor

__all__ = ["Distance", "distance"]


@dataclass(slots=True)
class Distance:
    """Sums over the weights seen so far; 0 only if all are equal bit by bit (+0 equals -0)."""

    squared: float = 0.0  # of the differences
    reference: float = 0.0  # of the first matrix
    largest: float = 0.0

    def add(self, a: Tensor, b: Tensor) -> None:
        """Compare two float32 tensors of one shape."""
        self.reference += float(torch.linalg.vector_norm(a)) ** 2
        if torch.equal(a, b):
            return
        delta = a - b
        self.squared += float(torch.linalg.vector_norm(delta)) ** 2
        self.largest = max(self.largest, float(delta.abs().max()))

    @property
    def relative(self) -> float:
        """||a - b|| / ||a||; inf if only a is zero."""
        if self.squared == 0:
            return 0.0
        return (self.squared / self.reference) ** 0.5 if self.reference else float("inf")


def _same(a: QuantizedTensor, b: QuantizedTensor) -> bool:
    """Equal tensors of one description: nothing needs to be computed."""
    if (a.spec, a.packing, a.shape) != (b.spec, b.packing, b.shape):
        return False
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(torch.equal(t, right[n]) for n, t in left.items())


def _dense(value: QuantizedTensor | Tensor, start: int, stop: int, in_features: int) -> Tensor:
    if isinstance(value, Tensor):
        return value[start:stop].float()
    return dense_weight(slice_rows_of(value, start, stop), in_features)


def distance(
    a: QuantizedTensor | Tensor,
    b: QuantizedTensor | Tensor,
    in_features: int,
    total: Distance | None = None,
) -> Distance:
    """Distance of two matrices [N, in_features], added to ``total`` if that is given."""
    total = total or Distance()
    if isinstance(a, QuantizedTensor) and isinstance(b, QuantizedTensor) and _same(a, b):
        for start, stop in row_blocks(a.shape[0], in_features):
            block = _dense(a, start, stop, in_features)
            total.add(block, block)
        return total
    for start, stop in row_blocks(a.shape[0], in_features):
        total.add(_dense(a, start, stop, in_features), _dense(b, start, stop, in_features))
    return total
