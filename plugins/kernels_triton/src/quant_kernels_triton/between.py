"""Operations between linear layers: norms, rotations, gates; ``quant_core.kernels.between``.

Each is one pass over its inputs, rounded where torch's eager operators round. On Hopper a program
starts while the kernel before it still runs and lets the next one start at once (programmatic
dependent launch): a following product of packed weights reads ahead in that time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gated", "rms_norm", "rotary"]


@triton.jit(do_not_specialize=["M", "eps"])
def rms_norm(X, W, R, Y, SUM, M, eps, K: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
             ADD: tl.constexpr, LAST: tl.constexpr, UNIT: tl.constexpr,
             PDL: tl.constexpr):  # fmt: skip
    """Y = norm of X [M, K], or of SUM = X + R; BR rows a program.

    LAST: rounded once, after the weight; UNIT: the weight is 1 + W.
    """
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    k = tl.arange(0, BK)
    keep = (rows < M)[:, None] & (k < K)[None, :]
    at = rows.to(tl.int64)[:, None] * K + k[None, :]
    act = X.dtype.element_ty
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    x = tl.load(X + at, mask=keep, other=0.0)
    w = tl.load(W + k, mask=k < K, other=0.0).to(tl.float32)
    if ADD:
        r = tl.load(R + at, mask=keep, other=0.0)
        x = (x.to(tl.float32) + r.to(tl.float32)).to(act)
        tl.store(SUM + at, x, mask=keep)
    if UNIT:
        w = 1.0 + w
        if not LAST:
            w = w.to(act).to(tl.float32)
    x = x.to(tl.float32)
    h = x * tl.rsqrt(tl.sum(x * x, 1) / K + eps)[:, None]
    if not LAST:
        h = h.to(act).to(tl.float32)
    tl.store(Y + at, (h * w[None, :]).to(act), mask=keep)


@triton.jit
def _rotated(IN, OUT, COS, SIN, head, heads, ih, oh, D: tl.constexpr, R: tl.constexpr,
             BD: tl.constexpr):  # fmt: skip
    d = tl.arange(0, BD)
    turns = d < R
    cos = tl.load(COS + d, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(SIN + d, mask=turns, other=0.0).to(tl.float32)
    keep = (head < heads)[:, None] & (d < D)[None, :]
    at = IN + head.to(tl.int64)[:, None] * ih * 16
    x = tl.load(at + d[None, :], mask=keep, other=0.0)
    other = tl.where(d < R // 2, d + R // 2, tl.where(turns, d - R // 2, d))
    t = tl.load(at + other[None, :], mask=keep, other=0.0).to(tl.float32)
    act = x.dtype
    t = tl.where(d < R // 2, -t, t)
    y = (x.to(tl.float32) * cos[None, :]).to(act).to(tl.float32)
    y = (y + (t * sin[None, :]).to(act).to(tl.float32)).to(act)
    y = tl.where(turns[None, :], y, x)
    tl.store(OUT + head.to(tl.int64)[:, None] * oh + d[None, :], y, mask=keep)


@triton.jit(do_not_specialize=["T", "H", "HK", "qb", "qh", "qt", "kb", "kh", "kt", "cb", "ct"])
def rotary(Q, K, COS, SIN, YQ, YK, T, H, HK, qb, qh, qt, kb, kh, kt, cb, ct,
           D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr,
           PDL: tl.constexpr):  # fmt: skip
    """YQ [B, T, H, D], YK [B, T, HK, D] from Q, K of any order; a program turns BH heads of one.

    Strides of Q and K are in units of 16 elements.
    """
    b = (tl.program_id(0) // T).to(tl.int64)
    t = (tl.program_id(0) % T).to(tl.int64)
    part = tl.program_id(1)
    blocks = tl.cdiv(H, BH)
    token = tl.program_id(0).to(tl.int64)
    COS += b * cb + t * ct
    SIN += b * cb + t * ct
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if part < blocks:
        head = part * BH + tl.arange(0, BH)
        _rotated(Q + (b * qb + t * qt) * 16, YQ + token * H * D, COS, SIN, head, H, qh, D, D, R, BD)
    else:
        head = (part - blocks) * BH + tl.arange(0, BH)
        _rotated(K + (b * kb + t * kt) * 16, YK + token * HK * D, COS, SIN, head, HK, kh, D, D, R,
                 BD)  # fmt: skip


@triton.jit(do_not_specialize=["gs", "us"])
def gated(G, U, Y, gs, us, K: tl.constexpr, BK: tl.constexpr, GELU: tl.constexpr,
          PDL: tl.constexpr):  # fmt: skip
    """Y [M, K] = act(G) U; a program does BK columns of a row. Row strides in units of 16."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    g = tl.load(G + row * gs * 16 + k, mask=k < K, other=0.0)
    u = tl.load(U + row * us * 16 + k, mask=k < K, other=0.0)
    act = g.dtype
    x = g.to(tl.float32)
    # tanh form of GELU: x (1 + tanh z) / 2 = x sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
    z = x * (1.5957691216057308 + 0.07135481627159975 * x * x) if GELU else x
    a = (x / (1.0 + tl.exp(-z))).to(act)
    tl.store(Y + row * K + k, (a.to(tl.float32) * u.to(tl.float32)).to(act), mask=k < K)
