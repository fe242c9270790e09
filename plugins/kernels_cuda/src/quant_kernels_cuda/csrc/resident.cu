// y[M, N] = x[M, K] * W[N, K]^T + bias, as decode.cu, with x in registers.
//
// decode.cu reads x from shared memory for every tile, and its loop finds its way through a general
// cut of the work; on large layers with several rows that costs more than the weights. Here
//
//   * a warp keeps up to GPC groups of 128 columns of x in registers, as B operands of mma, and takes
//     the weights of these columns of tile after tile: ``slots`` warps cover the columns of a block,
//     ``sets`` such teams take turns with its tiles. The loop has no address to compute but the
//     weights', and reads nothing but weights.
//   * blocks of a cluster share K, up to 8 of them: each needs a part of x only.
//   * only ``run`` stages are asked for before x, or half of one (run 0): the first of them must not
//     keep x waiting.
//   * warps leave their sums of a tile in shared memory and go on. After a batch of tiles they
//     arrive at a barrier; a batch later, when all have long arrived, they add the sums up, in a
//     fixed order. Sums of a cluster are sent to the block that owns the tile (its number modulo
//     the blocks), counted by a barrier there, and added at the end.
//
//   sums of a tile   [16 rows][8 NT rows of x], 16-byte pieces exchanged so that neither writing
//                    by mma's layout nor reading by row meets a bank twice (``piece``)
//
// Compile-time constants: group.cuh; RT is 1.
#include "group.cuh"

constexpr int MC = 8 * NT, SUMS = 16 * MC;  // floats of a tile's sums

// Kept in a register where one is left: with 256 columns of 16 rows in registers and several scales
// per 128 columns they are needed for scales that are read ahead.
template <class T>
DEVICE T spare(T v) {
  return FLUSH > 1 && !XSUMS && NT * GPC >= 4 ? v : keep(v);
}

constexpr bool FP4 = IN_WEIGHT && CODE_BITS == 4;
// Their scales are read and decoded at the start of a turn, a shuffle away from their first use.
// Four groups in registers leave none for it; nor do 8-bit floats, whose limit is memory.
constexpr bool EARLY = FP4 && GPC < 4;
// Half of a stage may be all that is asked for before x.
constexpr bool HALVES = GPC > 3 || (FP4 && GPC > 1);

// A value that all lanes of a warp share. Where lanes exchange scales the compiler has to know that
// they stay together, or it looks before every shuffle and moves nothing past it.
DEVICE u32 same(u32 v) { return FP4 ? __shfl_sync(~0u, v, 0) : v; }

