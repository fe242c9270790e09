/* The int8 linear kernel, once for every instruction set; int8.h has the maths. Included by a unit
 * that defines NAME(f), TILE (most tokens of a tile) and
 *
 *     NAME(tile)(w, x, quads, tokens, acc)   acc[m][r] += sum of x u over 4 * quads columns
 *         w   [quads][32 rows][4] of one block      x   [quads][tokens][4]
 *     NAME(tile)(w, x, k, columns, quads, tokens, acc)   where QK_AMX: from column k of x on, which lies in
 *         tiles of 16 tokens (fewer in a segment's last one): [columns / 64][16][64]
 *     NAME(rows)(w, k, count, flip, x, columns, acc)    acc[r] += sum of x (w ^ flip) of `count` rows
 *         w   bytes of rows, k apart                    x   codes of one token
 *     NAME(turn)(w, k, flip, out)    where HAVE_TURN: 16 words of 16 rows, turned: out[word][32 rows]
 *
 * Tokens are quantized once, into tiles whose bytes lie in the order of use. Then each task takes
 * one block of rows and runs through a slab of tokens, a chunk of K at a time: the slab's part of x
 * and the block's part of the weights stay in the L2 cache, sums wait in `acc` for the next chunk.
 * At the end of a group of weights the sums become doubles under its scale. Rows of bytes as files store
 * them are used where they lie for one token; for more a chunk of a block is put in order first. (Blocks that share a
 * pass over x were tried: 3 to 6 % slower on Zen 5.)
 */
#include <math.h>
#include <omp.h>

#include "common.h"
#include "int8.h"

#ifdef QK_AMX
#define TILES_DONE() qk_tiles_done()
#define K_CHUNK 1024 /* columns: 32 KiB of a block, which the first cache holds */
#define M_SLAB 256
#else
#define TILES_DONE() (void)0
#define K_CHUNK 2048 /* columns: 64 KiB of a block, 504 KiB of a slab */
#define M_SLAB 252   /* tokens whose sums are kept at once: 32 KiB */
#endif

/* One token: codes, their sum per group, and the scale they stand under. A scale of NaN marks
 * values that no code can stand for (oracle: quant_core.kernels.activations and .integer). */
static inline float qk_quantize(const qk_int8_op *op, const qk_int8_tensors *t,
                                const float *restrict x, int8_t *restrict q, int32_t *sums) {
    const int64_t count = op->k, group = op->group;
    const uint32_t infinity = 0x7f800000;
    uint32_t top = 0, odd = 0;
    for (int64_t i = 0; i < count; i++) { /* magnitudes order as their bits do */
        uint32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        bits &= 0x7fffffff;
        top = bits > top ? bits : top;
    }
    float s;
    if (op->input_type) {
        s = qk_read(t->input_scale, op->input_type, 0);
    } else {
        memcpy(&s, &top, sizeof s);
        s = s / op->peak;
        s = s < op->least ? op->least : s;
        s = op->most > 0 && s > op->most ? op->most : s;
        s = s == 0 ? 0x1p-23f : s; /* epsilon of float32: zeros stay zeros */
    }
    const float z = t->input_zero ? (float)*t->input_zero : 0, low = op->lowest, high = op->highest;
    for (int64_t i = 0; i < count; i++) {
        float v = x[i] / s + z;
        odd |= v != v;
        v = v < low ? low : v;
        v = v > high ? high : v;
        v += 0x1.8p23f; /* rounds half to even; the code is the low byte */
        uint32_t bits;
        memcpy(&bits, &v, sizeof bits);
        q[i] = (int8_t)bits;
    }
    for (int64_t k = 0, g = 0; k < count; k += group, g++) {
        const int64_t stop = qk_min(count, k + group);
        int32_t sum = 0;
        for (int64_t i = k; i < stop; i++) sum += q[i];
        sums[g] = sum;
    }
    if (odd || top >= infinity) return NAN;
    return t->out_scale ? 1.0f : s;
}

typedef struct {
    const int8_t *q;     /* tiles of codes, [k / 4][tokens][4] each */
    const int32_t *sums; /* [tokens][groups] of codes */
    const float *scale;  /* [tokens] */
    int64_t step;        /* tokens of a tile; the last of a segment may have fewer */
} NAME(codes);

/* What turns the integer sums of one group of one block into its share of y. */
typedef struct {
    double scale[QK_ROWS], add[QK_ROWS];
    int32_t less[QK_ROWS]; /* z sum c */
} NAME(finish);

