// Codes to one A operand of mma: the 8 weights a lane owns in one step of 16 columns.
//
//   integers  bits at place p of a 16-bit half are, read as a float, code * 2^(p - LEAST): the
//             bits of a float are linear up to the second exponent, so p goes up to 7. One
//             multiplication and addition makes (code - zero) * 2^-LOW of it, exactly; nothing is
//             shifted within a byte.
//             A weight equal to its zero is 0, and Inf * 0 is NaN
//   e2m1      sign, exponent and mantissa moved to the wider type's: value * 2^-126 (f16: 2^-14)
//   e4m3      the same: value * 2^-120 (f16: 2^-8)
//
// Small floats whose scale has few bits take it here, as a product that is exact in the wider type
// (IN_WEIGHT). What is left of powers of two is OUT_EXP, applied to the sum.
#pragma once
#include "factors.cuh"

#if F16
constexpr int LEAST = 24, LOW = 12;  // 2^-24 is the least number
DEVICE u32 power2(int e) { return dup16((15 + e) << 10); }
#else
constexpr int LEAST = 133, LOW = 8;
DEVICE u32 power2(int e) { return dup16((127 + e) << 7); }
#endif

// What is added to a code: -zero * 2^-LOW, twice.
DEVICE u32 minus_zero(u32 zero) { return mul2(dup16(zero), power2(LEAST - LOW) | 0x80008000u); }
// bits << at of both halves, (code << shift) - zero
DEVICE u32 weight2(u32 bits, int at, int shift, u32 zero) {
  return fma2(bits, power2(LEAST - LOW + shift - at), zero);
}

// 2 to 4 bits: one word of 16-bit halves p = 0, 1 for each (kh, h)
DEVICE void integers4(u32 w, u32 zero0, u32 zero1, u32* a) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = 4 * (i & 1);
    const u32 v = and_xor(w >> 8 * (i / 2), 0x000F000Fu << at, dup16(SIGNED_FLIP) << at);
    a[i] = weight2(v, at, 0, i & 1 ? zero1 : zero0);
  }
}
DEVICE void integers2(u32 w, int step, u32 zero0, u32 zero1, u32* a) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 v = and_xor(w >> 8 * (step & 1), 0x00030003u << 2 * i, dup16(SIGNED_FLIP) << 2 * i);
    a[i] = weight2(v, 2 * i, 0, i & 1 ? zero1 : zero0);
  }
}
DEVICE void integers3(u32 w, u32 high, int step, u32 zero0, u32 zero1, u32* a) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = (step & 1) * 4 + i;  // of the high bit, in its byte
    const u32 low = w >> 8 * (step & 1) & 0x00030003u << 2 * i;
    const u32 top = and_xor(high >> 8 * ((step & 3) / 2), 0x00010001u << at,
                            dup16(SIGNED_FLIP >> 2) << at);
    a[i] = weight2(low, 2 * i, 0, weight2(top, at, 2, i & 1 ? zero1 : zero0));
  }
}
// 8 bits: bytes (h, p) of kh = 0 and of kh = 1
DEVICE void integers8(u32 w0, u32 w1, u32 zero0, u32 zero1, u32* a) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 w = (i < 2 ? w0 : w1) ^ dup16(SIGNED_FLIP * 0x101u);
    a[i] = weight2(prmt(w, 0, i & 1 ? 0x4342 : 0x4140), 0, 0, i & 1 ? zero1 : zero0);
  }
}

// e2m1. Two codes of every half come to their places together: ``pick`` takes the signs from one
// shift of the word and the magnitudes from another, where no bit of the two codes meets another's.
DEVICE void floats4(u32 w, u32 scale0, u32 scale1, u32* a) {
  constexpr u32 PLACES = F16 ? 0x8E008E00 : 0x81C081C0;  // of sign, exponent and mantissa
  constexpr u32 SIGNS = F16 ? 0x80808080 : 0x88008800;
  constexpr int APART = F16 ? 3 : 6, SECOND = F16 ? 8 : 4, UP = F16 ? 4 : 8;
  const u32 high = pick(w, w >> APART, SIGNS), low = pick(w << UP, w << (UP - APART), SIGNS);
  a[3] = high & PLACES, a[F16 ? 1 : 2] = high << SECOND & PLACES;
  a[F16 ? 2 : 1] = low & PLACES, a[0] = low << SECOND & PLACES;
  if (WEIGHT_MUL)
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = mul2(a[i], i & 1 ? scale1 : scale0);
}
DEVICE void floats8(u32 w0, u32 w1, u32 scale0, u32 scale1, u32* a) {  // e4m3
#pragma unroll
  for (int kh = 0; kh < 2; kh++) {  // low and high bytes of the four values
    const u32 w = kh ? w1 : w0;
    const u32 low = w << (F16 ? 7 : 4) & (F16 ? 0x80808080 : 0xF0F0F0F0);
    const u32 high = and_or(w >> (F16 ? 1 : 4), F16 ? 0x3F3F3F3F : 0x07070707, w & 0x80808080);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 v = prmt(low, high, h ? 0x7362 : 0x5140);
      a[2 * kh + h] = WEIGHT_MUL ? mul2(v, h ? scale1 : scale0) : v;
    }
  }
}

// Scales of both rows (two bytes) as a pair of factors of floats4 / floats8: s * 2^WEIGHT_EXP.
template <int T>
DEVICE u32 weight_scales(u32 bytes) {
  if (T == T_E8M0)  // bf16 only; exponent 0, which is 2^-127, is read as zero
    return mul2(prmt(bytes, 0, 0x4140) << 7, dup16((127 + WEIGHT_EXP) << 7));
  const u32 t = prmt(bytes, 0, 0x1404);
#if F16  // (s * 2^-8) * 2^14
  return mul2(and_or(t >> 1, 0x3F803F80, t & 0x80008000), 0x74007400);
#else  // (s * 2^-120) * 2^120 * 2^WEIGHT_EXP
  const u32 both = mul2(and_or(t >> 4, 0x07F007F0, t & 0x80008000), 0x7B807B80);
  return mul2(both, dup16((127 + WEIGHT_EXP) << 7));
#endif
}
