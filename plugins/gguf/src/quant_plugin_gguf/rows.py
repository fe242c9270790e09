"""Row order of llama's q and k: interleaved pairs in the file, halves in the model.

A head of D rows is stored as 0 D/2 1 D/2+1 2 ..., because llama.cpp rotates neighbouring rows.
Blocks never cross rows, so the reordering is exact on packed bytes, and on biases.

Source: llama.cpp, convert_hf_to_gguf.py (permute); checked against transformers 5.23.
"""

from __future__ import annotations

from torch import Tensor

from quant_core.errors import LayoutError

__all__ = ["to_public_rows", "to_stored_rows"]


def _check(rows: Tensor, heads: int, name: str) -> int:
    half, left = divmod(rows.shape[0], 2 * heads)
    if left:
        raise LayoutError(
            f"tensor {name!r} has {rows.shape[0]} rows, expected a multiple of {2 * heads} for "
            f"{heads} heads of even size. The head count in the metadata is wrong; convert again.",
            code="Q-LAYOUT-SHAPE",
            tensor=name,
            expected=2 * heads,
            actual=rows.shape[0],
        )
    return half


def to_public_rows(rows: Tensor, heads: int, name: str = "") -> Tensor:
    """Stored row order to the model's: [N, ...] of any dtype."""
    half = _check(rows, heads, name)
    return rows.unflatten(0, (heads, half, 2)).transpose(1, 2).reshape(rows.shape)


def to_stored_rows(rows: Tensor, heads: int, name: str = "") -> Tensor:
    """The inverse of ``to_public_rows``."""
    half = _check(rows, heads, name)
    return rows.unflatten(0, (heads, 2, half)).transpose(1, 2).reshape(rows.shape)
