/* bfloat16 activations, AVX512-BF16: codes become pairs of bfloat16, exact for every code value
 * the caller lets through; products are exact and accumulated in float32 (vdpbf16ps). The
 * instruction reads subnormals as zero. With QK_AMX: many tokens by matrix units, which do the same.
 * With QK_FLOAT8: 8-bit floats by AVX512-VBMI, two lookups of 128 bytes. */
#include "common.h"
#include "vec512.h"

#if defined(QK_FLOAT8) && defined(QK_AMX)
#define NAME(f) f##_amx_float8
#elif defined(QK_FLOAT8)
#define NAME(f) f##_bf16_float8
#elif defined(QK_AMX)
#define NAME(f) f##_amx
#else
#define NAME(f) f##_bf16
#endif
#define KP 2
#define XTYPE QK_BF16

typedef uint16_t xelem;
typedef __m512i vp; /* 16 rows x (k, k + 1) */
#ifdef QK_FLOAT8
typedef struct {
    __m512i high[2], low[2]; /* bytes of the bfloat16 of each magnitude */
} code_table;
#else
typedef struct {
    __m512i pairs; /* bfloat16 values, twice: the lookup may ignore all but four index bits */
    __m512 wide;   /* float32 values */
} code_table;
#endif

#define load_panel(p) _mm512_load_si512(p)
#define store_panel(p, v) _mm512_store_si512(p, v)
#define mac(acc, c, x) _mm512_dpbf16_ps(acc, (__m512bh)(c), (__m512bh)(x))

QK_INLINE vp bcast(const uint16_t *x) {
    int pair;
    memcpy(&pair, x, sizeof pair);
    return _mm512_set1_epi32(pair);
}

#ifdef QK_FLOAT8

static inline code_table make_table(const qk_op *op, const qk_tensors *t) {
    const uint8_t *high = op->float8->high, *low = op->float8->low;
    (void)t;
    return (code_table){{_mm512_loadu_si512(high), _mm512_loadu_si512(high + 64)},
                        {_mm512_loadu_si512(low), _mm512_loadu_si512(low + 64)}};
}

/* Columns (2 s, 2 s + 1) of 4; what does not depend on `s` is computed once. */
QK_INLINE vp code8(vi v, int s, code_table t) {
    const __m512i sign = _mm512_and_si512(v, _mm512_set1_epi8((char)0x80));
    const __m512i high = _mm512_or_si512(sign, _mm512_permutex2var_epi8(t.high[0], v, t.high[1]));
    const __m512i low = _mm512_permutex2var_epi8(t.low[0], v, t.low[1]);
    const __m128i even = _mm_set_epi8(13, 13, 12, 12, 9, 9, 8, 8, 5, 5, 4, 4, 1, 1, 0, 0);
    const __m512i at = _mm512_broadcast_i32x4(_mm_add_epi8(even, _mm_set1_epi8((char)(2 * s))));
    return _mm512_mask_blend_epi8(0xAAAAAAAAAAAAAAAA, _mm512_shuffle_epi8(low, at),
                                  _mm512_shuffle_epi8(high, at));
}

#define code4(v, s, table) code8(v, s, table) /* never run */
#define shifted_code(v, s, table, width, shift) ((void)(shift), code8(v, s, table))

#else

static inline code_table make_table(const qk_op *op, const qk_tensors *tensors) {
    const float *values = qk_table(op, tensors);
    uint16_t t[32];
    for (int i = 0; i < 32; i++) t[i] = qk_to_bf16(values[i % 16]);
    return (code_table){_mm512_loadu_si512(t), _mm512_loadu_ps(values)};
}

/* Columns (2 s, 2 s + 1) of 8. */
QK_INLINE vp code4(vi v, int s, code_table table) {
    return _mm512_permutexvar_epi16(s ? _mm512_srli_epi16(v, 4 * s) : v, table.pairs);
}

/* Integers of up to 9 bits leave the low half of a float32 zero. */
QK_INLINE vp pair(__m512 even, __m512 odd) {
    return _mm512_or_si512(_mm512_castps_si512(odd),
                           _mm512_srli_epi32(_mm512_castps_si512(even), 16));
}

/* Columns (2 s, 2 s + 1) of 4. */
QK_INLINE vp code8(vi v, int s, code_table table) {
    (void)table;
    return pair(qk_signed_byte(v, 2 * s), qk_signed_byte(v, 2 * s + 1));
}

QK_INLINE vp shifted_code(vi v, int s, code_table table, int width, vf shift) {
    const __m512 even = width == 8 ? qk_signed_byte(v, 2 * s)
                                   : _mm512_permutexvar_ps(_mm512_srli_epi32(v, 4 * s), table.wide);
    const __m512 odd =
        width == 8 ? qk_signed_byte(v, 2 * s + 1)
                   : _mm512_permutexvar_ps(_mm512_srli_epi32(v, 16 + 4 * s), table.wide);
    return pair(_mm512_add_ps(even, shift), _mm512_add_ps(odd, shift));
}

#endif

static float x_sum(const uint16_t *x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, load_bf16(x + i));
    return _mm512_reduce_add_ps(sum);
}

static inline void fill_row(const void *x, int64_t xtype, int64_t row, const qk_op *op,
                            const void *gather, uint16_t *out) {
    const uint16_t *from = (const uint16_t *)x + row * op->k_in;
    const int32_t *g = gather;
    (void)xtype; /* always bfloat16 here */
    for (int64_t i = 0; i < op->k; i++) out[i] = g[i] < 0 ? 0 : from[g[i]];
}

#include "kernel.h"
