/* Arithmetic between linear layers: norms, gates, rotations. Included like attention.h, after it, by
 * a unit per instruction set; vectors are left to the compiler. Every result is rounded where
 * torch's own operators round; sums are float32. */
#include "between_calls.h"

QK_INLINE void NAME(wide)(const void *p, const int type, int64_t at, int64_t count, float *out) {
    if (type == QK_F32) memcpy(out, (const float *)p + at, count * sizeof(float));
    else if (type == QK_F16)
        for (int64_t i = 0; i < count; i++) out[i] = _cvtsh_ss(((const uint16_t *)p)[at + i]);
    else
        for (int64_t i = 0; i < count; i++) out[i] = qk_from_bf16(((const uint16_t *)p)[at + i]);
}

QK_INLINE float NAME(rounded)(float f, const int type) {
    if (type == QK_F32) return f;
    return type == QK_F16 ? _cvtsh_ss(_cvtss_sh(f, 0)) : qk_from_bf16(qk_to_bf16(f));
}

QK_INLINE void NAME(narrow)(const float *from, void *p, const int type, int64_t at, int64_t count) {
    if (type == QK_F32) memcpy((float *)p + at, from, count * sizeof(float));
    else if (type == QK_F16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)p)[at + i] = _cvtss_sh(from[i], 0);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)p)[at + i] = qk_to_bf16(from[i]);
}

/* a + b of two rows, rounded; `out` has the sum as float32 too. */
QK_INLINE void NAME(add_row)(const void *a, const void *b, void *sum, const int type, int64_t at,
                             int64_t count, float *out, float *scratch) {
    NAME(wide)(a, type, at, count, out);
    NAME(wide)(b, type, at, count, scratch);
    for (int64_t i = 0; i < count; i++) out[i] = NAME(rounded)(out[i] + scratch[i], type);
    NAME(narrow)(out, sum, type, at, count);
}

#define SUM_LANES 32 /* four vectors of eight */
#define SUM_LEVELS 4

/* The sum of x^2 in the order in which torch sums a row, so that a norm is torch's bit for bit: one
 * rounding that tips grows to tenths in the logits of a model in bfloat16. Lanes are summed apart,
 * every 2^p steps into the next level. Source: torch 2.13 aten/native/cpu/SumKernel.cpp. */
QK_INLINE float NAME(squares)(const float *x, int64_t k) {
    float acc[SUM_LEVELS][SUM_LANES] = {{0}};
    const int64_t steps = k / SUM_LANES, vectors = k / 8;
    int64_t bits = 0, power;
    while ((int64_t)1 << bits < steps) bits++;
    power = bits / SUM_LEVELS > 4 ? bits / SUM_LEVELS : 4;
    int64_t i = 0;
    while (i + ((int64_t)1 << power) <= steps) {
        for (int64_t j = 0; j < (int64_t)1 << power; j++, i++)
            for (int l = 0; l < SUM_LANES; l++) acc[0][l] += x[i * SUM_LANES + l] * x[i * SUM_LANES + l];
        for (int level = 1; level < SUM_LEVELS; level++) {
            for (int l = 0; l < SUM_LANES; l++) {
                acc[level][l] += acc[level - 1][l];
                acc[level - 1][l] = 0;
            }
            if (i & ((((int64_t)1 << power) - 1) << (level * power))) break;
        }
    }
    for (; i < steps; i++)
        for (int l = 0; l < SUM_LANES; l++) acc[0][l] += x[i * SUM_LANES + l] * x[i * SUM_LANES + l];
    for (int level = 1; level < SUM_LEVELS; level++)
        for (int l = 0; l < SUM_LANES; l++) acc[0][l] += acc[level][l];
    for (int64_t v = steps * 4; v < vectors; v++)
        for (int l = 0; l < 8; l++) acc[0][l] += x[v * 8 + l] * x[v * 8 + l];
    for (int part = 1; part < 4; part++)
        for (int l = 0; l < 8; l++) acc[0][l] += acc[0][part * 8 + l];
    float sum = 0;
    for (int64_t j = vectors * 8; j < k; j++) sum += x[j] * x[j];
    for (int l = 0; l < 8; l++) sum += acc[0][l];
    return sum;
}

QK_INLINE void NAME(norm_row)(const qk_norm *c, const int type, int64_t row, float *x, float *w) {
    const int64_t k = c->k, at = row * k;
    if (c->delta) NAME(add_row)(c->x, c->delta, c->sum, type, at, k, x, w);
    else NAME(wide)(c->x, type, at, k, x);
    const float over = 1.0f / sqrtf(NAME(squares)(x, k) / (float)k + (float)c->eps);
    const float one = c->form & QK_UNIT_OFFSET ? 1.0f : 0.0f;
    NAME(wide)(c->weight, type, 0, k, w);
    if (c->form & QK_ROUND_LAST)
        for (int64_t i = 0; i < k; i++) x[i] = (w[i] + one) * (x[i] * over);
    else
        for (int64_t i = 0; i < k; i++)
            x[i] = NAME(rounded)(w[i] + one, type) * NAME(rounded)(x[i] * over, type);
    NAME(narrow)(x, c->y, type, at, k);
}

QK_INLINE void NAME(norm_typed)(const qk_norm *c, int64_t row, float *room) {
    if (c->type == QK_F32) NAME(norm_row)(c, QK_F32, row, room, room + c->k);
    else if (c->type == QK_F16) NAME(norm_row)(c, QK_F16, row, room, room + c->k);
    else NAME(norm_row)(c, QK_BF16, row, room, room + c->k);
}

