// What both kernels share: arguments, the ring's stages, and the arithmetic of one group.
//
// A scale is multiplied where it is cheapest: into the weight where that is exact (dequant.cuh),
// onto the sums of its columns, or, one per row or matrix, onto the output. Offsets and zero points
// that are no integers need sum(x) of their columns (XSUMS).
//
// Compile-time: F16 NT (8 rows of x each) RT (tiles of 16 output rows that a warp takes together)
//   GPC (groups of 128 in a stage) ST (stages) WARPS (of a block)
//   CODE_BITS FLOAT_CODES SIGNED_FLIP ZERO
//   S0_* S1_* Z_* O0_* O1_* (TYPE, GRAIN, SUBS)  IN_WEIGHT WEIGHT_MUL WEIGHT_EXP WEIGHT_CONST
//   OUT_EXP FLUSH (scales per 128 columns on the sums, 0: none)
#pragma once
#include "dequant.cuh"

#define THREADS (WARPS * 32)
#define ROW_FACTORS 3

typedef Factor<S0_TYPE, S0_GRAIN, S0_SUBS, GPC> S0;
typedef Factor<S1_TYPE, S1_GRAIN, S1_SUBS, GPC> S1;
typedef Factor<Z_TYPE, Z_GRAIN, Z_SUBS, GPC> ZF;
typedef Factor<O0_TYPE, O0_GRAIN, O0_SUBS, GPC> O0;
typedef Factor<O1_TYPE, O1_GRAIN, O1_SUBS, GPC> O1;

constexpr bool OFFSET = O0_TYPE != T_NONE;
constexpr bool ZERO_INTEGER = Z_TYPE == T_U8;
constexpr bool ZERO_FLOAT = Z_TYPE != T_NONE && !ZERO_INTEGER;
constexpr bool XSUMS = OFFSET || ZERO_FLOAT;
constexpr int PLANES16 = CODE_BITS <= 3 ? 1 : CODE_BITS == 4 ? 2 : 4;  // 16-byte pieces of a group
constexpr int PIECES = GPC * PLANES16;  // of one tile; a stage holds RT of each of the following
constexpr int HIGH = CODE_BITS == 3 ? GPC : 0;
constexpr int AT_HIGH = PIECES * 512, AT_S0 = AT_HIGH + HIGH * 256, AT_S1 = AT_S0 + S0::BYTES;
constexpr int AT_Z = AT_S1 + S1::BYTES, AT_O0 = AT_Z + ZF::BYTES, AT_O1 = AT_O0 + O0::BYTES;
constexpr int TILE = AT_O1 + O1::BYTES;  // bytes, a multiple of 16
constexpr int STAGE = RT * TILE;
constexpr int PARTS = FLUSH ? FLUSH : 1;
#define XSUM_UNIT __int_as_float((127 - OUT_EXP) << 23)  // sums of x are as sums of codes are
constexpr int STEPS = 8 / PARTS;  // of 16 columns between two scales on the sums
constexpr int OWN = IN_WEIGHT ? (S0_SUBS + 3) / 4 : 0;  // scales of a group that a lane decodes

struct Args {
  const char *x, *codes, *high, *s0, *s1, *z, *o0, *o1;
  const char* row[ROW_FACTORS];
  const char *bias, *gather, *experts;
  char* y;
  u64 step[13];  // bytes from one expert to the next: codes high s0 s1 z o0 o1 row[3] bias gather -
  int m, m_inverse;  // 2^20 / m, rounded up
  int n, k, groups;
  int each, extra;     // tiles per block (cluster); the first ``extra`` have one more
  int cluster, slice;  // blocks that share K, groups of each
  // groups of a phase (a multiple of GPC), log2 of the chunks of a run (resident.cu: stages
  // asked for before x, 0: half of one)
  int span, run;
  int batch, slots;   // tiles per barrier, most warps that share a tile
  int coarse, shift;  // groups per row and log2 of 128-column groups per value of G_COARSE
  // G_BLOCK: per value 16-row tiles and 128-groups; values per row of blocks
  int block_rows, block_groups, block_cols;
  int pitch;  // bytes of a row of x in shared memory
  int row_type[ROW_FACTORS], row_single[ROW_FACTORS], row_inverse[ROW_FACTORS], bias_type;
  int expert_count;
  int buffers;  // decode.cu: for sums; 1 if all tiles make one batch, else 2
  int sets;     // resident.cu: teams of ``slots`` warps that take turns with tiles
  int walkers;  // blocks (clusters) that share the tiles
  u32 by_slots, by_sets, by_cluster, by_batch;  // for ``divided``
};


