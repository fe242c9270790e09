/* float32 activations (others are widened), AVX2 + FMA + F16C. Codes are converted as integers; with
 * QK_LOOKUP those of 4 bits are looked up in a table of 16. With QK_FLOAT8: 8-bit floats. */
#include "common.h"

#ifdef QK_FLOAT8
#define NAME(f) f##_avx2_float8
#elif defined(QK_LOOKUP)
#define NAME(f) f##_avx2_lookup
#else
#define NAME(f) f##_avx2
#endif
#define VW 8
#define NV 4
#define MAX_TILE 3
#define SHORT_TILE 3 /* no room to keep outputs */
#define MAX_DECODE 3
#define PARTS(tokens) ((tokens) == 1 ? 2 : 1)
#define KP 1
#define XTYPE QK_F32

typedef float xelem;
typedef __m256 vf;
typedef __m256i vi;
typedef __m256 vp;

#define vzero() _mm256_setzero_ps()
#define vset(f) _mm256_set1_ps(f)
#define vadd(a, b) _mm256_add_ps(a, b)
#define vsub(a, b) _mm256_sub_ps(a, b)
#define vmul(a, b) _mm256_mul_ps(a, b)
#define vfma(a, b, c) _mm256_fmadd_ps(a, b, c)
#define vload(p) _mm256_loadu_ps(p)
#define vstore(p, v) _mm256_storeu_ps(p, v)
#define vload_codes(p) _mm256_loadu_si256((const __m256i *)(p))
#define load_panel(p) _mm256_load_ps((const float *)(p))
#define store_panel(p, v) _mm256_store_ps((float *)(p), v)
#define bcast(x) _mm256_set1_ps(*(x))
#define mac(acc, c, x) _mm256_fmadd_ps(c, x, acc)

#define load_f16(p) _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p)))
#define load_bf16(p)                                             \
    _mm256_castsi256_ps(_mm256_slli_epi32(                       \
        _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(p))), 16))
#define load_u8(p) \
    _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define load_i8(p) \
    _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define load_e8m0(p) qk_power(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))))
#define load_table(table, p) \
    _mm256_i32gather_ps(table, _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(p))), 4)

/* 2^(e - 127): the exponent of a float32, but for 0, a subnormal, and 255, not a number. */
QK_INLINE vf qk_power(__m256i e) {
    const __m256i half = _mm256_set1_epi32(0x400000);
    const __m256i bits = _mm256_max_epi32(_mm256_slli_epi32(e, 23), half);
    const __m256i none = _mm256_cmpeq_epi32(e, _mm256_set1_epi32(255));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_and_si256(none, half)));
}

/* fp8 e4m3 as float16 less 2^8: a fraction of what a gather from a table takes. */
QK_INLINE vf qk_e4m3(__m128i codes) {
    const __m128i bits = _mm_srai_epi16(_mm_unpacklo_epi8(_mm_setzero_si128(), codes), 1);
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_and_si128(bits, _mm_set1_epi16((int16_t)0xBF80))),
                         _mm256_set1_ps(0x1p8f));
}
#define load_e4m3(p) qk_e4m3(_mm_loadl_epi64((const __m128i *)(p)))

#ifdef QK_FLOAT8

typedef struct {
    __m128i shift;
    __m256i mask;
    __m256 unit;
    int wide;
    __m128i wide_shift;
    __m256i wide_mask, wide_base;
    __m256 least;
} code_table;

static inline code_table make_table(const qk_op *op, const qk_tensors *t) {
    const qk_float8 *f = op->float8;
    (void)t;
    return (code_table){_mm_cvtsi32_si128(f->shift), _mm256_set1_epi16((int16_t)f->mask), _mm256_set1_ps(f->unit),
                        f->wide, _mm_cvtsi32_si128(f->shift + 3), _mm256_set1_epi32(f->wide_mask),
                        _mm256_set1_epi32(f->wide_base), _mm256_set1_ps(f->least)};
}

