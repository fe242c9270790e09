/* What Python packs to round activations (rounding.py), as 64-bit words. The rules are those of core's
 * kernels/activations.py; kinds and factors are drawn in round.h. */
#ifndef QK_ROUND_CALLS_H
#define QK_ROUND_CALLS_H

#include "qk.h"

enum { QK_STORED, QK_FLOAT, QK_EXPONENT, QK_SMALL };                 /* kind of the finest scale */
enum { QK_NO_FACTOR, QK_FACTOR_STORED, QK_FACTOR_TOKEN, QK_FACTOR_TENSOR }; /* above it */
enum { QK_EVEN, QK_DOWN, QK_UP };

typedef struct {
    int64_t bits, exponent, minus_zero; /* of a float: fraction bits, least exponent; bits < 0: int */
    double low, high;
} qk_rounded;

typedef struct {
    int64_t kind, factor, inverse, factor_inverse, factor_plain, zero, ties, whole;
    qk_rounded code, scale; /* scale: of QK_SMALL */
    double peak, least, most, eps, factor_over;
} qk_rounding;

typedef struct {
    const qk_rounding *rule;
    const int32_t *steps; /* of QK_EXPONENT */
    const void *x;
    const float *stored, *zeros;
    void *y;
    int64_t type, rows, k, group, per_group, stride, isa; /* stride: of stored values, rows apart */
} qk_round_call;

/* 0, 1 without memory, 3 if x or a scale is not finite: then torch's operators must do it. */
int qk_round_avx2(const qk_round_call *, int64_t threads), qk_round_avx512(const qk_round_call *, int64_t);

#endif
