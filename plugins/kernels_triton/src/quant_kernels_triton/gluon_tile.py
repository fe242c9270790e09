"""Steps of a consumer warpgroup: factors, the operand, products, and where sums are put.

A consumer owns 64 outputs. Shapes and layouts are those of ``gluon_parts``; sums are [64, B] of one
or two tiles of rows, B1 and B2.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from quant_kernels_triton.gluon_parts import dequantize, outer_factors, parameters, raw_factor

__all__ = ["multiply", "operand", "raws", "store", "sums", "waited"]


@gluon.jit
def raws(P, tile, sub, lane, group, G, K, HALF: gl.constexpr, SPG: gl.constexpr,
          C0: gl.constexpr, C1: gl.constexpr, C2: gl.constexpr, C3: gl.constexpr,
          C4: gl.constexpr):  # fmt: skip
    """Raw factors of half a group; ``lane`` stands for absent ones."""
    f0 = lane
    f1 = lane
    z = lane
    o0 = lane
    o1 = lane
    if C0 != 7:
        f0 = raw_factor(P[0], tile, sub, lane, group, G, K, HALF, SPG, C0)
    if C1 != 7:
        f1 = raw_factor(P[1], tile, sub, lane, group, G, K, HALF, SPG, C1)
    if C2 != 7:
        z = raw_factor(P[2], tile, sub, lane, group, G, K, HALF, SPG, C2)
    if C3 != 7:
        o0 = raw_factor(P[3], tile, sub, lane, group, G, K, HALF, SPG, C3)
    if C4 != 7:
        o1 = raw_factor(P[4], tile, sub, lane, group, G, K, HALF, SPG, C4)
    return f0, f1, z, o0, o1


@gluon.jit
def operand(w, raw, BYTES: gl.constexpr, BF16: gl.constexpr, C0: gl.constexpr, C1: gl.constexpr,
             C3: gl.constexpr, C4: gl.constexpr, MODE: gl.constexpr, ZERO: gl.constexpr,
             ASM: gl.constexpr, REGS: gl.constexpr, AL: gl.constexpr, W6: gl.constexpr,
             SB: gl.constexpr):  # fmt: skip
    """Codes of 64 columns and their raw factors to the A operand."""
    HAS_P: gl.constexpr = MODE != 0 or ZERO != 0
    S2: gl.constexpr = 2 if BYTES else 1
    # carried as 32-bit words: two 16-bit ones would take a register each
    w = gl.join(w.to(gl.int16), (w >> 16).to(gl.int16)).reshape([4, S2, 32, 8])
    p = raw
    if HAS_P:
        p = parameters(
            raw[0], raw[1], raw[2], raw[3], raw[4], C0, C1, C3, C4, MODE, ZERO, BYTES, BF16
        )
    return dequantize(w, p, 4, 1, BYTES, BF16, ASM, REGS, HAS_P, AL, W6, SB)


@gluon.jit
def multiply(a, x1, x2, acc, acc2, FIRST: gl.constexpr, B2: gl.constexpr, AL2: gl.constexpr):
    """acc += a x for both tiles of rows; with FIRST the sums start at zero. Not waited for."""
    d = warpgroup_mma(a, x1.permute((1, 0)), acc, use_acc=not FIRST, is_async=True)
    e = acc2
    if B2:
        a2 = gl.convert_layout(a, AL2, assert_trivial=True)
        e = warpgroup_mma(a2, x2.permute((1, 0)), acc2, use_acc=not FIRST, is_async=True)
    return d, e


@gluon.jit
def waited(d, e, B2: gl.constexpr, LEFT: gl.constexpr):
    """Sums of both tiles of rows; products of the last LEFT operands may still be under way."""
    if B2:
        d, e = warpgroup_mma_wait(2 * LEFT, deps=(d, e))
    else:
        d = warpgroup_mma_wait(LEFT, deps=(d,))
        e = d
    return d, e


@gluon.jit
def sums(PART, B: gl.constexpr, mma: gl.constexpr):
    """Addresses of the sums of 64 features of B rows, in the order of the registers."""
    on = gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    om = gl.arange(0, B, layout=gl.SliceLayout(0, mma))
    lane = (on // 16 * 32 + on % 8 * 4)[:, None] + (om % 8 // 2)[None, :]
    register = (om // 8 * 4 + om % 2)[None, :] + (on // 8 % 2 * 2)[:, None]
    return PART + (register * 128 + lane)


@gluon.jit
def store(acc, ROW0, ROW1, BIAS, Y, ORDER, m0, m1, n0, N, B: gl.constexpr, BF16: gl.constexpr,
           R0: gl.constexpr, R1: gl.constexpr, HAS_BIAS: gl.constexpr, GROUPED: gl.constexpr,
           mma: gl.constexpr):  # fmt: skip
    """Rows m0 .. m1 of y, 64 features from n0 on."""
    ACT: gl.constexpr = gl.bfloat16 if BF16 else gl.float16
    rn = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    acc = outer_factors(acc, ROW0, ROW1, BIAS, rn, N, R0, R1, HAS_BIAS)
    OL: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    y = gl.convert_layout(acc.to(ACT), OL)
    on = n0 + gl.arange(0, 64, layout=gl.SliceLayout(1, OL))
    om = m0 + gl.arange(0, B, layout=gl.SliceLayout(0, OL))
    to = om
    if GROUPED:
        to = gl.load(ORDER + om, mask=om < m1, other=0)
    gl.store(Y + to[None, :].to(gl.int64) * N + on[:, None], y,
             mask=(om < m1)[None, :] & (on < N)[:, None])  # fmt: skip
