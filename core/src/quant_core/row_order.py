"""Whole rows that files keep in another order than the model, said to a kernel as a feature.

    "row_pairs:64"    heads of 64 rows whose halves lie interleaved:
                      row i of a head is stored at 2 i, row 32 + i at 2 i + 1

The canonical form has rows in the model's order. Moving them is a copy of the matrix, so for
weights that stay pages of a file (``quant_core.mapped``) a kernel is asked with this feature
whether it runs rows as they are stored: buffers hold them so, results, bias and ``restore`` are in
the model's order. No other operation has it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quant_core.spec import OpSpec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["head_of", "in_model_order", "row_pairs", "stored_rows"]

_PAIRS = "row_pairs:"


def row_pairs(head: int) -> str:
    """The feature of heads of ``head`` rows, an even number."""
    return f"{_PAIRS}{head}"


def head_of(op: OpSpec) -> int:
    """Rows of a head whose halves are stored interleaved; 0 where rows lie in the model's order."""
    return next((int(f.removeprefix(_PAIRS)) for f in op.features if f.startswith(_PAIRS)), 0)


def in_model_order(op: OpSpec) -> OpSpec:
    """The same operation on rows in the model's order."""
    kept = frozenset(f for f in op.features if not f.startswith(_PAIRS))
    return op if kept == op.features else replace(op, features=kept)


def stored_rows(n: int, head: int) -> Tensor:
    """Where each of the ``n`` rows of the model is stored: int64 (n,)."""
    import torch

    return torch.arange(n).view(-1, head // 2, 2).transpose(1, 2).reshape(n)
