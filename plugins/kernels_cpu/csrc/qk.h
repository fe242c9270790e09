/* What every translation unit shares: the operation, its tensors, one block's view of them.
 *
 * Packed weights lie in blocks of 32 output rows. One block of 4-bit codes (per = 8 codes of one
 * row in 32 bits) or 8-bit codes (per = 4):
 *
 *     [K / per][32 rows][4 bytes]
 *
 *     4 bits   low 16 bits: k = 0 2 4 6, high 16 bits: k = 1 3 5 7 (lowest nibble first), so that
 *              a shift by 4 j leaves the pair (2 j, 2 j + 1) at the bottom of both halves
 *     8 bits   the four bytes are k = 0 1 2 3, two's complement
 *
 * Every factor, zero point and offset lies as [block][group][32 rows] in its stored type.
 */
#ifndef QK_H
#define QK_H

#include <stdint.h>

#define QK_ROWS 32

enum { QK_NONE, QK_F32, QK_F16, QK_BF16, QK_U8, QK_I8, QK_TABLE, QK_SINGLE, QK_DIVISOR, QK_E8M0, QK_E4M3 };
enum { QK_OWN_TABLE = 1, QK_CODEBOOK }; /* qk_op.lut */
enum { QK_ZERO_FOLDED, QK_ZERO_CONST, QK_ZERO_CODE, QK_ZERO_OFFSET, QK_ZERO_FLOAT };

/* One factor of a scale or an offset. `group` is in columns, `table` decodes the bytes of QK_TABLE,
 * QK_E8M0 (exponents) and QK_E4M3 (floats), of which vector kernels need no table for the last two;
 * QK_SINGLE is one float32 for the whole matrix, QK_DIVISOR one whose inverse is the factor. */
typedef struct {
    int64_t type, group;
    const float *table;
} qk_factor;

/* 8-bit floats with a sign bit. `((int16)(code << 8) >> shift) & mask` are the bits of a float16 that is
 * the value times 1 / unit, a power of two. Where that has no room for the largest exponent (`wide`; unit is 1):
 * `((code << 24) >> (shift + 3) & wide_mask) + wide_base`, without signs, are the bits of a float32 that is
 * the value or, for a subnormal, the mean of it and 2 least. high and low are the bytes of each magnitude
 * as bfloat16. */
typedef struct {
    float values[256], unit, least;
    int32_t shift, mask, wide, wide_mask, wide_base;
    uint8_t high[128], low[128];
} qk_float8;

/* Fixed for one operation; filled by descriptor.py, which mirrors this struct.
 * A packed code stands for value(code) - bias; `shift` is what is left to subtract (const).
 * `zero_type` is that of QK_ZERO_FLOAT. With QK_OWN_TABLE 4-bit codes are no integers less
 * a bias, but what `table` says; with QK_CODEBOOK the tensor `codebook` takes its place;
 * `float8` is NULL but for 8-bit floats. */
typedef struct {
    int64_t n, k, k_in, width, group, zero_kind, zero_type, bias_type, lut;
    const qk_float8 *float8;
    qk_factor scale[2], offset[2];
    float table[16];
    float bias, shift;
    int64_t order, block, at, head; /* where codes lie in files (stored.h); 0: in blocks of 32 rows */
} qk_op;

typedef struct {
    const void *codes, *scales[2];
    union { /* a table of 16 float32 has no zero points */
        const void *zeros;
        const float *codebook;
    };
    const void *offset[2], *gather, *bias;
} qk_tensors;

/* Rows [start, start + count) of x belong to `expert`. */
typedef struct {
    int64_t expert, start, count;
} qk_segment;

/* What Python packs for one call; descriptor.py writes it as 64-bit words (CALL). */
typedef struct {
    const qk_op *op;
    qk_tensors tensors;
    const void *x;
    int64_t xtype;
    void *y;
    int64_t isa; /* at most qk_isa() */
    const qk_segment *segments; /* NULL: one matrix and `count` tokens */
    int64_t count;
} qk_call;

/* y = x W^T + bias for the tokens of every segment; x and y are row-major of type `xtype`.
 * Returns 0, or 1 when memory for scratch is not there. */
typedef int qk_linear_fn(const qk_op *, const qk_tensors *, const void *x, int64_t xtype, void *y,
                         const qk_segment *, int64_t segments, int64_t threads);

