/* float32 activations (others are widened), AVX-512F: codes become float32 by a 16-entry lookup.
 * With QK_FLOAT8: 8-bit floats, whose bits are shifted into those of float16. */
#include "common.h"
#include "vec512.h"

#ifdef QK_FLOAT8
#define NAME(f) f##_avx512_float8
#else
#define NAME(f) f##_avx512
#endif
#define KP 1
#define AT_ONCE 4 /* 7 are slower than 4 and 3, by a fifth; those of 8 bits are not */
#define XTYPE QK_F32

typedef float xelem;
typedef __m512 vp;

#define load_panel(p) _mm512_load_ps(p)
#define store_panel(p, v) _mm512_store_ps(p, v)
#define bcast(x) _mm512_set1_ps(*(x))
#define mac(acc, c, x) _mm512_fmadd_ps(c, x, acc)

#ifdef QK_FLOAT8

typedef struct {
    __m128i shift;
    __m512i mask;
    __m512 unit;
    int wide;
    __m128i wide_shift;
    __m512i wide_mask, wide_base;
    __m512 least;
} code_table;

static inline code_table make_table(const qk_op *op, const qk_tensors *t) {
    const qk_float8 *f = op->float8;
    (void)t;
    return (code_table){_mm_cvtsi32_si128(f->shift), _mm512_set1_epi16((int16_t)f->mask), _mm512_set1_ps(f->unit),
                        f->wide, _mm_cvtsi32_si128(f->shift + 3), _mm512_set1_epi32(f->wide_mask),
                        _mm512_set1_epi32(f->wide_base), _mm512_set1_ps(f->least)};
}

/* All words of four columns as float16 less a power of two: column 0 (1) of the 16 rows, then 2 (3). */
QK_INLINE __m512i halves(__m512i v, int odd, code_table t) {
    const __m128i at = _mm_set_epi8(15, 14, 11, 10, 7, 6, 3, 2, 13, 12, 9, 8, 5, 4, 1, 0);
    const __m512i apart = _mm512_shuffle_epi8(v, _mm512_broadcast_i32x4(at));
    const __m512i words = _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), apart);
    return _mm512_and_si512(_mm512_sra_epi16(odd ? words : _mm512_slli_epi16(words, 8), t.shift), t.mask);
}

/* Exponents that float16 has no room for. What stands for a subnormal of magnitude m is least + m / 2;
 * twice that less 2 least is m, and more than the value of every other code. */
QK_INLINE vp wide_code(vi v, int s, code_table t) {
    const __m512i top = s == 3 ? v : _mm512_slli_epi32(v, 24 - 8 * s);
    const __m512i bits = _mm512_and_si512(_mm512_srl_epi32(top, t.wide_shift), t.wide_mask);
    const __m512 f = _mm512_castsi512_ps(_mm512_add_epi32(bits, t.wide_base));
    const __m512 value = _mm512_min_ps(f, _mm512_mul_ps(_mm512_sub_ps(f, t.least), _mm512_set1_ps(2)));
    const __m512i sign = _mm512_set1_epi32(INT32_MIN); /* value | top & sign */
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(value), top, sign, 0xF8));
}

/* Codes divided by `unit`. A float32 that is subnormal would cost a hundred cycles on Intel's processors,
 * and be zero where they are told so; a float16 does neither. */
QK_INLINE vp code8_less(vi v, int s, code_table t) {
    const __m512i h = halves(v, s % 2, t); /* once for two columns, so before the branch */
    if (__builtin_expect(t.wide, 0)) return wide_code(v, s, t);
    return _mm512_cvtph_ps(s < 2 ? _mm512_castsi512_si256(h) : _mm512_extracti64x4_epi64(h, 1));
}

#define code_unit(table) (table).unit
#define code8(v, s, table) _mm512_mul_ps(code8_less(v, s, table), (table).unit)
#define code4(v, s, table) code8(v, s, table) /* never run */
#define shifted_code(v, s, table, width, shift) ((void)(shift), code8(v, s, table))

#else

typedef __m512 code_table;

QK_INLINE code_table make_table(const qk_op *op, const qk_tensors *t) {
    return _mm512_loadu_ps(qk_table(op, t));
}

/* Column s of 8: the lookup reads the low four bits of a lane and ignores the rest. */
QK_INLINE vp code4(vi v, int s, code_table table) {
    const int shift = 4 * (s / 2) + 16 * (s % 2);
    return _mm512_permutexvar_ps(shift ? _mm512_srli_epi32(v, shift) : v, table);
}

QK_INLINE vp code8(vi v, int s, code_table table) {
    (void)table;
    return qk_signed_byte(v, s);
}

QK_INLINE vp shifted_code(vi v, int s, code_table table, int width, vf shift) {
    return _mm512_add_ps(width == 4 ? code4(v, s, table) : code8(v, s, table), shift);
}

#endif

static float x_sum(const float *x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
    return _mm512_reduce_add_ps(sum);
}

#define fill_row(x, xtype, row, op, gather, out) \
    qk_token_f32(x, xtype, row, op, (const int32_t *)(gather), out)

#include "kernel.h"
