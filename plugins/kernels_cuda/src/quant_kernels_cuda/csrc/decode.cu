// y[M, N] = x[M, K] * W[N, K]^T + bias for few rows, W in the order "tiles16" (kernels/tiles.py).
//
// out^T = W x^T: weights are the A operand of mma.m16n8k16, in registers in the order they are
// stored; x is the B operand, read by ldmatrix from shared memory.
//
//   * One block per multiprocessor, 16 warps. A block (with ``cluster`` blocks: their cluster) walks
//     over tiles of 16 output rows; its part of K is cut in chunks of GPC groups of 128 columns.
//     Chunks of all its tiles form one line, dealt to the warps in turn: any K is balanced.
//   * A warp's codes and factors come by cp.async into a ring of ST stages that only this warp
//     uses: no block barrier in the loop. The ring fills before the previous kernel has finished
//     (programmatic dependent launch), for weights do not depend on it.
//   * Warps leave their sums of a tile in shared memory; once per ``batch`` tiles there is a barrier
//     and they are added in a fixed order. Blocks of a cluster share K and add their sums through
//     distributed shared memory, also in a fixed order: results repeat bit for bit.
//   * With ``experts`` blockIdx.y is a row of x with an expert of its own.
//
// A scale is multiplied where it is cheapest: into the weight where that is exact (dequant.cuh),
// onto the sums of its columns, or, one per row or matrix, onto the output. Offsets and zero points
// that are no integers need sum(x) of their columns, made once per block (XSUMS).
//
// Compile-time: F16 NT(8 rows of x each) GPC ST CODE_BITS FLOAT_CODES SIGNED_FLIP ZERO ZERO_LEFT
//   S0_* S1_* Z_* O0_* O1_* (TYPE, GRAIN, SUBS)  IN_WEIGHT WEIGHT_MUL WEIGHT_EXP WEIGHT_CONST
//   OUT_EXP FLUSH (scales per 128 columns on the sums, 0: none)
#include "dequant.cuh"

#define WARPS 16
#define THREADS (WARPS * 32)
#define PITCH 20  // floats between rows of x in the sums: no bank conflicts
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
constexpr int PIECES = GPC * PLANES16;
constexpr int HIGH = CODE_BITS == 3 ? GPC : 0;
constexpr int AT_HIGH = PIECES * 512, AT_S0 = AT_HIGH + HIGH * 256, AT_S1 = AT_S0 + S0::BYTES;
constexpr int AT_Z = AT_S1 + S1::BYTES, AT_O0 = AT_Z + ZF::BYTES, AT_O1 = AT_O0 + O0::BYTES;
constexpr int STAGE = AT_O1 + O1::BYTES;  // bytes, a multiple of 16
constexpr int PARTS = FLUSH ? FLUSH : 1;
constexpr int STEPS = 8 / PARTS;  // of 16 columns between two scales on the sums

