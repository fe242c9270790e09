"""Activations to their codes and back in one pass over x, bit for bit as the reference rounds.

    groups [BN] of GS columns each, a tile [BN, BG] of x per program
    s     stored, or of the group's largest magnitude (``activations`` has the rules)
    y     (round(x / s + z) - z) * s          NaN where x or s is not finite

A factor above the groups' scales, and a scale of the whole tensor, come from magnitudes that
``extremes`` writes first, from the token (a program then holds all of it), or are stored.

Magnitudes are compared as integers, which orders NaN and infinity above numbers, so they reach the
scale as they do in torch. Quotients are correctly rounded, codes are made with integer and exact
float arithmetic, and sums must not be fused with products (``enable_fp_fusion=False``): results
are equal on every GPU and in the interpreter. bfloat16 is read and written as words for the same
reason. An e8m0 byte is looked up: STEPS[f] holds the byte of 2^(f - 127), and STEPS[256 + f] the
bits from which on it is one more (``rounding_run.steps``), so every rule is one code path.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["extremes", "round_groups"]


@triton.jit
def _read(at, mask, HALF: tl.constexpr):
    """float32 of x; ``HALF``: the words are bfloat16."""
    if HALF:
        return (tl.load(at, mask=mask, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(at, y, mask, HALF: tl.constexpr):
    if HALF:
        bits = y.to(tl.int32, bitcast=True)
        word = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(at, tl.where(y != y, 0x7FC0, word).to(tl.int16), mask=mask)
    else:
        tl.store(at, y.to(at.dtype.element_ty), mask=mask)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _float(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _over(a, divisor: tl.constexpr):
    return tl.div_rn(a, tl.full(a.shape, divisor, tl.float32))


@triton.jit
def _near(a, TIES: tl.constexpr):
    """Whole number next to 0 <= a < 2^22. TIES 0: to even, 1: down, 2: up."""
    r = (a + 8388608.0) - 8388608.0  # 2^23: the sum has no bits below 1
    if TIES != 0:
        low = tl.where(r > a, r - 1.0, r)
        r = tl.where(a - low == 0.5, low + (TIES - 1), r)
    return r


@triton.jit
def _signed(r, x):
    """r >= 0 with the sign of x."""
    return _float(_bits(r) | (_bits(x) & -2147483648))


@triton.jit
def _to_int(v, LOW: tl.constexpr, HIGH: tl.constexpr, TIES: tl.constexpr):
    c = tl.minimum(tl.maximum(v, LOW), HIGH)
    return _signed(_near(tl.abs(c), TIES), c)


@triton.jit
def _to_float(v, MAN: tl.constexpr, EMIN: tl.constexpr, HIGH: tl.constexpr,
              SIGNED_ZERO: tl.constexpr, TIES: tl.constexpr):  # fmt: skip
    """The nearest value with MAN bits behind the leading one, steps of 2^(EMIN - MAN) below."""
    a = tl.minimum(tl.abs(v), HIGH)
    e = tl.maximum((_bits(a) >> 23) - 127, EMIN)
    r = _near(a * _float((127 + MAN - e) << 23), TIES) * _float((127 - MAN + e) << 23)
    signed = _signed(r, v)
    if SIGNED_ZERO:
        return signed
    else:
        return tl.where(r == 0.0, r, signed)


@triton.jit
def _clamp(s, LEAST: tl.constexpr, MOST: tl.constexpr):
    """NaN stays NaN; 0 is no bound above."""
    c = tl.maximum(s, LEAST)
    if MOST > 0.0:
        c = tl.minimum(c, MOST)
    return tl.where(s != s, s, c)


@triton.jit
def _exponent_scale(amax, STEPS, LEAST: tl.constexpr, MOST: tl.constexpr):
    bits = _bits(_clamp(amax, LEAST, MOST))
    f = (bits >> 23) & 255
    byte = tl.load(STEPS + f) + (bits >= tl.load(STEPS + 256 + f)).to(tl.int32)
    s = tl.where(byte == 0, 0x00400000, byte << 23)  # 2^-127 is subnormal
    return _float(tl.where(byte >= 255, 0x7FC00000, s))  # a NaN of all ones counts one more


@triton.jit
def _stored(at, mask, KIND: tl.constexpr, STEPS):
    """A stored value. KIND 0: a float, 1: a byte of the table STEPS, else bits of an integer:
    10 + b unsigned, 20 + b two's complement."""
    v = tl.load(at, mask=mask, other=0)
    if KIND == 0:
        return v.to(tl.float32)
    elif KIND == 1:
        return _float(tl.load(STEPS + v.to(tl.int32)))
    elif KIND < 20:
        return v.to(tl.float32)
    else:
        half: tl.constexpr = 1 << (KIND - 21)
        return (((v.to(tl.int32) & (2 * half - 1)) ^ half) - half).to(tl.float32)


