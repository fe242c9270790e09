"""Device functions of the kernels with 8-bit activations on weights of 4 or 8 bits.

A word of codes in the order "tiles16" holds, for the step S of 16 columns and the lane t = l % 4,

    byte 2 p + kh: rows g (low nibble) and g + 8 (high) of column S * 16 + kh * 8 + t * 2 + p

Four bytes of a row side by side in a lane are four columns of the 8-bit A operand of wgmma, whose
lane t holds columns 4 t .. 4 t + 3 of 16. So the word is the operand already, once its columns are
called t * 4 + p * 2 + kh: x is quantized into that order (``codes_gluon``) and weights stay as
the other kernels of "tiles16" have them. A dot product does not mind the order of its terms.

    e4m3  the byte |code - 8| with the sign on top is (code - 8) * 2^-9: small integers are the
          subnormal and first normal numbers of e4m3, so nothing is looked up
    e2m1  exponent and mantissa moved below the sign: value * 2^-6
    int8  the code moved to the upper nibble with its top bit turned: (code - 8) * 16

Weights of 8 bits lie in pairs of words (S, kh) with the bytes (h, p): the pair's halves are the two
rows' operands, whose columns are called t * 4 + kh * 2 + p.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "factor",
    "factor_offsets",
    "moved",
    "operand",
    "outer",
    "piece",
    "raw_factors",
]


@gluon.jit
def piece(words, NW: gl.constexpr, J: gl.constexpr, SUB: gl.constexpr, BYTES: gl.constexpr):
    """Bytes of piece J of a group, in a layout in which a lane holds its own."""
    if SUB == 4 and not BYTES:
        L: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 1, 32, 1], [NW, 1, 1, 1], [3, 2, 1, 0])
        return words.slice(J // 2, 1, dim=1).slice(J % 2 * 8, 8, dim=3).load(L)
    else:
        P: gl.constexpr = (4 if BYTES else 2) // SUB
        L1: gl.constexpr = gl.BlockedLayout(
            [1, P, 1, 16], [1, 1, 32, 1], [NW, 1, 1, 1], [3, 2, 1, 0]
        )
        return words.slice(J * P, P, dim=1).load(L1)


@gluon.jit
def operand(w, ROWS: gl.constexpr, COLS: gl.constexpr, INT: gl.constexpr, BYTES: gl.constexpr,
            ASM: gl.constexpr, AL: gl.constexpr):  # fmt: skip
    """Bytes [tiles, pieces, 32 lanes, B] to the A operand [ROWS, COLS]."""
    NT: gl.constexpr = ROWS // 16
    B: gl.constexpr = w.shape[3]
    T: gl.constexpr = gl.int8 if INT else gl.float8e4nv
    if BYTES:
        v = gl.inline_asm_elementwise(ASM, "=&r,=&r,r,r", [w], dtype=T.value, is_pure=True, pack=8)
        v = v.reshape([NT, w.shape[1], 8, 4, 2, 2, 4])  # tile piece g t S h byte
        v = v.permute([0, 5, 2, 1, 4, 3, 6]).reshape([ROWS, COLS])
    else:
        a, b = gl.inline_asm_elementwise(
            ASM, "=&r,=&r,r", [w], dtype=(T.value, T.value), is_pure=True, pack=4
        )
        v = gl.join(a, b).reshape([NT, w.shape[1], 8, 4, B // 4, 4, 2])  # tile piece g t S byte h
        v = v.permute([0, 6, 2, 1, 4, 3, 5]).reshape([ROWS, COLS])
    return gl.convert_layout(v, AL, assert_trivial=True)


@gluon.jit
def moved(P, expert, NP, G, F: gl.constexpr):
    """The factor's pointer moved to one expert of a stack."""
    COLS: gl.constexpr = (F >> 20) * 16
    if (F & 7) == 0:
        return P + expert
    elif (F & 7) == 1:
        return P + expert * NP
    elif (F & 7) == 2:
        return P + expert.to(gl.int64) * (NP * ((G * 128 + COLS - 1) // COLS))
    else:
        return P


@gluon.jit
def _decoded(v, ELEMENT: gl.constexpr, INVERSE: gl.constexpr):
    if ELEMENT == 3:  # e8m0
        e = v.to(gl.int32) & 255
        bits = gl.where(e == 0, 0x00400000, e << 23)
        f = gl.where(e == 255, 0x7FC00000, bits).to(gl.float32, bitcast=True)
    elif ELEMENT == 5:
        f = (v.to(gl.int32) & 255).to(gl.float32)
    else:
        f = v.to(gl.float32)
    if INVERSE:
        f = 1.0 / f
    return f


@gluon.jit
def factor_offsets(rows, G, F: gl.constexpr):
    """Where the first values of a factor by group lie, for each of ``rows``."""
    COLS: gl.constexpr = (F >> 20) * 16 if (F & 7) == 2 else 128
    groups = (G * 128 + COLS - 1) // COLS
    return rows // 16 * groups * 16 + rows % 8 * 2 + rows % 16 // 8


@gluon.jit
def _raw(P, at, p, none, SUB: gl.constexpr, F: gl.constexpr):
    """The stored factor of a piece of 128 / SUB columns; ``none`` where it is absent."""
    COLS: gl.constexpr = (F >> 20) * 16
    if (F & 7) == 2:
        return gl.load(P + at + p * (128 // SUB) // COLS * 16)
    else:
        return none


@gluon.jit
def raw_factors(S0, S1, at0, at1, g, G, none, SUB: gl.constexpr, C0: gl.constexpr,
                C1: gl.constexpr):  # fmt: skip
    """The stored factors of a group's SUB pieces, of two levels."""
    p = gl.minimum(g, G - 1) * SUB
    a0 = _raw(S0, at0, p, none, SUB, C0)
    b0 = _raw(S1, at1, p, none, SUB, C1)
    a1, a2, a3 = a0, a0, a0
    b1, b2, b3 = b0, b0, b0
    if SUB >= 2:
        a1 = _raw(S0, at0, p + 1, none, SUB, C0)
        b1 = _raw(S1, at1, p + 1, none, SUB, C1)
    if SUB == 4:
        a2 = _raw(S0, at0, p + 2, none, SUB, C0)
        b2 = _raw(S1, at1, p + 2, none, SUB, C1)
        a3 = _raw(S0, at0, p + 3, none, SUB, C0)
        b3 = _raw(S1, at1, p + 3, none, SUB, C1)
    return a0, b0, a1, b1, a2, b2, a3, b3


@gluon.jit
def factor(raw0, raw1, F0: gl.constexpr, F1: gl.constexpr):
    """The product of two stored factors, float32."""
    f = _decoded(raw0, (F0 >> 3) & 7, (F0 >> 6) & 1)
    if F1 != 7:
        f = _decoded(raw1, (F1 >> 3) & 7, (F1 >> 6) & 1) * f
    return f


@gluon.jit
def outer(acc, SX, ROW0, ROW1, BIAS, on, om, N, M, R0: gl.constexpr, R1: gl.constexpr,
          HAS_BIAS: gl.constexpr, POWER: gl.constexpr):  # fmt: skip
    """acc [rows, tokens] times the factors of its rows and of its tokens, plus the bias."""
    inside = on < N
    f = gl.zeros_like(on).to(gl.float32) + POWER
    if (R0 & 7) == 1:
        f = f * _decoded(gl.load(ROW0 + on, mask=inside, other=1), (R0 >> 3) & 7, (R0 >> 6) & 1)
    elif (R0 & 7) == 0:
        f = f * _decoded(gl.load(ROW0), (R0 >> 3) & 7, (R0 >> 6) & 1)
    if (R1 & 7) == 1:
        f = f * _decoded(gl.load(ROW1 + on, mask=inside, other=1), (R1 >> 3) & 7, (R1 >> 6) & 1)
    elif (R1 & 7) == 0:
        f = f * _decoded(gl.load(ROW1), (R1 >> 3) & 7, (R1 >> 6) & 1)
    acc = acc.to(gl.float32) * f[:, None]
    acc = acc * gl.load(SX + om, mask=om < M, other=0.0)[None, :]
    if HAS_BIAS:
        acc += gl.load(BIAS + on, mask=inside, other=0).to(gl.float32)[:, None]
    return acc
