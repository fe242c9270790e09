"""Products of 8-bit codes in plain Triton, for few rows and for what torch's matmuls refuse.

    gemm8     y[m, n] = sx[m] sw[n] sum_k qx[m, k] qw[n, k] (+ bias)
              or with scales per 128 columns: sum over groups of sx[m, g] sw[n / 128, g] (...)
    epilogue  y = sums * sx[m] * sw[n] (+ bias) after a matmul of codes by torch

The weight tile is the left operand, so few rows of x waste little. fp8 sums of 128 columns are
added in float32 outside the tensor cores, whose own sums keep fewer bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_kernels_triton.plain_parts import _small_float, dot

__all__ = ["epilogue", "gemm8"]


@triton.jit(do_not_specialize=["M"])
def gemm8(X, SX, W, SW, BIAS, Y, M, N, K, G,
          FP8: tl.constexpr, BLOCKED: tl.constexpr, SINGLE: tl.constexpr,
          HAS_BIAS: tl.constexpr,
          BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
          INTERPRET: tl.constexpr):  # fmt: skip
    """See the module's docstring. W [N, K] codes; SW [N], [1] (SINGLE) or [N/128, K/128]."""
    blocks = tl.cdiv(N, BN)
    pn = tl.program_id(0) % blocks
    pm = tl.program_id(0) // blocks
    n = pn * BN + tl.arange(0, BN)
    m = pm * BM + tl.arange(0, BM)
    kk = tl.arange(0, BK)
    wp = W + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    xp = X + tl.minimum(m, M - 1).to(tl.int64)[None, :] * K
    if FP8 or INTERPRET:
        acc = tl.zeros([BN, BM], tl.float32)
    else:
        acc = tl.zeros([BN, BM], tl.int32)
    for k0 in range(0, K, BK):
        k = k0 + kk
        ok = k < K
        w = tl.load(wp + k[None, :], mask=ok[None, :], other=0)
        x = tl.load(xp + k[:, None], mask=ok[:, None], other=0)
        if INTERPRET:
            if FP8:
                w = _small_float(w.to(tl.int32), 4, 3)
                x = _small_float(x.to(tl.int32), 4, 3)
            part = dot(w.to(tl.float32), x.to(tl.float32), tl.zeros([BN, BM], tl.float32), True)
        elif FP8:
            part = tl.dot(w.to(tl.float8e4nv, bitcast=True), x.to(tl.float8e4nv, bitcast=True))
        else:
            part = tl.dot(w, x, out_dtype=tl.int32)
        if BLOCKED:
            g = k0 // 128
            sx = tl.load(SX + tl.minimum(m, M - 1) * G + g)
            sw = tl.load(SW + tl.minimum(n, N - 1) // 128 * G + g).to(tl.float32)
            acc += part * sw[:, None] * sx[None, :]
        else:
            acc += part
    y = acc.to(tl.float32)
    if not BLOCKED:
        sx = tl.load(SX + m, mask=m < M, other=0.0)
        if SINGLE:
            y = y * (sx * tl.load(SW).to(tl.float32))[None, :]
        else:
            sw = tl.load(SW + n, mask=n < N, other=0.0).to(tl.float32)
            y = y * sw[:, None] * sx[None, :]
    if HAS_BIAS:
        y += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def epilogue(SUMS, SX, SW, BIAS, Y, N, SINGLE: tl.constexpr, HAS_BIAS: tl.constexpr,
             BN: tl.constexpr):  # fmt: skip
    """Y [M, N] = SUMS [M, N] * SX [M] * SW [N] (+ BIAS); SUMS int32 or float32."""
    m = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    keep = n < N
    at = m.to(tl.int64) * N + n
    y = tl.load(SUMS + at, mask=keep, other=0).to(tl.float32) * tl.load(SX + m)
    if SINGLE:
        y = y * tl.load(SW).to(tl.float32)
    else:
        y = y * tl.load(SW + n, mask=keep, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(BIAS + n, mask=keep, other=0.0).to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=keep)