static void NAME(make_finish)(NAME(finish) *f, const qk_int8_op *op, const qk_int8_tensors *t,
                              int64_t block, int64_t groups, int64_t g) {
    const int64_t at = (block * groups + g) * QK_ROWS;
    const int64_t count = qk_min(QK_ROWS, op->n - block * QK_ROWS);
    const int32_t z = t->input_zero && !t->out_scale ? *t->input_zero : 0;
    memset(f, 0, sizeof *f);
    for (int64_t r = 0; r < count; r++) {
        const int64_t n = block * QK_ROWS + r;
        const int64_t own = op->stored ? n * groups + g : at + r, s = op->scale_single ? 0 : own;
        f->scale[r] = t->out_scale ? t->out_scale[n] : qk_read(t->scales, op->scale_type, s);
        f->add[r] = t->acc_bias ? t->acc_bias[n] : 0;
        f->less[r] = z ? z * t->sums[own] : 0;
    }
}

/* total[32] (+)= (acc - 128 sum q - z sum c + acc_bias) * scale. Differences wrap, results fit. */
QK_INLINE void NAME(add_group)(const NAME(finish) *f, const int32_t *acc, int32_t sum, int first,
                               double *total) {
    const uint32_t codes = 128u * (uint32_t)sum;
    for (int r = 0; r < QK_ROWS; r++) {
        const int32_t dot = (int32_t)((uint32_t)acc[r] - codes - (uint32_t)f->less[r]);
        const double part = ((double)dot + f->add[r]) * f->scale[r];
        total[r] = first ? part : total[r] + part;
    }
}

/* Memory of one thread. */
typedef struct {
    int32_t *acc;  /* [tokens of a slab][32] */
    double *total; /* the same; only where a row has several groups */
    float *wide;   /* one token */
    int8_t *row;
    uint8_t *block; /* [K_CHUNK / 4][32][4]; only where codes lie in rows */
} NAME(work);

static int64_t NAME(block_bytes)(const qk_int8_op *op) { return op->stored ? K_CHUNK * QK_ROWS : 0; }

/* What turns stored bytes into u, four at a time. */
static inline uint32_t NAME(flip)(const qk_int8_op *op) {
    return op->stored == QK_INT8_SIGNED ? 0x80808080 : 0;
}

/* `quads` words of each row of a block, in the order of qk.h; zeros where there are fewer rows. */
static void NAME(fetch)(const uint8_t *rows, int64_t k, int64_t count, uint32_t flip, int64_t quads,
                        uint8_t *out) {
    uint32_t *to = (uint32_t *)out;
    if (count < QK_ROWS) memset(out, 0, quads * QK_ROWS * 4);
    int64_t line = 0;
#ifdef HAVE_TURN
    if (count == QK_ROWS)
        for (; line + 16 <= quads; line += 16)
            for (int half = 0; half < QK_ROWS; half += 16)
                NAME(turn)(rows + half * k + line * 4, k, flip, to + line * QK_ROWS + half);
#endif
    for (; line < quads; line += 16) /* a cache line of each row */
        for (int64_t r = 0; r < count; r++) {
            const uint8_t *row = rows + r * k;
            for (int64_t i = line; i < qk_min(line + 16, quads); i++) {
                uint32_t w;
                memcpy(&w, row + i * 4, sizeof w);
                to[i * QK_ROWS + r] = w ^ flip;
            }
        }
}

static void NAME(run_task)(const qk_int8_op *op, const qk_int8_tensors *t, int64_t block,
                           const qk_segment *seg, const NAME(codes) *c, const NAME(work) *work,
                           void *y, int64_t ytype) {
    const int64_t groups = qk_div_up(op->k, op->group), step = c->step;
    const int64_t slab = seg->count <= TILE ? step : M_SLAB / step * step;
    const int in_rows = op->stored && seg->count == 1;
    const int64_t chunk = seg->count <= TILE && (in_rows || !op->stored) ? op->k : K_CHUNK;
    const int64_t column = block * QK_ROWS, count = qk_min(QK_ROWS, op->n - column);
    const uint8_t *codes = (const uint8_t *)t->codes + column * op->k;
    const uint32_t flip = NAME(flip)(op);
    for (int64_t m0 = 0; m0 < seg->count; m0 += slab) {
        const int64_t tokens = qk_min(slab, seg->count - m0), first = seg->start + m0;
        for (int64_t k = 0, stop, g = 0; k < op->k; k = stop) {
            const int64_t end = qk_min(op->k, (g + 1) * op->group);
            stop = qk_min(end, k + chunk);
            if (k == g * op->group) memset(work->acc, 0, tokens * QK_ROWS * sizeof(int32_t));
            const uint8_t *w = codes + k * QK_ROWS;
            if (in_rows)
                NAME(rows)(codes + k, op->k, count, flip, c->q + first * op->k + k, stop - k, work->acc);
            else if (op->stored) {
                w = work->block;
                NAME(fetch)(codes + k, op->k, count, flip, (stop - k) / 4, work->block);
            }
            for (int64_t m = 0; m < tokens && !in_rows; m += step) {
                const int64_t some = qk_min(step, tokens - m);
#ifdef QK_AMX
                NAME(tile)(w, c->q + (first + m) * op->k, k, op->k, (stop - k) / 4, (int)some,
                           work->acc + m * QK_ROWS);
#else
                NAME(tile)(w, c->q + (first + m) * op->k + k * some,
                           (stop - k) / 4, (int)some, work->acc + m * QK_ROWS);
#endif
            }
            if (stop < end) continue;
            NAME(finish) f;
            NAME(make_finish)(&f, op, t, block, groups, g);
            for (int64_t m = 0; m < tokens; m++) {
                double one[QK_ROWS], *total = groups > 1 ? work->total + m * QK_ROWS : one;
                const int64_t token = first + m, at = token * op->n + column;
                const int32_t *acc = work->acc + m * QK_ROWS;
                NAME(add_group)(&f, acc, c->sums[token * groups + g], g == 0, total);
                if (stop < op->k) continue;
                float out[QK_ROWS];
                for (int r = 0; r < QK_ROWS; r++) out[r] = (float)(total[r] * c->scale[token]);
                qk_store(out, count, t->bias, op->bias_type, y, ytype, at, column);
            }
            g++;
        }
    }
}

