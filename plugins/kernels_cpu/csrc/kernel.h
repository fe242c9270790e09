/* The linear kernel, once for every instruction set: y = x W^T with exact codes.
 *
 * A translation unit defines the primitives listed below and includes this file. Codes stay
 * integers (or table values) until the end of a group; the scale is applied in float32 once per
 * group, so that nothing is rounded to the type of x on the way:
 *
 *     y[m, n] = sum over groups q of   s[n, q] (sum over k in q of x[m, k] c[n, k] - z x_sum[m, q])
 *                                    + o[n, q] x_sum[m, q]        x_sum: sum over k in q of x[m, k]
 *
 * Two ways through a block of 32 rows. Few tokens: codes are expanded in registers and used at
 * once (`decode`). Many tokens: a chunk of K is expanded to a panel of c - z that stays in the L2
 * cache and is used for every tile of tokens (`tile`). Each output is computed by one thread in a fixed
 * order, whatever the number of threads.
 *
 * Primitives:
 *     NAME(f)             name of a function in this unit
 *     VW, NV              floats in a vector, vectors in 32 rows
 *     vf vi vp            float accumulator, packed codes, codes expanded for `mac`
 *     xelem KP            type of x as used, columns that one vp covers per row
 *     MAX_TILE            tokens of a tile whose accumulators fit the registers
 *     SHORT_TILE          the same where outputs are kept in registers too; MAX_TILE: never
 *     MAX_DECODE          most tokens for the register path
 *     AT_ONCE             most of these that 4-bit codes meet at once; MAX_DECODE if not defined
 *     PARTS(tokens)       sums kept per output there, to hide the latency of mac
 *     vload_codes load_panel store_panel   64 * VW / 16 bytes
 *     code4(v, s, tab) code8(v, s, tab)   step s of a vector of codes
 *     shifted_code(v, s, tab, width, shift)   the same plus a float32 vector of integers
 *     code_unit(tab)      defined: code8_less(v, s, tab) is code8 less this factor
 *     bcast(x) mac(acc, c, x)
 *     vzero vadd vsub vmul vfma vset vload vstore   float32 arithmetic
 *     load_f16 load_bf16 load_u8 load_i8 load_e8m0 load_e4m3 load_table
 *     code_table make_table(op, tensors)
 *     QK_FLOAT8           defined: all codes have 8 bits and are floats, so no zero points
 *     QK_AMX              defined: panels meet tokens in matrix units (amx.h); x is bfloat16
 *     x_sum(x, n)         float32 sum of n xelems, fixed order
 */
#include <omp.h>

#include "factors.h"
#include "stored.h"
#ifdef QK_AMX
#include "amx.h"
#define K_CHUNK 512 /* columns of a panel: 32 KiB of a block of rows, which the first cache holds */
#else
#define K_CHUNK 1024 /* columns of a panel: 64 KiB of bfloat16 a block of rows */
#endif
#define M_SLAB 256   /* tokens whose accumulators are kept at once */
#define SHORT_GROUP 128 /* groups below this are short: their ends weigh */
#define AHEAD_BYTES 8192 /* of codes that are fetched ahead: what memory takes to answer */
#ifndef AT_ONCE
#define AT_ONCE MAX_DECODE
#endif
#define MAX_BLOCKS 4 /* blocks of rows that share one pass over x */

/* What a packed code still lacks of c - z (or of c, where an offset follows): VW rows. */
QK_INLINE vf NAME(shift)(const NAME(view) *v, int64_t block, int64_t q, int vec) {
    const qk_op *op = v->op;
    if (op->zero_kind == QK_ZERO_CONST) return vset(-op->shift);
    if (op->zero_kind == QK_ZERO_FLOAT) {
        const qk_factor z = {op->zero_type, op->group, NULL};
        const vf zero = NAME(factor)(&z, v->t.zeros, block, v->groups, q * op->group, vec);
        return vsub(vset(op->bias), zero);
    }
    if (op->zero_kind != QK_ZERO_CODE) return vset(op->bias);
    const uint8_t *z = (const uint8_t *)v->t.zeros + (block * v->groups + q) * QK_ROWS;
    return vsub(vset(op->bias), load_u8(z + vec * VW));
}

/* Add a finished (part of a) group to the outputs: out[m][32] += s (acc + shift x_sum) + o x_sum.
 * `kind` is what is left to do for zero points: nothing in the middle of a group, whose x_sum
 * counts once, and nothing that a panel has done. */
