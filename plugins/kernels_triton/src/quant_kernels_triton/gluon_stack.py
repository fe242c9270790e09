"""With which block sizes ``gluon_experts`` runs, and what that costs; plain data, no torch.

Rows go to experts at random, so an expert has more or fewer than the mean, and its last block is
not full. The model counts the blocks that are to be expected, shares them out to the processors,
and compares that with the time of reading the weights of the experts that are met.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from quant_kernels_triton.gluon_plan import SMS, GluonPlan
from quant_kernels_triton.recipe import Recipe

__all__ = ["WAYS", "Stack", "expected_blocks", "sort_us", "stack_config", "stack_us"]

# registers of a thread, by consumers and whether rows are gathered: of a consumer, of those that
# fetch
_REGISTERS = {
    (2, False): (240, 24),
    (3, False): (160, 24),
    (4, False): (112, 24),
    (3, True): (152, 56),
    (4, True): (104, 56),
}
_SHARED = 196 * 1024  # bytes of stages


@dataclass(frozen=True, slots=True)
class Stack:
    """Block sizes: two tiles of rows, consumers (64 outputs each), whether sums are scaled, whether
    rows of x are gathered while they are fetched (or copied by expert before), how many times 64
    columns a stage holds, whether mma.sync multiplies (or wgmma), stages."""

    b1: int
    b2: int
    consumers: int
    acc: bool
    gather: bool = False
    halves: int = 1
    few: bool = False
    stages: int = 0

    @property
    def bm(self) -> int:
        """Rows of a block."""
        return self.b1 + self.b2

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of a consumer, and of one that fetches."""
        return _REGISTERS[self.consumers, self.gather]

    def fitted(self, p: GluonPlan) -> Stack:
        """With as many stages as shared memory holds."""
        stage = self.bm * 128 + self.consumers * (4096 if p.bytes else 2048)
        return replace(self, stages=min(16, _SHARED // stage) // self.halves)


# microseconds of a program for a group of 128 columns (int4, groups of 128), measured on an H100
WAYS = (
    (Stack(8, 0, 4, True, True, 2, few=True), 0.785),
    (Stack(16, 0, 4, True, True, 2, few=True), 0.80),
    (Stack(32, 0, 4, True, False, 2), 0.86),
    (Stack(32, 0, 4, True, True, 2), 0.885),
    (Stack(64, 0, 4, False, False, 2), 0.98),
    (Stack(64, 32, 3, False, False, 2), 0.98),
    (Stack(64, 32, 3, False, True, 2), 1.085),
    (Stack(128, 0, 3, False, False, 2), 1.13),
    (Stack(256, 0, 2, False), 1.39),
    (Stack(256, 32, 2, False), 1.65),
)
_TILE, _STORED = 0.8, 1.6e4  # microseconds of a tile besides, and sums that take one more
_READ = 2.8e6  # bytes a microsecond, of codes
_START = 7.5  # microseconds of a launch, and of what the last tiles wait for
_COPY, _COPY_BYTES = 2.0, 2.8e6  # the same of copying rows by expert: bytes read and written


@functools.lru_cache(maxsize=1024)
def expected_blocks(rows: int, experts: int, bm: int) -> tuple[float, float]:
    """(blocks, experts met) that are to be expected of rows spread at random: a Poisson sum."""
    mean = rows / experts
    wide = 6.0 * math.sqrt(mean) + 6.0
    total = met = 0.0
    for count in range(max(1, int(mean - wide)), int(mean + wide) + 1):
        share = math.exp(count * math.log(mean) - mean - math.lgamma(count + 1))
        total += share * -(-count // bm)
        met += share
    return experts * total, experts * met


def sort_us(rows: int) -> float:
    """Microseconds of sorting rows by expert: of ``schedule``, or of ``tally`` and ``place``."""
    return 3.5 + rows / 1700.0 if rows <= 8192 else 7.0 + rows / 3600.0


def _slower(p: GluonPlan, c: Stack) -> float:
    """What dequantizing other than int4 with one scale for 128 columns costs."""
    more = 0.3 if p.spg >= 8 or p.mode == 3 else 0.13 if p.spg > 1 else 0.0
    more += 0.14 if p.early and not c.few else 0.22 if p.bytes else 0.0
    return 1.0 + more * (1.0 if c.bm < 256 else 0.3)


def _us(p: GluonPlan, recipe: Recipe, c: Stack, unit: float, rows: int) -> float:
    blocks, met = expected_blocks(rows, recipe.experts, c.bm)
    outputs = 64 * c.consumers
    tiles = max(blocks * -(-recipe.rows // outputs) / SMS, 1.0 / recipe.groups)
    each = recipe.groups * unit * _slower(p, c) + _TILE + c.bm * outputs / _STORED
    work = tiles * each
    copy = 0.0 if c.gather else _COPY + rows * recipe.k * 4 / _COPY_BYTES
    return copy + max(work, met * recipe.weight_bytes / _READ)


@functools.lru_cache(maxsize=4096)
def _quickest(p: GluonPlan, recipe: Recipe, rows: int) -> tuple[float, Stack]:
    sums = p.spg == 1 and p.mode in (1, 2)
    held = []
    for way, unit in WAYS:
        c = way if sums or not way.acc else replace(way, acc=False)
        if p.bytes and c.few:  # not measured
            continue
        c = replace(c, halves=1) if p.bytes else c
        held.append((_us(p, recipe, c, unit, rows), c.fitted(p)))
    return min(held, key=lambda h: h[0])


def stack_config(p: GluonPlan, recipe: Recipe, rows: int) -> Stack:
    """Block sizes for ``rows`` rows spread over the experts of a stack."""
    return _quickest(p, recipe, rows)[1]


def stack_us(p: GluonPlan, recipe: Recipe, rows: int) -> float:
    """Microseconds of ``rows`` rows, sorting and copying included."""
    return _START + sort_us(rows) + _quickest(p, recipe, rows)[0]
