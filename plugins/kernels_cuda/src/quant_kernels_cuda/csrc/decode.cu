// y[M, N] = x[M, K] * W[N, K]^T + bias for few rows, W in the order "tiles16" (kernels/tiles.py).
//
// out^T = W x^T: weights are the A operand of mma.m16n8k16, in registers in the order they are
// stored; x is the B operand, read by ldmatrix from shared memory.
//
//   * One block per multiprocessor, 16 warps. A block walks over tiles of 16 RT output rows. Its
//     columns are cut in phases (as much of x as fits shared memory), a phase in runs of 2^run
//     chunks of GPC groups of 128. The runs of all tiles of all phases form one line, dealt to the
//     warps in turn: any K is balanced.
//   * A warp's codes and factors come by cp.async into a ring of ST stages that only this warp
//     uses: no block barrier in the loop. The ring fills before the previous kernel has finished
//     (programmatic dependent launch) and while x is exchanged: weights depend on neither.
//   * Warps leave their sums of a run in shared memory; once per ``batch`` tiles there is a barrier
//     and they are added in a fixed order. Blocks of a cluster share K and add their sums through
//     distributed shared memory, also in a fixed order: results repeat bit for bit.
//   * With ``experts`` blockIdx.y is a row of x with an expert of its own.
//
// A scale is multiplied where it is cheapest: into the weight where that is exact (dequant.cuh),
// onto the sums of its columns, or, one per row or matrix, onto the output. Offsets and zero points
// that are no integers need sum(x) of their columns, made once per block (XSUMS).
//
// Compile-time: F16 NT (8 rows of x each) RT (tiles of 16 output rows that a warp takes together,
//   so that they share what is read of x) GPC ST CODE_BITS FLOAT_CODES SIGNED_FLIP ZERO ZERO_LEFT
//   S0_* S1_* Z_* O0_* O1_* (TYPE, GRAIN, SUBS)  IN_WEIGHT WEIGHT_MUL WEIGHT_EXP WEIGHT_CONST
//   OUT_EXP FLUSH (scales per 128 columns on the sums, 0: none)
#include "dequant.cuh"

#define WARPS 16
#define THREADS (WARPS * 32)
#define ROWS (16 * RT)
#define PITCH (ROWS + 4)  // floats between rows of x in the sums: no bank conflicts
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
constexpr int STEPS = 8 / PARTS;  // of 16 columns between two scales on the sums

