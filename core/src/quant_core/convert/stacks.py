"""Tensors that hold several matrices: their whole shapes, and putting them together.

gate [N, K]  ->  experts.gate_up_proj[0, 0:2N:2]        index (0, (0, 2N, 2))
up   [N, K]  ->  experts.gate_up_proj[0, 1:2N:2]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quant_core.checkpoint.base import Index
from quant_core.spec import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Stack", "whole_shape"]


def whole_shape(index: Index, part: tuple[int, ...], known: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the tensor of which ``part`` is cut out at ``index``, as far as it is known.

    Args:
        known: what other parts have told; () = nothing yet.
    """
    sizes: list[int] = []
    left = list(part)
    for i in index:
        if isinstance(i, tuple):
            left.pop(0)
            sizes.append(i[1])
        else:
            sizes.append(int(i) + 1)
    shape = (*sizes, *left)
    return tuple(map(max, shape, known)) if known else shape


class Stack:
    """One tensor, filled part by part."""

    def __init__(self, info: TensorInfo) -> None:
        import torch

        self.whole: Tensor = torch.zeros(info.shape, dtype=getattr(torch, info.dtype))
        self.missing = self.whole.numel()

    def put(self, index: Index, part: Tensor) -> bool:
        """Store a part, each once; whether nothing is missing any more."""
        at = tuple(slice(*i) if isinstance(i, tuple) else i for i in index)
        self.whole[at] = part
        self.missing -= part.numel()
        return self.missing == 0