DEVICE int piece(int row, int chunk) {  // where 4 sums of a row are kept
  const int turn = NT == 2 ? (row & 2) | (row >> 2 & 1) : row >> 2 & 1;
  return row * MC + ((chunk ^ turn) * 4);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
resident_kernel(const __grid_constant__ Args A) {
  extern __shared__ __align__(128) char smem[];
  const int warp = same(threadIdx.x >> 5), lane = spare((u32)threadIdx.x & 31);
  const int row = lane >> 2, quad = lane & 3;
  const int first_tile = divided(blockIdx.x, A.by_cluster), stride = A.walkers;
  const int rank = blockIdx.x - first_tile * A.cluster;
  const int tiles = A.each + (first_tile < A.extra);
  const int g0 = rank * A.slice, g1 = min(A.groups, g0 + A.slice);
  // the block's groups go to ``slots`` warps, to the first ``more`` one more than to the others
  const int count = g1 - g0, slots = min(A.slots, count);
  const int few = (count >= slots) + (count >= 2 * slots) + (count >= 3 * slots) +
                  (count >= 4 * slots);
  const int more = count - few * slots;
  const int set = divided(warp, A.by_slots), slot = warp - set * A.slots;
  const int group = g0 + slot * few + min(slot, more);
  const int valid = same(spare((u32)(few + (slot < more))));
  const bool works = set < A.sets && slot < slots && set < tiles;
  const int mine = same(works ? divided(tiles - set - 1, A.by_sets) + 1 : 0);

  // shared memory: barriers | rings | sums of x per warp | sums, twice | those of the cluster
  const u32 barriers = (u32)__cvta_generic_to_shared(smem), received = barriers + 16;
  const u32 ring = same(spare(128 + warp * ST * STAGE));
  const u32 ring_at = (u32)__cvta_generic_to_shared(smem) + ring + lane * 16;
  const int working = A.slots * A.sets;  // warps with columns; others only add up
  float* const all_xsums = (float*)(smem + 128 + working * ST * STAGE);
  float* const xsums = all_xsums + warp * GPC * PARTS * MC;
  float* const sums = all_xsums + (XSUMS ? working * GPC * PARTS * MC : 0);
  const int sums_size = A.batch * A.slots * SUMS;
  float* const gathered = sums + 2 * sums_size;

  const int owned = divided(tiles - rank + A.cluster - 1, A.by_cluster);  // of a cluster's tiles
  if (threadIdx.x < 2) barrier_init(barriers + threadIdx.x * 8, WARPS);
  if (A.cluster > 1) {
    if (threadIdx.x == 2) {
      barrier_init(received, 1);
      barrier_expect(received, owned * A.cluster * 16 * ((A.m + 3) / 4) * 16);
    }
    cluster_arrive_relaxed();
  }
  Sources from = sources(A, 0, lane);
  from.codes = spare(from.codes);
  auto tile_of = [&](int i) { return first_tile + (set + i * A.sets) * stride; };
  // what is asked for next, and how much is left to ask for
  u32 tile_next = tile_of(0), index_next = tile_next * A.groups + group;
  const u32 tile_step = A.sets * stride, index_step = tile_step * A.groups;
  auto next = [&] {
    return Place{tile_next, index_next, (u32)A.coarse, (u32)group, valid, A.shift, lane};
  };
  constexpr int HALF = GPC / 2;
  auto issue = [&](u32 stage, bool more, bool begun = false) {  // begun: HALF of it is asked for
    if (more) {
      if (!begun) copy_codes<0, HALF>(ring_at + stage, from, next());
      copy_codes<HALF, GPC>(ring_at + stage, from, next());
      copy_factors(ring_at + stage, from, next());
      tile_next += tile_step, index_next += index_step;
    }
    copies_commit();
  };
  // what is asked for first comes first: x waits for every copy before it
  if (HALVES && A.run == 0 && mine > 0) copy_codes<0, HALF>(ring_at, from, next());
#pragma unroll 1
  for (int s = 0; s < A.run; s++) issue(s * STAGE, s < mine);
  float scale_next[GPC] = {};
  auto block_scales = [&](int i) {
#pragma unroll
    for (int q = 0; q < GPC; q++)
      scale_next[q] = i < mine ? block_scale(A, from.s0, tile_of(i), group + q) : 0.f;
  };
  if (S0_GRAIN == G_BLOCK) block_scales(0);
  const u32 zero = minus_zero(ZERO), own = IN_WEIGHT ? spare(Group::own(lane)) : 0;
  __syncthreads();  // the barriers exist

  wait_then_release_dependents();
  // x of GPC groups: 8 lanes load 64 columns of a row; through this warp's places for sums
  u32 b[GPC][4][NT][4];
  {
    const u16* const x = (const u16*)A.x;
    const int line = lane >> 3, eighth = lane & 7;
#pragma unroll
    for (int i = 0; i < GPC * 2; i++)
#pragma unroll
      for (int j = 0; j < NT * 2; j++) {
        const int m = j * 4 + line, column = group * 128 + i * 64 + eighth * 8;
        uint4 v = make_uint4(0, 0, 0, 0);
        if (mine > 0 && m < A.m && column < A.k && (GPC == 1 || i / 2 < valid))
          v = *(const uint4*)(x + (u64)m * A.k + column);
        u32* const to = b[i / 2][i % 2 * 2 + j / NT][j % NT];
        to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
      }
#pragma unroll 1
    for (int s = A.run; s < ST - 1; s++) issue(s * STAGE, s < mine, HALVES && s == 0);
    if (set < A.sets) {
      // columns 32 p.. of the 64 in the place of buffer p: 4 pieces of 16 bytes a row, exchanged
      char* const own = (char*)(sums + (set * A.slots + slot) * SUMS);
      const int apart = sums_size * 4, turn = line >> 1;
      char* const store = own + (eighth >> 2) * apart + (line * 4) * 16;
      const int r = lane & 7, c = lane >> 3;
      const u32 load = (u32)__cvta_generic_to_shared(own) + (r * 4 + (c ^ (r >> 1 & 3))) * 16;
#pragma unroll
      for (int i = 0; i < GPC * 2; i++) {
#pragma unroll
        for (int j = 0; j < NT * 2; j++) {  // row 4 j + line
          const u32* const v = b[i / 2][i % 2 * 2 + j / NT][j % NT];
          const int at = (eighth & 3) ^ (turn | (j & 1) << 1);
          *(uint4*)(store + (j * 16 + at) * 16) = make_uint4(v[0], v[1], v[2], v[3]);
        }
        __syncwarp();
#pragma unroll
        for (int p = 0; p < 2; p++)
#pragma unroll
          for (int n = 0; n < NT; n++)
            ldmatrix4(b[i / 2][i % 2 * 2 + p][n], load + p * apart + n * 512);
        __syncwarp();
      }
    }
  }
  if (XSUMS && set < A.sets) {
#pragma unroll
    for (int p = 0; p < GPC * PARTS; p++)
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float s = 0.f;
#pragma unroll
        for (int i = 0; i < STEPS; i++) {
          const int step = p % PARTS * STEPS + i;
          const u32* const v = b[p / PARTS][step / 2][n] + step % 2 * 2;
          s += act_to_float((u16)v[0]) + act_to_float((u16)(v[0] >> 16));
          s += act_to_float((u16)v[1]) + act_to_float((u16)(v[1] >> 16));
        }
        s += __shfl_xor_sync(~0u, s, 1);
        s += __shfl_xor_sync(~0u, s, 2);
        if (quad == 0) xsums[p * MC + n * 8 + row] = s * XSUM_UNIT;
      }
    __syncwarp();
  }
  if (A.cluster > 1) cluster_wait();  // the other blocks run

  auto write = [&](int out, int chunk, float4 v, float2 fb) {
    const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const int m = chunk * 4 + j;
      if (m < A.m && out < A.n)
        ((u16*)A.y)[(u64)m * A.n + out] = float_to_act(values[j] * fb.x + fb.y);
    }
  };
  auto row_of = [&](int t, int unit) { return (first_tile + t * stride) * 16 + unit % 16; };
  auto add_up = [&](int batch) {  // a unit: a row of a tile and 4 rows of x
    const int t0 = batch * A.batch, units = min(A.batch, tiles - t0) * 4 * MC;
    // other threads than for the batch before
    int unit = threadIdx.x - (u32)(batch * A.batch * 4 * MC) % THREADS;
    if (unit < 0) unit += THREADS;
    const u32 barrier = barriers + (batch & 1) * 8, parity = batch >> 1 & 1;
    if (unit >= units) {  // the warp has none, but its next sums go where others were read
      barrier_wait(barrier, parity);
      return;
    }
    int t = t0 + unit / (4 * MC);
    float2 fb = make_float2(1.f, 0.f);
    if (A.cluster == 1 && row_of(t, unit) < A.n) fb = factor_and_bias(A, 0, row_of(t, unit));
    barrier_wait(barrier, parity);
#pragma unroll 1
    for (; unit < units; unit += THREADS) {
      const int again = t0 + unit / (4 * MC), chunk = unit / 16 % (MC / 4);
      if (A.cluster == 1 && again != t && row_of(again, unit) < A.n)
        fb = factor_and_bias(A, 0, row_of(again, unit));
      t = again;
      if (chunk * 4 >= A.m) continue;
      const int at = piece(unit % 16, chunk);
      const float* p = sums + (batch & 1) * sums_size + (t - t0) * A.slots * SUMS + at;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
      for (int s = 0; s < slots; s++) {
        const float4 w = *(const float4*)(p + s * SUMS);
        v.x += w.x, v.y += w.y, v.z += w.z, v.w += w.w;
      }
      if (A.cluster == 1) {
        write(row_of(t, unit), chunk, v, fb);
      } else {
        const int first = divided(t, A.by_cluster) * A.cluster;
        float* const to = gathered + (first + rank) * SUMS + at;
        cluster_send((u32)__cvta_generic_to_shared(to), received, t - first, v);
      }
    }
  };

  const int per = divided(A.batch, A.by_sets);  // tiles of a set in a batch
  const int batches = divided(tiles + A.batch - 1, A.by_batch);
  // where the sums of this warp's next tile go: of the lane's row and columns; of its other 8 columns
  // 8 floats beside (an exchanged bit), of row + 8 8 MC beyond
  const u32 lane_sums = (set * A.slots + slot) * SUMS + piece(row, quad >> 1) + (quad & 1) * 2;
  const u32 sums_step = A.sets * A.slots * SUMS;
  u32 put = spare(lane_sums), stage = 0, before = (ST - 1) * STAGE;  // stages in use, used
  int batch = 0, left = per, todo = mine;
