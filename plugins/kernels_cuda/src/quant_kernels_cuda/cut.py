"""One way to cut a call: the numbers that a launch is made of, and the memory that they need."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quant_kernels_cuda.variant import Variant

__all__ = ["Schedule", "shared_bytes", "sums_bytes", "with_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One launch of the decode kernel; the names are those of csrc/decode.cu."""

    m: int  # rows of x
    nt: int  # tiles of 8 rows that the code is compiled for
    rt: int  # tiles of 16 output rows that a warp takes together
    gpc: int  # groups of 128 per chunk
    stages: int
    cluster: int
    slice: int  # groups of 128 per block
    span: int  # groups per phase
    run: int  # log2 of the chunks that a warp takes at once (resident: stages before x, 0: half)
    batch: int  # tiles (of 16 rt rows) per barrier
    slots: int  # warps that share a tile, at most
    tiles: int
    walkers: int  # blocks or clusters that share them
    shared: int  # bytes
    kernel: str = "decode"  # or "resident": csrc/<kernel>.cu
    warps: int = 16  # of a block
    sets: int = 1  # resident: teams of ``slots`` warps; then batch counts tiles of all of them

    @property
    def phases(self) -> int:
        return -(-self.slice // self.span)

    @property
    def buffers(self) -> int:
        """Buffers for sums: with one batch nobody writes while another reads."""
        return 1 if self.batch >= self.mine else 2

    @property
    def mine(self) -> int:
        """Most tiles of a block."""
        return -(-self.tiles // self.walkers)


def shared_bytes(v: Variant, s: Schedule) -> int:
    """Shared memory of one block: the layout of csrc/decode.cu or csrc/resident.cu."""
    if s.kernel == "resident":
        return _resident_bytes(v, s)
    ring = s.warps * s.stages * s.rt * v.stage_bytes(s.gpc)
    x = s.m * (s.span * 256 + 16) + 16
    xsums = s.span * max(v.parts, 1) * s.nt * 32 if v.xsums else 0
    sums = s.buffers * s.batch * sums_bytes(s)
    outputs = s.rt * 64 * s.m
    totals = s.mine * outputs if s.span < s.slice else 0
    return (
        ring + x + xsums + sums + totals + (s.buffers * s.batch * outputs if s.cluster > 1 else 0)
    )


def with_rows(v: Variant, s: Schedule, m: int) -> Schedule:
    """The same cut for fewer rows of x."""
    s = replace(s, m=m)
    return replace(s, shared=shared_bytes(v, s))


def _resident_bytes(v: Variant, s: Schedule) -> int:
    tile = 512 * s.nt  # of sums
    working = s.slots * s.sets
    ring = working * s.stages * v.stage_bytes(s.gpc)
    xsums = working * s.gpc * max(v.parts, 1) * s.nt * 32 if v.xsums else 0
    gathered = -(-s.mine // s.cluster) * s.cluster * tile if s.cluster > 1 else 0
    return 128 + ring + xsums + 2 * s.batch * s.slots * tile + gathered


def sums_bytes(s: Schedule) -> int:
    """Bytes of the sums that the warps of decode.cu leave for one tile."""
    return s.slots * s.m * (16 * s.rt + 4) * 4
