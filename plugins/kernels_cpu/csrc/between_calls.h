/* What Python packs for the operations between linear layers (between.py, block.py), as 64-bit
 * words. Strides are in elements; the last axis of every tensor is dense. */
#ifndef QK_BETWEEN_CALLS_H
#define QK_BETWEEN_CALLS_H

#include "qk.h"

enum { QK_ROUND_LAST = 1, QK_UNIT_OFFSET = 2 }; /* forms of a norm */
enum { QK_SILU, QK_GELU_TANH };

/* y = norm(x) * weight, or of sum = x + delta. All of one type; rows of k numbers. */
typedef struct {
    const void *weight, *x, *delta;
    void *sum, *y;
    int64_t type, form, rows, k;
    double eps;
    int64_t isa;
} qk_norm;

/* y = act(gate) * up */
typedef struct {
    const void *gate, *up;
    void *y;
    int64_t type, act, count, isa;
} qk_gate;

/* y = x turned by the angles; x [batch, heads, tokens, dim], cos and sin [batch, tokens, rotated] */
typedef struct {
    const void *x, *cos, *sin;
    void *y;
    int64_t type, batch, heads, tokens, dim, rotated;
    int64_t x_stride[3], y_stride[3], angle_stride[2];
    int64_t isa;
} qk_rotate;

/* down(act(gate(x)) * up(x)): `calls` are gate, up, down (`sides` 2), or one layer of both, whose
 * first half is gate, or up where `up_first`, and down (`sides` 1); without x, y, type and count. */
typedef struct {
    const qk_call *calls;
    const void *x;
    void *y;
    int64_t type, act, count, sides, up_first, isa;
} qk_mlp;

/* A decoder layer for one token a sequence; `calls` are q, k, v (`qkv` 3) or one layer of all three
 * behind each other (1), then o, then those of the MLP. `norm` are those of the branches, then those
 * of each head of queries and of keys, or NULL. The new token's key and value are written to position
 * *at, or length - 1 where `at` is NULL. */
typedef struct {
    const qk_call *calls;
    const void *norm[4], *x, *cos, *sin, *mask;
    void *keys, *values, *y;
    const int64_t *at;
    int64_t type, mask_type, act, form[4], qkv, sides, up_first;
    int64_t batch, heads, kv_heads, length, dim, rotated;
    int64_t k_stride[3], v_stride[3], mask_stride[3], angle_stride;
    double scale, eps[4];
    int64_t isa;
} qk_block;

/* `n` layers, each on the y of the one before: of all but the first x, and of all but the last y, is
 * not looked at. They agree in all but calls, norms, eps, cache, mask and position. 0, or why
 * nothing was computed: 1 for want of memory, or QK_OUTSIDE. */
int qk_decoder_blocks(const qk_block *, int64_t n);
int qk_decoder_block(const qk_block *);
enum { QK_OUTSIDE = 2 }; /* the position lies outside of the cache */

/* Parts of the calls below, by the calling thread; `room`: 2 k numbers. */
void qk_norm_rows_avx2(const qk_norm *, float *room), qk_norm_rows_avx512(const qk_norm *, float *room);
void qk_gate_some_avx2(const qk_gate *, int64_t, int64_t), qk_gate_some_avx512(const qk_gate *, int64_t, int64_t);
void qk_rotate_some_avx2(const qk_rotate *, int64_t, int64_t);
void qk_rotate_some_avx512(const qk_rotate *, int64_t, int64_t);

int qk_norm_avx2(const qk_norm *, int64_t threads);
int qk_norm_avx512(const qk_norm *, int64_t threads);
void qk_gate_avx2(const qk_gate *, int64_t threads), qk_gate_avx512(const qk_gate *, int64_t threads);
void qk_rotate_avx2(const qk_rotate *, int64_t), qk_rotate_avx512(const qk_rotate *, int64_t);
void qk_add_avx2(const void *, const void *, void *, int64_t type, int64_t count);
void qk_add_avx512(const void *, const void *, void *, int64_t type, int64_t count);

#endif