/* Token `m` of a segment, quantized into its place in the tiles. */
static void NAME(quantize_token)(const qk_int8_op *op, const qk_int8_tensors *t, const void *x,
                                 int64_t xtype, const qk_segment *seg, int64_t m, int64_t step,
                                 const NAME(work) *work, int8_t *q, int32_t *sums, float *scale) {
#ifdef QK_AMX
    const int64_t base = m / 16 * 16, some = qk_min(16, seg->count - base), piece = 64;
#else
    const int64_t base = m / step * step, some = qk_min(step, seg->count - base), piece = 4;
#endif
    const int64_t groups = qk_div_up(op->k, op->group), token = seg->start + m;
    const qk_op shape = {.k = op->k, .k_in = op->k};
    int8_t *tile = q + (seg->start + base) * op->k + (m - base) * piece;
    int8_t *row = some == 1 ? tile : work->row;
    qk_token_f32(x, xtype, token, &shape, NULL, work->wide);
    scale[token] = qk_quantize(op, t, work->wide, row, sums + token * groups);
    if (some > 1)
        for (int64_t i = 0; i < op->k; i += piece) memcpy(tile + i * some, row + i, piece);
}

static int64_t NAME(tile_step)(int64_t tokens) {
#ifdef QK_AMX
    return qk_min(tokens, TILE); /* a tile takes as long as it has rows */
#endif
    return qk_div_up(tokens, qk_div_up(tokens, TILE));
}

int NAME(qk_w8a8)(const qk_int8_op *op, const qk_int8_tensors *t, const void *x, int64_t xtype,
                  void *y, const qk_segment *segs, int64_t segments, int64_t threads) {
    const int64_t end = segs[segments - 1].start + segs[segments - 1].count;
    if (end == 0) return 0;
    if (op->n * op->k * end < 1 << 16) threads = 1;
    int64_t most = 0;
    for (int64_t s = 0; s < segments; s++) most = segs[s].count > most ? segs[s].count : most;
    const int64_t groups = qk_div_up(op->k, op->group), rows = qk_div_up(op->n, QK_ROWS);
    const int64_t share = most > TILE ? 1 : qk_div_up(rows * segments, threads * 4);
    const int64_t held = (most <= TILE ? most : M_SLAB) * QK_ROWS;
    const int64_t line = qk_div_up(op->k, 64) * 64; /* bytes */
    const int64_t sums_bytes = held * (groups > 1 ? 12 : 4);
    const int64_t own_bytes = sums_bytes + line * 5 + NAME(block_bytes)(op);
    char *scratch = qk_alloc(threads * own_bytes + end * (op->k + (groups + 1) * 4));
    if (!scratch) return 1;
    int8_t *q = (int8_t *)(scratch + threads * own_bytes); /* k is a multiple of 16 */
    int32_t *sums = (int32_t *)(q + end * op->k);
    float *scale = (float *)(sums + end * groups);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *own = scratch + omp_get_thread_num() * own_bytes;
        NAME(work) work = {.wide = (float *)own, .row = (int8_t *)own + line * 4};
        work.acc = (int32_t *)(own + line * 5);
        work.total = (double *)(work.acc + held);
        work.block = (uint8_t *)own + line * 5 + sums_bytes;
        for (int64_t s = 0; s < segments; s++) {
            const qk_int8_tensors mine = qk_int8_expert(op, t, segs[s].expert);
            const int64_t step = NAME(tile_step)(segs[s].count);
#pragma omp for schedule(static) nowait
            for (int64_t m = 0; m < segs[s].count; m++)
                NAME(quantize_token)(op, &mine, x, xtype, &segs[s], m, step, &work, q, sums, scale);
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, share) nowait
        for (int64_t task = 0; task < segments * rows; task++) {
            const qk_segment *seg = &segs[task / rows];
            const qk_int8_tensors mine = qk_int8_expert(op, t, seg->expert);
            const NAME(codes) c = {q, sums, scale, NAME(tile_step)(seg->count)};
            NAME(run_task)(op, &mine, task % rows, seg, &c, &work, y, xtype);
        }
        TILES_DONE();
    }
    free(scratch);
    return 0;
}

