"""Blocks that run over a flattened matrix: one value for every ``block`` weights in row order.

    N = 3, K = 6, block 4                      as a grid of grain (1, 2), 2 = gcd(4, 6)
    a a a a b b                                a a b
    b b c c c c                                b c c
    d d d d e e   (the last one is short)      d d e

Where a block is a whole number of rows, or a row a whole number of blocks, the grid holds each
value once; else it repeats values, which is exact and takes memory. The way back compares every
repeated value and refuses if they differ.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from quant_core.errors import LayoutError
from quant_core.spec import Grain

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["flat_count", "flat_grain", "flat_to_grid", "grid_to_flat", "shrink_grid"]


def flat_count(block: int, shape: tuple[int, int]) -> int:
    """Number of blocks; the last one may be short."""
    return -(-shape[0] * shape[1] // block)


def flat_grain(block: int, in_features: int) -> Grain:
    """The coarsest grain whose lines contain those of all blocks."""
    if block % in_features == 0:
        return (block // in_features, 0)
    return (1, math.gcd(block, in_features))


def flat_to_grid(values: Tensor, block: int, shape: tuple[int, int]) -> Tensor:
    """One value a block to the grid of ``flat_grain``. Exact.

    Shapes:  values (blocks,), any dtype  ->  (ceil(N / r), ceil(K / c))
    """
    n, k = shape
    c = flat_grain(block, k)[1]
    if c == 0:
        return values.reshape(-1, 1)
    if c != block:
        values = values.repeat_interleave(block // c)[: n * (k // c)]
    return values.reshape(n, k // c)


def grid_to_flat(
    grid: Tensor, grain: Grain, block: int, shape: tuple[int, int], where: str
) -> Tensor:
    """Inverse of ``flat_to_grid``, also from a finer grid.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if values differ inside a block.
    """
    want = flat_grain(block, shape[1])
    grid = shrink_grid(grid, grain, want, shape, where)
    flat = grid.reshape(-1)
    if want[1] in (0, block):
        return flat
    picked = flat[:: block // want[1]].contiguous()
    if not _same(flat_to_grid(picked, block, shape), grid):
        raise _differ(where, f"blocks of {block} consecutive weights")
    return picked


def shrink_grid(t: Tensor, old: Grain, new: Grain, shape: tuple[int, int], where: str) -> Tensor:
    """Values of grain ``old`` on the coarser grid ``new``: inverse of ``regrain``.

    Raises:
        LayoutError: ``Q-LAYOUT-REPRESENT`` if ``new`` is no multiple, or values differ inside it.
    """
    from quant_core.rewrites.grains import repeat_grid

    if old == new:
        return t
    out = t
    for dim, o, c in ((0, old[0], new[0]), (1, old[1], new[1])):
        if o == c:
            continue
        if o == 0 or c % o:
            raise _differ(where, f"a grain of {new}")
        step = c // o if c else out.shape[dim]
        out = out[::step] if dim == 0 else out[:, ::step]
    out = out.contiguous()
    if not _same(repeat_grid(out, new, old, shape), t):
        raise _differ(where, f"a grain of {new}")
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal shapes and bits; -0.0 and 0.0 differ."""
    from quant_core.rewrites.join import same_bytes

    return same_bytes(a.contiguous(), b.contiguous())


def _differ(where: str, expected: str) -> LayoutError:
    return LayoutError(
        f"{where}: scales or zeros differ inside {expected}, expected one value. "
        "Write a format with finer scales.",
        code="Q-LAYOUT-REPRESENT",
        tensor=where,
        expected=expected,
    )