struct Args {
  const char *x, *codes, *high, *s0, *s1, *z, *o0, *o1;
  const char* row[ROW_FACTORS];
  const char *bias, *gather, *experts;
  char* y;
  u64 step[13];  // bytes from one expert to the next: codes high s0 s1 z o0 o1 row[3] bias gather -
  int m, n, k, groups, tiles;
  int cluster, slice;  // blocks that share K, groups of each (a multiple of GPC)
  int batch, slots;    // tiles per barrier, most warps that share a tile
  int coarse, shift;   // groups per row and log2 of 128-column groups per value of G_COARSE
  int block_rows, block_groups, block_cols;  // G_BLOCK: tiles and 128-groups per value, values per row
  int pitch;                                 // bytes of a row of x in shared memory
  int row_type[ROW_FACTORS], row_single[ROW_FACTORS], row_inverse[ROW_FACTORS], bias_type;
  int expert_count, padding;
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_kernel(const __grid_constant__ Args A) {
  extern __shared__ __align__(128) char smem[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = lane >> 2, quad = lane & 3;
  const int rank = A.cluster > 1 ? blockIdx.x % A.cluster : 0;
  const int first_tile = blockIdx.x / A.cluster, stride = gridDim.x / A.cluster;
  const int tiles = (A.tiles - first_tile + stride - 1) / stride;
  const int g0 = rank * A.slice, g1 = min(A.groups, g0 + A.slice);
  const int chunks = (g1 - g0 + GPC - 1) / GPC;
  const int slots = min(chunks, WARPS);  // warps that share a tile

  // shared memory: rings | x rows, 16 zero bytes | sums of x | sums of warps, twice | of the block
  char* ring = smem + warp * ST * STAGE;
  char* xrows = smem + WARPS * ST * STAGE;
  const u32 zeros_at = A.m * A.pitch;
  float* xsums = (float*)(xrows + zeros_at + 16);
  float* sums = xsums + (XSUMS ? A.slice * PARTS * NT * 8 : 0);
  const int sums_size = A.batch * A.slots * A.m * PITCH;
  float* block_sums = sums + 2 * sums_size;
  const u32 ring_at = (u32)__cvta_generic_to_shared(ring);
  const u32 x_at = (u32)__cvta_generic_to_shared(xrows);

  u64 expert = 0;
  int x_row = 0;
  if (A.experts) {  // the expert comes from the kernel before
    wait_then_release_dependents();
    x_row = blockIdx.y;
    const long long e = ((const long long*)A.experts)[x_row];
    if (e < 0 || e >= A.expert_count) {
      for (int i = blockIdx.x * THREADS + threadIdx.x; i < A.n; i += gridDim.x * THREADS)
        ((u16*)A.y)[(u64)x_row * A.n + i] = 0;
      return;  // all blocks of a cluster leave here together
    }
    expert = e;
  }
  const char* codes = A.codes + expert * A.step[0] + lane * 16;
  const char* high = A.high + expert * A.step[1] + lane * 8;
  const char* p_s0 = A.s0 + expert * A.step[2];
  const char* p_s1 = A.s1 + expert * A.step[3];
  const char* p_z = A.z + expert * A.step[4];
  const char* p_o0 = A.o0 + expert * A.step[5];
  const char* p_o1 = A.o1 + expert * A.step[6];

  auto issue = [&](int ti, int chunk, int stage) {
    if (ti < tiles) {
      const u64 tile = first_tile + (u64)ti * stride;
      const int group = g0 + chunk * GPC, valid = min(GPC, g1 - group);
      const u32 to = ring_at + stage * STAGE;
      const char* from = codes + (tile * A.groups + group) * (PLANES16 * 512);
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const bool there = GPC == 1 || i / PLANES16 < valid;
        copy16(to + i * 512 + lane * 16, there ? from + i * 512 : codes, there ? 16 : 0);
      }
#pragma unroll
      for (int q = 0; q < HIGH; q++) {
        const bool there = GPC == 1 || q < valid;
        copy8(to + AT_HIGH + q * 256 + lane * 8,
              there ? high + (tile * A.groups + group + q) * 256 : high, there ? 8 : 0);
      }
      S0::copy(to + AT_S0, p_s0, tile, A.groups, A.coarse, A.shift, group, valid, lane);
      S1::copy(to + AT_S1, p_s1, tile, A.groups, A.coarse, A.shift, group, valid, lane);
      ZF::copy(to + AT_Z, p_z, tile, A.groups, A.coarse, A.shift, group, valid, lane);
      O0::copy(to + AT_O0, p_o0, tile, A.groups, A.coarse, A.shift, group, valid, lane);
      O1::copy(to + AT_O1, p_o1, tile, A.groups, A.coarse, A.shift, group, valid, lane);
    }
    copies_commit();
  };
  auto advance = [&](int& ti, int& chunk) {  // to this warp's next chunk in line
    chunk += WARPS;
    while (chunk >= chunks) chunk -= chunks, ti++;
  };
  auto block_scale = [&](int ti, int chunk, float* s) {
#pragma unroll
    for (int q = 0; q < GPC; q++) {
      const int group = min(g0 + chunk * GPC + q, A.groups - 1);
      const u64 at = (u64)((first_tile + min(ti, tiles - 1) * stride) / A.block_rows) * A.block_cols;
      s[q] = decode_any(S0_TYPE, p_s0, at + group / A.block_groups);
    }
  };

  int ti = 0, chunk = warp, next_ti, next_chunk, stage = 0;
  while (chunk >= chunks) chunk -= chunks, ti++;
  next_ti = ti, next_chunk = chunk;
#pragma unroll 1
  for (int s = 0; s < ST - 1; s++) {
    issue(next_ti, next_chunk, s);
    advance(next_ti, next_chunk);
  }
  float block_next[GPC] = {};
  if (S0_GRAIN == G_BLOCK) block_scale(ti, chunk, block_next);

  // ---- x into shared memory: columns of this block's groups, zero beyond K
  if (!A.experts) wait_then_release_dependents();
  {
    const int width = (A.slice * 128 + 7) / 8;  // 16-byte pieces of a row
    const int first = g0 * 128;
    const u16* x = (const u16*)A.x + (u64)x_row * A.k;
    if (threadIdx.x < 4) *(u32*)(xrows + zeros_at + threadIdx.x * 4) = 0;
    if (A.gather) {
      const int* gather = (const int*)(A.gather + expert * A.step[11]);
      const int columns = A.groups * 128;
      for (int c = threadIdx.x; c < A.slice * 128; c += THREADS) {
        const int from = first + c < columns ? gather[first + c] : -1;
        for (int m = 0; m < A.m; m++)
          *(u16*)(xrows + m * A.pitch + c * 2) = from < 0 ? (u16)0 : x[(u64)m * A.k + from];
      }
    } else {
      for (int v = threadIdx.x; v < width; v += THREADS) {
        const bool there = first + v * 8 < A.k;
#pragma unroll 8
        for (int m = 0; m < A.m; m++) {
          uint4 value = make_uint4(0, 0, 0, 0);
          if (there) value = *(const uint4*)(x + (u64)m * A.k + first + v * 8);
          *(uint4*)(xrows + m * A.pitch + v * 16) = value;
        }
      }
    }
  }
  __syncthreads();
  if (XSUMS) {
    constexpr int COLUMNS = 128 / PARTS;
    for (int i = threadIdx.x; i < A.slice * PARTS * NT * 8; i += THREADS) {
      const int m = i % (NT * 8), part = i / (NT * 8);
      float s = 0.f;
      if (m < A.m)
        for (int c = 0; c < COLUMNS; c += 2) {
          const u32 v = *(const u32*)(xrows + m * A.pitch + (part * COLUMNS + c) * 2);
          s += act_to_float((u16)v) + act_to_float((u16)(v >> 16));
        }
      xsums[i] = s;
    }
    __syncthreads();
  }

  // address of this lane's row of x for ldmatrix; rows beyond M read the zeros
  u32 x_lane[NT], x_mask[NT];
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const int m = n * 8 + (lane & 7);
    x_lane[n] = x_at + (m < A.m ? m * A.pitch + (lane >> 3) * 16 : zeros_at);
    x_mask[n] = m < A.m ? ~0u : 0u;
  }

