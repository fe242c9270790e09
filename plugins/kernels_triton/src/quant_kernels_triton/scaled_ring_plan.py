"""Block sizes of scaled_ring and what they take; plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from quant_kernels_triton.scaled_plan import ScaledPlan, codes_us

__all__ = ["MOST", "RingSizes", "ring_sizes", "ring_us"]

MOST = {"fp8": 128, "int8": 256, "block": 64}
"""Rows beyond which other kernels are as fast."""

SMS = 132  # multiprocessors of an H100: only block counts depend on it


@dataclass(frozen=True, slots=True)
class RingSizes:
    """Tokens, warps (16 outputs each), groups of 128 columns in a stage, stages, parts of K."""

    bm: int
    warps: int
    groups: int
    stages: int
    split: int


def _split(blocks: int, groups: int, most: int, least: int) -> int:
    """Parts of K: at most ``most`` blocks, each of at least ``least`` groups."""
    split = 1
    while split < 8 and blocks * split * 2 <= most and groups // (split * 2) >= least:
        split *= 2
    return split


def ring_sizes(p: ScaledPlan, rows: int) -> RingSizes:
    """Block sizes for ``rows`` tokens; measured on an H100 (benchmarks/gpu_mixed.py)."""
    groups, tiles = -(-p.k // 128), -(-p.n // 64)
    if rows <= 16:
        if tiles > 2 * SMS:
            return RingSizes(16, 8, 2, 3, 1)
        return RingSizes(16, 4, 2, 4, _split(tiles, groups, 2 * SMS, 16))
    if rows <= 64:
        bm = 32 if rows <= 32 else 64
        if 2 * SMS < tiles <= 3 * SMS:  # three blocks of a multiprocessor
            return RingSizes(bm, 4, 1, 4, 1)
        return RingSizes(bm, 4, 2, 3, _split(tiles, groups, SMS, 24))
    if tiles * -(-rows // 64) > 5 * SMS:
        return RingSizes(128, 4, 1, 4, 1)
    blocks = tiles * -(-rows // 64)
    if rows <= 128 or (blocks <= 2 * SMS and groups < 64):
        return RingSizes(64, 4, 1, 4, _split(blocks, groups, 2 * SMS, 24))
    return RingSizes(128, 4, 1, 4, _split(tiles * -(-rows // 128), groups, 2 * SMS, 24))


# Microseconds, fitted to an H100.
_START = 2.7  # of starting, beside quantizing
_BYTES_PER_US = 2.95e6
_STEP = {"fp8": 0.082, "int8": 0.082, "block": 0.145}  # of 64 rows by 64 outputs, 128 columns


def ring_us(p: ScaledPlan, rows: int) -> float:
    """Microseconds of a call: reading weights, and what multiplying adds."""
    c = ring_sizes(p, rows)
    groups, tiles = -(-p.k // 128), -(-p.n // (16 * c.warps)) * -(-rows // c.bm)
    turns = max(1.0, tiles * c.split / (2 * SMS))
    steps = turns * groups / c.split * (c.bm / 64) * (c.warps / 4)
    apart = 0.1 * (rows / 16) if rows <= 16 else _STEP[p.kind] * steps
    return _START + codes_us(rows, p.k) + p.n * p.k / _BYTES_PER_US + apart