// Copy a chunk of one tile into a stage of the ring. ``to`` is this lane's piece of the stage,
// ``codes`` and ``high`` this lane's pieces of the chunk; groups beyond ``valid`` become zeros.
struct Sources {
  const char *codes, *high, *s0, *s1, *z, *o0, *o1;
};
template <int FIRST, int END>  // of the chunk's groups
DEVICE void copy_codes(u32 to, const Sources& s, const Place& p) {
  const char* from = s.codes + (u64)p.index * (PLANES16 * 512);
#pragma unroll
  for (int i = FIRST * PLANES16; i < END * PLANES16; i++)
    copy16(to + i * 512, from + i * 512, GPC == 1 || i / PLANES16 < p.valid ? 16 : 0);
#pragma unroll
  for (int q = FIRST; q < (HIGH ? END : FIRST); q++)
    copy8(to + AT_HIGH + q * 256 - p.lane * 8, s.high + (u64)(p.index + q) * 256,
          GPC == 1 || q < p.valid ? 8 : 0);
}
DEVICE void copy_factors(u32 to, const Sources& s, const Place& p) {
  S0::copy(to + AT_S0, s.s0, p);
  S1::copy(to + AT_S1, s.s1, p);
  ZF::copy(to + AT_Z, s.z, p);
  O0::copy(to + AT_O0, s.o0, p);
  O1::copy(to + AT_O1, s.o1, p);
}
DEVICE void copy_chunk(u32 to, const Sources& s, const Place& p) {
  copy_codes<0, GPC>(to, s, p);
  copy_factors(to, s, p);
}
DEVICE Sources sources(const Args& A, u64 expert, int lane) {
  return {A.codes + expert * A.step[0] + lane * 16, A.high + expert * A.step[1] + lane * 8,
          A.s0 + expert * A.step[2], A.s1 + expert * A.step[3], A.z + expert * A.step[4],
          A.o0 + expert * A.step[5], A.o1 + expert * A.step[6]};
}
// The scale of a rectangle of weights that holds ``tile`` and ``group``.
DEVICE float block_scale(const Args& A, const char* s0, int tile, int group) {
  const u64 row = (u64)(min(tile * 16, A.n - 1) / (A.block_rows * 16)) * A.block_cols;
  return decode_any(S0_TYPE, s0, row + min(group, A.groups - 1) / A.block_groups);
}
// What an output is multiplied with, and what is added to it.
DEVICE float2 factor_and_bias(const Args& A, u64 expert, int out) {
  float factor = __int_as_float((127 + OUT_EXP) << 23), bias = 0.f;
#pragma unroll 1
  for (int r = 0; r < ROW_FACTORS; r++)
    if (A.row[r]) {
      const float f = decode_any(A.row_type[r], A.row[r] + expert * A.step[7 + r],
                                 A.row_single[r] ? 0 : out);
      factor = A.row_inverse[r] ? factor / f : factor * f;
    }
  if (A.bias) bias = decode_any(A.bias_type, A.bias + expert * A.step[10], out);
  return make_float2(factor, bias);
}

// Zero points and scales of the weights themselves, for the steps of one group.
struct Group {
  u32 zero0, zero1, scale0, scale1, held[2];
  const char* factors;  // of the tile, in the ring
  int q, row;

