// Codes to one A operand of mma: the 8 weights a lane owns in one step of 16 columns.
//
//   integers  a code is or-ed into the mantissa of BASE (128 in bf16, 1024 in f16), and BASE + zero
//             is subtracted: both exact, so a weight equal to its zero is 0, and Inf * 0 is NaN
//   int8      bf16 has 8 bits of mantissa: (128 + low 7 bits) - (128 + sign bit) = the value
//   e2m1      sign, exponent and mantissa moved to the wider type's: value * 2^-126 (f16: 2^-14)
//   e4m3      the same: value * 2^-120 (f16: 2^-8)
//
// Small floats whose scale has few bits take it here, as a product that is exact in the wider type
// (SCALE_IN_WEIGHT); what is left of the power of two is OUT_SCALE, applied to the sum.
#pragma once
#include "factors.cuh"

#if F16
#define MAGIC 0x6400u
#else
#define MAGIC 0x4300u
#endif

// 2 to 4 bits: one word of 16-bit halves p = 0, 1 for each (kh, h)
DEVICE void integers4(u32 w, u32 zero0, u32 zero1, u32* a) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    a[i] = sub2(and_xor(w >> 4 * i, 0x000F000F, dup16(MAGIC | SIGNED_FLIP)), i & 1 ? zero1 : zero0);
}
DEVICE void integers2(u32 w, int step, u32 zero0, u32 zero1, u32* a) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    a[i] = sub2(and_xor(w >> 2 * ((step & 1) * 4 + i), 0x00030003, dup16(MAGIC | SIGNED_FLIP)),
                i & 1 ? zero1 : zero0);
}
DEVICE void integers3(u32 w, u32 high, int step, u32 zero0, u32 zero1, u32* a) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int at = (step & 3) * 4 + i;
    const u32 top = at >= 2 ? high >> (at - 2) : high << (2 - at);
    const u32 low = and_xor(w >> 2 * ((step & 1) * 4 + i), 0x00030003, dup16(MAGIC | SIGNED_FLIP));
    a[i] = sub2(and_xor(top, 0x00040004, low), i & 1 ? zero1 : zero0);
  }
}
// 8 bits: bytes (h, p) of kh = 0 and of kh = 1; zero0, zero1 as ``zero_pair`` makes them
DEVICE void integers8(u32 w0, u32 w1, u32 zero0, u32 zero1, u32* a) {
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 w = (i < 2 ? w0 : w1) ^ dup16(SIGNED_FLIP * 0x101u);
#if F16 || CODE_BITS < 8
    a[i] = sub2(prmt(w, MAGIC >> 8, i & 1 ? 0x4342 : 0x4140),
                i & 1 ? zero1 : zero0);
#else
    const u32 t = prmt(w, 0, i & 1 ? 0x4342 : 0x4140);
    a[i] = sub2(and_or(t, 0x007F007F, 0x43004300), and_or(t, 0x00800080, 0x43004300));
    if (ZERO_LEFT) a[i] = sub2(a[i], i & 1 ? zero1 : zero0);
#endif
  }
}
// What is subtracted from a code's bits, for a zero point known as an integer.
DEVICE u32 zero_pair(u32 zero) {
#if CODE_BITS == 8 && !F16  // codes were read as signed: zero - 128
  return sub2(dup16(0x4300 | (zero & 0x7F)), zero & 0x80 ? 0x43004300u : 0x43804380u);
#else
  return dup16(MAGIC + zero);
#endif
}

DEVICE void floats4(u32 w, u32 scale0, u32 scale1, u32* a) {  // e2m1
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int left = (F16 ? 9 : 6) - 4 * i;  // exponent and mantissa from bits 4 i
    const u32 t = left >= 0 ? w << (left >= 0 ? left : 0) : w >> (left < 0 ? -left : 0);
    const u32 v = and_or(t, F16 ? 0x0E000E00 : 0x01C001C0, w << (12 - 4 * i) & 0x80008000);
    a[i] = WEIGHT_MUL ? mul2(v, i & 1 ? scale1 : scale0) : v;
  }
}
DEVICE void floats8(u32 w0, u32 w1, u32 scale0, u32 scale1, u32* a) {  // e4m3
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 t = prmt(i < 2 ? w0 : w1, 0, i & 1 ? 0x3424 : 0x1404);  // bytes to the top of halves
#if F16
    const u32 v = and_or(t >> 1, 0x3F803F80, t & 0x80008000);
#else
    const u32 v = and_or(t >> 4, 0x07F007F0, t & 0x80008000);
#endif
    a[i] = WEIGHT_MUL ? mul2(v, i & 1 ? scale1 : scale0) : v;
  }
}

// Scales of both rows (two bytes) as factors of floats4 / floats8: s * 2^WEIGHT_EXP, each doubled.
template <int T>
DEVICE void weight_scales(u32 bytes, u32& scale0, u32& scale1) {
  u32 both;
  if (T == T_E8M0) {  // bf16 only; exponent 0, which is 2^-127, is read as zero
    both = mul2(prmt(bytes, 0, 0x4140) << 7, dup16((127 + WEIGHT_EXP) << 7));
  } else {
    const u32 t = prmt(bytes, 0, 0x1404);
#if F16  // (s * 2^-8) * 2^14
    both = mul2(and_or(t >> 1, 0x3F803F80, t & 0x80008000), 0x74007400);
#else  // (s * 2^-120) * 2^120 * 2^WEIGHT_EXP
    both = mul2(and_or(t >> 4, 0x07F007F0, t & 0x80008000), 0x7B807B80);
    both = mul2(both, dup16((127 + WEIGHT_EXP) << 7));
#endif
  }
  scale0 = prmt(both, both, 0x1010);
  scale1 = prmt(both, both, 0x3232);
}