QK_INLINE void NAME(finish)(const NAME(view) *v, int64_t block, int64_t q, const int kind,
                            const int tokens, vf acc[][NV], const float *sums, float *out) {
    const qk_op *op = v->op;
    const int64_t k = q * op->group;
#pragma GCC unroll 4
    for (int j = 0; j < NV; j++) {
        float *y = out + j * VW;
        if (kind != QK_ZERO_FOLDED) {
            const vf shift = NAME(shift)(v, block, q, j);
#pragma GCC unroll 16
            for (int m = 0; m < tokens; m++)
                acc[m][j] = vfma(shift, vset(sums[m * v->groups + q]), acc[m][j]);
        }
        if (kind == QK_ZERO_OFFSET) {
            const vf o = NAME(product)(op->offset, v->t.offset, v->offset_groups, block, k, j);
            for (int m = 0; m < tokens; m++)
                vstore(y + m * QK_ROWS, vfma(o, vset(sums[m * v->groups + q]), vload(y + m * QK_ROWS)));
        }
        const vf s = NAME(product)(op->scale, v->t.scales, v->scale_groups, block, k, j);
#pragma GCC unroll 16
        for (int m = 0; m < tokens; m++)
            vstore(y + m * QK_ROWS, vfma(s, acc[m][j], vload(y + m * QK_ROWS)));
    }
}

/* ------------------------------------------------------------------------------- few tokens */

#define PER4 8
#define PER8 4
#ifdef QK_FLOAT8
#define IS4(op) 0
#else
#define IS4(op) ((op)->width == 4)
#endif

#ifdef code_unit
#define few8(v, s, table) code8_less(v, s, table)
#define whole(sum, table) vmul(sum, code_unit(table))
#else
#define few8(v, s, table) code8(v, s, table)
#define whole(sum, table) (sum)
#endif

QK_INLINE void NAME(decode_group)(const NAME(view) *v, const uint8_t *codes, int64_t columns,
                                  const xelem *x, const int tokens, const int width,
                                  vf total[][NV]) {
    const int parts = PARTS(tokens), per = width == 4 ? PER4 : PER8;
    const int64_t ld = v->op->k;
    vf acc[MAX_DECODE][NV][4];
#pragma GCC unroll 8
    for (int m = 0; m < tokens; m++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++)
#pragma GCC unroll 4
            for (int p = 0; p < parts; p++) acc[m][j][p] = vzero();
    for (int64_t k = 0; k < columns; k += per, codes += QK_ROWS * 4) {
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            _mm_prefetch((const char *)codes + AHEAD_BYTES + j * VW * 4, _MM_HINT_T0);
            const vi w = vload_codes(codes + j * VW * 4);
#pragma GCC unroll 8
            for (int s = 0; s < per / KP; s++) {
                const vp c = width == 4 ? code4(w, s, v->table) : few8(w, s, v->table);
#pragma GCC unroll 8
                for (int m = 0; m < tokens; m++)
                    acc[m][j][s % parts] = mac(acc[m][j][s % parts], c, bcast(x + m * ld + k + s * KP));
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < tokens; m++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            vf sum = acc[m][j][0];
            if (parts == 2) sum = vadd(sum, acc[m][j][1]);
            if (parts == 4) sum = vadd(vadd(sum, acc[m][j][1]), vadd(acc[m][j][2], acc[m][j][3]));
            total[m][j] = whole(sum, v->table);
        }
}

QK_INLINE void NAME(decode_tokens)(const NAME(view) *v, int64_t block, const xelem *x,
                                   const float *sums, float *out, const int tokens,
                                   const int width) {
    const qk_op *op = v->op;
    const int per = width == 4 ? PER4 : PER8;
    const uint8_t *codes = (const uint8_t *)v->t.codes + block * QK_ROWS * op->k * width / 8;
    memset(out, 0, tokens * QK_ROWS * sizeof(float));
    for (int64_t q = 0; q < v->groups; q++) {
        const int64_t k = q * op->group, stop = qk_min(op->k, k + op->group);
        vf total[MAX_DECODE][NV];
        NAME(decode_group)(v, codes + k / per * QK_ROWS * 4, stop - k, x + k, tokens, width, total);
        NAME(finish)(v, block, q, (int)op->zero_kind, tokens, total, sums, out);
    }
}

#define DECODE_CASE(N)                                                                    \
    case N:                                                                               \
        if (IS4(v->op)) NAME(decode_tokens)(v, block, x, sums, out, N, 4);         \
        else NAME(decode_tokens)(v, block, x, sums, out, N, 8);                           \
        break;

/* out[tokens][32] of one block, tokens <= MAX_DECODE. */
static void NAME(decode)(const NAME(view) *v, int64_t block, int64_t tokens, const xelem *x,
                         const float *sums, float *out) {
    switch (tokens) {
        DECODE_CASE(1)
        DECODE_CASE(2)
        DECODE_CASE(3)
#if MAX_DECODE > 3
        DECODE_CASE(4)
        DECODE_CASE(5)
        DECODE_CASE(6)
        DECODE_CASE(7)
#endif
    }
}

/* ------------------------------------------------------------------------------ many tokens */

/* Columns [k, stop) of one block as a panel [columns / KP][32] of expanded codes, less their zero
 * points where those are codes: c - z is an integer of at most 9 bits, exact in every vp. */
QK_INLINE void NAME(expand_width)(const NAME(view) *v, int64_t block, int64_t k, int64_t stop,
                                  char *panel, const int width, const int shifted) {
    const qk_op *op = v->op;
    const int per = width == 4 ? PER4 : PER8;
    const uint8_t *codes = (const uint8_t *)v->t.codes + (block * op->k + k) * QK_ROWS * width / 8;
    while (k < stop) {
        const int64_t q = k / op->group, end = qk_min(stop, (q + 1) * op->group);
        vf shift[NV];
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) shift[j] = NAME(shift)(v, block, q, j);
        for (; k < end; k += per, codes += QK_ROWS * 4, panel += per / KP * QK_ROWS * 4)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) {
                const vi w = vload_codes(codes + j * VW * 4);
                char *at = panel + j * VW * 4;
#pragma GCC unroll 8
                for (int s = 0; s < per / KP; s++) {
                    const vp c = shifted      ? shifted_code(w, s, v->table, width, shift[j])
                                 : width == 4 ? code4(w, s, v->table)
                                              : code8(w, s, v->table);
                    store_panel(at + s * QK_ROWS * 4, c);
                }
            }
    }
}

