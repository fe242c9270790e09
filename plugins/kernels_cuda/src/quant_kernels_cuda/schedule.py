"""How one call is cut: rows per launch, blocks that share K, depth of the ring, tiles per barrier.

Pure arithmetic on sizes, so that it is the same in every process and can be tested without a GPU.
The constants were measured on an H100; they order the candidates, nothing depends on them for
correctness.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from quant_kernels_cuda.variant import Variant

__all__ = ["MAX_ROWS", "Schedule", "candidates", "schedule", "shared_bytes"]

MAX_ROWS = 16
WARPS, PITCH, THREADS = 16, 20, 512
_BYTES_PER_US = 22.7e3  # of weights per multiprocessor, 3 TB/s over 132
_X_BYTES_PER_US = 50e3  # of x from L2 per multiprocessor
_CLUSTER_US = 0.6  # a round of sums through distributed shared memory


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One launch of the decode kernel."""

    m: int  # rows of x
    nt: int  # tiles of 8 rows that the code is compiled for
    gpc: int  # groups of 128 per chunk
    stages: int
    cluster: int
    slice: int  # groups of 128 per block
    batch: int  # tiles per barrier
    slots: int  # warps that share a tile, at most
    blocks: int
    shared: int  # bytes


def shared_bytes(
    v: Variant, m: int, gpc: int, stages: int, cluster: int, slice_: int, batch: int
) -> int:
    """Shared memory of one block: the layout of csrc/decode.cu."""
    nt = 1 if m <= 8 else 2
    slots = min(WARPS, -(-slice_ // gpc))
    ring = WARPS * stages * v.stage_bytes(gpc)
    x = m * (slice_ * 256 + 16) + 16
    xsums = slice_ * max(v.parts, 1) * nt * 32 if v.xsums else 0
    sums = 2 * batch * slots * m * PITCH * 4
    return ring + x + xsums + sums + (2 * THREADS * 4 if cluster > 1 else 0)


def candidates(
    v: Variant, m: int, sms: int, limit: int, cluster_max: int
) -> list[tuple[float, Schedule]]:
    """(estimated microseconds, launch) for every cut that fits; see ``schedule``."""
    tiles, groups = -(-v.n // 16), v.groups
    out = []
    rings = ((2, 4), (2, 3), (1, 4), (1, 3)) if v.bits <= 4 else ((1, 4), (1, 3))
    for cluster in (1, 2, 4, 8):
        if cluster > cluster_max:
            break
        walkers = min(tiles, sms // cluster)
        for rank, (gpc, stages) in enumerate(rings):
            slice_ = -(-groups // cluster)
            slice_ += -slice_ % gpc
            if walkers < 1 or (cluster - 1) * slice_ >= groups:
                continue
            mine = -(-tiles // walkers)
            batch = min(mine, THREADS // 16 // m)
            while batch > 1 and shared_bytes(v, m, gpc, stages, cluster, slice_, batch) > limit:
                batch -= 1
            shared = shared_bytes(v, m, gpc, stages, cluster, slice_, batch)
            if shared > limit:
                continue
            weights = mine * slice_ * (v.weight_bytes / (-(-v.n // 64) * 4 * groups))
            us = weights / _BYTES_PER_US + m * slice_ * 256 / _X_BYTES_PER_US
            us += (-(-mine // batch)) * (_CLUSTER_US if cluster > 1 else 0.05) + 0.1 * rank
            s = Schedule(m=m, nt=1 if m <= 8 else 2, gpc=gpc, stages=stages, cluster=cluster,
                         slice=slice_, batch=batch, slots=min(WARPS, slice_ // gpc),
                         blocks=walkers * cluster, shared=shared)  # fmt: skip
            out.append((us, s))
    return out


@functools.lru_cache(maxsize=4096)
def schedule(v: Variant, m: int, sms: int, limit: int, cluster_max: int) -> Schedule:
    """The launch for ``m`` rows, or for as many of them as fit: ``Schedule.m`` <= m.

    Args:
        m: rows of x, 1 or more.
        sms: multiprocessors (for experts: those that one row may use).
        limit: bytes of shared memory that a block may have.
        cluster_max: most blocks of a cluster; 1 where the device has none.

    Raises:
        ValueError: a single row does not fit.
    """
    m = min(m, MAX_ROWS)
    while m:
        found = candidates(v, m, sms, limit, cluster_max)
        if found:
            return min(found, key=lambda f: f[0])[1]
        m //= 2
    raise ValueError(f"one row of {v.k} columns does not fit {limit} bytes of shared memory")
