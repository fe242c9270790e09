"""Activations to 8-bit codes in one pass over x, by the rule of ``quant_core.kernels.activations``.

    s = clamp(max|x| / peak, least, most), 0 becomes 2^-23       code = round(x / s), ties to even

One program reads one token (grain: the whole token) or one group of 128 columns of it. Divisions
are correctly rounded and fp8 codes are made with integer arithmetic, so that codes equal the
reference's bit for bit on every GPU and in the interpreter. A token (group) with NaN or infinity
gets the scale NaN, which reaches all of its results.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["quantize_groups", "quantize_static", "quantize_tokens"]


@triton.jit
def _codes(q, FP8: tl.constexpr):
    """Codes of q, which is finite or NaN: uint8 bits of e4m3, or int8."""
    if FP8:
        a = tl.minimum(tl.abs(q), 448.0)
        bits = a.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # exponent bias 127 to 7
        tiny = (a + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # steps of 2^-9
        code = tl.where(a < 0.015625, tiny, normal)
        code = tl.where(q != q, 127, code)
        return (code | ((q.to(tl.int32, bitcast=True) >> 24) & 128)).to(tl.uint8)
    else:
        r = (q + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to an integer, ties to even
        r = tl.minimum(tl.maximum(r, -128.0), 127.0)
        return tl.where(r != r, 0.0, r).to(tl.int8)


@triton.jit
def _scale(x, amax, peak, least, most, BOUNDED: tl.constexpr):
    s = tl.div_rn(amax, peak)
    if BOUNDED:
        s = tl.maximum(s, least)
        s = tl.where(most > 0.0, tl.minimum(s, most), s)
    return tl.where(s == 0.0, 1.1920928955078125e-07, s)  # 2^-23, epsilon of float32


@triton.jit(do_not_specialize=["peak", "least", "most"])
def quantize_tokens(X, Q, S, K, peak, least, most, FP8: tl.constexpr, BOUNDED: tl.constexpr,
                    BK: tl.constexpr):  # fmt: skip
    """X [T, K] to codes Q [T, K] and scales S [T], a program per token."""
    t = tl.program_id(0)
    k = tl.arange(0, BK)
    base = t.to(tl.int64) * K
    x = tl.load(X + base + k, mask=k < K, other=0.0).to(tl.float32)
    odd = tl.max((~(tl.abs(x) <= 3.4028234663852886e38)).to(tl.int32), 0)
    s = _scale(x, tl.max(tl.abs(x), 0), peak, least, most, BOUNDED)
    s = tl.where(odd != 0, float("nan"), s)
    tl.store(S + t, s)
    tl.store(Q + base + k, _codes(tl.div_rn(x, s), FP8), mask=k < K)


@triton.jit(do_not_specialize=["T", "peak", "least", "most"])
def quantize_groups(X, Q, S, T, K, peak, least, most, COLUMN_MAJOR: tl.constexpr,
                    BOUNDED: tl.constexpr, BT: tl.constexpr):  # fmt: skip
    """X [T, K] to e4m3 codes and a scale per 128 columns: S [T, K/128], or [K/128, T]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    g = tl.program_id(1)
    k = g * 128 + tl.arange(0, 128)
    at = t.to(tl.int64)[:, None] * K + k[None, :]
    keep = (t < T)[:, None] & (k < K)[None, :]
    x = tl.load(X + at, mask=keep, other=0.0).to(tl.float32)
    odd = tl.max((~(tl.abs(x) <= 3.4028234663852886e38)).to(tl.int32), 1)
    s = _scale(x, tl.max(tl.abs(x), 1), peak, least, most, BOUNDED)
    s = tl.where(odd != 0, float("nan"), s)
    groups = (K + 127) // 128
    to = g * T + t if COLUMN_MAJOR else t * groups + g
    tl.store(S + to, s, mask=t < T)
    tl.store(Q + at, _codes(tl.div_rn(x, s[:, None]), True), mask=keep)


@triton.jit
def quantize_static(X, SCALE, Q, S, K, FP8: tl.constexpr, BK: tl.constexpr):
    """X [T, K] to codes under the stored scale SCALE [1]; S [T] repeats it, NaN for odd tokens."""
    t = tl.program_id(0)
    k = tl.arange(0, BK)
    base = t.to(tl.int64) * K
    x = tl.load(X + base + k, mask=k < K, other=0.0).to(tl.float32)
    odd = tl.max((~(tl.abs(x) <= 3.4028234663852886e38)).to(tl.int32), 0)
    s = tl.load(SCALE).to(tl.float32)
    tl.store(S + t, tl.where(odd != 0, float("nan"), s))
    q = tl.where(odd != 0, 0.0, tl.div_rn(x, s))
    tl.store(Q + base + k, _codes(q, FP8), mask=k < K)
