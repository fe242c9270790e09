"""Rows to experts on the device: which rows a block of a grouped product takes.

    schedule   one program per expert: counts all rows by expert, finds where its own begin, lists
               them in order, and writes the blocks that they fill
    clear      zeros for rows of no expert

Both read the expert indices only, so nothing waits for the host and graphs can be captured.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["clear", "schedule"]


@triton.jit(do_not_specialize=["T", "B"])
def schedule(INDEX, ORDER, EXPERT, BOUNDS, T, B, E: tl.constexpr, BINS: tl.constexpr,
             BM: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """ORDER [T]: rows by expert. EXPERT [B], BOUNDS [B, 2]: blocks of at most BM rows of ORDER.

    Rows of no expert come last and are in no block; blocks too many have the expert -1.
    """
    e = tl.program_id(0)  # E stands for "no expert"
    bins = tl.arange(0, BINS)
    counts = tl.zeros([BINS], tl.int32)
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        i = tl.load(INDEX + t, mask=t < T, other=0).to(tl.int32)
        i = tl.where((i < 0) | (i >= E), E, i)
        i = tl.where(t < T, i, BINS - 1)  # the last bin is no expert's
        counts += tl.histogram(i, BINS)
    counts = tl.where(bins <= E, counts, 0)
    start = tl.sum(tl.where(bins < e, counts, 0), 0)
    mine = tl.sum(tl.where(bins == e, counts, 0), 0)
    blocks = tl.where(bins < E, (counts + (BM - 1)) // BM, 0)
    b = tl.sum(tl.where(bins < e, blocks, 0), 0)
    at = start
    for t0 in range(0, T, BT):
        t = t0 + tl.arange(0, BT)
        i = tl.load(INDEX + t, mask=t < T, other=0).to(tl.int32)
        i = tl.where((i < 0) | (i >= E), E, i)
        hit = ((i == e) & (t < T)).to(tl.int32)
        tl.store(ORDER + at + tl.cumsum(hit, 0) - 1, t, mask=hit != 0)
        at += tl.sum(hit, 0)
    if e == E:
        for j in range(b, B):
            tl.store(EXPERT + j, -1)
            tl.store(BOUNDS + 2 * j, 0)
            tl.store(BOUNDS + 2 * j + 1, 0)
    else:
        for j in range(0, (mine + BM - 1) // BM):
            first = start + j * BM
            tl.store(EXPERT + b + j, e)
            tl.store(BOUNDS + 2 * (b + j), first)
            tl.store(BOUNDS + 2 * (b + j) + 1, tl.minimum(first + BM, start + mine))


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