static void NAME(expand)(const NAME(view) *v, int64_t block, int64_t k, int64_t stop,
                         char *panel) {
    const int64_t kind = v->op->zero_kind;
    const int shifted = kind == QK_ZERO_CODE || kind == QK_ZERO_CONST;
    if (IS4(v->op) && shifted) NAME(expand_width)(v, block, k, stop, panel, 4, 1);
    else if (IS4(v->op)) NAME(expand_width)(v, block, k, stop, panel, 4, 0);
    else if (shifted) NAME(expand_width)(v, block, k, stop, panel, 8, 1);
    else NAME(expand_width)(v, block, k, stop, panel, 8, 0);
}

/* Whether a panel holds c itself and the end of a group adds what its zero point asks for. */
QK_INLINE int NAME(adds_sums)(const qk_op *op) {
    return op->zero_kind == QK_ZERO_OFFSET || op->zero_kind == QK_ZERO_FLOAT;
}

/* out[tokens][32] += columns [k, stop) of `tokens` rows of x times the panel. Meanwhile codes at
 * `ahead` are fetched, `step` bytes a column or pair of columns. */
QK_INLINE void NAME(tile_tokens)(const NAME(view) *v, int64_t block, int64_t k, int64_t stop,
                                 const char *panel, const char *ahead, int64_t step,
                                 const xelem *x, const float *sums, float *out,
                                 const int tokens) {
    const qk_op *op = v->op;
    const int64_t ld = op->k;
    while (k < stop) {
        const int64_t q = k / op->group, group_end = qk_min(op->k, (q + 1) * op->group);
        const int64_t end = qk_min(stop, group_end);
        vf acc[MAX_TILE][NV];
#pragma GCC unroll 16
        for (int m = 0; m < tokens; m++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) acc[m][j] = vzero();
        for (; k < end; k += KP, panel += QK_ROWS * 4) {
            vp c[NV];
            _mm_prefetch(ahead, _MM_HINT_T1);
            ahead += step;
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) c[j] = load_panel(panel + j * VW * 4);
#pragma GCC unroll 16
            for (int m = 0; m < tokens; m++) {
                const vp b = bcast(x + m * ld + k);
#pragma GCC unroll 4
                for (int j = 0; j < NV; j++) acc[m][j] = mac(acc[m][j], c[j], b);
            }
        }
        const int late = NAME(adds_sums)(op) && end == group_end;
        NAME(finish)(v, block, q, late ? (int)op->zero_kind : QK_ZERO_FOLDED, tokens, acc, sums, out);
    }
}

