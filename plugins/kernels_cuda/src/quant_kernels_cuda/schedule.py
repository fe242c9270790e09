"""How one call is cut: rows per launch, phases of K, blocks that share it, ring, tiles per barrier.

Pure arithmetic on sizes, so that it is the same in every process and can be tested without a GPU.
The constants were measured on an H100; they order the candidates, nothing depends on them for
correctness.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace

from quant_kernels_cuda.variant import Variant

__all__ = [
    "BUCKETS",
    "MAX_ROWS",
    "Schedule",
    "best",
    "candidates",
    "schedule",
    "shared_bytes",
    "with_rows",
]

MAX_ROWS = 16
BUCKETS = (1, 2, 4, 8, MAX_ROWS)  # largest numbers of rows of one cut
WARPS, THREADS = 16, 512
# Fitted to all cuts of four int4 layers at 1, 4, 8 and 16 rows (benchmarks/gpu_kernels_cuda.py,
# sweep): the chosen cut is within 6 % of the best in 15 of 16 cases, within 12 % in one.
_BYTES_PER_US = 22.7e3  # of weights per multiprocessor: 3 TB/s over 132
_X_BYTES_PER_US = 60e3  # of x from L2 per multiprocessor
_SHARED_BYTES_PER_US = 260e3  # to and from shared memory
_SUMS_BYTES_PER_US = 56e3  # of warps' sums, written and read
_IDLE, _PHASE_US, _CLUSTER_US, _FILL_US, _SMALL_US = 0.19, 1.6, 2.5, 0.018, 0.009
_SLOT_US = 0.02  # of the last sums, for each warp that has a part in them
# Its level against the resident kernel's: factor and microseconds, for 8 and for 16 rows.
_LEVEL = {1: (1.046, 1.0), 2: (1.117, 0.1)}
_NARROW = 1.2  # of 2 and 3 bits with 16 rows, where it is slower than the resident kernel
# The resident kernel, fitted to its cuts of five int4 layers at 4, 8 and 16 rows: of 15 choices
# between all cuts of both kernels 14 are within 4 % of the best measured, one within 6 %.
_RESIDENT_BYTES_PER_US = 23.2e3
_TURN_US, _GROUP_US, _X_RESIDENT_PER_US = 0.37, 0.144, 105e3
_RESIDENT_US, _EARLY_US = 2.2, 1.4
_X_SHORT_US, _SHORT_US = 1.5, 8.0
_JOIN_US, _JOIN_BLOCK_US, _JOIN_TILE_US = 0.55, 0.35, 0.04  # of a cluster
_AHEAD = 64 << 10  # bytes of weights on the way to a multiprocessor
_SUMS = 42 << 10  # bytes of warps' sums beyond which a batch does not grow
_RINGS = {  # (tiles that a warp takes together, groups per chunk, stages)
    False: ((1, 2, 4), (1, 2, 3), (1, 1, 4), (1, 1, 3), (2, 1, 4), (2, 1, 3)),
    True: ((1, 1, 4), (1, 1, 3)),  # 8 bits
}
_LAST_RESORT = ((1, 1, 2),)  # where shared memory holds no deeper ring


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
    run: int  # log2 of the chunks that a warp takes at once
    batch: int  # tiles (of 16 rt rows) per barrier
    slots: int  # warps that share a tile, at most
    tiles: int
    walkers: int  # blocks or clusters that share them
    shared: int  # bytes
    kernel: str = "decode"  # or "resident": csrc/<kernel>.cu
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
    ring = WARPS * s.stages * s.rt * v.stage_bytes(s.gpc)
    x = s.m * (s.span * 256 + 16) + 16
    xsums = s.span * max(v.parts, 1) * s.nt * 32 if v.xsums else 0
    sums = s.buffers * s.batch * _sums_bytes(s)
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
    ring = WARPS * s.stages * v.stage_bytes(s.gpc)
    xsums = WARPS * s.gpc * max(v.parts, 1) * s.nt * 32 if v.xsums else 0
    gathered = -(-s.mine // s.cluster) * s.cluster * tile if s.cluster > 1 else 0
    return 128 + ring + xsums + 2 * s.batch * s.slots * tile + gathered


def _sums_bytes(s: Schedule) -> int:
    return s.slots * s.m * (16 * s.rt + 4) * 4


def _estimate(v: Variant, s: Schedule) -> float:
    """Microseconds, roughly: weights, shared memory, x, and warps without work at the end."""
    per_group = v.weight_bytes / (-(-v.n // 64) * 4 * v.groups) * s.rt
    chunks = s.mine * s.phases * -(-s.span // s.gpc)
    runs = s.mine * s.phases * -(-s.span // (s.gpc << s.run))
    idle = -(-runs // WARPS) * WARPS * (1 << s.run) / chunks - 1
    read = s.mine * s.slice * per_group / _BYTES_PER_US * (1 + _IDLE * idle)
    moved = 2 * s.mine * s.slice * (per_group + s.nt * 1024) / _SHARED_BYTES_PER_US
    moved += 2 * s.mine * s.phases * _sums_bytes(s) / _SUMS_BYTES_PER_US
    us = (read**3 + moved**3) ** (1 / 3)
    us += s.m * s.slice * 256 / _X_BYTES_PER_US + _PHASE_US * (s.phases - 1)
    us += -(-s.mine // s.batch) * _CLUSTER_US * (s.cluster > 1)
    if s.gpc * s.rt == 1:  # small chunks: more bookkeeping
        us += _SMALL_US * s.mine * s.slice / WARPS
    us += _FILL_US * s.stages * s.gpc * s.rt + _SLOT_US * s.slots
    factor, more = _LEVEL[s.nt]
    if s.nt == 2 and v.bits < 4:  # instructions, not bytes
        factor *= _NARROW
    return us * factor + more


def candidates(
    v: Variant, m: int, sms: int, limit: int, clusters: tuple[int, ...]
) -> list[tuple[float, Schedule]]:
    """(estimated microseconds, launch) for cuts that fit; see ``schedule``."""
    found = _cuts(v, m, sms, limit, clusters, _RINGS[v.bits == 8])
    found += _resident_cuts(v, m, sms, limit, clusters)
    return found or _cuts(v, m, sms, limit, clusters, _LAST_RESORT)


def _cuts(
    v: Variant, m: int, sms: int, limit: int, clusters: tuple[int, ...],
    rings: tuple[tuple[int, int, int], ...],
) -> list[tuple[float, Schedule]]:  # fmt: skip
    out = []
    for cluster, (rt, gpc, stages) in itertools.product((1, 2), rings):
        tiles = -(-v.n // (16 * rt))
        walkers = min(tiles, _at_once(cluster, sms, clusters))
        slice_ = -(-v.groups // cluster)
        slice_ += -slice_ % gpc
        if walkers < 1 or (cluster - 1) * slice_ >= v.groups:
            continue
        fitting = 0
        for phases in range(1, slice_ // gpc + 1):
            span = -(-slice_ // phases)
            span += -span % gpc
            found = False
            for run in range(5):
                slots = min(WARPS, -(-span // (gpc << run)))
                if run and (gpc << run) // 2 >= span:
                    continue
                s = Schedule(m=m, nt=1 if m <= 8 else 2, rt=rt, gpc=gpc, stages=stages,
                             cluster=cluster, slice=slice_, span=span, run=run, batch=1,
                             slots=slots, tiles=tiles, walkers=walkers, shared=0)  # fmt: skip
                each = _sums_bytes(s)
                batch = s.mine if s.mine * each <= _SUMS else max(1, _SUMS // (2 * each))
                s = replace(s, batch=batch)
                s = replace(s, shared=shared_bytes(v, s))
                if s.shared <= limit:
                    found = True
                    out.append((_estimate(v, s), s))
            fitting += found
            if fitting == 2:  # more phases only cost more
                break
    return out


def _resident_estimate(v: Variant, s: Schedule) -> float:
    """Microseconds of csrc/resident.cu, roughly: weights, the turns of a warp, x, the cluster."""
    per_group = v.weight_bytes / (-(-v.n // 64) * 4 * v.groups)
    read = s.mine * s.slice * per_group / _RESIDENT_BYTES_PER_US
    work = -(-s.mine // s.sets) * (_TURN_US + s.gpc * s.nt * _GROUP_US)
    us = (read**3 + work**3) ** (1 / 3) + s.m * s.slice * 256 / _X_RESIDENT_PER_US
    us += _RESIDENT_US - _EARLY_US * (s.run > 1)
    if s.nt == 2:  # x of short calls: nothing hides it
        us += _X_SHORT_US * max(0.0, 1 - read / _SHORT_US)
    if s.cluster > 1:
        us += _JOIN_US + _JOIN_BLOCK_US * s.cluster + _JOIN_TILE_US * s.mine * s.nt
    return us


def _resident_cuts(
    v: Variant, m: int, sms: int, limit: int, clusters: tuple[int, ...]
) -> list[tuple[float, Schedule]]:
    """Cuts for csrc/resident.cu: x in registers, K over a cluster of up to 8 blocks."""
    if v.gather or v.op != "linear":
        return []
    out, nt, all_tiles = [], 1 if m <= 8 else 2, -(-v.n // 16)
    most = 2 if nt == 2 else 3  # registers hold more groups of fewer rows
    for cluster, gpc in itertools.product(range(1, 9), range(1, most + 1)):
        slice_ = -(-v.groups // cluster)
        slots = -(-slice_ // gpc)
        walkers = min(all_tiles, _at_once(cluster, sms, clusters))
        if walkers < 1 or slots > WARPS or (cluster - 1) * slice_ >= v.groups:
            continue
        stages = 1 + max(2, -(-_AHEAD // (WARPS * v.stage_bytes(gpc))))
        many = cluster == 1 and gpc < 3
        s = Schedule(m=m, nt=nt, rt=1, gpc=gpc, stages=stages + many, cluster=cluster,
                     slice=slice_, span=slice_, run=1, batch=1, slots=slots, tiles=all_tiles,
                     walkers=walkers, shared=0, kernel="resident", sets=WARPS // slots)  # fmt: skip
        if many and nt == 1 and s.mine >= 12:
            s = replace(s, run=2)
        # tiles of a set per batch, and stages; less where they do not fit
        wanted = (2, 1) if nt == 1 else (1,) if cluster == 1 else (4, 2, 1)
        for per, stages in (*((per, s.stages) for per in wanted), (1, 3)):
            s = replace(s, batch=per * s.sets, stages=stages)
            s = replace(s, shared=shared_bytes(v, s))
            if s.shared <= limit:
                out.append((_resident_estimate(v, s), s))
                break
    return out


def _at_once(cluster: int, sms: int, clusters: tuple[int, ...]) -> int:
    """Clusters (blocks, for 1) that run at once on ``sms`` multiprocessors; 0: none."""
    if cluster == 1:
        return sms
    return min(sms // cluster, clusters[cluster - 2]) if len(clusters) > cluster - 2 else 0


def schedule(v: Variant, m: int, sms: int, limit: int, clusters: tuple[int, ...]) -> Schedule:
    """The launch for ``m`` rows, or for as many of them as fit: ``Schedule.m`` <= m.

    Args:
        m: rows of x, 1 or more.
        sms: multiprocessors (for experts: those that one row may use).
        limit: bytes of shared memory that a block may have.
        clusters: how many clusters of 2, 3, ... blocks run at once; empty where there are none.

    Raises:
        ValueError: a single row does not fit.
    """
    return best(v, m, sms, limit, clusters)[1]


@functools.lru_cache(maxsize=4096)
def best(
    v: Variant, m: int, sms: int, limit: int, clusters: tuple[int, ...]
) -> tuple[float, Schedule]:
    """(estimated microseconds, launch) of ``schedule``."""
    m = min(m, MAX_ROWS)
    while m:
        found = candidates(v, m, sms, limit, clusters)
        if found:
            return min(found, key=lambda f: f[0])
        m //= 2
    raise ValueError(f"one row of {v.k} columns does not fit {limit} bytes of shared memory")
