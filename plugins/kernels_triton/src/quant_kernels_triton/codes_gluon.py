"""Activations to 8-bit codes on Hopper: as ``quantize``, bit for bit, in fewer instructions.

    s = clamp(max|x| / peak, least, most), 0 becomes 2^-23       code = round(x / s), ties to even

A thread holds runs of 16 columns, so that their order can be exchanged for the mixed kernels
(``mixed_parts`` tells why) by naming registers: column kh * 8 + t * 2 + p is stored at

    ORDER 0    its own place
    ORDER 4    t * 4 + p * 2 + kh      for weights of 4 bits
    ORDER 8    t * 4 + kh * 2 + p      for weights of 8 bits

The quotient is corrected twice by its exact remainder, which rounds it correctly, so one division
makes the reciprocal of a whole token. The scale is brought near one before by a power of two, which
cancels. NaN or infinity in a token (group) make its scale NaN and its codes zero.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_kernels_triton.gluon_parts import gdc_launch_dependents, gdc_wait

__all__ = ["group_codes", "token_codes"]

_FP8 = gl.constexpr("""{ .reg .b16 a, b; cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;
cvt.rn.satfinite.e4m3x2.f32 b, $4, $3; mov.b32 $0, {a, b}; }""")


@gluon.jit
def _largest(x, AXIS: gl.constexpr):
    """Bits of max|x|: above those of infinity where there is a NaN."""
    return gl.max(x.to(gl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)


@gluon.jit
def _magnitude(x):
    """Integers in the order of |x|, NaN last, from x as it is stored."""
    if x.dtype == gl.float32:
        return x.to(gl.int32, bitcast=True) & 0x7FFFFFFF
    else:
        return x.to(gl.int16, bitcast=True).to(gl.int32) & 0x7FFF


@gluon.jit
def _bits_of(m, TYPE: gl.constexpr):
    """The float32 bits of a magnitude of TYPE."""
    if TYPE.primitive_bitwidth == 32:
        return m
    else:
        return m.to(gl.int16).to(TYPE, bitcast=True).to(gl.float32).to(gl.int32, bitcast=True)


@gluon.jit
def _scale(bits, peak, least, most, BOUNDED: gl.constexpr):
    s = gl.div_rn(bits.to(gl.float32, bitcast=True), peak)
    if BOUNDED:
        s = gl.maximum(s, least)
        s = gl.where(most > 0.0, gl.minimum(s, most), s)
    return gl.where(s == 0.0, 1.1920928955078125e-07, s)


@gluon.jit
def _power(s):
    """The power of two that x and s are multiplied by: s becomes a number from 2^-85 to 2^64."""
    p = gl.where(s > 1.152921504606847e18, 5.421010862427522e-20, 1.0)  # 2^60, 2^-64
    return gl.where(s < 8.673617379884035e-19, 1.8446744073709552e19, p)  # 2^-60, 2^64


@gluon.jit
def _quotient(x, s, y):
    """x / s, correctly rounded; y = 1 / s."""
    q = x * y
    q = gl.fma(gl.fma(-q, s, x), y, q)
    q = gl.fma(gl.fma(-q, s, x), y, q)
    sign = x.to(gl.int32, bitcast=True) & -2147483648  # which the remainder of -0 loses
    return (q.to(gl.int32, bitcast=True) & 0x7FFFFFFF | sign).to(gl.float32, bitcast=True)


@gluon.jit
def _codes(q, FP8: gl.constexpr, ASM: gl.constexpr):
    """Codes of finite q."""
    if FP8:
        return gl.inline_asm_elementwise(
            ASM, "=r,r,r,r,r", [q], dtype=gl.uint8, is_pure=True, pack=4
        )
    else:
        r = gl.minimum(gl.maximum(q, -128.0), 127.0) + 12582912.0  # 1.5 * 2^23: ties to even
        return r.to(gl.int32, bitcast=True).to(gl.int8)


@gluon.jit
def _exchanged(q, ORDER: gl.constexpr, BK: gl.constexpr, L: gl.constexpr):
    if ORDER == 0:
        return q
    else:
        v = q.reshape([BK // 16, 2, 4, 2])  # kh t p
        if ORDER == 8:
            v = v.permute([0, 2, 1, 3])
        else:
            v = v.permute([0, 2, 3, 1])
        return gl.convert_layout(v.reshape([BK]), L)


@gluon.jit(do_not_specialize=["peak", "least", "most"])
def token_codes(X, ROWS, SCALE, GATHER, Q, S, K, KIN, peak, least, most, FP8: gl.constexpr,
                BOUNDED: gl.constexpr, STATIC: gl.constexpr, HAS_ROWS: gl.constexpr,
                HAS_GATHER: gl.constexpr, ORDER: gl.constexpr, BK: gl.constexpr,
                BI: gl.constexpr, NW: gl.constexpr):  # fmt: skip
    """X [T, KIN] to codes Q [T, K] and scales S [T], a program per token; K a multiple of 16.

    HAS_ROWS: token t is row ROWS[t] of X. STATIC: under the stored scale SCALE [1]. HAS_GATHER:
    stored column k is column GATHER[k] of X, or zero where that is negative.
    """
    L: gl.constexpr = gl.BlockedLayout([16], [32], [NW], [0])
    PART: gl.constexpr = NW * 512  # columns at a time: registers hold all of x, but not all of q
    gdc_wait()
    gdc_launch_dependents()  # not before: blocks beside those of the last product spread unevenly
    t = gl.program_id(0)
    at = t
    if HAS_ROWS:
        at = gl.load(ROWS + t)
    row = X + at.to(gl.int64) * KIN
    i = gl.arange(0, PART, layout=L)
    top = gl.zeros([PART], gl.int32, L)
    held = ()
    for c in gl.static_range((BI + PART - 1) // PART):
        x = gl.load(row + c * PART + i, mask=c * PART + i < KIN, other=0.0)
        top = gl.maximum(top, _magnitude(x))
        held = held + (x,)
    bits = _bits_of(gl.max(top, 0), X.dtype.element_ty)
    odd = bits >= 0x7F800000
    if STATIC:
        s = gl.load(SCALE).to(gl.float32)
    else:
        s = _scale(bits, peak, least, most, BOUNDED)
    p = _power(s)
    y = gl.div_rn(1.0, s * p)
    for c in gl.static_range((BK + PART - 1) // PART):
        k = c * PART + i
        if HAS_GATHER:
            g = gl.load(GATHER + k, mask=k < K, other=-1)
            x = gl.load(row + g, mask=g >= 0, other=0.0).to(gl.float32)
        else:
            x = held[c].to(gl.float32)
        if STATIC:
            q = gl.div_rn(x, s)
        else:
            q = _quotient(x * p, s * p, y)
        q = _exchanged(gl.where(odd, 0.0, q), ORDER, PART, L)
        gl.store(Q + t.to(gl.int64) * K + k, _codes(q, FP8, _FP8), mask=k < K)
    gl.store(S + t, gl.where(odd, float("nan"), s))


@gluon.jit(do_not_specialize=["T", "peak", "least", "most"])
def group_codes(X, Q, S, T, K, peak, least, most, BOUNDED: gl.constexpr, NW: gl.constexpr):
    """X [T, K] to e4m3 codes and a scale per 128 columns, S [K / 128, T]."""
    L: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [NW, 1], [1, 0])
    gdc_wait()
    gdc_launch_dependents()
    t = gl.program_id(0) * (4 * NW) + gl.arange(0, 4 * NW, layout=gl.SliceLayout(1, L))
    g = gl.program_id(1)
    k = g * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    at = t[:, None].to(gl.int64) * K + k[None, :]
    keep = (t < T)[:, None] & (k < K)[None, :]
    x = gl.load(X + at, mask=keep, other=0.0).to(gl.float32)
    bits = _largest(x, 1)
    odd = bits >= 0x7F800000
    s = _scale(bits, peak, least, most, BOUNDED)
    p = _power(s)
    y = gl.div_rn(gl.full_like(s, 1.0), s * p)
    q = _quotient(
        x * p[:, None], (s * p)[:, None] + gl.zeros_like(x), y[:, None] + gl.zeros_like(x)
    )
    q = gl.where(odd[:, None], 0.0, q)
    gl.store(Q + at, _codes(q, True, _FP8), mask=keep)
    gl.store(S + g * T + t, gl.where(odd, float("nan"), s), mask=t < T)
