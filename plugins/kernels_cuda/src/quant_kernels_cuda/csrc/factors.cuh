// Factors of a scale, zero codes and offsets: where they lie (quant_core.kernels.tiles), how they
// come through the ring beside the codes, and what their bits mean.
#pragma once
#include "primitives.cuh"

enum Type : int { T_NONE, T_F32, T_F16, T_BF16, T_U8, T_I8, T_E4M3, T_E8M0 };
enum Grain : int {
  G_NONE,
  G_FINE,    // SUBS values per 128 columns: [tiles, groups * SUBS, 8, 2]
  G_COARSE,  // one value per 2^shift groups of 128: [tiles, coarse groups, 8, 2]
  G_ROW,     // one per output row: [Np]
  G_BLOCK    // one per rectangle: [rows / r, K / c]; read straight, one item ahead
};

DEVICE float e4m3_to_float(u32 b) {  // exponent and mantissa to float's: value * 2^-120
  return __int_as_float(((b & 0x80) << 24) | ((b & 0x7F) << 20)) * 0x1p120f;
}
DEVICE float e8m0_to_float(u32 b) { return __int_as_float(b ? b << 23 : 0x00400000); }
DEVICE float half_to_float(u16 v) {
  float r;
  asm("cvt.f32.f16 %0,%1;" : "=f"(r) : "h"(v));
  return r;
}

template <int T>
DEVICE float decode(u32 bits) {
  if (T == T_F32) return __int_as_float(bits);
  if (T == T_F16) return half_to_float((u16)bits);
  if (T == T_BF16) return __int_as_float(bits << 16);
  if (T == T_U8) return __int_as_float(0x4B000000 | bits) - 8388608.f;
  if (T == T_I8) return __int_as_float(0x4B000000 | (bits ^ 0x80)) - 8388736.f;
  if (T == T_E4M3) return e4m3_to_float(bits);
  return e8m0_to_float(bits);
}

// A value of a type known only at run time; for what is read once per output.
DEVICE float decode_any(int type, const void* base, u64 i) {
  if (type == T_F32) return ((const float*)base)[i];
  if (type == T_F16) return half_to_float(((const u16*)base)[i]);
  if (type == T_BF16) return decode<T_BF16>(((const u16*)base)[i]);
  const u32 b = ((const u8*)base)[i];
  if (type == T_E4M3) return decode<T_E4M3>(b);
  if (type == T_E8M0) return decode<T_E8M0>(b);
  return type == T_I8 ? decode<T_I8>(b) : decode<T_U8>(b);
}

struct Place {  // of a chunk: its tile, tile * groups + group, and what else finds its factors
  u32 tile, index, coarse, group;
  int valid, shift, lane;  // groups of the chunk that exist
};

template <int T, int GRAIN, int SUBS, int GROUPS>  // GROUPS of 128 in a stage of the ring
struct Factor {
  static constexpr int SIZE = T == T_F32 ? 4 : (T == T_F16 || T == T_BF16) ? 2 : 1;
  static constexpr int PER = GRAIN == G_FINE ? SUBS : 1;  // values per row and 128 columns
  static constexpr bool RING = GRAIN == G_FINE || GRAIN == G_COARSE || GRAIN == G_ROW;
  static constexpr int PIECES = !RING ? 0 : GRAIN == G_ROW ? SIZE : GROUPS * PER * SIZE;
  static constexpr int BYTES = PIECES * 16;

  // Copy the values of a chunk; ``to`` already points at this lane's piece.
  MEMBER void copy(u32 to, const char* base, const Place& p) {
    if constexpr (RING) {
#pragma unroll
      for (int at = 0; at < PIECES; at += 32) {
        const int i = at + p.lane;
        if (PIECES % 32 && i >= PIECES) break;
        u32 from = p.tile * SIZE + i;
        int q = 0;
        if (GRAIN == G_FINE) {
          q = i / (PER * SIZE);
          from = p.index * (PER * SIZE) + i;
        } else if (GRAIN == G_COARSE) {
          q = i / SIZE;
          from = (p.tile * p.coarse + ((p.group + q) >> p.shift)) * SIZE + i % SIZE;
        }
        copy16_small(to + at * 16, base + (u64)from * 16, GROUPS == 1 || q < p.valid ? 16 : 0);
      }
    }
  }

  // Raw bits of rows ``row`` and ``row + 8`` for sub-group ``sub`` of group ``q``.
  MEMBER void raw(const char* stage, int q, int sub, int row, u32& low, u32& high) {
    if (GRAIN == G_ROW) {
      if (SIZE == 4) low = ((const u32*)stage)[row], high = ((const u32*)stage)[row + 8];
      if (SIZE == 2) low = ((const u16*)stage)[row], high = ((const u16*)stage)[row + 8];
      if (SIZE == 1) low = ((const u8*)stage)[row], high = ((const u8*)stage)[row + 8];
      return;
    }
    const int i = (q * PER + (GRAIN == G_FINE ? sub : 0)) * 8 + row;
    if (SIZE == 4) {
      const uint2 v = ((const uint2*)stage)[i];
      low = v.x, high = v.y;
    } else if (SIZE == 2) {
      const u32 v = ((const u32*)stage)[i];
      low = v & 0xFFFF, high = v >> 16;
    } else {
      const u32 v = ((const u16*)stage)[i];
      low = v & 0xFF, high = v >> 8;
    }
  }
  MEMBER float2 read(const char* stage, int q, int sub, int row) {
    u32 low, high;
    raw(stage, q, sub, row, low, high);
    return make_float2(decode<T>(low), decode<T>(high));
  }
};
