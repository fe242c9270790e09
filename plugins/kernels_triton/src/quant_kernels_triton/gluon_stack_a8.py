"""With which block sizes ``gluon_experts_a8`` runs, and what that costs; plain data, no torch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from quant_kernels_triton.gluon_plan import SMS
from quant_kernels_triton.gluon_stack import expected_blocks, sort_us
from quant_kernels_triton.mixed_plan import MixedPlan
from quant_kernels_triton.scaled_plan import codes_us

__all__ = ["WAYS", "StackA8", "stack_a8_config", "stack_a8_us", "ways"]

_SHARED = 200 * 1024  # bytes of stages


@dataclass(frozen=True, slots=True)
class StackA8:
    """Block sizes: pieces of rows, rows of each, rows behind them, consumers (64 outputs each),
    whether pieces take turns with two buffers of sums, stages of 128 columns."""

    pieces: int
    rows: int
    rest: int
    consumers: int
    turns: bool = True
    stages: int = 0

    @property
    def bm(self) -> int:
        """Rows of a block."""
        return self.pieces * self.rows + self.rest

    @property
    def registers(self) -> int:
        """Of a thread that multiplies."""
        return 240 if self.consumers == 2 else 112

    def fitted(self, p: MixedPlan) -> StackA8:
        """With as many stages as shared memory holds."""
        stage = self.bm * 128 + self.consumers * (8192 if p.bytes else 4096)
        return replace(self, stages=min(8, _SHARED // stage))


# microseconds of a program for 128 columns (fp8, a scale per row), measured on an H100
WAYS = (
    (StackA8(1, 16, 0, 4), 0.40),
    (StackA8(1, 32, 0, 4), 0.50),
    (StackA8(1, 64, 0, 4), 1.05),
    (StackA8(2, 64, 0, 2), 0.555),
    (StackA8(2, 64, 64, 2), 0.74),
    (StackA8(2, 128, 0, 2, False), 0.97),
    (StackA8(4, 64, 0, 2), 0.94),
    (StackA8(4, 64, 32, 2), 1.15),
)
_READ = 3.05e6  # bytes a microsecond, of codes and rows
_APART = 0.15  # of the shorter of reading and multiplying, what the other does not hide
_TILE = 2.5 / 36864  # microseconds of storing a sum: 128 outputs of 288 rows take 2.5
_START = 7.5  # microseconds of a launch, and of what the last tiles wait for


def _slower(p: MixedPlan) -> float:
    """What other weights than fp8 cost: int4 and fp4 are taken apart, integers have no halves."""
    return {"int4": 1.08, "fp4": 1.08, "int8": 0.83}.get(p.kind, 1.0)


def _us(p: MixedPlan, c: StackA8, unit: float, rows: int) -> float:
    r = p.recipe
    blocks, met = expected_blocks(rows, r.experts, c.bm)
    tiles = max(blocks * -(-r.rows // (64 * c.consumers)) / SMS, 1.0 / r.groups)
    work = tiles * (r.groups * unit * _slower(p) + _TILE * c.bm * 64 * c.consumers)
    read = (met * r.weight_bytes + rows * (r.k + 2 * r.n)) / _READ
    return max(work, read) + _APART * min(work, read)


@functools.cache
def ways() -> Sequence[tuple[StackA8, float]]:
    """Those of ``WAYS`` that the installed Triton compiles without spilling sums.

    3.6 does all of them; 3.8 needs more registers for four pieces, and its wgmma would wait.
    """
    from importlib import metadata

    try:
        version = tuple(int(n) for n in metadata.version("triton").split(".")[:2])
    except metadata.PackageNotFoundError:  # nothing is run
        return WAYS
    return WAYS if version <= (3, 6) else [w for w in WAYS if w[0].pieces < 4]


@functools.lru_cache(maxsize=4096)
def _quickest(p: MixedPlan, rows: int) -> tuple[float, StackA8]:
    held = [(_us(p, c, unit, rows), c.fitted(p)) for c, unit in ways()]
    return min(held, key=lambda h: h[0])


def stack_a8_config(p: MixedPlan, rows: int) -> StackA8:
    """Block sizes for ``rows`` rows spread over the experts of a stack."""
    return _quickest(p, rows)[1]


def stack_a8_us(p: MixedPlan, rows: int) -> float:
    """Microseconds of ``rows`` rows, sorting and quantizing included."""
    return _START + sort_us(rows) + codes_us(rows, p.recipe.k) + _quickest(p, rows)[0]