/* Whether two layers of one x quantize it to the same codes, sums and scales. */
static int NAME(alike)(const qk_int8_call *a, const qk_int8_call *b) {
    const qk_int8_op *p = a->op, *q = b->op;
    const qk_int8_tensors *s = &a->tensors, *t = &b->tensors;
    if (p->k != q->k || p->group != q->group || p->input_type != q->input_type) return 0;
    if (p->peak != q->peak || p->least != q->least || p->most != q->most) return 0;
    if (p->lowest != q->lowest || p->highest != q->highest) return 0;
    if (!s->input_zero != !t->input_zero || !s->out_scale != !t->out_scale) return 0;
    if (s->input_zero && *s->input_zero != *t->input_zero) return 0;
    return !p->input_type || !memcmp(s->input_scale, t->input_scale, qk_size(p->input_type));
}

/* Several layers of one x, which is quantized once for neighbours that do so alike. Every call names
 * the same x, type and count and no segments; each y is what its own call gives, bit for bit. */
int NAME(qk_w8a8_shared)(const qk_int8_call *calls, int64_t n, int64_t threads) {
    const int64_t count = calls->count, most = count > TILE ? M_SLAB : count;
    const qk_segment seg = {0, 0, count};
    int64_t line = 0, groups = 0, work_items = 0, block_bytes = 0;
    for (int64_t i = 0; i < n; i++) {
        const int64_t mine = qk_div_up(calls[i].op->k, calls[i].op->group);
        groups = mine > groups ? mine : groups;
        line = calls[i].op->k > line ? calls[i].op->k : line;
        work_items += calls[i].op->n * calls[i].op->k * count;
        if (calls[i].op->stored) block_bytes = NAME(block_bytes)(calls[i].op);
    }
    if (count == 0) return 0;
    if (work_items < 1 << 16) threads = 1;
    line = qk_div_up(line, 64) * 64; /* bytes */
    const int64_t held = most * QK_ROWS, sums_bytes = held * (groups > 1 ? 12 : 4);
    const int64_t own_bytes = sums_bytes + line * 5 + block_bytes;
    char *scratch = qk_alloc(threads * own_bytes + count * (line + (groups + 1) * 4));
    if (!scratch) return 1;
    int8_t *q = (int8_t *)(scratch + threads * own_bytes);
    int32_t *sums = (int32_t *)(q + count * line);
    float *scale = (float *)(sums + count * groups);
    const NAME(codes) c = {q, sums, scale, NAME(tile_step)(count)};
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        char *own = scratch + omp_get_thread_num() * own_bytes;
        NAME(work) work = {.wide = (float *)own, .row = (int8_t *)own + line * 4};
        work.acc = (int32_t *)(own + line * 5);
        work.total = (double *)(work.acc + held);
        work.block = (uint8_t *)own + line * 5 + sums_bytes;
        for (int64_t i = 0; i < n; i++) {
            const qk_int8_call *call = &calls[i];
            const int64_t rows = qk_div_up(call->op->n, QK_ROWS);
            const int64_t share = count > TILE ? 1 : qk_div_up(rows, threads * 4);
            if (i == 0 || !NAME(alike)(call, call - 1)) {
#pragma omp barrier
#pragma omp for schedule(static)
                for (int64_t m = 0; m < count; m++)
                    NAME(quantize_token)(call->op, &call->tensors, call->x, call->xtype, &seg, m,
                                         c.step, &work, q, sums, scale);
            }
#pragma omp for schedule(dynamic, share) nowait
            for (int64_t task = 0; task < rows; task++)
                NAME(run_task)(call->op, &call->tensors, task, &seg, &c, &work, call->y, call->xtype);
        }
        TILES_DONE();
    }
    free(scratch);
    return 0;
}
