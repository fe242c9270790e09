"""Device functions of the Gluon kernels: packed codes to the register operand of wgmma.

The order "tiles16" puts side by side, for every lane, exactly the codes of its A registers, so a
weight goes from memory to the tensor cores without passing through shared memory again:
``convert_layout(assert_trivial=True)`` makes the compiler prove it.

Shapes: words of codes are int16 [tiles, halves, pieces, lane, blocks, words]: a half is 64
columns, a piece 32 (8-bit codes; 4-bit ones have one piece of 64), and ``blocks * words`` = 8,
the words of a block under one scale. Parameters of scales have the same axes without the last, of
size 1 where the scale spans the axis. Two rows h (g and g + 8) of a parameter lie side by side.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "all_staged",
    "barrier",
    "dequantize",
    "dequantize_few",
    "gdc_launch_dependents",
    "gdc_wait",
    "issued",
    "outer_factors",
    "parameters",
    "per_half",
    "raw_factor",
    "row_factor",
    "row_values",
    "shifted",
    "staged",
]

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # Triton 3.8, 3.6


@gluon.constexpr_function
def staged(c, spg):
    """Whether the factor of ``Factor.constant`` c goes through shared memory: one by group."""
    c, spg = int(c), int(spg)
    cols = (c >> 20) * 16
    per = 128 // cols if 0 < cols < 128 else 1
    return c & 7 == 2 and per in (1, spg)


@gluon.constexpr_function
def per_half(c, spg):
    """Scales of a row in 64 columns."""
    c, spg = int(c), int(spg)
    cols = (c >> 20) * 16
    return 64 // cols if 0 < cols < 64 else 1


@gluon.constexpr_function
def all_staged(spg, *factors):
    """Whether all ``factors`` there are go through shared memory."""
    return all(int(c) == 7 or staged(c, spg) for c in factors)


@gluon.jit
def gdc_wait():
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def issued():
    """What comes before is issued before anything is read from shared memory behind.

    ptxas would put the arithmetic on codes between the instructions of a product, which then waits.
    """
    gl.inline_asm_elementwise(
        "bar.warp.sync 0xffffffff; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def gdc_launch_dependents():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // dummy $0", "=r", [], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def raw_factor(P, tile, sub, lane, group, G, K, HALF: gl.constexpr, SPG: gl.constexpr,
               F: gl.constexpr):  # fmt: skip
    """A factor as it is stored, both rows in one word; ``F``: ``Factor.constant``.

    ``tile``, ``sub`` and ``lane`` broadcast to the parameter's shape; ``sub`` counts the groups of
    128 / SPG columns from the first of half HALF.
    """
    if HALF < 0:  # ``group`` counts halves
        col = group * 64 + sub * (128 // SPG)
    else:
        col = group * 128 + (sub + HALF * (SPG // 2)) * (128 // SPG)
    ROWS: gl.constexpr = ((F >> 8) & 0xFFF) * 16
    COLS: gl.constexpr = (F >> 20) * 16
    if (F & 7) == 2:
        groups = (G * 128 + COLS - 1) // COLS
        return gl.load(P + ((tile * groups + col // COLS) * 8 + lane // 4))
    else:  # rectangles: one value for all rows of a tile
        across = (K + COLS - 1) // COLS
        at = (tile * 16) // ROWS * across + gl.minimum(col // COLS, across - 1)
        return gl.load(P + (at + lane * 0))


@gluon.jit
def shifted(P, expert, NP, G, N, K, F: gl.constexpr):
    """The factor's pointer moved to one expert of a stack."""
    ROWS: gl.constexpr = ((F >> 8) & 0xFFF) * 16
    COLS: gl.constexpr = (F >> 20) * 16
    if (F & 7) == 0:
        return P + expert
    elif (F & 7) == 1:
        return P + expert * NP
    elif (F & 7) == 2:
        return P + expert.to(gl.int64) * ((NP // 16) * ((G * 128 + COLS - 1) // COLS) * 8)
    elif (F & 7) == 3:
        return P + expert * (((N + ROWS - 1) // ROWS) * ((K + COLS - 1) // COLS))
    else:
        return P


@gluon.jit
def _float_of(v, ELEMENT: gl.constexpr):
    if ELEMENT == 0:
        return v.to(gl.int32).to(gl.float32, bitcast=True)
    elif ELEMENT == 1:
        return (v << 16).to(gl.int32).to(gl.float32, bitcast=True)
    elif ELEMENT == 2:
        return v.to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
    elif ELEMENT == 3:
        e = v & 255
        bits = gl.where(e == 0, 0x00400000, e << 23)
        bits = gl.where(e == 255, 0x7FC00000, bits)
        return bits.to(gl.float32, bitcast=True)
    elif ELEMENT == 4:
        e = (v >> 3) & 15
        m = v & 7
        f = gl.where(e == 0, m.to(gl.float32) * 0.001953125,
                     (((e + 120) << 23) | (m << 20)).to(gl.float32, bitcast=True))  # fmt: skip
        f = gl.where((v & 127) == 127, float("nan"), f)
        return gl.where((v & 128) != 0, -f, f)
    elif ELEMENT == 6:
        b = v & 255
        return gl.where(b > 127, b - 256, b).to(gl.float32)
    else:
        return (v & 255).to(gl.float32)


@gluon.jit
def _pair_values(raw, F: gl.constexpr):
    """float32 of both rows of a raw factor."""
    KIND: gl.constexpr = F & 7
    ELEMENT: gl.constexpr = (F >> 3) & 7
    if KIND != 2:
        if ELEMENT <= 2:
            v0 = raw.to(gl.float32)
        else:
            v0 = _float_of(raw.to(gl.int32), ELEMENT)
        v1 = v0
    elif ELEMENT == 0:
        v0 = _float_of(raw, 0)
        v1 = _float_of(raw >> 32, 0)
    elif ELEMENT <= 2:
        v0 = _float_of(raw & 0xFFFF, ELEMENT)
        v1 = _float_of((raw >> 16) & 0xFFFF, ELEMENT)
    else:
        wide = raw.to(gl.int32)
        v0 = _float_of(wide & 255, ELEMENT)
        v1 = _float_of((wide >> 8) & 255, ELEMENT)
    if (F >> 6) & 1:
        v0 = 1.0 / v0
        v1 = 1.0 / v1
    return v0, v1


@gluon.jit
def _twice(v, BF16: gl.constexpr):
    """float32 to a pair of equal 16-bit floats."""
    if BF16:
        ASM: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $1, $1;"
    else:
        ASM: gl.constexpr = "cvt.rn.f16x2.f32 $0, $1, $1;"
    return gl.inline_asm_elementwise(ASM, "=r,f", [v], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _small_pairs(raw, ELEMENT: gl.constexpr, BF16: gl.constexpr):
    """Small float scales of both rows (two bytes) straight to pairs of equal 16-bit floats, exact.

    e8m0: the exponent moves into place. e4m3: all bits move into place, which divides by 2^120,
    and a product makes up for it.
    """
    if ELEMENT == 3:
        return (raw & 255) * 0x00800080, ((raw >> 8) & 255) * 0x00800080
    elif BF16:
        ASM: gl.constexpr = """{ .reg .b32 u, v; prmt.b32 v, $2, 0, 0x1404;
shr.u32 u, v, 4; and.b32 u, u, 0x07F007F0; lop3.b32 u, v, 0x80008000, u, 0xEA;
mov.b32 v, 0x7B807B80; mul.bf16x2 u, u, v;
prmt.b32 $0, u, u, 0x1010; prmt.b32 $1, u, u, 0x3232; }"""
        return gl.inline_asm_elementwise(
            ASM, "=&r,=&r,r", [raw], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )
    else:
        ASM2: gl.constexpr = """{ .reg .b32 u; .reg .b16 l, h; mov.b32 {l, h}, $2;
cvt.rn.f16x2.e4m3x2 u, l; prmt.b32 $0, u, u, 0x1010; prmt.b32 $1, u, u, 0x3232; }"""
        return gl.inline_asm_elementwise(
            ASM2, "=&r,=&r,r", [raw], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
        )


@gluon.jit
def _rest(v, twice, BF16: gl.constexpr):
    """What the 16-bit ``twice`` leaves of ``v``."""
    if BF16:
        return v - (twice << 16).to(gl.float32, bitcast=True)
    else:
        return v - (twice & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _parameters(s, z, o, MODE: gl.constexpr, ZERO: gl.constexpr, BYTES: gl.constexpr,
                BF16: gl.constexpr):  # fmt: skip
    """Zero, scale, rest of the scale, rest of the offset of one row, as pairs.

    An offset becomes the nearest integer zero and what is left of it: the product with the code
    then has no large term that would be rounded away.
    """
    zero = s.to(gl.int32) * 0
    rest = zero
    if ZERO == 2:
        mid = gl.where(s == 0.0, 0.0, -o / s)
        mid = gl.minimum(gl.maximum(gl.floor(mid + 0.5), 0.0), 255.0 if BYTES else 15.0)
        rest = _twice(o + mid * s, BF16)
        z = mid
    if ZERO != 0:
        if BYTES:
            zero = _twice((z - 128).to(gl.float32), BF16)
        elif ZERO == 1 and BF16:  # the bits of 128 + z
            zero = z.to(gl.int32) * 0x00010001 + 0x43004300
        elif ZERO == 1:
            zero = z.to(gl.int32) * 0x00010001 + 0x64006400
        elif BF16:
            zero = _twice(z + 128.0, BF16)
        else:
            zero = _twice(z + 1024.0, BF16)
    scale = zero
    low = zero
    if MODE != 0:
        scale = _twice(s, BF16)
    if MODE >= 2:
        low = _twice(_rest(s, scale, BF16), BF16)
    return zero, scale, low, rest


@gluon.jit
def row_values(f0, f1, F0: gl.constexpr, F1: gl.constexpr):
    """The product of the grouped factors of both rows, float32."""
    a0, a1 = _pair_values(f0, F0)
    if F1 != 7:
        b0, b1 = _pair_values(f1, F1)
        a0 = b0 * a0
        a1 = b1 * a1
    return a0, a1


@gluon.jit
def parameters(f0, f1, z, o0, o1, F0: gl.constexpr, F1: gl.constexpr, O0: gl.constexpr,
               O1: gl.constexpr, MODE: gl.constexpr, ZERO: gl.constexpr, BYTES: gl.constexpr,
               BF16: gl.constexpr):  # fmt: skip
    """The eight parameters of ``asm`` from raw factors (``z`` as stored: unsigned codes)."""
    SMALL: gl.constexpr = (F0 >> 3) & 7
    FAST: gl.constexpr = MODE == 1 and F1 == 7 and ZERO == 0 and (F0 & 7) == 2 and (
        (SMALL == 3 and BF16) or SMALL == 4) and ((F0 >> 6) & 1) == 0  # fmt: skip
    if FAST:
        raw = f0.to(gl.int32)
        sa, sb = _small_pairs(raw, SMALL, BF16)
        return sa, sa, sa, sa, sb, sb, sb, sb
    if F0 != 7:
        s0, s1 = row_values(f0, f1, F0, F1)
    else:
        s0 = (z.to(gl.int32) * 0).to(gl.float32)
        s1 = s0
    z0 = s0
    z1 = s1
    if ZERO == 1:
        wide = z.to(gl.int32)
        z0 = wide & 255
        z1 = (wide >> 8) & 255
    if ZERO == 2:
        z0, z1 = row_values(o0, o1, O0, O1)
    za, sa, la, ra = _parameters(s0, z0, z0, MODE, ZERO, BYTES, BF16)
    zb, sb, lb, rb = _parameters(s1, z1, z1, MODE, ZERO, BYTES, BF16)
    return za, sa, la, ra, zb, sb, lb, rb


@gluon.jit
def _like(p, w):
    """A parameter broadcast over the words it applies to."""
    p, _ = gl.broadcast(gl.expand_dims(p, 5), w)
    return p


@gluon.jit
def dequantize(w, p, NT: gl.constexpr, H: gl.constexpr, BYTES: gl.constexpr, BF16: gl.constexpr,
               ASM: gl.constexpr, REGS: gl.constexpr, HAS_P: gl.constexpr, AL: gl.constexpr,
               W6: gl.constexpr, SB: gl.constexpr):  # fmt: skip
    """Words [NT, H * pieces, 32, 8] and the parameters ``p`` (a tuple of eight) to the A operand
    [NT * 16, 64 * H] in the layout AL."""
    S2: gl.constexpr = 2 if BYTES else 1
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    w = gl.convert_layout(w.reshape([NT, H, S2, 32, SB, 8 // SB]), W6, assert_trivial=True)
    if HAS_P:
        q = (_like(p[0], w), _like(p[1], w), _like(p[2], w), _like(p[3], w), _like(p[4], w),
             _like(p[5], w), _like(p[6], w), _like(p[7], w))  # fmt: skip
    else:
        z = w.to(gl.int32)  # not read
        q = (z, z, z, z, z, z, z, z)
    if BYTES:  # two words, one per h, hold columns p = 0, 1: the results change places
        a, b = gl.inline_asm_elementwise(
            ASM, REGS, [w, q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7]],
            dtype=(ACT.value, ACT.value), is_pure=True, pack=2,
        )  # fmt: skip
        v = gl.join(a, b).reshape([NT, H, 2, 8, 4, 2, 2, 2, 2])  # half s2 g t s1 kh p h
        v = v.permute([0, 8, 3, 1, 2, 5, 6, 4, 7])
    else:
        a, b, c, d = gl.inline_asm_elementwise(
            ASM, REGS, [w, q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7]],
            dtype=(ACT.value, ACT.value, ACT.value, ACT.value), is_pure=True, pack=2,
        )  # fmt: skip
        v = gl.join(gl.join(a, b), gl.join(c, d))
        v = v.reshape([NT, H, 8, 4, 4, 2, 2, 2]).permute([0, 6, 2, 1, 4, 7, 3, 5])  # g t s p h kh
    v = v.reshape([NT * 16, 64 * H])
    return gl.convert_layout(v, AL, assert_trivial=True)


@gluon.jit
def dequantize_few(w, high, p, BF16: gl.constexpr, ASM: gl.constexpr, REGS: gl.constexpr,
                   HAS_P: gl.constexpr, AL: gl.constexpr, W6: gl.constexpr):  # fmt: skip
    """Words [4, 32, 4] of 2-bit fields, third bits [4, 1, 1, 32, 2] and the parameters to the A
    operand [64, 64] in the layout AL."""
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    w = gl.convert_layout(w.reshape([4, 1, 1, 32, 2, 2]), W6, assert_trivial=True)
    if HAS_P:
        q = (_like(p[0], w), _like(p[1], w), _like(p[2], w), _like(p[3], w), _like(p[4], w),
             _like(p[5], w), _like(p[6], w), _like(p[7], w))  # fmt: skip
    else:
        z = w.to(gl.int32)  # not read
        q = (z, z, z, z, z, z, z, z)
    a, b, c, d, e, f, g, h = gl.inline_asm_elementwise(
        ASM, REGS, [w, q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7], _like(high, w)],
        dtype=(ACT.value, ACT.value, ACT.value, ACT.value, ACT.value, ACT.value, ACT.value,
               ACT.value), is_pure=True, pack=2,
    )  # fmt: skip
    v = gl.join(gl.join(gl.join(a, b), gl.join(c, d)), gl.join(gl.join(e, f), gl.join(g, h)))
    v = v.reshape([4, 1, 8, 4, 2, 2, 2, 2, 2]).permute([0, 6, 2, 1, 4, 8, 7, 3, 5])
    return gl.convert_layout(v.reshape([64, 64]), AL, assert_trivial=True)


@gluon.jit
def outer_factors(acc, ROW0, ROW1, BIAS, on, N, R0: gl.constexpr, R1: gl.constexpr,
                  HAS_BIAS: gl.constexpr):  # fmt: skip
    """acc times the factors of its rows ``on`` or of the matrix, plus the bias."""
    inside = on < N
    if (R0 & 7) == 1:
        acc = acc * gl.load(ROW0 + on, mask=inside, other=0).to(gl.float32)[:, None]
    elif (R0 & 7) == 0:
        acc = acc * gl.load(ROW0).to(gl.float32)
    if (R1 & 7) == 1:
        acc = acc * gl.load(ROW1 + on, mask=inside, other=0).to(gl.float32)[:, None]
    elif (R1 & 7) == 0:
        acc = acc * gl.load(ROW1).to(gl.float32)
    if HAS_BIAS:
        acc += gl.load(BIAS + on, mask=inside, other=0).to(gl.float32)[:, None]
    return acc


@gluon.jit
def row_factor(f0, f1, F0: gl.constexpr, F1: gl.constexpr, NT: gl.constexpr, RL: gl.constexpr):
    """The product of grouped factors that span a whole group: [NT * 16] float32 in layout RL."""
    a, b = row_values(f0, f1, F0, F1)
    f = gl.join(a, b).reshape([NT, 8, 4, 2]).permute([0, 3, 1, 2])  # equal over the last axis
    return gl.convert_layout(gl.max(f, 3).reshape([NT * 16]), RL)