/* As in kernel_avx512.c, eight rows at a time. */
QK_INLINE __m256i halves(__m256i v, int odd, code_table t) {
    const __m128i at = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    const __m256i apart = _mm256_shuffle_epi8(v, _mm256_broadcastsi128_si256(at));
    const __m256i words = _mm256_permute4x64_epi64(apart, 0xD8);
    return _mm256_and_si256(_mm256_sra_epi16(odd ? words : _mm256_slli_epi16(words, 8), t.shift), t.mask);
}

QK_INLINE vp wide_code(vi v, int s, code_table t) {
    const __m256i top = _mm256_slli_epi32(v, 24 - 8 * s);
    const __m256i bits = _mm256_and_si256(_mm256_srl_epi32(top, t.wide_shift), t.wide_mask);
    const __m256 f = _mm256_castsi256_ps(_mm256_add_epi32(bits, t.wide_base));
    const __m256 value = _mm256_min_ps(f, _mm256_mul_ps(_mm256_sub_ps(f, t.least), _mm256_set1_ps(2)));
    return _mm256_or_ps(value, _mm256_and_ps(_mm256_castsi256_ps(top), _mm256_set1_ps(-0.0f)));
}

QK_INLINE vp code8_less(vi v, int s, code_table t) {
    const __m256i h = halves(v, s % 2, t); /* once for two columns, so before the branch */
    if (__builtin_expect(t.wide, 0)) return wide_code(v, s, t);
    return _mm256_cvtph_ps(s < 2 ? _mm256_castsi256_si128(h) : _mm256_extracti128_si256(h, 1));
}

#define code_unit(table) (table).unit
#define code8(v, s, table) _mm256_mul_ps(code8_less(v, s, table), (table).unit)
#define code4(v, s, table) code8(v, s, table) /* never run */
#define shifted_code(v, s, table, width, shift) ((void)(shift), code8(v, s, table))

#elif defined(QK_LOOKUP)

typedef struct {
    __m256 low, high;
} code_table;

QK_INLINE code_table make_table(const qk_op *op, const qk_tensors *t) {
    const float *values = qk_table(op, t);
    return (code_table){_mm256_loadu_ps(values), _mm256_loadu_ps(values + 8)};
}

/* A permutation reads three bits of a lane; the fourth, brought to the top, picks the half. */
QK_INLINE vp code4(vi v, int s, code_table t) {
    const __m256i c = _mm256_srli_epi32(v, 4 * (s / 2) + 16 * (s % 2));
    const __m256 low = _mm256_permutevar8x32_ps(t.low, c), high = _mm256_permutevar8x32_ps(t.high, c);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(c, 28)));
}

#define code8(v, s, table) code4(v, s, table) /* never run */

QK_INLINE vp shifted_code(vi v, int s, code_table table, int width, vf shift) {
    (void)width;
    return _mm256_add_ps(code4(v, s, table), shift);
}

#else

typedef __m256 code_table;

QK_INLINE code_table make_table(const qk_op *op, const qk_tensors *t) {
    (void)t;
    return _mm256_set1_ps(op->bias);
}

QK_INLINE vp code4(vi v, int s, code_table bias) {
    const __m256i c = _mm256_srli_epi32(v, 4 * (s / 2) + 16 * (s % 2));
    return _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(c, _mm256_set1_epi32(15))), bias);
}

QK_INLINE vp code8(vi v, int s, code_table bias) {
    (void)bias;
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * s), 24));
}

QK_INLINE vp shifted_code(vi v, int s, code_table bias, int width, vf shift) {
    return _mm256_add_ps(width == 4 ? code4(v, s, bias) : code8(v, s, bias), shift);
}

#endif

static float x_sum(const float *x, int64_t n) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < n; i += 8) sum = _mm256_add_ps(sum, _mm256_loadu_ps(x + i));
    float part[8];
    _mm256_storeu_ps(part, sum);
    return ((part[0] + part[1]) + (part[2] + part[3])) + ((part[4] + part[5]) + (part[6] + part[7]));
}

#define fill_row(x, xtype, row, op, gather, out) \
    qk_token_f32(x, xtype, row, op, (const int32_t *)(gather), out)

#include "kernel.h"
