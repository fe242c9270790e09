/* One query token per sequence against the keys and values of a cache. Included by a unit per
 * instruction set that defines NAME(f) and, through `omp simd`, leaves the vectors to the compiler.
 *
 *     s[l] = scale * sum over d of q[d] k[l, d]  (+ mask[l])      w = softmax(s)
 *     y[d] = sum over l of w[l] v[l, d]
 *
 * All in float32; q, k, v and y are bfloat16 or float16, y is rounded once. A position that a mask leaves
 * out is not read; a row that it leaves out whole gives zeros, as torch's safe softmax does. Query
 * heads that share a head of keys are computed side by side, so that keys are read once. */
#include <math.h>
#include <omp.h>

#include "common.h"
#include "step.h"

#define MAX_DIM 512  /* features of a head */
#define AHEAD 16     /* positions between what is fetched and what is used */

/* e^x for x <= 0, to about 2 units in the last place; NaN stays NaN. */
QK_INLINE float qk_exp(float x) {
    const float low = x < -87.0f ? -87.0f : x;
    const float n = rintf(low * 1.44269504f);
    const float r = (low - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t i; float f; } two = {((int32_t)n + 127) << 23};
    return x < -87.0f ? 0.0f : p * two.f;
}

/* `count` bfloat16 or float16 numbers as float32, times `scale`. */
QK_INLINE void NAME(widen)(const void *p, const int type, int64_t at, int64_t count, float scale,
                           float *out) {
    const uint16_t *from = (const uint16_t *)p + at;
    if (type == QK_F16)
        for (int64_t i = 0; i < count; i++) out[i] = _cvtsh_ss(from[i]) * scale;
    else
        for (int64_t i = 0; i < count; i++) out[i] = qk_from_bf16(from[i]) * scale;
}

/* A step finds the cache in memory, behind all weights: it is fetched ahead. */
QK_INLINE void NAME(fetch)(const void *p, int64_t at, int64_t count) {
    for (int64_t d = 0; d < count; d += 32)
        _mm_prefetch((const char *)((const uint16_t *)p + at + d), _MM_HINT_T0);
}

QK_INLINE int NAME(visible)(const qk_step *s, int64_t b, int64_t h, int64_t l, float *add) {
    if (!s->mask) return 1;
    const int64_t at = b * s->mask_stride[0] + h * s->mask_stride[1] + l * s->mask_stride[2];
    if (s->mask_type == QK_U8) return ((const uint8_t *)s->mask)[at] != 0;
    *add = qk_read(s->mask, s->mask_type, at);
    return *add != -INFINITY;
}

/* Query heads [h, h + side) of sequence b, which share one head of keys and values. What is constant
 * where this is inlined (`fixed` features, no mask) stays in registers. */