/* The same for short groups: outputs wait in registers for the end of the chunk, which takes half
 * the tokens and a third of the work at the end of a group. */
QK_INLINE void NAME(tile_short)(const NAME(view) *v, int64_t block, int64_t k, int64_t stop,
                                const char *panel, const char *ahead, int64_t step,
                                const xelem *x, const float *sums, float *out, const int tokens) {
    const qk_op *op = v->op;
    const int64_t ld = op->k;
    vf y[SHORT_TILE][NV];
#pragma GCC unroll 16
    for (int m = 0; m < tokens; m++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) y[m][j] = vload(out + m * QK_ROWS + j * VW);
    while (k < stop) {
        const int64_t q = k / op->group, first = k;
        const int64_t group_end = qk_min(op->k, (q + 1) * op->group), end = qk_min(stop, group_end);
        vf acc[SHORT_TILE][NV];
#pragma GCC unroll 16
        for (int m = 0; m < tokens; m++)
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) acc[m][j] = vzero();
        for (; k < end; k += KP, panel += QK_ROWS * 4) {
            vp c[NV];
            _mm_prefetch(ahead, _MM_HINT_T1);
            ahead += step;
#pragma GCC unroll 4
            for (int j = 0; j < NV; j++) c[j] = load_panel(panel + j * VW * 4);
#pragma GCC unroll 16
            for (int m = 0; m < tokens; m++) {
                const vp b = bcast(x + m * ld + k);
#pragma GCC unroll 4
                for (int j = 0; j < NV; j++) acc[m][j] = mac(acc[m][j], c[j], b);
            }
        }
        const int late = NAME(adds_sums)(op) && end == group_end;
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) {
            if (late) {
                const vf shift = NAME(shift)(v, block, q, j);
                vf o = vzero();
                if (op->zero_kind == QK_ZERO_OFFSET)
                    o = NAME(product)(op->offset, v->t.offset, v->offset_groups, block, first, j);
#pragma GCC unroll 16
                for (int m = 0; m < tokens; m++) {
                    const vf sum = vset(sums[m * v->groups + q]);
                    acc[m][j] = vfma(shift, sum, acc[m][j]);
                    y[m][j] = vfma(o, sum, y[m][j]);
                }
            }
            const vf s = NAME(product)(op->scale, v->t.scales, v->scale_groups, block, first, j);
#pragma GCC unroll 16
            for (int m = 0; m < tokens; m++) y[m][j] = vfma(s, acc[m][j], y[m][j]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < tokens; m++)
#pragma GCC unroll 4
        for (int j = 0; j < NV; j++) vstore(out + m * QK_ROWS + j * VW, y[m][j]);
}

#ifdef QK_AMX
/* Whether columns come in whole tiles, up to the end of every group. */
QK_INLINE int NAME(in_tiles)(const qk_op *op) { return op->k % 32 == 0 && op->group % 32 == 0; }

/* One token of a segment of `count`, as tiles of 16 tokens (fewer in the last one) have it: [k / 32][16][32]. */
QK_INLINE void NAME(into_tiles)(const xelem *row, int64_t k, int64_t m, int64_t count, xelem *tiles) {
    const int64_t base = m / 16 * 16, rows = qk_min(16, count - base);
    xelem *to = tiles + base * k + (m - base) * 32;
    for (int64_t i = 0; i < k; i += 32, to += rows * 32) _mm512_storeu_si512(to, _mm512_loadu_si512(row + i));
}

