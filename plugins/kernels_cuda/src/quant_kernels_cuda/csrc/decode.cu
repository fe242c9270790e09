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
// Compile-time constants: group.cuh.
#include "group.cuh"

#define ROWS (16 * RT)
#define PITCH (ROWS + 4)  // floats between rows of x in the sums: no bank conflicts

extern "C" __global__ void __launch_bounds__(THREADS, 1)
decode_kernel(const __grid_constant__ Args A) {
  extern __shared__ __align__(128) char smem[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, row = lane >> 2, quad = lane & 3;
  const int first_tile = divided(blockIdx.x, A.by_cluster), stride = A.walkers;
  const int rank = blockIdx.x - first_tile * A.cluster;
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
  const Sources from = sources(A, expert, lane);

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
        const u32 index = tile * A.groups + group;
        const Place place = {tile, index, (u32)A.coarse, (u32)group, valid, A.shift, lane};
        copy_chunk(ring_at + stage * STAGE + r * TILE + lane * 16, from, place);
      }
    }
    copies_commit();
  };
  auto block_scales = [&](const At& at, float* s) {
#pragma unroll
    for (int i = 0; i < RT * GPC; i++) {
      const int group = g0 + at.phase * A.span + at.chunk * GPC + i % GPC;
      const int tile = (first_tile + at.tile * stride) * RT + i / GPC;
      s[i] = at.phase < phases ? block_scale(A, from.s0, tile, group) : 0.f;
    }
  };

  const u32 zero = minus_zero(ZERO), own = IN_WEIGHT ? keep(Group::own(lane)) : 0;
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
  if (S0_GRAIN == G_BLOCK) block_scales(now, block_next);

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
        xsums[i] = s * XSUM_UNIT;
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
              block_scales(then, block_next);
            }
#pragma unroll
            for (int q = 0; q < GPC; q++) {
              float part[RT][NT][4] = {};
              Group group[RT];
#pragma unroll
              for (int r = 0; r < RT; r++) {
                Group::start(group[r], at + r * TILE, q, lane, zero);
                Group::raw_scales(group[r].held, at + r * TILE, q, own);
                Group::decode_scales(group[r].held);
              }
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
                  u32 a[4];
                  Group::weights(group[r], step, w[r] + q * PLANES16, h[r][HIGH ? q : 0], a);
#pragma unroll
                  for (int n = 0; n < NT; n++) {
                    const u32* f = b[(step / 2) & 1][n] + (step & 1) * 2;
                    mma(FLUSH ? part[r][n] : acc[r][n], a, f[0], f[1]);
                  }
                  if (FLUSH && (step + 1) % STEPS == 0) {
                    const int sub = step / STEPS;
                    Group::flush(group[r], sub, block_now[r * GPC + q],
                                 xsums + ((chunk * GPC + q) * PARTS + sub) * NT * 8 + quad * 2,
                                 acc[r], part[r]);
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
        fb = factor_and_bias(A, expert, row_of(b0, threadIdx.x));
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
          if (o >= THREADS) fb = factor_and_bias(A, expert, out);
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
          if (o >= THREADS) fb = factor_and_bias(A, expert, out);
          ((u16*)A.y)[(u64)(x_row + m) * A.n + out] = float_to_act(v * fb.x + fb.y);
        }
      }
      parity ^= A.buffers - 1;
    }
  }
  if (A.cluster > 1) cluster_sync();  // nobody leaves while its sums are read
}