qk_linear_fn qk_linear_avx2, qk_linear_avx512, qk_linear_bf16, qk_linear_w4a8;
qk_linear_fn qk_linear_avx2_lookup, qk_linear_avx2_float8, qk_linear_avx512_float8, qk_linear_bf16_float8;
qk_linear_fn qk_linear_amx, qk_linear_amx_float8;

/* `n` layers of one x: every call names the same x, type and count (at most `qk_most_shared`) and
 * no segments. Each y is what its own call of `qk_linear` gives, bit for bit. */
typedef int qk_shared_fn(const qk_call *, int64_t n, int64_t threads);

qk_shared_fn qk_shared_avx2, qk_shared_avx512, qk_shared_bf16;
qk_shared_fn qk_shared_avx2_lookup, qk_shared_avx2_float8, qk_shared_avx512_float8, qk_shared_bf16_float8;
/* One thread's share of a shared call: blocks [from, to) of all layers' blocks in a row. */
typedef int qk_part_fn(const qk_call *, int64_t n, int64_t from, int64_t to);

qk_part_fn qk_part_avx2, qk_part_avx512, qk_part_bf16;
qk_part_fn qk_part_avx2_lookup, qk_part_avx2_float8, qk_part_avx512_float8, qk_part_bf16_float8;

/* The part function of the unit that runs all of them as one shared call; NULL where none does, or
 * only as a whole. */
qk_part_fn *qk_part_of(const qk_call *calls, int64_t n);

int64_t qk_most_shared_avx2(void), qk_most_shared_avx512(void), qk_most_shared_bf16(void);
int64_t qk_most_shared_avx2_float8(void), qk_most_shared_avx512_float8(void);
int64_t qk_most_shared_bf16_float8(void), qk_most_shared_avx2_lookup(void);

static inline int64_t qk_div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t qk_min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t qk_size(int64_t type) {
    if (type == QK_F32 || type == QK_SINGLE || type == QK_DIVISOR) return 4;
    return type == QK_F16 || type == QK_BF16 ? 2 : type == QK_NONE ? 0 : 1;
}
static inline int64_t qk_blocks(const qk_op *op) { return qk_div_up(op->n, QK_ROWS); }

/* Bytes that one expert takes of a factor's buffer. */
static inline int64_t qk_factor_bytes(const qk_op *op, const qk_factor *f) {
    if (f->type == QK_SINGLE || f->type == QK_DIVISOR) return 4;
    return qk_blocks(op) * qk_div_up(op->k, f->group) * QK_ROWS * qk_size(f->type);
}

/* The tensors of one expert. */
static inline qk_tensors qk_expert(const qk_op *op, const qk_tensors *t, int64_t e) {
    qk_tensors v = *t;
    if (e == 0) return v;
    v.codes = (const uint8_t *)t->codes + e * qk_blocks(op) * QK_ROWS * op->k * op->width / 8;
    for (int i = 0; i < 2; i++) {
        if (op->scale[i].type)
            v.scales[i] = (const uint8_t *)t->scales[i] + e * qk_factor_bytes(op, &op->scale[i]);
        if (op->offset[i].type)
            v.offset[i] = (const uint8_t *)t->offset[i] + e * qk_factor_bytes(op, &op->offset[i]);
    }
    if (op->zero_kind == QK_ZERO_CODE || op->zero_kind == QK_ZERO_FLOAT) {
        const int64_t bytes = op->zero_kind == QK_ZERO_CODE ? 1 : qk_size(op->zero_type);
        const int64_t grid = qk_blocks(op) * qk_div_up(op->k, op->group) * QK_ROWS;
        v.zeros = (const uint8_t *)t->zeros + e * grid * bytes;
    } /* a codebook is that of all experts */
    if (t->gather) v.gather = (const int32_t *)t->gather + e * op->k;
    if (t->bias) v.bias = (const uint8_t *)t->bias + e * op->n * qk_size(op->bias_type);
    return v;
}

/* The values of 4-bit codes. */
static inline const float *qk_table(const qk_op *op, const qk_tensors *t) {
    return op->lut == QK_CODEBOOK ? t->codebook : op->table;
}

/* Scalar readings; the callers are compiled with F16C. */
static inline float qk_from_bf16(uint16_t u) {
    union { uint32_t i; float f; } v = {(uint32_t)u << 16};
    return v.f;
}
static inline uint16_t qk_to_bf16(float f) { /* to nearest even; NaN stays NaN */
    union { float f; uint32_t i; } v = {f};
    if (f != f) return (uint16_t)((v.i >> 16) | 0x40);
    return (uint16_t)((v.i + 0x7fff + ((v.i >> 16) & 1)) >> 16);
}

#endif