/* The same by matrix units: up to 32 tokens, whole tiles of 32 columns. x lies in tiles. */
static void NAME(tile_matrix)(const NAME(view) *v, int64_t block, int64_t k, int64_t stop,
                              const char *panel, const char *ahead, int64_t step, const xelem *x,
                              const float *sums, float *out, int64_t tokens) {
    const qk_op *op = v->op;
    const int64_t line = QK_ROWS * 4, rows = qk_min(16, tokens), more = tokens - rows;
    const int two = more > 0;
    const xelem *below = x + 16 * op->k;
    float part[QK_AMX_TOKENS][QK_ROWS] __attribute__((aligned(64)));
    qk_tiles_for(tokens);
    while (k < stop) {
        const int64_t q = k / op->group, first = k;
        const int64_t group_end = qk_min(op->k, (q + 1) * op->group), end = qk_min(stop, group_end);
        TILE_ZERO(0);
        TILE_ZERO(1);
        if (two) {
            TILE_ZERO(2);
            TILE_ZERO(3);
        }
        for (; k < end; k += 32, panel += 16 * line) {
            if (step)
                for (int i = 0; i < 16; i++, ahead += step) _mm_prefetch(ahead, _MM_HINT_T1);
            TILE_LOAD(4, x + k * rows, 64);
            TILE_LOAD(6, panel, line);
            TILE_LOAD(7, panel + 64, line);
            TILE_BF16(0, 4, 6);
            TILE_BF16(1, 4, 7);
            if (two) {
                TILE_LOAD(5, below + k * more, 64);
                TILE_BF16(2, 5, 6);
                TILE_BF16(3, 5, 7);
            }
        }
        TILE_STORE(0, part[0], line);
        TILE_STORE(1, part[0] + 16, line);
        if (two) {
            TILE_STORE(2, part[16], line);
            TILE_STORE(3, part[16] + 16, line);
        }
        const int late = NAME(adds_sums)(op) && end == group_end;
        for (int j = 0; j < NV; j++) {
            const vf s = NAME(product)(op->scale, v->t.scales, v->scale_groups, block, first, j);
            float *y = out + j * VW;
            if (late) {
                const vf shift = NAME(shift)(v, block, q, j);
                vf o = vzero();
                if (op->zero_kind == QK_ZERO_OFFSET)
                    o = NAME(product)(op->offset, v->t.offset, v->offset_groups, block, first, j);
                for (int64_t m = 0; m < tokens; m++) {
                    const vf sum = vset(sums[m * v->groups + q]);
                    const vf acc = vfma(shift, sum, vload(part[m] + j * VW));
                    vstore(y + m * QK_ROWS, vfma(s, acc, vfma(o, sum, vload(y + m * QK_ROWS))));
                }
            } else
                for (int64_t m = 0; m < tokens; m++)
                    vstore(y + m * QK_ROWS, vfma(s, vload(part[m] + j * VW), vload(y + m * QK_ROWS)));
        }
    }
}
#endif

/* Most tokens of a tile. What fits one large tile stays one: two small ones would wait for sums. */
static inline int64_t NAME(tile_most)(const qk_op *op, int64_t tokens) {
    return op->group < SHORT_GROUP && tokens > MAX_TILE ? SHORT_TILE : MAX_TILE;
}

#define SHORT_CASE(N)                                                             \
    case N: NAME(tile_short)(v, block, k, stop, panel, ahead, step, x, sums, out, N); return;

#define TILE_CASE(N)                                                              \
    case N: NAME(tile_tokens)(v, block, k, stop, panel, ahead, step, x, sums, out, N); break;

static void NAME(tile)(const NAME(view) *v, int64_t block, int64_t k, int64_t stop,
                       const char *panel, const char *ahead, int64_t step, const xelem *x,
                       const float *sums, float *out, int64_t tokens) {
#ifdef QK_AMX
    if (NAME(in_tiles)(v->op)) {
        NAME(tile_matrix)(v, block, k, stop, panel, ahead, step, x, sums, out, tokens);
        return;
    }
#endif
#if SHORT_TILE > 3
    if (v->op->group < SHORT_GROUP) switch (tokens) {
            SHORT_CASE(1)
            SHORT_CASE(2)
            SHORT_CASE(3)
            SHORT_CASE(4)
            SHORT_CASE(5)
            SHORT_CASE(6)
            SHORT_CASE(7)
        }
#endif
    switch (tokens) {
        TILE_CASE(1)
        TILE_CASE(2)
#if MAX_TILE > 2
        TILE_CASE(3)
#endif
#if MAX_TILE > 3
        TILE_CASE(4)
        TILE_CASE(5)
        TILE_CASE(6)
        TILE_CASE(7)
        TILE_CASE(8)
        TILE_CASE(9)
        TILE_CASE(10)
        TILE_CASE(11)
        TILE_CASE(12)
#endif
    }
}

