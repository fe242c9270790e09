"""Device functions of plain Triton: codes, factors and weights of tiles in the order "tiles16".

Everything is written with shifts, float32 arithmetic and reshapes, so that it means the same on any
GPU and in Triton's interpreter. Axis names of the order (``quant_core.kernels.tiles``): tile R, row
half h, row g of 8, group G, step S, kh, t of 4, p.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["code_at", "dot", "factor", "factor_at", "scaled", "tile_codes", "to_values"]


@triton.jit
def dot(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b. The interpreter multiplies the raw bits of bfloat16: there in float32."""
    if INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def tile_codes(W, HIGH, rt, group, G, BITS: tl.constexpr, NT: tl.constexpr):
    """int32 codes [NT * 16, 128] of tiles ``rt`` [NT] and one group of 128 columns."""
    lane = tl.arange(0, 32)
    four = tl.arange(0, 4)
    base = (rt * G + group).to(tl.int64)
    bit = tl.arange(0, 8)
    p, kh, h = bit // 4, bit // 2 % 2, bit % 2
    if BITS == 4:
        half = tl.arange(0, 2)
        at = half[None, :, None, None] * 128 + lane[None, None, :, None] * 4
        w = tl.load(W + base[:, None, None, None] * 256 + at + four[None, None, None, :])
        shift = p * 16 + kh * 8 + h * 4
        q = (w[:, :, :, :, None] >> shift[None, None, None, None, :]) & 15
        q = q.reshape(NT, 2, 8, 4, 4, 2, 2, 2).permute(0, 7, 2, 1, 4, 6, 3, 5)
        return q.reshape(NT * 16, 128)
    elif BITS == 8:
        at = four[None, :, None, None] * 128 + lane[None, None, :, None] * 4
        w = tl.load(W + base[:, None, None, None] * 512 + at + four[None, None, None, :])
        q = (w[:, :, :, :, None] >> (four * 8)[None, None, None, None, :]) & 255
        q = q.reshape(NT, 4, 8, 4, 2, 2, 2, 2).permute(0, 6, 2, 1, 4, 5, 3, 7)
        return q.reshape(NT * 16, 128)
    else:
        at = lane[None, :, None] * 4 + four[None, None, :]
        w = tl.load(W + base[:, None, None] * 128 + at)
        b16 = tl.arange(0, 16)  # p, S % 2, kh, h
        q = (w[:, :, :, None] >> (b16 // 8 * 16 + b16 % 8 * 2)[None, None, None, :]) & 3
        q = q.reshape(NT, 8, 4, 4, 2, 2, 2, 2).permute(0, 7, 1, 3, 5, 6, 2, 4)
        q = q.reshape(NT * 16, 128)
        if BITS == 3:
            two = tl.arange(0, 2)
            w = tl.load(HIGH + base[:, None, None] * 64 + lane[None, :, None] * 2 + two[None, None])
            b32 = tl.arange(0, 32)  # p, S % 4, kh, h: bit 16 p + the rest
            b = (w[:, :, :, None] >> b32[None, None, None, :]) & 1
            b = b.reshape(NT, 8, 4, 2, 2, 4, 2, 2).permute(0, 7, 1, 3, 5, 6, 2, 4)
            q = q | (b.reshape(NT * 16, 128) << 2)
        return q


@triton.jit
def code_at(W, HIGH, row, k, G, BITS: tl.constexpr):
    """int32 code at (row, k), element by element; both broadcast."""
    base = (row // 16).to(tl.int64) * G + k // 128
    lane = row % 8 * 4 + k % 8 // 2
    h, kh, p, s = row // 8 % 2, k // 8 % 2, k % 2, k // 16 % 8
    if BITS == 4:
        word = tl.load(W + base * 256 + s // 4 * 128 + lane * 4 + s % 4)
        return (word >> (p * 16 + kh * 8 + h * 4)) & 15
    elif BITS == 8:
        word = tl.load(W + base * 512 + s // 2 * 128 + lane * 4 + s % 2 * 2 + kh)
        return (word >> (h * 16 + p * 8)) & 255
    else:
        word = tl.load(W + base * 128 + lane * 4 + s // 2)
        q = (word >> (p * 16 + s % 2 * 8 + kh * 4 + h * 2)) & 3
        if BITS == 3:
            word = tl.load(HIGH + base * 64 + lane * 2 + s // 4)
            q = q | ((word >> (p * 16 + s % 4 * 4 + kh * 2 + h)) & 1) << 2
        return q


@triton.jit
def _small_float(c, EXP: tl.constexpr, MAN: tl.constexpr):
    """float32 of the codes of a small float: 1 sign, EXP exponent and MAN mantissa bits."""
    BIAS: tl.constexpr = (1 << (EXP - 1)) - 1
    TOP: tl.constexpr = (1 << EXP) - 1
    e = (c >> MAN) & TOP
    m = c & ((1 << MAN) - 1)
    normal = ((e + (127 - BIAS)) << 23) | (m << (23 - MAN))
    sub = ((1 - BIAS - MAN + 127) << 23) + m * 0
    v = tl.where(e == 0, m.to(tl.float32) * sub.to(tl.float32, bitcast=True),
                 normal.to(tl.float32, bitcast=True))  # fmt: skip
    if EXP == 4 and MAN == 3:
        v = tl.where((c & 127) == 127, float("nan"), v)
    if EXP == 5:
        v = tl.where(e == TOP, tl.where(m == 0, float("inf"), float("nan")), v)
    return tl.where((c >> (EXP + MAN)) & 1 == 1, -v, v)


@triton.jit
def to_values(q, BOOK, EXP: tl.constexpr, MAN: tl.constexpr, SIGNED: tl.constexpr):
    """float32 of codes: a table (EXP < 0), a small float (EXP > 0), or an integer."""
    if EXP < 0:
        return tl.load(BOOK + q)
    elif EXP > 0:
        return _small_float(q, EXP, MAN)
    elif SIGNED:
        return tl.where(q > 127, q - 256, q).to(tl.float32)
    else:
        return q.to(tl.float32)


@triton.jit
def _decode(v, ELEMENT: tl.constexpr):
    """float32 of a stored scale; the numbers are those of ``recipe.ELEMENTS``."""
    if ELEMENT <= 2:
        return v.to(tl.float32)
    elif ELEMENT == 3:
        e = v.to(tl.int32)
        bits = tl.where(e == 0, 0x00400000, e << 23)
        return tl.where(e == 255, float("nan"), bits.to(tl.float32, bitcast=True))
    elif ELEMENT == 4:
        return _small_float(v.to(tl.int32), 4, 3)
    elif ELEMENT == 6:
        i = v.to(tl.int32)
        return tl.where(i > 127, i - 256, i).to(tl.float32)
    else:
        return v.to(tl.float32)


@triton.jit
def factor_at(P, row, k, expert, NP, G, N, K, F: tl.constexpr):
    """One factor as it is stored at (row, k), element by element; ``F`` is ``Factor.constant``."""
    KIND: tl.constexpr = F & 7
    ROWS: tl.constexpr = ((F >> 8) & 0xFFF) * 16
    COLS: tl.constexpr = (F >> 20) * 16
    if KIND == 0:
        v = tl.load(P + expert)
    elif KIND == 1:
        v = tl.load(P + expert * NP + row)
    elif KIND == 2:
        groups = (G * 128 + COLS - 1) // COLS
        tile = (expert * (NP // 16) + row // 16).to(tl.int64) * groups + k // COLS
        v = tl.load(P + tile * 16 + row % 8 * 2 + row // 8 % 2)
    else:
        down, across = (N + ROWS - 1) // ROWS, (K + COLS - 1) // COLS
        at = (expert * down + tl.minimum(row // ROWS, down - 1)) * across
        v = tl.load(P + at + tl.minimum(k // COLS, across - 1))
    return _decode(v, (F >> 3) & 7)


@triton.jit
def factor(P, row, group, expert, NP, G, N, K, F: tl.constexpr):
    """One factor as stored, over rows [B] and a group of 128 columns: [B, 1] or [B, 128]."""
    COLS: tl.constexpr = (F >> 20) * 16
    if (F & 7) == 2 and COLS < 128:
        PER: tl.constexpr = 128 // COLS
        k = group * 128 + tl.arange(0, PER) * COLS
        v = factor_at(P, row[:, None], k[None, :], expert, NP, G, N, K, F)
        v = tl.broadcast_to(v[:, :, None], [row.shape[0], PER, COLS])
        return v.reshape(row.shape[0], 128)
    else:
        at = row[:, None]
        return factor_at(P, at, at * 0 + group * 128, expert, NP, G, N, K, F)


@triton.jit
def applied(v, f, F: tl.constexpr):
    """v times a factor, or divided by an inverse one, correctly rounded."""
    if (F >> 6) & 1:
        return tl.div_rn(v, f)
    else:
        return v * f


@triton.jit
def scaled(v, f0, f1, f2, F0: tl.constexpr, F1: tl.constexpr, F2: tl.constexpr):
    """v times its factors, the coarsest first, rounded as in ``quant_core.dequantize``.

    F1 or F2 of 7: there is no such factor.
    """
    if F1 == 7:
        return applied(v, f0, F0)
    else:
        if F2 == 7:
            s = applied(1.0, f1, F1)
        else:
            s = applied(applied(1.0, f2, F2), f1, F1)
        return v * applied(s, f0, F0)
