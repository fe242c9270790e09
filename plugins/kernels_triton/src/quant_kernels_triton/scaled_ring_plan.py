"""Block sizes of scaled_ring and what they take; plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from quant_core.kernels.base import ANY_ROWS
from quant_kernels_triton.scaled_plan import ScaledPlan, codes_us

__all__ = ["MOST", "RingSizes", "WideSizes", "ring_sizes", "ring_us"]

MOST = {"fp8": 128, "int8": ANY_ROWS, "block": 64}
"""Rows beyond which torch's products are as fast."""

SMS = 132  # multiprocessors of an H100: only block counts depend on it


@dataclass(frozen=True, slots=True)
class RingSizes:
    """Tokens, warps (16 outputs each), groups of 128 columns in a stage, stages, parts of K."""

    bm: int
    warps: int
    groups: int
    stages: int
    split: int


@dataclass(frozen=True, slots=True)
class WideSizes:
    """Block sizes of scaled_ws: tokens, stages, blocks that share weights in cache."""

    bm: int
    stages: int
    together: int


def _split(blocks: int, groups: int, most: int, least: int) -> int:
    """Parts of K: at most ``most`` blocks, each of at least ``least`` groups."""
    split = 1
    while split < 8 and blocks * split * 2 <= most and groups // (split * 2) >= least:
        split *= 2
    return split


def _many(p: ScaledPlan, rows: int) -> RingSizes | WideSizes:
    """Block sizes of int8 from 129 rows on."""
    small = -(-p.n // 128) * -(-rows // 128)
    if small <= SMS:
        return WideSizes(128, 6, 16) if rows <= 256 else RingSizes(128, 8, 2, 3, 1)
    large = -(-p.n // 128) * -(-rows // 256)
    if -(-large // SMS) * _WIDE[256] <= -(-small // SMS) * _WIDE[128]:
        return WideSizes(256, 4, 16)
    return WideSizes(128, 6, 16)


def ring_sizes(p: ScaledPlan, rows: int) -> RingSizes | WideSizes:
    """Block sizes for ``rows`` tokens; measured on an H100 (benchmarks/gpu_mixed.py)."""
    groups, tiles = -(-p.k // 128), -(-p.n // 64)
    crowded = 2 * SMS < tiles <= 3 * SMS  # small blocks: three of a multiprocessor
    if rows <= 16:
        if tiles > 2 * SMS:
            return RingSizes(16, 8, 2, 3, 1)
        return RingSizes(16, 4, 2, 4, _split(tiles, groups, 2 * SMS, 16))
    if rows <= 32:
        return RingSizes(32, 4, 2, 3 if crowded else 4, _split(tiles, groups, SMS, 24))
    if rows <= 64:
        if crowded:
            return RingSizes(64, 4, 1, 4, 1)
        return RingSizes(64, 4, 2, 3, _split(tiles, groups, SMS, 24))
    if rows > 128:
        return _many(p, rows)
    if tiles * 2 > 5 * SMS:
        return RingSizes(128, 4, 1, 4, 1)
    return RingSizes(64, 4, 1, 4, _split(tiles * 2, groups, 2 * SMS, 24))


# Microseconds, fitted to an H100.
_START = 2.7  # of starting, beside quantizing
_BYTES_PER_US = 2.95e6
_STEP = {"fp8": 0.082, "int8": 0.082, "block": 0.12}  # of 64 rows by 64 outputs, 128 columns
_WIDE = {256: 0.78, 128: 0.5}  # of so many rows by 128 outputs, 128 columns, on a full card


def ring_us(p: ScaledPlan, rows: int) -> float:
    """Microseconds of a call: reading weights, and what multiplying adds."""
    c = ring_sizes(p, rows)
    groups, start = -(-p.k // 128), _START + codes_us(rows, p.k)
    if isinstance(c, WideSizes) or rows > 128:
        turns = -(-(-(-rows // c.bm) * -(-p.n // 128)) // SMS)
        alone = turns == 1 and c.bm == 128
        return start + 1.5 + turns * groups * (0.34 if alone else _WIDE[c.bm])
    tiles = -(-p.n // (16 * c.warps)) * -(-rows // c.bm)
    filled = max(1.0, tiles * c.split / (2 * SMS))
    steps = filled * groups / c.split * (c.bm / 64) * (c.warps / 4)
    apart = 0.1 * (rows / 16) if rows <= 16 else _STEP[p.kind] * steps
    return start + p.n * p.k / _BYTES_PER_US + apart
