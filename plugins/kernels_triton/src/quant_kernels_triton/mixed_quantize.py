"""Activations to 8-bit codes in the order of columns that the mixed kernels multiply.

As ``quantize``, with the columns of every 16 exchanged: column kh * 8 + t * 2 + p of x is stored
at t * 4 + p * 2 + kh, or at t * 4 + kh * 2 + p for weights of 8 bits (``mixed_parts`` tells why).
Codes and scales equal the reference's bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_kernels_triton.quantize import _codes, _scale

__all__ = ["quantize_exchanged"]


@triton.jit(do_not_specialize=["peak", "least", "most"])
def quantize_exchanged(X, ROWS, SCALE, GATHER, Q, S, K, KIN, peak, least, most, FP8: tl.constexpr,
                       BOUNDED: tl.constexpr, STATIC: tl.constexpr, HAS_ROWS: tl.constexpr,
                       HAS_GATHER: tl.constexpr, PDL: tl.constexpr, BYTES: tl.constexpr,
                       BK: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    """X [T, KIN] to codes Q [T, K] and scales S [T], a program per token; K a multiple of 16.

    HAS_ROWS: token t is row ROWS[t] of X. STATIC: under the stored scale SCALE [1]. HAS_GATHER:
    stored column k is column GATHER[k] of X, or zero where that is negative. NaN or infinity in a
    token make its scale NaN.
    """
    if PDL:  # the product may fetch weights meanwhile; it waits for this kernel before it reads Q
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.program_id(0)
    i = tl.arange(0, BI)
    at = t
    if HAS_ROWS:
        at = tl.load(ROWS + t)
    row = X + at.to(tl.int64) * KIN
    x = tl.load(row + i, mask=i < KIN, other=0.0).to(tl.float32)
    odd = tl.max((~(tl.abs(x) <= 3.4028234663852886e38)).to(tl.int32), 0) != 0
    if STATIC:
        s = tl.load(SCALE).to(tl.float32)
    else:
        s = _scale(x, tl.max(tl.abs(x), 0), peak, least, most, BOUNDED)
    tl.store(S + t, tl.where(odd, float("nan"), s))
    k = tl.arange(0, BK)
    if HAS_GATHER:
        g = tl.load(GATHER + k, mask=k < K, other=-1)
        x = tl.load(row + g, mask=g >= 0, other=0.0).to(tl.float32)
    q = tl.where(odd, 0.0, tl.div_rn(x, s))
    q = _codes(q, FP8).reshape([BK // 16, 2, 4, 2])  # kh t p
    if BYTES:
        q = q.permute([0, 2, 1, 3])
    else:
        q = q.permute([0, 2, 3, 1])
    tl.store(Q + t.to(tl.int64) * K + k, q.reshape([BK]), mask=k < K)
