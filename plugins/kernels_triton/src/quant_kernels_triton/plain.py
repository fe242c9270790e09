"""Plain Triton kernels on weights in the order "tiles16": right on any GPU and in the interpreter.

    gemm       y[m, n] = sum_k x[m, k] W[n, k] (+ bias); with GROUPED, rows sorted by expert
    embed      rows of W
    dense      all of W in 16 bits, for a plain matmul afterwards

W is computed in float32, exactly as the reference does, and rounded once to the type of x. A block
of gemm computes 64 output features, so the dequantized tile is the left operand; sums are float32
and nothing is added across blocks: results repeat bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_kernels_triton.plain_parts import (
    code_at,
    dot,
    factor,
    factor_at,
    scaled,
    tile_codes,
    to_values,
)

__all__ = ["dense", "embed", "gemm"]


@triton.jit
def _scaled(v, row, group, expert, S0, S1, S2, Z, O0, O1, NP, G, N, K,
            SF0: tl.constexpr, SF1: tl.constexpr,
            SF2: tl.constexpr, OF0: tl.constexpr, OF1: tl.constexpr, ZERO: tl.constexpr,
            ZV: tl.constexpr):  # fmt: skip
    """Values [B, 128] of one group of columns to weights; see ``quant_core.dequantize``."""
    if ZERO == 1:
        ZF: tl.constexpr = (SF0 & ~0x78) | (5 << 3)  # codes on the grid of the finest scale
        v = v - factor(Z, row, group, expert, NP, G, N, K, ZF)
    elif ZV != 0:
        v = v - ZV
    f0 = factor(S0, row, group, expert, NP, G, N, K, SF0)
    f1 = f0
    f2 = f0
    if SF1 != 7:
        f1 = factor(S1, row, group, expert, NP, G, N, K, SF1)
    if SF2 != 7:
        f2 = factor(S2, row, group, expert, NP, G, N, K, SF2)
    v = scaled(v, f0, f1, f2, SF0, SF1, SF2)
    if ZERO == 2:
        f0 = factor(O0, row, group, expert, NP, G, N, K, OF0)
        if OF1 != 7:
            f1 = factor(O1, row, group, expert, NP, G, N, K, OF1)
        v = v + scaled(1.0, f0, f1, f1, OF0, OF1, 7)
    return v


@triton.jit(do_not_specialize=["M"])
def gemm(X, W, HIGH, S0, S1, S2, Z, O0, O1, BOOK, GATHER, BIAS, Y, ORDER, EXPERT, START, M, N, NP,
         K, KIN, G,
         SF0: tl.constexpr, SF1: tl.constexpr,
            SF2: tl.constexpr, OF0: tl.constexpr, OF1: tl.constexpr, ZERO: tl.constexpr,
            ZV: tl.constexpr,
         BITS: tl.constexpr, EXP: tl.constexpr, MAN: tl.constexpr, SIGNED: tl.constexpr,
         HAS_GATHER: tl.constexpr, HAS_BIAS: tl.constexpr, GROUPED: tl.constexpr,
         BM: tl.constexpr, NT: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """y [M, N] = x [M, KIN] W^T; see the module's docstring.

    With GROUPED, block b of rows belongs to expert EXPERT[b] (-1: nothing to do) and takes the rows
    ORDER[START[b] ..] up to START[b + 1]; without, rows b * BM and on.
    """
    BN: tl.constexpr = NT * 16
    blocks = NP // BN
    pid = tl.program_id(0)
    pn = pid % blocks
    pm = pid // blocks
    expert = 0
    m = pm * BM + tl.arange(0, BM)
    keep = m < M
    if GROUPED:
        expert = tl.load(EXPERT + pm)
        if expert < 0:
            return
        m = tl.load(START + 2 * pm) + tl.arange(0, BM)
        keep = m < tl.load(START + 2 * pm + 1)
        m = tl.load(ORDER + m, mask=keep, other=0)
    rt = expert * (NP // 16) + pn * NT + tl.arange(0, NT)
    row = pn * BN + tl.arange(0, BN)
    kk = tl.arange(0, 128)
    acc = tl.zeros([BN, BM], tl.float32)
    mo = m.to(tl.int64) * KIN
    for group in range(G):
        k = group * 128 + kk
        ok = k < K
        if HAS_GATHER:
            k = tl.load(GATHER + expert * G * 128 + k)
            ok = k >= 0
        x = tl.load(X + mo[None, :] + k[:, None], mask=ok[:, None] & keep[None, :], other=0.0)
        q = tile_codes(W, HIGH, rt, group, G, BITS, NT)
        v = to_values(q, BOOK + expert * 0, EXP, MAN, SIGNED)
        v = _scaled(
            v,
            row,
            group,
            expert,
            S0,
            S1,
            S2,
            Z,
            O0,
            O1,
            NP,
            G,
            N,
            K,
            SF0,
            SF1,
            SF2,
            OF0,
            OF1,
            ZERO,
            ZV,
        )
        acc = dot(v.to(X.dtype.element_ty), x, acc, INTERPRET)
    if HAS_BIAS:
        acc += tl.load(BIAS + expert * N + row, mask=row < N, other=0.0).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * N + row[:, None]
    tl.store(Y + at, acc.to(Y.dtype.element_ty), mask=keep[None, :] & (row < N)[:, None])


@triton.jit
def dense(W, HIGH, S0, S1, S2, Z, O0, O1, BOOK, OUT, N, NP, K, G, expert,
          SF0: tl.constexpr, SF1: tl.constexpr,
            SF2: tl.constexpr, OF0: tl.constexpr, OF1: tl.constexpr, ZERO: tl.constexpr,
            ZV: tl.constexpr,
          BITS: tl.constexpr, EXP: tl.constexpr, MAN: tl.constexpr, SIGNED: tl.constexpr,
          NT: tl.constexpr):  # fmt: skip
    """OUT [N, K] = the weights of one matrix in stored column order, in the type of OUT."""
    pn = tl.program_id(0)
    group = tl.program_id(1)
    rt = expert * (NP // 16) + pn * NT + tl.arange(0, NT)
    row = pn * NT * 16 + tl.arange(0, NT * 16)
    v = to_values(tile_codes(W, HIGH, rt, group, G, BITS, NT), BOOK, EXP, MAN, SIGNED)
    v = _scaled(
        v, row, group, expert, S0, S1, S2, Z, O0, O1, NP, G, N, K, SF0, SF1, SF2, OF0, OF1, ZERO, ZV
    )
    k = group * 128 + tl.arange(0, 128)
    at = row.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(OUT + at, v.to(OUT.dtype.element_ty), mask=(row < N)[:, None] & (k < K)[None, :])


@triton.jit
def embed(IDS, W, HIGH, S0, S1, S2, Z, O0, O1, BOOK, OUT, N, NP, K, G,
          SF0: tl.constexpr, SF1: tl.constexpr,
            SF2: tl.constexpr, OF0: tl.constexpr, OF1: tl.constexpr, ZERO: tl.constexpr,
            ZV: tl.constexpr,
          BITS: tl.constexpr, EXP: tl.constexpr, MAN: tl.constexpr, SIGNED: tl.constexpr,
          BK: tl.constexpr):  # fmt: skip
    """OUT [T, K]: the rows IDS [T] of W. An id outside the table gives NaN."""
    t = tl.program_id(0)
    row = tl.load(IDS + t).to(tl.int32)
    known = (row >= 0) & (row < N)
    row = tl.where(known, row, 0)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    v = to_values(code_at(W, HIGH, row + k * 0, k, G, BITS), BOOK, EXP, MAN, SIGNED)
    if ZERO == 1:
        ZF: tl.constexpr = (SF0 & ~0x78) | (5 << 3)  # codes on the grid of the finest scale
        v = v - factor_at(Z, row, k, 0, NP, G, N, K, ZF)
    elif ZV != 0:
        v = v - ZV
    f0 = factor_at(S0, row, k, 0, NP, G, N, K, SF0)
    f1 = f0
    f2 = f0
    if SF1 != 7:
        f1 = factor_at(S1, row, k, 0, NP, G, N, K, SF1)
    if SF2 != 7:
        f2 = factor_at(S2, row, k, 0, NP, G, N, K, SF2)
    v = scaled(v, f0, f1, f2, SF0, SF1, SF2)
    if ZERO == 2:
        f0 = factor_at(O0, row, k, 0, NP, G, N, K, OF0)
        if OF1 != 7:
            f1 = factor_at(O1, row, k, 0, NP, G, N, K, OF1)
        v = v + scaled(1.0, f0, f1, f1, OF0, OF1, 7)
    v = tl.where(known, v, float("nan"))
    tl.store(OUT + t.to(tl.int64) * K + k, v.to(OUT.dtype.element_ty), mask=k < K)
