"""Block sizes of scaled_ring and scaled_ws, and what they take; plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from quant_core.kernels.base import ANY_ROWS
from quant_kernels_triton.scaled_plan import SMS, ScaledPlan, codes_us, product_us

__all__ = ["MOST", "RingSizes", "WideSizes", "ring_sizes", "ring_us"]

MOST = {"fp8": ANY_ROWS, "int8": ANY_ROWS, "block": 128}
"""Rows beyond which torch's products are faster everywhere."""


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
    """Block sizes of scaled_ws: tokens, stages (an even number; of a pair of four), whether two
    warpgroups share a tile of 64 outputs, tiles that share weights in cache."""

    bm: int
    stages: int
    pair: bool = False
    together: int = 16

    @property
    def outputs(self) -> int:
        return 64 if self.pair else 128


def _split(blocks: int, groups: int, most: int, least: int) -> int:
    """Parts of K: at most ``most`` blocks, each of at least ``least`` groups."""
    split = 1
    while split < 8 and blocks * split * 2 <= most and groups // (split * 2) >= least:
        split *= 2
    return split


# Microseconds, fitted to an H100.
_START = 2.7  # of starting, beside quantizing
_BYTES_PER_US = 2.95e6
_STEP = {"fp8": 0.082, "int8": 0.082, "block": 0.12}  # of 64 rows by 64 outputs, 128 columns
_DEEP = 0.03  # the same behind six stages
_PAIR_64, _PAIR_128 = WideSizes(64, 12, pair=True), WideSizes(128, 8, pair=True)
_FP8 = {
    _PAIR_64: (0.217, 0.217),
    _PAIR_128: (0.136, 0.339),
    WideSizes(128, 6): (0.204, 0.51),
    WideSizes(256, 4): (0.583, 0.84),
}
_WIDE = {  # what registers hold: microseconds of 128 columns, alone and on a full card
    "fp8": _FP8,
    "int8": _FP8 | {_PAIR_128: (0.125, 0.313), WideSizes(256, 4): (0.5, 0.8)},
    "block": {WideSizes(64, 8): (0.276, 0.485), _PAIR_64: (0.096, 0.241)},
}


def _wide_us(p: ScaledPlan, c: WideSizes, rows: int) -> float:
    us = product_us(p.n, p.k, rows, (c.outputs, c.bm), *_WIDE[p.kind][c])
    tiles = -(-p.n // c.outputs) * -(-rows // c.bm)
    return us * (1.1 if tiles > 8 * SMS else 1.0)  # the card lowers its clock


def ring_sizes(p: ScaledPlan, rows: int) -> RingSizes | WideSizes:
    """Block sizes for ``rows`` tokens; measured on an H100 (benchmarks/gpu_mixed.py)."""
    groups, tiles = -(-p.k // 128), -(-p.n // 64)
    crowded = 2 * SMS < tiles <= 3 * SMS  # small blocks: three of a multiprocessor
    if rows > 64:
        return min(_WIDE[p.kind], key=lambda c: _wide_us(p, c, rows))
    if rows <= 16:
        if tiles > 2 * SMS:
            return RingSizes(16, 8, 2, 3, 1)
        if tiles <= SMS and p.kind != "block":
            return RingSizes(16, 4, 2, 8, _split(tiles, groups, SMS // 2, 16))
        return RingSizes(16, 4, 2, 4, _split(tiles, groups, 2 * SMS, 16))
    bm = 32 if rows <= 32 else 64
    if crowded and bm == 64:
        return RingSizes(64, 4, 1, 4, 1)
    if tiles > SMS:
        return RingSizes(bm, 4, 2, 4 if bm == 32 and not crowded else 3, 1)
    if p.kind == "block":
        return RingSizes(bm, 4, 2, 4, _split(tiles, groups, SMS, 24))
    return RingSizes(bm, 4, 2, 6, _split(tiles, groups, SMS // 2, 24))


def ring_us(p: ScaledPlan, rows: int) -> float:
    """Microseconds of a call: reading weights, and what multiplying adds."""
    c = ring_sizes(p, rows)
    groups, start = -(-p.k // 128), _START + codes_us(rows, p.k)
    if isinstance(c, WideSizes):
        return start + (0.9 if p.kind == "block" else 0.2) + _wide_us(p, c, rows)
    tiles = -(-p.n // (16 * c.warps)) * -(-rows // c.bm)
    filled = max(1.0, tiles * c.split / (2 * SMS))
    steps = filled * groups / c.split * (c.bm / 64) * (c.warps / 4)
    each = _DEEP if c.stages == 6 else _STEP[p.kind]
    apart = 0.1 * (rows / 16) if rows <= 16 else each * steps
    return start + p.n * p.k / _BYTES_PER_US + apart