void NAME(qk_norm_rows)(const qk_norm *c, float *room) {
    for (int64_t row = 0; row < c->rows; row++) NAME(norm_typed)(c, row, room);
}

int NAME(qk_norm)(const qk_norm *c, int64_t threads) {
    int failed = 0;
    if (c->rows * c->k < 1 << 15) threads = 1;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        float *x = qk_alloc(2 * c->k * (int64_t)sizeof(float));
        failed |= x == NULL;
#pragma omp for schedule(static)
        for (int64_t row = 0; row < c->rows; row++)
            if (x) NAME(norm_typed)(c, row, x);
        free(x);
    }
    return failed;
}

#define GATE_STEP 512 /* features at a time: 4 KiB of float32 on the stack */

/* act(gate) * up; act(x) = x / (1 + e^-t), t = x for silu. e^-|t| is all that is needed of it. */
QK_INLINE void NAME(gate_part)(const qk_gate *c, const int type, const int tanh_form, int64_t at,
                               int64_t count) {
    float g[GATE_STEP], u[GATE_STEP];
    NAME(wide)(c->gate, type, at, count, g);
    NAME(wide)(c->up, type, at, count, u);
    for (int64_t i = 0; i < count; i++) {
        const float x = g[i];
        /* sqrt(8 / pi) (x + 0.044715 x^3): 1 + tanh z = 2 / (1 + e^-2z) */
        const float t = tanh_form ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
        const float e = qk_exp(-fabsf(t));
        const float act = x * (t < 0 ? e : 1.0f) / (1.0f + e);
        g[i] = NAME(rounded)(act, type) * u[i];
    }
    NAME(narrow)(g, c->y, type, at, count);
}

void NAME(qk_gate_some)(const qk_gate *c, int64_t from, int64_t to) {
    const int tanh_form = c->act == QK_GELU_TANH;
    for (int64_t at = from; at < to; at += GATE_STEP) {
        const int64_t count = qk_min(GATE_STEP, to - at);
        if (c->type == QK_F32) NAME(gate_part)(c, QK_F32, tanh_form, at, count);
        else if (c->type == QK_F16) NAME(gate_part)(c, QK_F16, tanh_form, at, count);
        else NAME(gate_part)(c, QK_BF16, tanh_form, at, count);
    }
}

void NAME(qk_gate)(const qk_gate *c, int64_t threads) {
    if (c->count < 1 << 15) threads = 1;
    const int64_t parts = qk_div_up(c->count, GATE_STEP);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t part = 0; part < parts; part++)
        NAME(qk_gate_some)(c, part * GATE_STEP, qk_min((part + 1) * GATE_STEP, c->count));
}

#define MAX_ROTATED 512

QK_INLINE void NAME(rotate_row)(const qk_rotate *c, const int type, int64_t from, int64_t to,
                                int64_t angle) {
    const int64_t r = c->rotated, half = r / 2;
    float x[MAX_ROTATED], cosine[MAX_ROTATED], sine[MAX_ROTATED], y[MAX_ROTATED];
    NAME(wide)(c->x, type, from, r, x);
    NAME(wide)(c->cos, type, angle, r, cosine);
    NAME(wide)(c->sin, type, angle, r, sine);
    for (int64_t i = 0; i < half; i++) {
        y[i] = NAME(rounded)(x[i] * cosine[i], type) - NAME(rounded)(x[i + half] * sine[i], type);
        y[i + half] = NAME(rounded)(x[i + half] * cosine[i + half], type) +
                      NAME(rounded)(x[i] * sine[i + half], type);
    }
    NAME(narrow)(y, c->y, type, to, r);
    const int64_t size = qk_size(type);
    memmove((char *)c->y + (to + r) * size, (const char *)c->x + (from + r) * size, (c->dim - r) * size);
}

/* Rows [from, to) of [batch, heads, tokens]. */
void NAME(qk_rotate_some)(const qk_rotate *c, int64_t from, int64_t to) {
    for (int64_t row = from; row < to; row++) {
        const int64_t t = row % c->tokens, h = row / c->tokens % c->heads;
        const int64_t b = row / c->tokens / c->heads;
        const int64_t at = b * c->x_stride[0] + h * c->x_stride[1] + t * c->x_stride[2];
        const int64_t into = b * c->y_stride[0] + h * c->y_stride[1] + t * c->y_stride[2];
        const int64_t angle = b * c->angle_stride[0] + t * c->angle_stride[1];
        if (c->type == QK_F32) NAME(rotate_row)(c, QK_F32, at, into, angle);
        else if (c->type == QK_F16) NAME(rotate_row)(c, QK_F16, at, into, angle);
        else NAME(rotate_row)(c, QK_BF16, at, into, angle);
    }
}

void NAME(qk_rotate)(const qk_rotate *c, int64_t threads) {
    const int64_t rows = c->batch * c->heads * c->tokens;
    if (rows * c->dim < 1 << 15) threads = 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) NAME(qk_rotate_some)(c, row, row + 1);
}

/* y = a + b, rounded; count numbers. */
void NAME(qk_add)(const void *a, const void *b, void *y, int64_t type, int64_t count) {
    float one[GATE_STEP], two[GATE_STEP];
    for (int64_t at = 0; at < count; at += GATE_STEP) {
        const int64_t n = qk_min(GATE_STEP, count - at);
        if (type == QK_F32) NAME(add_row)(a, b, y, QK_F32, at, n, one, two);
        else if (type == QK_F16) NAME(add_row)(a, b, y, QK_F16, at, n, one, two);
        else NAME(add_row)(a, b, y, QK_BF16, at, n, one, two);
    }
}