struct Args {
  const char *x, *codes, *high, *s0, *s1, *z, *o0, *o1;
  const char* row[ROW_FACTORS];
  const char *bias, *gather, *experts;
  char* y;
  u64 step[13];  // bytes from one expert to the next: codes high s0 s1 z o0 o1 row[3] bias gather -
  int m, m_inverse;      // 2^20 / m, rounded up
  int n, k, groups;
  int each, extra;       // tiles per block (cluster); the first ``extra`` have one more
  int cluster, slice;  // blocks that share K, groups of each
  int span, run;       // groups of a phase (a multiple of GPC), log2 of the chunks of a run
  int batch, slots;    // tiles per barrier, most warps that share a tile
  int coarse, shift;   // groups per row and log2 of 128-column groups per value of G_COARSE
  // G_BLOCK: per value 16-row tiles and 128-groups; values per row of blocks
  int block_rows, block_groups, block_cols;
  int pitch;                                 // bytes of a row of x in shared memory
  int row_type[ROW_FACTORS], row_single[ROW_FACTORS], row_inverse[ROW_FACTORS], bias_type;
  int expert_count;
  int buffers;  // for sums: 1 if all tiles make one batch, else 2
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_kernel(const __grid_constant__ Args A) {
  extern __shared__ __align__(128) char smem[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = lane >> 2, quad = lane & 3;
  const int rank = A.cluster > 1 ? blockIdx.x % A.cluster : 0;
  const int first_tile = A.cluster > 1 ? blockIdx.x / A.cluster : blockIdx.x;
  const int stride = A.cluster > 1 ? gridDim.x / A.cluster : gridDim.x;
  const int tiles = A.each + (first_tile < A.extra);
  const int g0 = rank * A.slice, g1 = min(A.groups, g0 + A.slice);
  const int phases = A.span < A.slice ? (g1 - g0 + A.span - 1) / A.span : 1;
  const int chunks_full = A.span / GPC;
  const int chunks_end = (g1 - g0 - (phases - 1) * A.span + GPC - 1) / GPC;  // of the last phase

  // shared memory: rings | x rows, 16 zero bytes | sums of x | sums of warps | of phases |
  // of the block; of warps and block twice if there are several batches
  char* ring = smem + warp * ST * STAGE;
  char* xrows = smem + WARPS * ST * STAGE;
  const u32 zeros_at = A.m * A.pitch;
  float* xsums = (float*)(xrows + zeros_at + 16);
  float* sums = xsums + (XSUMS ? A.span * PARTS * NT * 8 : 0);
  const int sums_size = A.batch * A.slots * A.m * PITCH;
  float* totals = sums + A.buffers * sums_size;
  float* block_sums = totals + (A.span < A.slice ? (A.each + (A.extra > 0)) * ROWS * A.m : 0);
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

  struct At {  // a place in the line of chunks
    int phase, tile, run, chunk;
  };
  auto chunks_of = [&](int phase) { return phase == phases - 1 ? chunks_end : chunks_full; };
  auto runs_of = [&](int phase) { return (chunks_of(phase) + (1 << A.run) - 1) >> A.run; };
  auto settle = [&](At& at) {  // after run was moved on: into the tile and phase it belongs to
    int runs = runs_of(at.phase);
    while (at.run >= runs && at.phase < phases) {
      at.run -= runs;
      if (++at.tile == tiles) {
        at.tile = 0;
        at.phase++;
        runs = runs_of(at.phase);
      }
    }
    at.chunk = at.run << A.run;
  };
  auto advance = [&](At& at) {  // to this warp's next chunk
    at.chunk++;
    if (at.chunk == ((at.run + 1) << A.run) || at.chunk == chunks_of(at.phase)) {
      at.run += WARPS;
      settle(at);
    }
  };
  auto issue = [&](const At& at, int stage) {
    if (at.phase < phases) {
      const int group = g0 + at.phase * A.span + at.chunk * GPC, valid = g1 - group;
#pragma unroll
      for (int r = 0; r < RT; r++) {
        const u32 tile = (first_tile + at.tile * stride) * RT + r;
        const u32 to = ring_at + stage * STAGE + r * TILE + lane * 16;
        const u32 index = tile * A.groups + group;
        const char* from = codes + (u64)index * (PLANES16 * 512);
#pragma unroll
        for (int i = 0; i < PIECES; i++)
          copy16(to + i * 512, from + i * 512, GPC == 1 || i / PLANES16 < valid ? 16 : 0);
#pragma unroll
        for (int q = 0; q < HIGH; q++)
          copy8(to + AT_HIGH + q * 256 - lane * 8, high + (u64)(index + q) * 256,
                GPC == 1 || q < valid ? 8 : 0);
        const Place place = {tile, index, (u32)A.coarse, (u32)group, valid, A.shift, lane};
        S0::copy(to + AT_S0, p_s0, place);
        S1::copy(to + AT_S1, p_s1, place);
        ZF::copy(to + AT_Z, p_z, place);
        O0::copy(to + AT_O0, p_o0, place);
        O1::copy(to + AT_O1, p_o1, place);
      }
    }
    copies_commit();
  };
  auto block_scale = [&](const At& at, float* s) {
#pragma unroll
    for (int i = 0; i < RT * GPC; i++) {
      const int group = min(g0 + at.phase * A.span + at.chunk * GPC + i % GPC, A.groups - 1);
      const int tile = (first_tile + at.tile * stride) * RT + i / GPC;
      const u64 row = (u64)(min(tile * 16, A.n - 1) / (A.block_rows * 16)) * A.block_cols;
      s[i] = at.phase < phases ? decode_any(S0_TYPE, p_s0, row + group / A.block_groups) : 0.f;
    }
  };

  At now = {0, 0, warp, 0};
  int stage = 0;
  settle(now);
  At next = now;
#pragma unroll 1
  for (int s = 0; s < ST - 1; s++) {
    issue(next, s);
    if (next.phase < phases) advance(next);
  }
  float block_next[RT * GPC] = {};
  if (S0_GRAIN == G_BLOCK) block_scale(now, block_next);

  if (!A.experts) wait_then_release_dependents();
  if (threadIdx.x < 4) *(u32*)(xrows + zeros_at + threadIdx.x * 4) = 0;
  auto load_x = [&](int phase) {  // columns of this phase, zero beyond K
    const int first = (g0 + phase * A.span) * 128, columns = A.span * 128;
    const u16* x = (const u16*)A.x + (u64)x_row * A.k;
    if (A.gather) {
      const int* gather = (const int*)(A.gather + expert * A.step[11]);
#pragma unroll 1
      for (int c = threadIdx.x; c < columns; c += THREADS) {
        const int from = first + c < A.groups * 128 ? gather[first + c] : -1;
#pragma unroll 1
        for (int m = 0; m < A.m; m++)
          *(u16*)(xrows + m * A.pitch + c * 2) = from < 0 ? (u16)0 : x[(u64)m * A.k + from];
      }
    } else {
#pragma unroll 1
      for (int c = threadIdx.x * 8; c < columns; c += THREADS * 8) {
        const bool there = first + c < A.k;
        uint4 held[NT * 8];  // all rows at once: one latency, not one per row
#pragma unroll
        for (int m = 0; m < NT * 8; m++) {
          held[m] = make_uint4(0, 0, 0, 0);
          if (there && m < A.m) held[m] = *(const uint4*)(x + (u64)m * A.k + first + c);
        }
#pragma unroll
        for (int m = 0; m < NT * 8; m++)
          if (m < A.m) *(uint4*)(xrows + m * A.pitch + c * 2) = held[m];
      }
    }
    __syncthreads();
    if (XSUMS) {
      constexpr int COLUMNS = 128 / PARTS;
#pragma unroll 1
      for (int i = threadIdx.x; i < A.span * PARTS * NT * 8; i += THREADS) {
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
  };

  // address of this lane's row of x for ldmatrix; rows beyond M read the zeros
  u32 x_lane[NT], x_mask[NT];
#pragma unroll
  for (int n = 0; n < NT; n++) {
    const int m = n * 8 + (lane & 7);
    x_lane[n] = x_at + (m < A.m ? m * A.pitch + (lane >> 3) * 16 : zeros_at);
    x_mask[n] = m < A.m ? ~0u : 0u;
  }

  // output ``o`` of a batch: its tile, row of x, row of the tile
  auto tile_of = [&](int o) { return (int)((u32)(o / ROWS) * (u32)A.m_inverse >> 20); };
  auto token_of = [&](int o) { return o / ROWS - tile_of(o) * A.m; };
  auto row_of = [&](int b0, int o) {
    return (first_tile + (b0 + tile_of(o)) * stride) * ROWS + o % ROWS;
  };
  auto factor_and_bias = [&](int out) {
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
  };

  int parity = 0;
#pragma unroll 1
  for (int phase = 0; phase < phases; phase++) {
    load_x(phase);  // after the last barrier nobody reads the x of the phase before
    const bool last = phase == phases - 1;
    const int chunks = chunks_of(phase), slots = min(runs_of(phase), WARPS);
#pragma unroll 1
    for (int b0 = 0; b0 < tiles; b0 += A.batch) {
      const int b1 = min(b0 + A.batch, tiles);
      float* const batch_sums = sums + parity * sums_size;
      while (now.phase == phase && now.tile < b1) {
        const int slot = now.run, tile = now.tile, tile_in_batch = tile - b0;
        float acc[RT][NT][4] = {};
        do {  // all runs of this warp in the tile
          const int end = min(now.chunk + (1 << A.run), chunks);
#pragma unroll 1
          for (int chunk = now.chunk; chunk < end; chunk++) {
            copies_wait<ST - 2>();
            __syncwarp();  // factors were copied by other lanes
            const char* at = ring + stage * STAGE;
            uint4 w[RT][PIECES];
            uint2 h[RT][HIGH ? HIGH : 1];
#pragma unroll
            for (int r = 0; r < RT; r++) {
#pragma unroll
              for (int i = 0; i < PIECES; i++)
                w[r][i] = *(const uint4*)(at + r * TILE + i * 512 + lane * 16);
#pragma unroll
              for (int i = 0; i < HIGH; i++)
                h[r][i] = *(const uint2*)(at + r * TILE + AT_HIGH + i * 256 + lane * 8);
            }
            {
              const int e = stage + ST - 1;
              issue(next, e >= ST ? e - ST : e);
              if (next.phase < phases) advance(next);
            }
            float block_now[RT * GPC];
#pragma unroll
            for (int i = 0; i < RT * GPC; i++) block_now[i] = block_next[i];
            if (S0_GRAIN == G_BLOCK) {
              At then = {phase, now.tile, now.run, chunk};
              advance(then);
              block_scale(then, block_next);
            }
#pragma unroll
            for (int q = 0; q < GPC; q++) {
              float part[RT][NT][4] = {};
              u32 zero0[RT], zero1[RT], w0[RT], w1[RT];
#pragma unroll
              for (int r = 0; r < RT; r++)
                zero0[r] = zero1[r] = zero_pair(ZERO), w0[r] = w1[r] = WEIGHT_CONST;
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
#pragma unroll
                for (int r = 0; r < RT; r++) {
                  const char* const factors = at + r * TILE;
                  if (ZERO_INTEGER && step % (8 / Z_SUBS) == 0) {
                    u32 low, up;
                    ZF::raw(factors + AT_Z, q, step * Z_SUBS / 8, row, low, up);
                    zero0[r] = zero_pair(low), zero1[r] = zero_pair(up);
                  }
                  if (IN_WEIGHT && step % (8 / S0_SUBS) == 0)
                    weight_scales<S0_TYPE>(
                        ((const u16*)(factors +
                                      AT_S0))[(q * S0_SUBS + step * S0_SUBS / 8) * 8 + row],
                        w0[r], w1[r]);
                  u32 a[4];
                  if (CODE_BITS >= 5) {
                    const uint4& v = w[r][q * PLANES16 + step / 2];
                    const u32 c0 = step & 1 ? v.z : v.x, c1 = step & 1 ? v.w : v.y;
                    if (FLOAT_CODES) floats8(c0, c1, w0[r], w1[r], a);
                    else integers8(c0, c1, zero0[r], zero1[r], a);
                  } else {
                    const int i = CODE_BITS == 4 ? step : step / 2;
                    const uint4& v = w[r][q * PLANES16 + i / 4];
                    const u32 c = i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
                    const uint2& top = h[r][HIGH ? q : 0];
                    if (FLOAT_CODES) floats4(c, w0[r], w1[r], a);
                    else if (CODE_BITS == 4) integers4(c, zero0[r], zero1[r], a);
                    else if (CODE_BITS == 2) integers2(c, step, zero0[r], zero1[r], a);
                    else integers3(c, step < 4 ? top.x : top.y, step, zero0[r], zero1[r], a);
                  }
#pragma unroll
                  for (int n = 0; n < NT; n++) {
                    const u32* f = b[(step / 2) & 1][n] + (step & 1) * 2;
                    mma(FLUSH ? part[r][n] : acc[r][n], a, f[0], f[1]);
                  }
                  if (FLUSH && (step + 1) % STEPS == 0) {
                    const int sub = step / STEPS;
                    float2 s = make_float2(1.f, 1.f);
                    if (S0_GRAIN == G_BLOCK)
                      s.x = s.y = block_now[r * GPC + q];
                    else if (!IN_WEIGHT && S0::RING)
                      s = S0::read(factors + AT_S0, q, sub * S0_SUBS / PARTS, row);
                    if (S1::RING) {
                      const float2 t = S1::read(factors + AT_S1, q, sub * S1_SUBS / PARTS, row);
                      s.x *= t.x, s.y *= t.y;
                    }
                    float2 o = make_float2(0.f, 0.f);
                    if (OFFSET) {
                      o = O0::read(factors + AT_O0, q, sub * O0_SUBS / PARTS, row);
                      if (O1::RING) {
                        const float2 t = O1::read(factors + AT_O1, q, sub * O1_SUBS / PARTS, row);
                        o.x *= t.x, o.y *= t.y;
                      }
                    } else if (ZERO_FLOAT) {
                      const float2 t = ZF::read(factors + AT_Z, q, sub * Z_SUBS / PARTS, row);
                      o.x = -t.x * s.x, o.y = -t.y * s.y;
                    }
#pragma unroll
                    for (int n = 0; n < NT; n++) {
                      float *const c = acc[r][n], *const p = part[r][n];
                      c[0] += p[0] * s.x, c[1] += p[1] * s.x;
                      c[2] += p[2] * s.y, c[3] += p[3] * s.y;
                      if (XSUMS) {
                        const float2 t = *(const float2*)(
                            xsums + ((chunk * GPC + q) * PARTS + sub) * NT * 8 + n * 8 + quad * 2);
                        c[0] += o.x * t.x, c[1] += o.x * t.y, c[2] += o.y * t.x, c[3] += o.y * t.y;
                      }
                      p[0] = p[1] = p[2] = p[3] = 0.f;
                    }
                  }
                }
              }
            }
            stage = stage + 1 == ST ? 0 : stage + 1;
          }
          now.run += WARPS;
          settle(now);
        } while (now.tile == tile && now.phase == phase);
        float* const to = batch_sums + (tile_in_batch * slots + slot) * A.m * PITCH + row;
#pragma unroll
        for (int r = 0; r < RT; r++)
#pragma unroll
          for (int n = 0; n < NT; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
              const int m = n * 8 + quad * 2 + (i & 1);
              if (m < A.m) to[m * PITCH + r * 16 + (i >> 1) * 8] = acc[r][n][i];
            }
      }

      // ---- the sums of the batch; a thread has the same outputs in every phase
      const int outputs = (b1 - b0) * ROWS * A.m;
      float2 fb = make_float2(0.f, 0.f);
      if (last && threadIdx.x < outputs && row_of(b0, threadIdx.x) < A.n)
        fb = factor_and_bias(row_of(b0, threadIdx.x));
      __syncthreads();
      float* const shared = block_sums + parity * A.batch * ROWS * A.m;
#pragma unroll 1
      for (int o = threadIdx.x; o < outputs; o += THREADS) {
        const int m = token_of(o), out = row_of(b0, o);
        const float* from = batch_sums + (tile_of(o) * slots * A.m + m) * PITCH + o % ROWS;
        float v = 0.f;
#pragma unroll 4
        for (int s = 0; s < slots; s++) v += from[s * A.m * PITCH];
        if (phases > 1) {
          float& total = totals[b0 * ROWS * A.m + o];
          v += phase ? total : 0.f;
          total = v;
        }
        if (!last) continue;
        if (A.cluster > 1) {
          shared[o] = v;
        } else if (out < A.n) {
          if (o >= THREADS) fb = factor_and_bias(out);
          ((u16*)A.y)[(u64)(x_row + m) * A.n + out] = float_to_act(v * fb.x + fb.y);
        }
      }
      if (A.cluster > 1 && last) {
        cluster_sync();
        for (int o = threadIdx.x; o < outputs; o += THREADS) {
          const int m = token_of(o), out = row_of(b0, o);
          if ((o >> 5) % A.cluster != rank || out >= A.n) continue;
          float v = 0.f;
          for (int r = 0; r < A.cluster; r++)
            v += cluster_read((u32)__cvta_generic_to_shared(shared + o), r);
          if (o >= THREADS) fb = factor_and_bias(out);
          ((u16*)A.y)[(u64)(x_row + m) * A.n + out] = float_to_act(v * fb.x + fb.y);
        }
      }
      parity ^= A.buffers - 1;
    }
  }
  if (A.cluster > 1) cluster_sync();  // nobody leaves while its sums are read
}