/* out[blocks][tokens][32] of neighbouring blocks for up to M_SLAB tokens. */
static void NAME(slab)(const NAME(view) *v, int64_t block, int64_t blocks, int64_t tokens,
                       const xelem *x, const float *sums, char *panels, float *out) {
    const qk_op *op = v->op;
    const int64_t panel_bytes = K_CHUNK / KP * QK_ROWS * 4, bytes = QK_ROWS * op->width / 8;
    /* even tiles: 13 tokens make 7 + 6, not 12 + 1 */
    const int64_t tiles = qk_div_up(tokens, NAME(tile_most)(op, tokens));
    int64_t step = qk_div_up(tokens, tiles);
#ifdef QK_AMX
    if (NAME(in_tiles)(op)) step = QK_AMX_TOKENS; /* a tile takes as long as it has rows */
#endif
    memset(out, 0, blocks * tokens * QK_ROWS * sizeof(float));
    for (int64_t k = 0; k < op->k; k += K_CHUNK) {
        const int64_t stop = qk_min(op->k, k + K_CHUNK);
        for (int64_t b = 0; b < blocks; b++)
            NAME(expand)(v, block + b, k, stop, panels + b * panel_bytes);
        for (int64_t m = 0; m < tokens; m += step)
            for (int64_t b = 0; b < blocks; b++) {
                /* what `expand` reads next: the next chunk, or the first one of a later block */
                const int64_t at = stop < op->k ? (block + b) * op->k + stop
                                                : (block + blocks + b) * op->k;
                const char *ahead = (const char *)v->t.codes + at * bytes;
                NAME(tile)(v, block + b, k, stop, panels + b * panel_bytes, ahead,
                           m == 0 ? KP * bytes : 0, x + m * op->k, sums + m * v->groups,
                           out + (b * tokens + m) * QK_ROWS, qk_min(step, tokens - m));
            }
    }
}

/* ----------------------------------------------------------------------------------- driver */

typedef struct {
    const void *x;
    int64_t xtype;
    void *y;
    const xelem *rows; /* tokens in stored column order, all segments */
    const float *sums; /* [tokens][groups], or NULL where no zero point needs them */
} NAME(job);

/* Blocks [block, block + blocks) for the tokens of one segment; weights that lie in another order are
 * made blocks of in `fetched`. */
static void NAME(run)(const NAME(view) *v, const NAME(job) *job, const qk_segment *seg,
                      int64_t block, int64_t blocks, char *panels, float *acc, void *fetched) {
    const qk_op *op = v->op;
    const int few = seg->count <= MAX_DECODE;
    NAME(view) here;
    int64_t at = block;
    if (op->order) {
        const int64_t row = block * QK_ROWS;
        here = *v;
        here.t = qk_fetch(op, &v->t, row, qk_min(blocks * QK_ROWS, op->n - row), fetched);
        v = &here, at = 0;
    }
    for (int64_t m = 0; m < seg->count; m += M_SLAB) {
        const int64_t tokens = qk_min(M_SLAB, seg->count - m), first = seg->start + m;
        const xelem *x = job->rows + first * op->k;
        const float *sums = job->sums ? job->sums + first * v->groups : NULL;
        const int64_t turns = qk_div_up(tokens, IS4(op) ? AT_ONCE : MAX_DECODE);
        const int64_t some = qk_div_up(tokens, turns); /* 7 are 4 and 3 */
        if (few)
            for (int64_t b = 0; b < blocks; b++)
                for (int64_t i = 0; i < tokens; i += some)
                    NAME(decode)(v, at + b, qk_min(some, tokens - i), x + i * op->k,
                                 sums ? sums + i * v->groups : NULL, acc + (b * tokens + i) * QK_ROWS);
        else
            NAME(slab)(v, at, blocks, tokens, x, sums, panels, acc);
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t column = (block + b) * QK_ROWS, count = qk_min(QK_ROWS, op->n - column);
            for (int64_t i = 0; i < tokens; i++)
                qk_store(acc + (b * tokens + i) * QK_ROWS, count, v->t.bias, op->bias_type, job->y,
                         job->xtype, (first + i) * op->n + column, column);
        }
    }
}

/* The tokens of one segment in stored column order, as xelem, and their sums per group. */
static void NAME(prepare)(const NAME(view) *v, const qk_segment *seg, const void *x, int64_t xtype,
                          xelem *rows, float *sums, int64_t m, xelem *own) {
    const qk_op *op = v->op;
    const int64_t at = seg->start + m;
    const xelem *row = rows ? rows + at * op->k : (const xelem *)x + at * op->k;
#ifdef QK_AMX
    if (NAME(in_tiles)(op) && seg->count > MAX_DECODE) {
        row = (const xelem *)x + at * op->k_in;
        if (v->t.gather) fill_row(x, xtype, at, op, v->t.gather, own), row = own;
        NAME(into_tiles)(row, op->k, m, seg->count, rows + seg->start * op->k);
    } else if (!v->t.gather) memcpy(rows + at * op->k, row = (const xelem *)x + at * op->k, op->k * sizeof *rows);
    else fill_row(x, xtype, at, op, v->t.gather, rows + at * op->k);
#else
    if (rows) fill_row(x, xtype, at, op, v->t.gather, rows + at * op->k);
#endif
    if (sums)
        for (int64_t q = 0; q < v->groups; q++)
            sums[at * v->groups + q] =
                x_sum(row + q * op->group, qk_min(op->group, op->k - q * op->group));
}

