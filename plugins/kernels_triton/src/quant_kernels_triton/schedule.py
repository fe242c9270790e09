"""Rows to experts on the device: which rows a block of a grouped product takes.

    schedule   one program per expert: counts the rows before its own, lists its own in order; the
               program that has counted last writes the blocks that all of them fill
    tally      many rows: one program per piece of rows counts those of each expert in it,
    place      and then knows where its own rows go; one program more writes the blocks
    gather     rows of x in that order
    clear      zeros in the rows of y of no expert
    combine    the rows of each token, weighted and added

Experts are read on the device: nothing waits for the host, and graphs can be captured.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["clear", "combine", "gather", "place", "schedule", "tally"]


@triton.jit
def _expert(INDEX, t, T, E):
    """Experts of rows ``t``: E for none, E + 1 behind the last row."""
    i = tl.load(INDEX + t, mask=t < T, other=0).to(tl.int32)
    i = tl.where((i < 0) | (i >= E), E, i)
    return tl.where(t < T, i, E + 1)


@triton.jit
def _blocks(counts, EXPERT, BOUNDS, BLOCKS, B, BM, BINS: tl.constexpr):
    """The blocks of at most BM rows that ``counts`` [BINS] rows of the experts fill, in order."""
    bins = tl.arange(0, BINS)
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
        _blocks(counts, EXPERT, BOUNDS, BLOCKS, B, BM, BINS)
        tl.store(ARRIVED, 0)


@triton.jit(do_not_specialize=["T", "E"])
def tally(INDEX, TALLY, T, E, BINS: tl.constexpr, BT: tl.constexpr, PDL: tl.constexpr):
    """TALLY [pieces, BINS]: how many of BT rows go to each expert, and to none (E)."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    p = tl.program_id(0)
    i = _expert(INDEX, p * BT + tl.arange(0, BT), T, E)
    tl.store(TALLY + p * BINS + tl.arange(0, BINS), tl.histogram(i, BINS))


@triton.jit(do_not_specialize=["T", "B", "E", "BM"])
def place(INDEX, TALLY, FIRST, ORDER, EXPERT, BOUNDS, COUNTS, BLOCKS, T, B, E, BM,
          BINS: tl.constexpr, BT: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr):  # fmt: skip
    """What ``schedule`` writes, from ``tally``. FIRST [pieces, BINS]: where a piece's rows go."""
    p = tl.program_id(0)
    bins = tl.arange(0, BINS)
    t = p * BT + tl.arange(0, BT)
    i = _expert(INDEX, t, T, E)
    rank = tl.zeros([BT], tl.int32)  # among the piece's rows of the same expert
    for j in tl.static_range(0, BT, 64):
        o = p * BT + j + tl.arange(0, 64)
        same = (_expert(INDEX, o, T, E)[None, :] == i[:, None]) & (o[None, :] < t[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    whole = tl.zeros([STEP, BINS], tl.int32)
    part = tl.zeros([STEP, BINS], tl.int32)
    pieces = tl.num_programs(0) - 1
    for q0 in range(0, pieces, STEP):
        q = q0 + tl.arange(0, STEP)
        h = tl.load(TALLY + q[:, None] * BINS + bins[None, :], mask=(q < pieces)[:, None], other=0)
        whole += h
        part += tl.where((q < p)[:, None], h, 0)
    counts = tl.sum(whole, 0)
    if p == pieces:
        tl.store(COUNTS + bins, counts, mask=bins <= E)
        _blocks(tl.where(bins < E, counts, 0), EXPERT, BOUNDS, BLOCKS, B, BM, BINS)
    else:
        start = tl.cumsum(counts, 0) - counts
        tl.store(FIRST + p * BINS + bins, start + tl.sum(part, 0))
        tl.debug_barrier()  # read again by other threads of this program
        at = tl.load(FIRST + p * BINS + i) + rank
        tl.store(ORDER + at, t, mask=t < T)


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
