/* 4-bit codes times int8 activations, AVX512-VNNI: faster and less exact than kernel.h.
 *
 * Every group of A columns of a token (the weight's own group, at most 128) is rounded to int8
 * with a scale of its own; products of codes are exact integers:
 *
 *     sx = max|x| / 127      q = round(x / sx)      to nearest even
 *     y[n] = sum over groups   s[n] sx (sum c q - z sum q) + o[n] sx sum q
 *
 * A group with NaN or infinity gives NaN. The bytes of q lie in the order in which masking and
 * one shift bring up the codes: of 8 columns, 0 4 1 5 against the low nibbles of the four bytes,
 * 2 6 3 7 against the high ones.
 */
#include <math.h>
#include <omp.h>

#include "common.h"
#include "vec512.h"

#define NAME(f) f##_w4a8
#define MAX_TOKENS 8

typedef int code_table; /* codes are used as they are */
#define make_table(op, t) 0

#include "factors.h"

/* One token, quantized: A columns share a scale. */
typedef struct {
    const int8_t *q;   /* [k] */
    const float *scale; /* [groups] */
    const float *sum;   /* [groups]: sum of q, an exact integer */
} qk_token;

static int64_t activation_group(const qk_op *op) { return qk_min(op->group, 128); }

static void quantize(const float *x, int64_t k, int64_t size, int8_t *q, float *scale,
                     float *sum) {
    const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
    for (int64_t g = 0; g * size < k; g++) {
        const int64_t start = g * size, stop = qk_min(k, start + size);
        __m512 top = _mm512_setzero_ps(), bad = _mm512_setzero_ps();
        for (int64_t i = start; i < stop; i += 16) {
            const __m512 v = _mm512_loadu_ps(x + i);
            top = _mm512_max_ps(top, _mm512_abs_ps(v));
            bad = _mm512_fmadd_ps(v, _mm512_setzero_ps(), bad); /* NaN if v is not finite */
        }
        const float most = _mm512_reduce_max_ps(top), finite = _mm512_reduce_add_ps(bad);
        const __m512 inverse = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
        __m512i total = _mm512_setzero_si512();
        for (int64_t i = start; i < stop; i += 16) {
            const __m512i c = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
            total = _mm512_add_epi32(total, c);
            _mm_storeu_si128((__m128i *)(q + i), _mm_shuffle_epi8(_mm512_cvtsepi32_epi8(c), order));
        }
        scale[g] = finite == 0 ? most / 127.0f : NAN;
        sum[g] = (float)_mm512_reduce_add_epi32(total);
    }
}

QK_INLINE __m512i broadcast4(const int8_t *q) {
    int word;
    memcpy(&word, q, sizeof word);
    return _mm512_set1_epi32(word);
}

