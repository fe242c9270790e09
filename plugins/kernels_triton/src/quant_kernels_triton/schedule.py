"""Rows to experts on the device: which rows a block of a grouped product takes.

    schedule   one program per expert: counts the rows before its own, lists its own in order; the
               program that has counted last writes the blocks that all of them fill
    gather     rows of x in that order
    clear      zeros in the rows of y of no expert
    combine    the rows of each token, weighted and added

Experts are read on the device: nothing waits for the host, and graphs can be captured.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["clear", "combine", "gather", "schedule"]


@triton.jit
def _expert(INDEX, t, T, E):
    """Experts of rows ``t``: E for none, E + 1 behind the last row."""
    i = tl.load(INDEX + t, mask=t < T, other=0).to(tl.int32)
    i = tl.where((i < 0) | (i >= E), E, i)
    return tl.where(t < T, i, E + 1)


@triton.jit(do_not_specialize=["T", "B", "E", "BM"])
def schedule(INDEX, ORDER, EXPERT, BOUNDS, COUNTS, BLOCKS, ARRIVED, T, B, E, BM,
             BINS: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """ORDER [T]: rows by expert. EXPERT [B], BOUNDS [B, 2]: blocks of at most BM rows of ORDER.

    Rows of no expert come last and are in no block; blocks too many have the expert -1. BLOCKS [1]:
    how many there are; COUNTS [E + 1]: rows of each expert, and of none. ARRIVED [1] is zero before
    and after.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    e = tl.program_id(0)  # E stands for "no expert"
    i = _expert(INDEX, tl.arange(0, BT), T, E)
    before = (i < e).to(tl.int32)
    mine = (i == e).to(tl.int32)
    for t0 in range(BT, T, BT):
        more = _expert(INDEX, t0 + tl.arange(0, BT), T, E)
        before += (more < e).to(tl.int32)
        mine += (more == e).to(tl.int32)
    tl.store(COUNTS + e, tl.sum(mine, 0))
    arrived = tl.atomic_add(ARRIVED, 1, sem="acq_rel")
    at = tl.sum(before, 0)
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        hit = (i == e).to(tl.int32)
        tl.store(ORDER + at + tl.cumsum(hit, 0) - 1, t, mask=hit != 0)
        if T > BT:
            at += tl.sum(hit, 0)
            i = _expert(INDEX, t + BT, T, E)
    if arrived == E:
        bins = tl.arange(0, BINS)
        counts = tl.load(COUNTS + bins, mask=bins < E, other=0, cache_modifier=".cg")
        start = tl.cumsum(counts, 0) - counts
        blocks = (counts + (BM - 1)) // BM
        b = tl.cumsum(blocks, 0) - blocks
        total = tl.sum(blocks, 0)
        for j in range(0, tl.max(blocks, 0)):
            here = j < blocks
            first = start + j * BM
            tl.store(EXPERT + b + j, bins, mask=here)
            tl.store(BOUNDS + 2 * (b + j), first, mask=here)
            last = tl.minimum(first + BM, start + counts)
            tl.store(BOUNDS + 2 * (b + j) + 1, last, mask=here)
        for b0 in range(total, B, BINS):
            rest = b0 + bins
            tl.store(EXPERT + rest, -1, mask=rest < B)
            tl.store(BOUNDS + 2 * rest, 0, mask=rest < B)
            tl.store(BOUNDS + 2 * rest + 1, 0, mask=rest < B)
        tl.store(BLOCKS, total)
        tl.store(ARRIVED, 0)


@triton.jit(do_not_specialize=["T", "TOP", "E"])
def gather(X, ORDER, COUNTS, XS, T, K, TOP, E, BR: tl.constexpr, BK: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """XS [T, K]: row ORDER[i] // TOP of X for each i of some expert."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    held = T - tl.load(COUNTS + E)
    for j in range(BR):
        i = tl.program_id(0) * BR + j
        if i < held:
            t = tl.load(ORDER + i) // TOP
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK)
                v = tl.load(X + t.to(tl.int64) * K + k, mask=k < K)
                tl.store(XS + i.to(tl.int64) * K + k, v, mask=k < K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["T", "E"])
def clear(INDEX, Y, T, N, E, BT: tl.constexpr, BN: tl.constexpr):
    """Y [T, N]: zeros in rows whose expert is not one of E."""
    for j in range(BT):
        t = tl.program_id(0) * BT + j
        if t < T:
            i = tl.load(INDEX + t)
            if (i < 0) | (i >= E):
                for n0 in range(0, N, BN):
                    n = n0 + tl.arange(0, BN)
                    zero = tl.zeros([BN], tl.float32).to(Y.dtype.element_ty)
                    tl.store(Y + t.to(tl.int64) * N + n, zero, mask=n < N)


@triton.jit
def combine(Y, W, OUT, N, TOP: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr):
    """OUT [T, N]: rows t TOP .. of Y, each times its weight of W [T, TOP], added in float32."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    total = tl.zeros([BN], tl.float32)
    for j in tl.static_range(TOP):
        w = tl.load(W + t * TOP + j).to(tl.float32)
        y = tl.load(Y + (t * TOP + j) * N + n, mask=n < N, other=0.0)
        total += w * y.to(tl.float32)
    tl.store(OUT + t * N + n, total.to(OUT.dtype.element_ty), mask=n < N)