  // Scales in the weight: each lane of a quad decodes some, the others ask it for them.
  // ``own``: bytes from a group's scales to those that this lane decodes
  MEMBER u32 own(int lane) { return ((lane >> 2) + (lane & 3) % S0_SUBS * 8) * 2; }
  MEMBER void raw_scales(u32* to, const char* factors, int q, u32 own) {
#pragma unroll
    for (int i = 0; i < OWN; i++)
      to[i] = *(const u16*)(factors + AT_S0 + q * S0_SUBS * 16 + own + i * 64);
  }
  MEMBER void decode_scales(u32* of) {
#pragma unroll
    for (int i = 0; i < OWN; i++) of[i] = weight_scales<S0_TYPE>(of[i]);
  }
  MEMBER void start(Group& g, const char* factors, int q, int lane, u32 zero) {
    g.factors = factors, g.q = q, g.row = lane >> 2;
    g.zero0 = g.zero1 = zero, g.scale0 = g.scale1 = WEIGHT_CONST;
  }
  // The weights of one step from the codes of this group.
  MEMBER void weights(Group& g, int step, const uint4* w, const uint2& top, u32* a) {
    if (ZERO_INTEGER && step % (8 / Z_SUBS) == 0) {
      u32 low, up;
      ZF::raw(g.factors + AT_Z, g.q, step * Z_SUBS / 8, g.row, low, up);
      g.zero0 = minus_zero(low), g.zero1 = minus_zero(up);
    }
    if (IN_WEIGHT && step % (8 / S0_SUBS) == 0) {
      const int sub = step * S0_SUBS / 8;
      const u32 both = __shfl_sync(~0u, g.held[sub / 4], sub % 4, 4);
      g.scale0 = low2(both), g.scale1 = high2(both);
    }
    if (CODE_BITS >= 5) {
      const uint4& v = w[step / 2];
      const u32 c0 = step & 1 ? v.z : v.x, c1 = step & 1 ? v.w : v.y;
      if (FLOAT_CODES) floats8(c0, c1, g.scale0, g.scale1, a);
      else integers8(c0, c1, g.zero0, g.zero1, a);
    } else {
      const int i = CODE_BITS == 4 ? step : step / 2;
      const uint4& v = w[i / 4];
      const u32 c = i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
      if (FLOAT_CODES) floats4(c, g.scale0, g.scale1, a);
      else if (CODE_BITS == 4) integers4(c, g.zero0, g.zero1, a);
      else if (CODE_BITS == 2) integers2(c, step, g.zero0, g.zero1, a);
      else integers3(c, step < 4 ? top.x : top.y, step, g.zero0, g.zero1, a);
    }
  }
  // Add the sums of columns under one scale; ``xsums``: of x of these columns, rows of this lane.
  MEMBER void flush(const Group& g, int sub, float block, const float* xsums, float (*acc)[4],
                    float (*part)[4]) {
    float2 s = make_float2(1.f, 1.f);
    if (S0_GRAIN == G_BLOCK) s.x = s.y = block;
    else if (!IN_WEIGHT && S0::RING)
      s = S0::read(g.factors + AT_S0, g.q, sub * S0_SUBS / PARTS, g.row);
    if (S1::RING) {
      const float2 t = S1::read(g.factors + AT_S1, g.q, sub * S1_SUBS / PARTS, g.row);
      s.x *= t.x, s.y *= t.y;
    }
    float2 o = make_float2(0.f, 0.f);
    if (OFFSET) {
      o = O0::read(g.factors + AT_O0, g.q, sub * O0_SUBS / PARTS, g.row);
      if (O1::RING) {
        const float2 t = O1::read(g.factors + AT_O1, g.q, sub * O1_SUBS / PARTS, g.row);
        o.x *= t.x, o.y *= t.y;
      }
    } else if (ZERO_FLOAT) {
      const float2 t = ZF::read(g.factors + AT_Z, g.q, sub * Z_SUBS / PARTS, g.row);
      o.x = -t.x * s.x, o.y = -t.y * s.y;
    }
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float *const c = acc[n], *const p = part[n];
      c[0] += p[0] * s.x, c[1] += p[1] * s.x;
      c[2] += p[2] * s.y, c[3] += p[3] * s.y;
      if (XSUMS) {
        const float2 t = *(const float2*)(xsums + n * 8);
        c[0] += o.x * t.x, c[1] += o.x * t.y, c[2] += o.y * t.x, c[3] += o.y * t.y;
      }
      p[0] = p[1] = p[2] = p[3] = 0.f;
    }
  }
};
