"""Which cuts a call can take, and the one to take: see ``cut.py`` and ``estimate.py``.

Pure arithmetic on sizes, so that it is the same in every process and can be tested without a GPU.
The estimates order the candidates; nothing depends on them for correctness.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import replace

from quant_kernels_cuda.cut import Schedule, shared_bytes, sums_bytes, with_rows
from quant_kernels_cuda.estimate import estimate
from quant_kernels_cuda.variant import Variant

__all__ = ["BUCKETS", "MAX_ROWS", "best", "candidates", "schedule", "with_rows"]

MAX_ROWS = 16
BUCKETS = (1, 2, 4, 8, MAX_ROWS)  # largest numbers of rows of one cut
_WARPS = (16, 20)  # of a block of resident.cu: more have too few registers
_DECODE_WARPS = (16,)  # of decode.cu
_BYTES_WARPS = (16, 32)  # the same for codes of 8 bits, up to 8 rows
_SHALLOW, _DEEP = (3, 1), (4, 2)  # stages, and those of them that are asked for before x
_HALF, _HALF_SHALLOW = (2, 0), (3, 0)  # half of a stage before x
_RESIDENT = {  # by ``nt``: groups in registers, most warps, rings
    1: ((1, 20, (_SHALLOW,)), (2, 20, (_SHALLOW, _DEEP)), (3, 16, (_SHALLOW,)), (4, 16, (_HALF,))),
    2: ((1, 20, (_SHALLOW,)), (2, 16, (_SHALLOW, _DEEP))),
}
_SUMS = 42 << 10  # bytes of warps' sums beyond which a batch does not grow
_RINGS = {  # (tiles that a warp takes together, groups per chunk, stages)
    False: ((1, 2, 3), (1, 1, 3), (2, 1, 3)),
    True: ((1, 1, 3),),  # 8 bits
}
_LAST_RESORT = ((1, 1, 2),)  # where shared memory holds no deeper ring


def candidates(
    v: Variant, m: int, sms: int, limit: int, clusters: tuple[int, ...]
) -> list[tuple[float, Schedule]]:
    """(estimated microseconds, launch) for cuts that fit; see ``schedule``."""
    found = [
        *_cuts(v, m, sms, limit, clusters, _RINGS[v.bits == 8]),
        *_resident_cuts(v, m, sms, limit, clusters),
    ]
    found = found or list(_cuts(v, m, sms, limit, clusters, _LAST_RESORT))
    return [(estimate(v, s), s) for s in found]


def _cuts(
    v: Variant, m: int, sms: int, limit: int, clusters: tuple[int, ...],
    rings: tuple[tuple[int, int, int], ...],
) -> Iterator[Schedule]:  # fmt: skip
    nt = 1 if m <= 8 else 2
    many = v.bits == 8 and nt == 1 and v.op == "linear"  # experts were not measured
    counts = _BYTES_WARPS if many else _DECODE_WARPS
    for cluster, (rt, gpc, stages), warps in itertools.product((1, 2), rings, counts):
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
                slots = min(warps, -(-span // (gpc << run)))
                if run and (gpc << run) // 2 >= span:
                    continue
                s = Schedule(m=m, nt=nt, rt=rt, gpc=gpc, stages=stages,
                             cluster=cluster, slice=slice_, span=span, run=run, batch=1,
                             slots=slots, tiles=tiles, walkers=walkers, shared=0,
                             warps=warps)  # fmt: skip
                each = sums_bytes(s)
                batch = s.mine if s.mine * each <= _SUMS else max(1, _SUMS // (2 * each))
                s = replace(s, batch=batch)
                s = replace(s, shared=shared_bytes(v, s))
                if s.shared <= limit:
                    found = True
                    yield s
            fitting += found
            if fitting == 2:  # more phases only cost more
                break


def _resident_cuts(
    v: Variant, m: int, sms: int, limit: int, clusters: tuple[int, ...]
) -> Iterator[Schedule]:
    """Cuts for csrc/resident.cu: x in registers, K over a cluster of up to 8 blocks."""
    if v.gather or v.op != "linear":
        return
    nt, tiles = 1 if m <= 8 else 2, -(-v.n // 16)
    fp4 = dict(v.defines)["IN_WEIGHT"] == "1" and v.bits == 4
    for cluster, (gpc, most, rings) in itertools.product(range(1, 9), _RESIDENT[nt]):
        if gpc == 4 and not fp4:  # what has the registers, and arithmetic enough to gain
            continue
        slice_ = -(-v.groups // cluster)
        slots = -(-slice_ // gpc)
        walkers = min(tiles, _at_once(cluster, sms, clusters))
        if walkers < 1 or slots > most or (cluster - 1) * slice_ >= v.groups:
            continue
        if fp4 and gpc in (2, 3):
            rings = (*rings, _HALF_SHALLOW)
        for sets, (stages, run) in itertools.product(range(1, most // slots + 1), rings):
            working = slots * sets
            if sets > 1 and working < 12:
                continue
            s = Schedule(m=m, nt=nt, rt=1, gpc=gpc, stages=stages, cluster=cluster,
                         slice=slice_, span=slice_, run=run, batch=1, slots=slots, tiles=tiles,
                         walkers=walkers, shared=0, kernel="resident", sets=sets,
                         warps=next(w for w in _WARPS if w >= working))  # fmt: skip
            # the same with the groups of fewer warps dealt to all of a block's first warps
            spread = min(_WARPS[0] // sets, slice_)
            for one in (s, replace(s, slots=spread))[: 2 if spread > slots else 1]:
                # tiles of a set per batch, as many as fit
                for per in (2, 1) if nt == 1 else (1,) if cluster == 1 else (4, 3, 2, 1):
                    one = replace(one, batch=per * one.sets)
                    one = replace(one, shared=shared_bytes(v, one))
                    if one.shared <= limit:
                        yield one
                        break


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
