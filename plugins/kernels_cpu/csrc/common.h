/* Pieces of a linear kernel that no vector width changes: reading x, storing y. Needs F16C. */
#ifndef QK_COMMON_H
#define QK_COMMON_H

#include <immintrin.h>
#include <stdlib.h>
#include <string.h>

#include "qk.h"

#define QK_INLINE static inline __attribute__((always_inline))

QK_INLINE float qk_read(const void *p, int64_t type, int64_t i) {
    if (type == QK_F32) return ((const float *)p)[i];
    if (type == QK_F16) return _cvtsh_ss(((const uint16_t *)p)[i]);
    return qk_from_bf16(((const uint16_t *)p)[i]);
}

QK_INLINE void qk_write(void *p, int64_t type, int64_t i, float f) {
    if (type == QK_F32) ((float *)p)[i] = f;
    else if (type == QK_F16) ((uint16_t *)p)[i] = _cvtss_sh(f, 0);
    else ((uint16_t *)p)[i] = qk_to_bf16(f);
}

/* `count` finished outputs of one token: add the bias, round to the type of y. */
static inline void qk_store(const float *acc, int64_t count, const void *bias, int64_t bias_type,
                            void *y, int64_t type, int64_t at, int64_t column) {
    float v[QK_ROWS];
    memcpy(v, acc, sizeof v);
    if (bias)
        for (int64_t i = 0; i < count; i++) v[i] += qk_read(bias, bias_type, column + i);
    if (type == QK_F32) memcpy((float *)y + at, v, count * sizeof(float));
    else if (type == QK_F16)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)y)[at + i] = _cvtss_sh(v[i], 0);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)y)[at + i] = qk_to_bf16(v[i]);
}

/* One token as float32 in stored column order: gathered, -1 gives zero. */
static inline void qk_token_f32(const void *x, int64_t type, int64_t row, const qk_op *op,
                                const int32_t *gather, float *out) {
    const int64_t at = row * op->k_in;
    if (gather)
        for (int64_t i = 0; i < op->k; i++)
            out[i] = gather[i] < 0 ? 0.0f : qk_read(x, type, at + gather[i]);
    else if (type == QK_F32)
        memcpy(out, (const float *)x + at, op->k * sizeof(float));
    else if (type == QK_F16)
        for (int64_t i = 0; i < op->k; i++) out[i] = _cvtsh_ss(((const uint16_t *)x)[at + i]);
    else
        for (int64_t i = 0; i < op->k; i++) out[i] = qk_from_bf16(((const uint16_t *)x)[at + i]);
}

static inline void *qk_alloc(int64_t bytes) {
    void *p = NULL;
    return posix_memalign(&p, 64, bytes ? (size_t)bytes : 64) ? NULL : p;
}

#endif
