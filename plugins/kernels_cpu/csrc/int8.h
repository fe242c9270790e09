/* What the int8 units share with Python: one operation, one call, its activations as codes.
 *
 *     q = clamp(round(x / s + z))      half to even, in float32, as quant_core.kernels.activations
 *     y[m, n] = s_x[m] * sum over groups g of  s_w[n, g] * sum over k in g of (q - z) c[n, k]
 *
 * or, where the layer stores one combined scale: y = (sum of q c + acc_bias[n]) * out_scale[n].
 *
 * Weights are kept as u = c + 128 (unsigned bytes) in the 8-bit blocks of qk.h, so that activations
 * stay signed and what is too much needs only the sum of the token's own codes:
 *
 *     sum (q - z) c = sum q u - 128 sum q - z sum c
 *
 * Where the operation says so, codes lie as files store them instead: whole rows [N][K] of bytes, and
 * scales and sums [N][groups]. There are no experts then.
 *
 * All sums are exact in 32 bits (k <= 65536); the scales are applied in double, rounded once.
 */
#ifndef QK_INT8_H
#define QK_INT8_H

#include "qk.h"

enum { QK_INT8_BLOCKS, QK_INT8_SIGNED, QK_INT8_UNSIGNED }; /* rows of c, rows of u */

/* Fixed for one operation; descriptor.py mirrors this struct. `group` is k where one scale serves
 * the whole row; `input_type` is the float type of a stored activation scale, 0 = max|x| / peak;
 * `stored` is one of the above. */
typedef struct {
    int64_t n, k, group, scale_type, scale_single, bias_type, input_type, has_zero, stored;
    float peak, least, most, lowest, highest, unused;
} qk_int8_op;

typedef struct {
    const void *codes, *scales;
    const int32_t *sums; /* of c, in the order of scales; only with a zero point */
    const void *bias;
    const int32_t *acc_bias;
    const float *out_scale;
    const void *input_scale;
    const int8_t *input_zero;
} qk_int8_tensors;

typedef struct {
    const qk_int8_op *op;
    qk_int8_tensors tensors;
    const void *x;
    int64_t xtype;
    void *y;
    int64_t isa;
    const qk_segment *segments; /* NULL: one matrix and `count` tokens */
    int64_t count;
} qk_int8_call;

typedef int qk_int8_fn(const qk_int8_op *, const qk_int8_tensors *, const void *x, int64_t xtype,
                       void *y, const qk_segment *, int64_t segments, int64_t threads);

qk_int8_fn qk_w8a8_avx2, qk_w8a8_vnni, qk_w8a8_amx;

/* `n` layers of one x; see kernel_int8.h. */
typedef int qk_int8_shared_fn(const qk_int8_call *, int64_t n, int64_t threads);

qk_int8_shared_fn qk_w8a8_shared_avx2, qk_w8a8_shared_vnni, qk_w8a8_shared_amx;

/* The tensors of one expert. */
static inline qk_int8_tensors qk_int8_expert(const qk_int8_op *op, const qk_int8_tensors *t,
                                             int64_t e) {
    qk_int8_tensors v = *t;
    const int64_t rows = qk_div_up(op->n, QK_ROWS) * QK_ROWS;
    const int64_t grid = rows * qk_div_up(op->k, op->group), scales = op->scale_single ? 1 : grid;
    const int64_t input_bytes = qk_size(op->input_type);
    v.codes = (const uint8_t *)t->codes + e * rows * op->k;
    v.scales = (const uint8_t *)t->scales + e * scales * qk_size(op->scale_type);
    if (t->sums) v.sums += e * grid;
    if (t->bias) v.bias = (const uint8_t *)t->bias + e * op->n * qk_size(op->bias_type);
    if (t->acc_bias) v.acc_bias += e * op->n;
    if (t->out_scale) v.out_scale += e * op->n;
    if (t->input_scale) v.input_scale = (const uint8_t *)t->input_scale + e * input_bytes;
    if (t->input_zero) v.input_zero += e;
    return v;
}

#endif