QK_INLINE void NAME(heads)(const qk_step *s, int64_t b, int64_t h, const int side, const int type,
                           const int64_t dim, const int64_t wide, const int masked, float *scores) {
    const int64_t shared = h / (s->heads / s->kv_heads);
    const int64_t k0 = b * s->k_stride[0] + shared * s->k_stride[1];
    const int64_t v0 = b * s->v_stride[0] + shared * s->v_stride[1];
    float q[MAX_SIDE][MAX_DIM], y[MAX_SIDE][MAX_DIM], row[MAX_DIM], top[MAX_SIDE], sum[MAX_SIDE];
    for (int j = 0; j < side; j++) {
        NAME(widen)(s->q, type, b * s->q_stride[0] + (h + j) * s->q_stride[1], dim, s->scale, q[j]);
        for (int64_t d = 0; d < wide; d++) y[j][d] = 0;
        top[j] = -INFINITY;
    }
    for (int64_t l = 0; l < s->length; l++) {
        NAME(fetch)(s->k, k0 + (l + AHEAD) * s->k_stride[2], dim);
        NAME(fetch)(s->v, v0 + l * s->v_stride[2], wide);
        float add[MAX_SIDE] = {0};
        int seen[MAX_SIDE], any = 0;
        for (int j = 0; j < side; j++)
            any |= seen[j] = masked ? NAME(visible)(s, b, h + j, l, &add[j]) : 1;
        if (any) NAME(widen)(s->k, type, k0 + l * s->k_stride[2], dim, 1.0f, row);
        for (int j = 0; j < side; j++) {
            float dot = 0;
            if (seen[j]) {
#pragma omp simd reduction(+ : dot)
                for (int64_t d = 0; d < dim; d++) dot += q[j][d] * row[d];
                if (masked) dot += add[j];
                top[j] = dot > top[j] || dot != dot ? dot : top[j];
            }
            scores[j * s->length + l] = seen[j] ? dot : -INFINITY;
        }
    }
    for (int j = 0; j < side; j++) {
        float *w = scores + j * s->length, total = 0;
        const float most = top[j] == -INFINITY ? 0 : top[j];
#pragma omp simd reduction(+ : total)
        for (int64_t l = 0; l < s->length; l++) {
            w[l] = qk_exp(w[l] - most);
            total += w[l];
        }
        sum[j] = total;
    }
    for (int64_t l = 0; l < s->length; l++) {
        int any = !masked;
        for (int j = 0; j < side && masked; j++) any |= scores[j * s->length + l] != 0;
        if (!any) continue;
        NAME(widen)(s->v, type, v0 + l * s->v_stride[2], wide, 1.0f, row);
        for (int j = 0; j < side; j++) {
            const float w = scores[j * s->length + l];
            for (int64_t d = 0; d < wide; d++) y[j][d] += w * row[d];
        }
    }
    for (int j = 0; j < side; j++) {
        const float over = sum[j] == 0 ? 0 : 1 / sum[j];
        const int64_t at = (b * s->heads + h + j) * wide;
        for (int64_t d = 0; d < wide; d++) qk_write(s->y, type, at + d, y[j][d] * over);
    }
}

#define FIXED_CASE(SIDE, DIM)                                                          \
    case SIDE: NAME(heads)(s, b, h, SIDE, type, DIM, DIM, 0, scores); return;

/* The same for what is common: heads of 64 or 128 features, up to four of them, no mask. */
QK_INLINE void NAME(typed)(const qk_step *s, int64_t b, int64_t h, int side, const int type,
                           float *scores) {
    if (!s->mask && s->dim == 64 && s->value_dim == 64) switch (side) {
            FIXED_CASE(1, 64)
            FIXED_CASE(2, 64)
            FIXED_CASE(3, 64)
            FIXED_CASE(4, 64)
        }
    if (!s->mask && s->dim == 128 && s->value_dim == 128) switch (side) {
            FIXED_CASE(1, 128)
            FIXED_CASE(2, 128)
        }
    NAME(heads)(s, b, h, side, type, s->dim, s->value_dim, 1, scores);
}

void NAME(qk_step_heads)(const qk_step *s, int64_t from, int64_t to, float *scores) {
    const int64_t repeat = s->heads / s->kv_heads;
    for (int64_t at = from, side; at < to; at += side) {
        const int64_t b = at / s->heads, h = at % s->heads;
        /* as many as share keys with this one */
        side = qk_min(qk_min(repeat - h % repeat, to - at), MAX_SIDE);
        if (s->type == QK_BF16) NAME(typed)(s, b, h, (int)side, QK_BF16, scores);
        else NAME(typed)(s, b, h, (int)side, QK_F16, scores);
    }
}

int NAME(qk_step)(const qk_step *s, int64_t threads) {
    const int64_t repeat = s->heads / s->kv_heads;
    /* as many heads at a time as share keys, but no fewer tasks than threads */
    int64_t side = qk_min(repeat, MAX_SIDE);
    while (side > 1 && s->batch * s->kv_heads * (repeat / side) < threads) side--;
    while (repeat % side) side--;
    const int64_t tasks = s->batch * s->heads / side;
    if (s->batch * s->heads * s->length * s->dim < 1 << 15) threads = 1;
    threads = qk_min(threads, tasks);
    const int64_t own = qk_div_up(side * s->length * (int64_t)sizeof(float), 64) * 64;
    char *scratch = qk_alloc(own * threads);
    if (!scratch) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; task++) {
        const int64_t b = task * side / s->heads, h = task * side % s->heads;
        float *scores = (float *)(scratch + own * omp_get_thread_num());
        if (s->type == QK_BF16) NAME(typed)(s, b, h, (int)side, QK_BF16, scores);
        else NAME(typed)(s, b, h, (int)side, QK_F16, scores);
    }
    free(scratch);
    return 0;
}