  int parity = 0;
  for (int b0 = 0; b0 < tiles; b0 += A.batch) {
    const int b1 = min(b0 + A.batch, tiles);
    float* const batch_sums = sums + parity * sums_size;
    while (ti < b1) {
      const int slot = chunk, tile_in_batch = ti - b0;
      float acc[NT][4] = {};
      do {
        copies_wait<ST - 2>();
        __syncwarp();  // factors were copied by other lanes
        const char* at = ring + stage * STAGE;
        uint4 w[PIECES];
        uint2 h[HIGH ? HIGH : 1];
#pragma unroll
        for (int i = 0; i < PIECES; i++) w[i] = *(const uint4*)(at + i * 512 + lane * 16);
#pragma unroll
        for (int i = 0; i < HIGH; i++) h[i] = *(const uint2*)(at + AT_HIGH + i * 256 + lane * 8);
        {
          const int e = stage + ST - 1;
          issue(next_ti, next_chunk, e >= ST ? e - ST : e);
          advance(next_ti, next_chunk);
        }
        float block_now[GPC];
#pragma unroll
        for (int q = 0; q < GPC; q++) block_now[q] = block_next[q];
        if (S0_GRAIN == G_BLOCK) {
          int t2 = ti, c2 = chunk;
          advance(t2, c2);
          block_scale(t2, c2, block_next);
        }
#pragma unroll
        for (int q = 0; q < GPC; q++) {
          float part[NT][4] = {};
          u32 zero0 = zero_pair(ZERO), zero1 = zero0, w0 = WEIGHT_CONST, w1 = WEIGHT_CONST;
          u32 b[2][NT][4];
          const u32 x_group = (chunk * GPC + q) * 256;
#pragma unroll
          for (int n = 0; n < NT; n++) ldmatrix4(b[0][n], x_lane[n] + (x_group & x_mask[n]));
#pragma unroll
          for (int step = 0; step < 8; step++) {
            if (step % 2 == 0 && step < 6) {
#pragma unroll
              for (int n = 0; n < NT; n++)
                ldmatrix4(b[(step / 2 + 1) & 1][n],
                          x_lane[n] + ((x_group + (step / 2 + 1) * 64) & x_mask[n]));
            }
            if (ZERO_INTEGER && step % (8 / Z_SUBS) == 0) {
              u32 low, up;
              ZF::raw(at + AT_Z, q, step * Z_SUBS / 8, row, low, up);
              zero0 = zero_pair(low), zero1 = zero_pair(up);
            }
            if (IN_WEIGHT && step % (8 / S0_SUBS) == 0) {
              u32 low, up;
              S0::raw(at + AT_S0, q, step * S0_SUBS / 8, row, low, up);
              weight_scales<S0_TYPE>(low, up, w0, w1);
            }
            u32 a[4];
            if (CODE_BITS >= 5) {
              const uint4& v = w[q * PLANES16 + step / 2];
              const u32 c0 = step & 1 ? v.z : v.x, c1 = step & 1 ? v.w : v.y;
              if (FLOAT_CODES) floats8(c0, c1, w0, w1, a);
              else integers8(c0, c1, zero0, zero1, a);
            } else {
              const int index = CODE_BITS == 4 ? step : step / 2;
              const uint4& v = w[q * PLANES16 + index / 4];
              const u32 c = index % 4 == 0 ? v.x : index % 4 == 1 ? v.y : index % 4 == 2 ? v.z : v.w;
              if (FLOAT_CODES) floats4(c, w0, w1, a);
              else if (CODE_BITS == 4) integers4(c, zero0, zero1, a);
              else if (CODE_BITS == 2) integers2(c, step, zero0, zero1, a);
              else integers3(c, step < 4 ? h[HIGH ? q : 0].x : h[HIGH ? q : 0].y, step, zero0, zero1, a);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
              const u32* f = b[(step / 2) & 1][n] + (step & 1) * 2;
              mma(FLUSH ? part[n] : acc[n], a, f[0], f[1]);
            }
            if (FLUSH && (step + 1) % STEPS == 0) {
              const int sub = step / STEPS;
              float2 s = make_float2(1.f, 1.f);
              if (S0_GRAIN == G_BLOCK) s.x = s.y = block_now[q];
              else if (!IN_WEIGHT && S0::RING) s = S0::read(at + AT_S0, q, sub * S0_SUBS / PARTS, row);
              if (S1::RING) {
                const float2 t = S1::read(at + AT_S1, q, sub * S1_SUBS / PARTS, row);
                s.x *= t.x, s.y *= t.y;
              }
              float2 o = make_float2(0.f, 0.f);
              if (OFFSET) {
                o = O0::read(at + AT_O0, q, sub * O0_SUBS / PARTS, row);
                if (O1::RING) {
                  const float2 t = O1::read(at + AT_O1, q, sub * O1_SUBS / PARTS, row);
                  o.x *= t.x, o.y *= t.y;
                }
              } else if (ZERO_FLOAT) {
                const float2 t = ZF::read(at + AT_Z, q, sub * Z_SUBS / PARTS, row);
                o.x = -t.x * s.x, o.y = -t.y * s.y;
              }
#pragma unroll
              for (int n = 0; n < NT; n++) {
                acc[n][0] += part[n][0] * s.x, acc[n][1] += part[n][1] * s.x;
                acc[n][2] += part[n][2] * s.y, acc[n][3] += part[n][3] * s.y;
                if (XSUMS) {
                  const float2 t = *(const float2*)(xsums + ((chunk * GPC + q) * PARTS + sub) * NT * 8 +
                                                    n * 8 + quad * 2);
                  acc[n][0] += o.x * t.x, acc[n][1] += o.x * t.y;
                  acc[n][2] += o.y * t.x, acc[n][3] += o.y * t.y;
                }
                part[n][0] = part[n][1] = part[n][2] = part[n][3] = 0.f;
              }
            }
          }
        }
        stage = stage + 1 == ST ? 0 : stage + 1;
        chunk += WARPS;
      } while (chunk < chunks);
      while (chunk >= chunks) chunk -= chunks, ti++;
      float* const to = batch_sums + (tile_in_batch * slots + slot) * A.m * PITCH + row;
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int m = n * 8 + quad * 2 + (i & 1);
          if (m < A.m) to[m * PITCH + (i >> 1) * 8] = acc[n][i];
        }
    }