#ifndef QK_AMX /* few tokens are left to vectors */
/* ------------------------------------------------------------------ few tokens, several layers */

#define STACK_BYTES 8192 /* what a thread prepares of x without asking for memory */

/* See qk.h. Every thread prepares x for itself, which takes less time than waiting for another to do
 * it. Returns 0, or 1 when memory is not there. */
int NAME(qk_part)(const qk_call *calls, int64_t n, int64_t from, int64_t to) {
    const int64_t tokens = calls->count, xtype = calls->xtype, k = calls->op->k_in;
    float acc[MAX_DECODE * QK_ROWS] __attribute__((aligned(64)));
    char stack[STACK_BYTES] __attribute__((aligned(64))), *scratch = stack;
    int64_t columns = k, groups = 0, first = 0, fetched = 0, row_bytes, sum_bytes;
    for (int64_t i = 0; i < n; i++) {
        const qk_op *op = calls[i].op;
        columns = columns < op->k ? op->k : columns;
        const int64_t mine = qk_div_up(op->k, op->group);
        groups = groups < mine ? mine : groups;
        const int64_t bytes = qk_fetch_bytes(op, 1);
        fetched = fetched < bytes ? bytes : fetched;
    }
    row_bytes = qk_div_up(tokens * columns * (int64_t)sizeof(xelem), 64) * 64;
    sum_bytes = qk_div_up(tokens * groups * (int64_t)sizeof(float), 64) * 64;
    if (row_bytes + sum_bytes + fetched > STACK_BYTES) scratch = qk_alloc(row_bytes + sum_bytes + fetched);
    if (!scratch) return 1;
    xelem *rows = (xelem *)scratch;
    float *sums = (float *)(scratch + row_bytes);
    int have_rows = 0;        /* `rows` holds x in its own order */
    int64_t have_sums = 0;    /* `sums` belongs to x in its own order, in groups of so many columns */
    for (int64_t i = 0; i < n; i++) {
        const qk_op *op = calls[i].op;
        const qk_tensors *t = &calls[i].tensors;
        const int64_t low = from - first, high = to - first, all = qk_blocks(op);
        const int64_t begin = low < 0 ? 0 : low, end = qk_min(high, all);
        first += all;
        if (begin >= end) continue;
        const int copy = t->gather != NULL || xtype != XTYPE;
        if (t->gather) have_rows = 0, have_sums = 0;
        if (copy && !have_rows)
            for (int64_t m = 0; m < tokens; m++)
                fill_row(calls->x, xtype, m, op, t->gather, rows + m * op->k);
        const xelem *x = copy ? rows : (const xelem *)calls->x;
        NAME(view) v;
        NAME(make_view)(&v, op, t, 0);
        const int use_sums = op->zero_kind != QK_ZERO_FOLDED;
        if (use_sums && have_sums != op->group)
            for (int64_t m = 0; m < tokens; m++)
                for (int64_t q = 0; q < v.groups; q++)
                    sums[m * v.groups + q] = x_sum(x + m * op->k + q * op->group,
                                                   qk_min(op->group, op->k - q * op->group));
        if (!t->gather) {
            have_rows |= copy;
            if (use_sums) have_sums = op->group;
        }
        const NAME(job) job = {calls->x, xtype, calls[i].y, x, use_sums ? sums : NULL};
        const qk_segment seg = {0, 0, tokens};
        for (int64_t block = begin; block < end; block++)
            NAME(run)(&v, &job, &seg, block, 1, NULL, acc, scratch + row_bytes + sum_bytes);
        if (t->gather) have_sums = 0;
    }
    if (scratch != stack) free(scratch);
    return 0;
}

/* Several layers of one x, of at most MAX_DECODE tokens, in one parallel region. */
int NAME(qk_shared)(const qk_call *calls, int64_t n, int64_t threads) {
    int64_t blocks = 0, work = 0;
    int failed = 0;
    for (int64_t i = 0; i < n; i++) {
        blocks += qk_blocks(calls[i].op);
        work += calls[i].op->n * calls[i].op->k * calls->count;
    }
    if (work < 1 << 16) return NAME(qk_part)(calls, n, 0, blocks);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
        failed |= NAME(qk_part)(calls, n, blocks * id / team, blocks * (id + 1) / team);
    }
    return failed;
}