/* out[tokens][32] of one block. */
QK_INLINE void block_tokens(const view_w4a8 *v, int64_t block, const qk_token *t, float *out,
                            const int tokens) {
    const qk_op *op = v->op;
    const int64_t size = activation_group(op);
    const uint8_t *codes = (const uint8_t *)v->t.codes + block * QK_ROWS * op->k / 2;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 y[MAX_TOKENS][NV];
#pragma GCC unroll 8
    for (int m = 0; m < tokens; m++)
#pragma GCC unroll 2
        for (int j = 0; j < NV; j++) y[m][j] = _mm512_setzero_ps();
    for (int64_t g = 0; g * size < op->k; g++) {
        const int64_t start = g * size, stop = qk_min(op->k, start + size), q = start / op->group;
        __m512i acc[MAX_TOKENS][NV], high[MAX_TOKENS][NV];
#pragma GCC unroll 8
        for (int m = 0; m < tokens; m++)
#pragma GCC unroll 2
            for (int j = 0; j < NV; j++) acc[m][j] = high[m][j] = _mm512_setzero_si512();
        for (int64_t k = start; k < stop; k += 8, codes += QK_ROWS * 4)
#pragma GCC unroll 2
            for (int j = 0; j < NV; j++) {
                _mm_prefetch((const char *)codes + 4096 + 64 * j, _MM_HINT_T0);
                const __m512i w = _mm512_loadu_si512(codes + 64 * j);
                const __m512i a = _mm512_and_si512(w, low);
                const __m512i b = _mm512_and_si512(_mm512_srli_epi16(w, 4), low);
#pragma GCC unroll 8
                for (int m = 0; m < tokens; m++) {
                    acc[m][j] = _mm512_dpbusd_epi32(acc[m][j], a, broadcast4(t[m].q + k));
                    if (tokens <= 2) /* two sums hide the latency */
                        high[m][j] = _mm512_dpbusd_epi32(high[m][j], b, broadcast4(t[m].q + k + 4));
                    else
                        acc[m][j] = _mm512_dpbusd_epi32(acc[m][j], b, broadcast4(t[m].q + k + 4));
                }
            }
#pragma GCC unroll 2
        for (int j = 0; j < NV; j++) {
            const __m512 s = product_w4a8(op->scale, v->t.scales, v->scale_groups, block, start, j);
            __m512 z = _mm512_set1_ps(op->zero_kind == QK_ZERO_OFFSET ? 0.0f : op->bias + op->shift);
            if (op->zero_kind == QK_ZERO_CODE)
                z = load_u8((const uint8_t *)v->t.zeros + (block * v->groups + q) * QK_ROWS + j * VW);
#pragma GCC unroll 8
            for (int m = 0; m < tokens; m++) {
                const __m512i c = tokens <= 2 ? _mm512_add_epi32(acc[m][j], high[m][j]) : acc[m][j];
                const __m512 dot = /* exact: below 2^24 */
                    _mm512_fnmadd_ps(z, _mm512_set1_ps(t[m].sum[g]), _mm512_cvtepi32_ps(c));
                y[m][j] = _mm512_fmadd_ps(_mm512_mul_ps(s, _mm512_set1_ps(t[m].scale[g])), dot, y[m][j]);
            }
            if (op->zero_kind == QK_ZERO_OFFSET) {
                const __m512 o =
                    product_w4a8(op->offset, v->t.offset, v->offset_groups, block, start, j);
#pragma GCC unroll 8
                for (int m = 0; m < tokens; m++)
                    y[m][j] = _mm512_fmadd_ps(o, _mm512_set1_ps(t[m].scale[g] * t[m].sum[g]), y[m][j]);
            }
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < tokens; m++)
#pragma GCC unroll 2
        for (int j = 0; j < NV; j++) _mm512_storeu_ps(out + m * QK_ROWS + j * VW, y[m][j]);
}

#define TOKENS_CASE(N) \
    case N: block_tokens(v, block, t, out, N); break;

static void run_block(const view_w4a8 *v, int64_t block, const qk_token *t, int64_t tokens,
                      float *out) {
    switch (tokens) {
        TOKENS_CASE(1)
        TOKENS_CASE(2)
        TOKENS_CASE(3)
        TOKENS_CASE(4)
        TOKENS_CASE(5)
        TOKENS_CASE(6)
        TOKENS_CASE(7)
        TOKENS_CASE(8)
    }
}

static void run_segment(const view_w4a8 *v, int64_t block, const qk_segment *seg,
                        const qk_token *tokens, void *y, int64_t ytype) {
    const qk_op *op = v->op;
    const int64_t column = block * QK_ROWS, count = qk_min(QK_ROWS, op->n - column);
    const int64_t step = qk_div_up(seg->count, qk_div_up(seg->count, MAX_TOKENS));
    float out[MAX_TOKENS * QK_ROWS];
    for (int64_t m = 0; m < seg->count; m += step) {
        const int64_t some = qk_min(step, seg->count - m), first = seg->start + m;
        run_block(v, block, tokens + first, some, out);
        for (int64_t i = 0; i < some; i++)
            qk_store(out + i * QK_ROWS, count, v->t.bias, op->bias_type, y, ytype,
                     (first + i) * op->n + column, column);
    }
}

int qk_linear_w4a8(const qk_op *op, const qk_tensors *t, const void *x, int64_t xtype, void *y,
                   const qk_segment *segs, int64_t segments, int64_t threads) {
    const int64_t end = segs[segments - 1].start + segs[segments - 1].count;
    if (end == 0) return 0;
    const int64_t blocks = qk_blocks(op), groups = qk_div_up(op->k, activation_group(op));
    if (op->n * op->k * end < 1 << 16) threads = 1;
    const int64_t rounded = qk_div_up(op->k, 64) * 64, pairs = qk_div_up(groups * 8, 64) * 64;
    char *scratch = qk_alloc(end * (rounded + pairs + (int64_t)sizeof(qk_token)) +
                             threads * rounded * (int64_t)sizeof(float));
    if (!scratch) return 1;
    float *wide = (float *)scratch; /* one token a thread */
    int8_t *q = (int8_t *)(wide + threads * rounded);
    float *scales = (float *)(q + end * rounded);
    qk_token *tokens = (qk_token *)(scales + end * pairs / 4);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        view_w4a8 v;
        float *own = wide + omp_get_thread_num() * rounded;
        for (int64_t s = 0; s < segments; s++) {
            make_view_w4a8(&v, op, t, segs[s].expert);
#pragma omp for schedule(static) nowait
            for (int64_t m = segs[s].start; m < segs[s].start + segs[s].count; m++) {
                float *scale = scales + m * pairs / 4;
                qk_token_f32(x, xtype, m, op, v.t.gather, own);
                quantize(own, op->k, activation_group(op), q + m * rounded, scale, scale + groups);
                tokens[m] = (qk_token){q + m * rounded, scale, scale + groups};
            }
        }
#pragma omp barrier
        int64_t current = -1;
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < segments * blocks; task++) {
            const int64_t s = task / blocks;
            if (s != current) make_view_w4a8(&v, op, t, segs[s].expert);
            current = s;
            run_segment(&v, task % blocks, &segs[s], tokens, y, xtype);
        }
    }
    free(scratch);
    return 0;
}
