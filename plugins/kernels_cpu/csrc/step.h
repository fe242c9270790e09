/* One decode step of attention, shared with Python (attention.py packs it as 64-bit words). Strides
 * are in elements; q [batch, heads, dim], k [batch, kv_heads, length, dim], v likewise with
 * value_dim, mask [batch, heads, length] or NULL; y [batch, heads, value_dim], dense. */
#ifndef QK_STEP_H
#define QK_STEP_H

#include "qk.h"

typedef struct {
    const void *q, *k, *v, *mask;
    void *y;
    int64_t type, mask_type; /* QK_U8: a mask of bytes, 0 = left out; else numbers that are added */
    int64_t batch, heads, kv_heads, length, dim, value_dim;
    int64_t q_stride[2], k_stride[3], v_stride[3], mask_stride[3];
    double scale;
    int64_t isa;
} qk_step;

int qk_step_avx2(const qk_step *, int64_t threads);
int qk_step_avx512(const qk_step *, int64_t threads);

/* Heads [from, to) of all sequences' heads in a row; `scores`: qk_step_room numbers. */
void qk_step_heads_avx2(const qk_step *, int64_t from, int64_t to, float *scores);
void qk_step_heads_avx512(const qk_step *, int64_t from, int64_t to, float *scores);

#define MAX_SIDE 8 /* query heads at a time */
static inline int64_t qk_step_room(int64_t length) { return MAX_SIDE * length; }

#endif