int64_t NAME(qk_most_shared)(void) { return MAX_DECODE; }
#endif

int NAME(qk_linear)(const qk_op *op, const qk_tensors *t, const void *x, int64_t xtype, void *y,
                    const qk_segment *segs, int64_t segments, int64_t threads) {
    int64_t tokens = 0, most = 0;
    int use_sums = NAME(adds_sums)(op); /* panels do without them otherwise */
    for (int64_t s = 0; s < segments; s++) {
        tokens += segs[s].count;
        if (segs[s].count > most) most = segs[s].count;
        if (segs[s].count <= MAX_DECODE && op->zero_kind != QK_ZERO_FOLDED) use_sums = 1;
    }
    if (tokens == 0) return 0;
    const int64_t end = segs[segments - 1].start + segs[segments - 1].count;
    const int64_t all = qk_blocks(op), groups = qk_div_up(op->k, op->group);
    const int few = most <= MAX_DECODE;
    int64_t blocks = few && !op->order ? 1 : all * segments / (threads * 4);
    blocks = blocks < 1 ? 1 : qk_min(blocks, MAX_BLOCKS);
    const int64_t per_segment = qk_div_up(all, blocks), tasks = segments * per_segment;

#ifdef QK_AMX
    const int copy = 1; /* into tiles */
#else
    const int copy = t->gather != NULL || xtype != XTYPE;
#endif
    const int64_t row_bytes = copy ? qk_div_up(end * op->k * (int64_t)sizeof(xelem), 64) * 64 : 0;
    const int64_t sum_bytes =
        use_sums ? qk_div_up(end * groups * (int64_t)sizeof(float), 64) * 64 : 0;
    int64_t panel_bytes = few ? 0 : (int64_t)MAX_BLOCKS * K_CHUNK / KP * QK_ROWS * 4;
#ifdef QK_AMX
    if (panel_bytes < op->k * (int64_t)sizeof(xelem)) panel_bytes = qk_div_up(op->k * sizeof(xelem), 64) * 64; /* a token */
#endif
    const int64_t acc_bytes = MAX_BLOCKS * qk_min(most, M_SLAB) * QK_ROWS * (int64_t)sizeof(float);
    const int64_t before = panel_bytes + qk_div_up(acc_bytes, 64) * 64;
    const int64_t own = before + qk_fetch_bytes(op, blocks);
    if (op->n * op->k * tokens < 1 << 16) threads = 1;

    char *scratch = qk_alloc(row_bytes + sum_bytes + own * threads);
    if (!scratch) return 1;
    NAME(job) job = {x, xtype, y, copy ? (xelem *)scratch : x,
                     sum_bytes ? (float *)(scratch + row_bytes) : NULL};
    const int wide = tokens * op->k >= 1 << 15;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *panels = scratch + row_bytes + sum_bytes + own * omp_get_thread_num();
        float *acc = (float *)(panels + panel_bytes);
        NAME(view) v;
        if (copy || sum_bytes) {
            for (int64_t s = 0; s < segments; s++) {
                NAME(make_view)(&v, op, t, segs[s].expert);
                if (wide || threads == 1) {
#pragma omp for schedule(static) nowait
                    for (int64_t m = 0; m < segs[s].count; m++)
                        NAME(prepare)(&v, &segs[s], x, xtype, copy ? (xelem *)scratch : NULL,
                                      (float *)job.sums, m, (xelem *)panels);
                } else {
#pragma omp single nowait
                    for (int64_t m = 0; m < segs[s].count; m++)
                        NAME(prepare)(&v, &segs[s], x, xtype, copy ? (xelem *)scratch : NULL,
                                      (float *)job.sums, m, (xelem *)panels);
                }
            }
#pragma omp barrier
        }
        int64_t current = -1;
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < tasks; task++) {
            const int64_t s = task / per_segment, block = task % per_segment * blocks;
            if (s != current) NAME(make_view)(&v, op, t, segs[s].expert);
            current = s;
            NAME(run)(&v, &job, &segs[s], block, qk_min(blocks, all - block), panels, acc, panels + before);
        }
#ifdef QK_AMX
        qk_tiles_done();
#endif
    }
    free(scratch);
    return 0;
}
