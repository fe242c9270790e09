"""The 128 x 4 order of block scales that block-scaled matmul instructions read.

Rows are padded to 128 and columns to 4 with zero. Tiles of 128 x 4 follow one another along the
columns, then the rows; inside a tile, row r and column c lie at byte

    (r % 32) * 16 + (r // 32 % 4) * 4 + c % 4

Checkpoints store scales row-major; the swizzle is a kernel's own business, per expert.
Sources: torchao 0.18 ``prototype/mx_formats/utils.py`` to_blocked; vLLM 0.32 swizzle_blockscale.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad

__all__ = ["swizzle_scales", "swizzled_offset", "unswizzle_scales"]


def swizzled_offset(row: int, col: int, cols: int) -> int:
    """Position of scale (row, col) of a matrix with ``cols`` scale columns."""
    tile = row // 128 * -(-cols // 4) + col // 4
    return tile * 512 + row % 32 * 16 + row // 32 % 4 * 4 + col % 4


def swizzle_scales(scales: Tensor) -> Tensor:
    """Row-major bytes [..., R, C] to [..., ceil(R/128) * ceil(C/4) * 512] in tile order."""
    rows, cols = scales.shape[-2:]
    full = pad(scales, (0, -cols % 4, 0, -rows % 128))
    tiles = full.unflatten(-1, (-1, 4)).unflatten(-3, (-1, 4, 32))  # [.., RT, 4, 32, CT, 4]
    return tiles.movedim(-2, -4).transpose(-3, -2).flatten(-5)


def unswizzle_scales(swizzled: Tensor, rows: int, cols: int) -> Tensor:
    """Inverse of ``swizzle_scales``: [..., R, C], padding dropped."""
    row_tiles, col_tiles = -(-rows // 128), -(-cols // 4)
    tiles = swizzled.unflatten(-1, (row_tiles, col_tiles, 32, 4, 4))
    full = tiles.transpose(-3, -2).movedim(-4, -2).flatten(-2).flatten(-4, -2)
    return full[..., :rows, :cols].contiguous()