    // ---- one thread per output of the batch (16 * M * batch <= THREADS)
    const int o = threadIdx.x, m = (o >> 4) % A.m, i = (o >> 4) / A.m;
    const int out = (first_tile + (b0 + i) * stride) * 16 + (o & 15);
    const bool mine = b0 + i < b1 && out < A.n;
    float factor = __int_as_float((127 + OUT_EXP) << 23), bias = 0.f;
    if (mine) {
#pragma unroll
      for (int r = 0; r < ROW_FACTORS; r++)
        if (A.row[r]) {
          const float f = decode_any(A.row_type[r], A.row[r] + expert * A.step[7 + r],
                                     A.row_single[r] ? 0 : out);
          factor = A.row_inverse[r] ? factor / f : factor * f;
        }
      if (A.bias) bias = decode_any(A.bias_type, A.bias + expert * A.step[10], out);
    }
    __syncthreads();
    float v = 0.f;
    if (mine)
      for (int s = 0; s < slots; s++)
        v += batch_sums[((i * slots + s) * A.m + m) * PITCH + (o & 15)];
    bool store = mine;
    if (A.cluster > 1) {
      float* const shared = block_sums + parity * THREADS;
      shared[o] = v;
      cluster_sync();
      store = mine && (o >> 5) % A.cluster == rank;
      if (store) {
        v = 0.f;
        const u32 from = (u32)__cvta_generic_to_shared(shared + o);
        for (int r = 0; r < A.cluster; r++) v += cluster_read(from, r);
      }
    }
    if (store) ((u16*)A.y)[(u64)(x_row + m) * A.n + out] = float_to_act(v * factor + bias);
    parity ^= 1;
  }
  if (A.cluster > 1) cluster_sync();  // nobody leaves while its sums are read
}
