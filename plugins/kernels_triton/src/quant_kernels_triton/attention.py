"""Attention of one new token per sequence over a float cache of keys and values.

    y[b, h] = sum_n softmax_n(scale q[b, h] . k[b, n] + mask[n]) v[b, n]      one q per sequence

A program takes all heads that share one cache head, so each key and value is read once, and every
``SPLITS``-th block of BN positions, beginning with its own: however far a static cache is filled,
programs have equal shares. Running maxima as in flash attention, sums in float32; the weights enter
the second product as a sum of two 16-bit numbers, so that the output is rounded once. With several
splits each leaves its sums, and ``combine`` adds them in a fixed order: results repeat bit for bit.

``STEP`` is a whole decode step of attention from the joined product of q, k and v, one row each:

    row of QKV    q_0 .. q_H-1 | k_0 .. k_HK-1 | v_0 .. v_HK-1        D features each
    rotated       x cos + turned(x) sin,  turned = (-x[R/2:R], x[:R/2]), features from R on as they
                  are; products and sum are rounded, as torch's operators do

The new key and value go to one position of the cache, and count for the token itself; the cache is
read before that position only, so nobody waits for the write.

On Hopper a program starts while the kernel before it still runs and lets the next one start at once
(programmatic dependent launch): a following product of packed weights reads ahead in that time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["attend", "combine"]


@triton.jit
def _turned(at, head, d, live, cos, sin, D: tl.constexpr, R: tl.constexpr):
    """Rows ``head`` of D features at ``at``, rotated."""
    keep = live[:, None] & (d < D)[None, :]
    turns = d < R
    x = tl.load(at + head[:, None] * D + d[None, :], mask=keep, other=0.0)
    other = tl.where(d < R // 2, d + R // 2, tl.where(turns, d - R // 2, d))
    t = tl.load(at + head[:, None] * D + other[None, :], mask=keep, other=0.0).to(tl.float32)
    t = tl.where(d < R // 2, -t, t)
    act = x.dtype
    y = (x.to(tl.float32) * cos[None, :]).to(act).to(tl.float32)
    y = (y + (t * sin[None, :]).to(act).to(tl.float32)).to(act)
    return tl.where(turns[None, :], y, x)


@triton.jit(do_not_specialize=[
    "scale", "L", "SPLITS", "HK", "sqb", "sqh", "skb", "skh", "skn", "svb", "svh", "svn", "smb",
    "smh", "smn", "scb", "sab",
])  # fmt: skip
def attend(Q, K, V, MASK, COS, SIN, AT, Y, PART, scale, L, SPLITS, HK,
           sqb, sqh, skb, skh, skn, svb, svh, svn, smb, smh, smn, scb, sab,
           G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, BG: tl.constexpr,
           BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr, KIND: tl.constexpr,
           PER_HEAD: tl.constexpr, STEP: tl.constexpr, SPLIT: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """See the module's docstring. Program (split, sequence and cache head).

    Strides of Q, K, V are in units of 16 elements: their rows are aligned.
    KIND: 0 no mask, 1 bytes (0 hides), 2 floats that are added.
    STEP: 0 no step, 1 the new token's position is AT, 2 it is the last one.
    """
    split = tl.program_id(0)
    b = (tl.program_id(1) // HK).to(tl.int64)
    hk = (tl.program_id(1) % HK).to(tl.int64)
    g = tl.arange(0, BG)
    d = tl.arange(0, BD)
    dv = tl.arange(0, BDV)
    live = g < G
    head = hk * G + g
    K += (b * skb + hk * skh) * 16
    V += (b * svb + hk * svh) * 16
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    top = tl.full([BG], float("-inf"), tl.float32)
    total = tl.zeros([BG], tl.float32)
    acc = tl.zeros([BG, BDV], tl.float32)
    stop = L
    if STEP:
        new = L - 1
        if STEP == 1:
            new = tl.load(AT + b * sab).to(tl.int32)
        stop = tl.minimum(new, L)
        row = Q + b * sqb * 16
        cos = tl.load(COS + b * scb + d, mask=d < R, other=1.0).to(tl.float32)
        sin = tl.load(SIN + b * scb + d, mask=d < R, other=0.0).to(tl.float32)
        q = _turned(row, head, d, live, cos, sin, D, R)
        if split == 0:
            one = tl.zeros([BG], tl.int64) + hk
            key = _turned(row + HK * G * D, one, d, live, cos, sin, D, R)
            value = tl.load(row + (HK * (G + 1) + hk) * D + dv, mask=dv < DV, other=0.0)
            first = (g == 0)[:, None] & (d < D)[None, :] & (new < L)
            here = new.to(tl.int64) * 16
            tl.store(K + here * skn + d[None, :] + tl.zeros([BG, 1], tl.int32), key, mask=first)
            tl.store(V + here * svn + dv, value, mask=(dv < DV) & (new < L))
            top = tl.sum(q.to(tl.float32) * key.to(tl.float32), 1) * scale
            if KIND:
                at = MASK + b * smb + head * smh + new.to(tl.int64) * smn
                m = tl.load(at, mask=live, other=0)
                if KIND == 2:
                    top += m.to(tl.float32)
                else:
                    top = tl.where(m != 0, top, float("-inf"))
            total = tl.where(top > float("-inf"), 1.0, 0.0)
            acc += value.to(tl.float32)[None, :] * total[:, None]
    else:
        keep = live[:, None] & (d < D)[None, :]
        q = tl.load(Q + (b * sqb + head[:, None] * sqh) * 16 + d[None, :], mask=keep, other=0.0)
    for n0 in range(split * BN, stop, SPLITS * BN):
        n = n0 + tl.arange(0, BN)
        seen = live[:, None] & (n < stop)[None, :]
        column = n < stop
        if KIND and not PER_HEAD:
            shown = tl.load(MASK + b * smb + n.to(tl.int64) * smn, mask=column, other=0)
            column &= (shown != 0) if KIND == 1 else (shown > float("-inf"))
            seen &= column[None, :]
        if KIND and PER_HEAD:
            where = MASK + b * smb + head[:, None] * smh + n[None, :].to(tl.int64) * smn
            shown = tl.load(where, mask=seen, other=0)
            seen &= (shown != 0) if KIND == 1 else (shown > float("-inf"))
            column = tl.max(seen.to(tl.int32), 0) > 0
        known = (d < D)[:, None] & column[None, :]
        k = tl.load(K + n[None, :].to(tl.int64) * skn * 16 + d[:, None], mask=known, other=0.0)
        s = tl.dot(q, k) * scale
        if KIND == 2:
            s += shown.to(tl.float32) if PER_HEAD else shown.to(tl.float32)[None, :]
        s = tl.where(seen, s, float("-inf"))
        above = tl.maximum(top, tl.max(s, 1))
        base = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp2((s - base[:, None]) * 1.4426950408889634)
        less = tl.exp2((top - base) * 1.4426950408889634)
        valued = column[:, None] & (dv < DV)[None, :]
        v = tl.load(V + n[:, None].to(tl.int64) * svn * 16 + dv[None, :], mask=valued, other=0.0)
        high = p.to(v.dtype)
        low = (p - high.to(tl.float32)).to(v.dtype)
        acc = tl.dot(low, v, tl.dot(high, v, acc * less[:, None]))
        total = total * less + tl.sum(p, 1)
        top = above
    heads = HK * G
    row = b * heads + head
    if SPLIT:
        at = row * SPLITS + split
        tl.store(PART + at[:, None] * DV + dv[None, :], acc,
                 mask=live[:, None] & (dv < DV)[None, :])  # fmt: skip
        stat = PART + tl.num_programs(1).to(tl.int64) * G * SPLITS * DV + at * 2
        tl.store(stat, top, mask=live)
        tl.store(stat + 1, total, mask=live)
    else:
        y = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(Y + row[:, None] * DV + dv[None, :], y.to(Y.dtype.element_ty),
                 mask=live[:, None] & (dv < DV)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["SPLITS"])
def combine(PART, Y, SPLITS, DV: tl.constexpr, BDV: tl.constexpr, BS: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """Y [rows, DV] from the sums that ``attend`` left for each split; a program per row."""
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BS)
    dv = tl.arange(0, BDV)
    stat = PART + tl.num_programs(0).to(tl.int64) * SPLITS * DV + row * SPLITS * 2
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    top = float("-inf")
    total = 0.0
    acc = tl.zeros([BDV], tl.float32)
    for s0 in range(0, SPLITS, BS):
        there = s0 + s < SPLITS
        t = tl.load(stat + (s0 + s) * 2, mask=there, other=float("-inf"))
        w = tl.load(stat + (s0 + s) * 2 + 1, mask=there, other=0.0)
        keep = there[:, None] & (dv < DV)[None, :]
        part = tl.load(PART + (row * SPLITS + s0 + s)[:, None] * DV + dv[None, :], mask=keep,
                       other=0.0)  # fmt: skip
        above = tl.maximum(top, tl.max(t, 0))
        base = tl.where(above == float("-inf"), 0.0, above)
        less = tl.exp2((top - base) * 1.4426950408889634)
        more = tl.exp2((t - base) * 1.4426950408889634)
        acc = acc * less + tl.sum(part * more[:, None], 0)
        total = total * less + tl.sum(w * more, 0)
        top = above
    y = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(Y + row * DV + dv, y.to(Y.dtype.element_ty), mask=dv < DV)