#pragma unroll 1
  for (;; todo--) {
    float acc[NT][4] = {};
    if (todo > 0) {
      copies_wait<ST - 2>();
      __syncwarp();  // factors were copied by other lanes
      const char* const at = smem + ring + stage;
      uint4 w[PIECES];
      uint2 h[HIGH ? HIGH : 1];
#pragma unroll
      for (int p = 0; p < PIECES; p++) w[p] = *(const uint4*)(at + p * 512 + lane * 16);
#pragma unroll
      for (int p = 0; p < HIGH; p++) h[p] = *(const uint2*)(at + AT_HIGH + p * 256 + lane * 8);
      u32 scales[GPC][2];
#pragma unroll
      for (int q = 0; q < (EARLY ? GPC : 0); q++) Group::raw_scales(scales[q], at, q, own);
      issue(before, todo >= ST);
      before = stage;
#pragma unroll
      for (int q = 0; q < (EARLY ? GPC : 0); q++) {
        Group::decode_scales(scales[q]);
#pragma unroll
        for (int i = 0; i < OWN; i++) scales[q][i] = keep(scales[q][i]);
      }
      float scale_now[GPC];
#pragma unroll
      for (int q = 0; q < GPC; q++) scale_now[q] = scale_next[q];
      if (S0_GRAIN == G_BLOCK) block_scales(mine - todo + 1);
#pragma unroll
      for (int q = 0; q < GPC; q++) {
        if (q > 0 && q >= valid) break;
        float part[NT][4] = {};
        Group g;
        Group::start(g, at, q, lane, zero);
        if (!EARLY) Group::raw_scales(g.held, at, q, own);
        if (!EARLY) Group::decode_scales(g.held);
#pragma unroll
        for (int i = 0; i < (EARLY ? OWN : 0); i++) g.held[i] = scales[q][i];
#pragma unroll
        for (int step = 0; step < 8; step++) {
          u32 a[4];
          Group::weights(g, step, w + q * PLANES16, h[HIGH ? q : 0], a);
#pragma unroll
          for (int n = 0; n < NT; n++) {
            const u32* const v = b[q][step / 2][n] + step % 2 * 2;
            mma(FLUSH ? part[n] : acc[n], a, v[0], v[1]);
          }
          if (FLUSH && (step + 1) % STEPS == 0)
            Group::flush(g, step / STEPS, scale_now[q],
                         xsums + (q * PARTS + step / STEPS) * MC + quad * 2, acc, part);
        }
      }
      stage = stage == (ST - 1) * STAGE ? 0 : stage + STAGE;
    }
    if (left == per && batch) add_up(batch - 1);
    if (batch == batches) break;
    if (todo > 0) {
#pragma unroll
      for (int n = 0; n < NT; n++) {
        float* const to = sums + (put ^ n * 8);
        *(float2*)to = make_float2(acc[n][0], acc[n][1]);
        *(float2*)(to + 8 * MC) = make_float2(acc[n][2], acc[n][3]);
      }
      put += sums_step;
    }
    if (--left == 0) {
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers + (batch & 1) * 8);
      batch++, left = per;
      put = lane_sums + (batch & 1) * sums_size;
    }
  }

  if (A.cluster > 1) {
    auto out_of = [&](int unit) { return row_of(unit / (4 * MC) * A.cluster + rank, unit); };
    float2 fb = make_float2(1.f, 0.f);
    if (threadIdx.x < owned * 4 * MC && out_of(threadIdx.x) < A.n)
      fb = factor_and_bias(A, 0, out_of(threadIdx.x));
    barrier_wait_received(received);  // after that nobody writes here: blocks may leave
#pragma unroll 1
    for (int unit = threadIdx.x; unit < owned * 4 * MC; unit += THREADS) {
      const int t = unit / (4 * MC), chunk = unit / 16 % (MC / 4), out = out_of(unit);
      if (chunk * 4 >= A.m || out >= A.n) continue;
      if (unit >= THREADS) fb = factor_and_bias(A, 0, out);
      const float* const p = gathered + t * A.cluster * SUMS + piece(unit % 16, chunk);
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 4
      for (int r = 0; r < A.cluster; r++) {
        const float4 w = *(const float4*)(p + r * SUMS);
        v.x += w.x, v.y += w.y, v.z += w.z, v.w += w.w;
      }
      write(out, chunk, v, fb);
    }
  }
}