@triton.jit(do_not_specialize=["SIZE", "CHUNK"])
def extremes(X, PART, SIZE, CHUNK, HALF: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
             PDL: tl.constexpr):  # fmt: skip
    """PART [2, PARTS]: bits of the largest -x and the largest x of a part of x, both >= 0."""
    pid = tl.program_id(0).to(tl.int64)
    below = tl.zeros([BLOCK], tl.int32)
    above = tl.zeros([BLOCK], tl.int32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    for start in range(0, CHUNK, BLOCK):
        at = pid * CHUNK + start + tl.arange(0, BLOCK)
        x = _read(X + at, at < SIZE, HALF)
        size = _bits(x) & 0x7FFFFFFF
        below = tl.maximum(below, tl.where((x < 0) | (x != x), size, 0))
        above = tl.maximum(above, tl.where((x > 0) | (x != x), size, 0))
    tl.store(PART + pid, tl.max(below, 0))
    tl.store(PART + PARTS + pid, tl.max(above, 0))


@triton.jit(do_not_specialize=["T", "E"])
def round_groups(X, Y, SCALE, ZERO, STEPS, PART, EXPERT, T, K, G, GS, E,
                 HALF: tl.constexpr, KIND: tl.constexpr, STORED: tl.constexpr,
                 STORED_ZERO: tl.constexpr, PER_GROUP: tl.constexpr, EXPERTS: tl.constexpr,
                 INVERSE: tl.constexpr, HAS_ZERO: tl.constexpr, FACTOR: tl.constexpr,
                 FACTOR_INVERSE: tl.constexpr, FACTOR_OVER: tl.constexpr,
                 FACTOR_PLAIN: tl.constexpr, PEAK: tl.constexpr,
                 LEAST: tl.constexpr, MOST: tl.constexpr, EPS: tl.constexpr,
                 IS_FLOAT: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
                 MAN: tl.constexpr, EMIN: tl.constexpr, SIGNED_ZERO: tl.constexpr,
                 TIES: tl.constexpr, SMAN: tl.constexpr, SEMIN: tl.constexpr,
                 SHIGH: tl.constexpr, TENSOR: tl.constexpr, RAGGED: tl.constexpr,
                 WHOLE: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
                 BN: tl.constexpr, BG: tl.constexpr, BO: tl.constexpr,
                 EARLY: tl.constexpr):  # fmt: skip
    """See the module's docstring; ``rounding_plan`` says what the constants are.

    BO: of a group that is all of a token, several programs look for its scale, and each rounds so
    many columns; 0: one program a tile.

    EARLY: the product may begin as soon as a multiprocessor is free, while the kernel before this
    one still runs. What it reads before it waits are weights, which a kernel that lets this one
    begin before it ends must not write; no kernel here writes any.
    """
    pid = tl.program_id(0)
    if WHOLE:  # a program holds all groups of its token
        g = tl.arange(0, BN)
        t = tl.zeros([BN], tl.int32) + pid
        some = g < G
    else:
        n = pid * BN + tl.arange(0, BN)
        t = n // G
        g = n - t * G
        some = t < T
    j = tl.arange(0, BG)
    keep = some[:, None] & (j < GS)[None, :]
    if RAGGED:
        keep = keep & (g[:, None] * GS + j[None, :] < K)
        at = t.to(tl.int64)[:, None] * K + g[:, None] * GS + j[None, :]
    elif WHOLE:
        at = pid.to(tl.int64) * K + g[:, None] * GS + j[None, :]
    else:
        at = (pid * BN + tl.arange(0, BN)).to(tl.int64)[:, None] * GS + j[None, :]
    if PDL:  # the product that follows may fetch weights meanwhile
        if EARLY:
            gdc_launch_dependents()
            gdc_wait()
        else:
            gdc_wait()
            gdc_launch_dependents()
    x = _read(X + at, keep, HALF)
    size = _bits(x) & 0x7FFFFFFF
    if BO > 0:
        own_j = tl.program_id(1) * BO + tl.arange(0, BO)
        own_keep = some[:, None] & (own_j < GS)[None, :]
        own_at = t.to(tl.int64)[:, None] * K + own_j[None, :]
        own_x = _read(X + own_at, own_keep, HALF)

    own = g if PER_GROUP else tl.zeros([BN], tl.int32)
    if EXPERTS:
        e = tl.load(EXPERT + t, mask=some, other=0)
        e = tl.where((e >= 0) & (e < E), e, 0).to(tl.int32)
        own = own + e * (G if PER_GROUP else 1)

    if FACTOR == 1:
        factor = _stored(SCALE + own, some, 0, STEPS)
    elif FACTOR > 1:
        if FACTOR == 2:
            most = tl.max(tl.max(size, 1), 0)
        else:
            most = tl.max(tl.load(PART + tl.arange(0, 2 * PARTS)), 0)
        largest = _float(tl.zeros([BN], tl.int32) + most)
        factor = _over(largest, FACTOR_OVER)
        factor = tl.where((factor if FACTOR_PLAIN else largest) == 0.0, 1.0, factor)
    if KIND == 0:
        s = _stored(SCALE + own, some, STORED, STEPS)
        if HAS_ZERO:
            z = _stored(ZERO + own, some, STORED_ZERO, STEPS)
    elif HAS_ZERO:
        if TENSOR:
            p = tl.arange(0, PARTS)
            below = tl.zeros([BN], tl.int32) + tl.max(tl.load(PART + p), 0)
            above = tl.zeros([BN], tl.int32) + tl.max(tl.load(PART + PARTS + p), 0)
        else:
            below = tl.max(tl.where((x < 0) | (x != x), size, 0), 1)
            above = tl.max(tl.where((x > 0) | (x != x), size, 0), 1)
        low = -_float(below)
        s = _over(_float(above) - low, HIGH - LOW)
        s = tl.where(s == 0.0, EPS, s)
        z = _to_int(LOW - tl.div_rn(low, s), LOW, HIGH, 0)
    else:
        if TENSOR:
            amax = _float(
                tl.zeros([BN], tl.int32) + tl.max(tl.load(PART + tl.arange(0, 2 * PARTS)), 0)
            )
        else:
            amax = _float(tl.max(size, 1))
        if KIND == 1:
            s = _over(amax, PEAK)
            if FACTOR == 1:
                s = s * factor
            s = _clamp(s, LEAST, MOST)
            s = tl.where(s == 0.0, EPS, s)
        elif KIND == 2:
            s = _exponent_scale(amax, STEPS, LEAST, MOST)
        else:
            if FACTOR == 0:
                wide = _over(amax, PEAK)
            elif FACTOR_INVERSE:
                wide = factor * _over(amax, PEAK)
            else:
                wide = tl.div_rn(amax, factor * PEAK)
            wide = _clamp(wide, LEAST, MOST)
            s = _to_float(wide, SMAN, SEMIN, SHIGH, True, 0)
            s = tl.where(s == 0.0, EPS, s)
            s = tl.where(wide != wide, wide, s)
            if FACTOR != 0:
                s = tl.div_rn(s, factor) if FACTOR_INVERSE else s * factor

    if BO > 0:
        x, at, keep, size = own_x, own_at, own_keep, _bits(own_x) & 0x7FFFFFFF
    wide_s = tl.broadcast_to(s[:, None], x.shape)
    q = x * wide_s if INVERSE else tl.div_rn(x, wide_s)
    if HAS_ZERO:
        q = q + z[:, None]
    if IS_FLOAT:
        r = _to_float(q, MAN, EMIN, HIGH, SIGNED_ZERO, TIES)
    else:
        r = _to_int(q, LOW, HIGH, TIES)
    if HAS_ZERO:
        r = r - z[:, None]
    y = tl.div_rn(r, wide_s) if INVERSE else r * wide_s
    odd = (q != q) | (size == 0x7F800000)
    if HAS_ZERO:
        odd = odd | (z != z)[:, None]
    _write(Y + at, tl.where(odd, float("nan"), y), keep, HALF)
