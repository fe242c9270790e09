/* float32 activations (others are widened), AVX-512F: codes become float32 by a 16-entry lookup.
 * With QK_FLOAT8: 8-bit floats, whose bits are shifted into place. */
#include "common.h"
#include "vec512.h"

#ifdef QK_FLOAT8
#define NAME(f) f##_avx512_float8
#else
#define NAME(f) f##_avx512
#endif
#define KP 1
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
} code_table;

static inline code_table make_table(const qk_op *op, const qk_tensors *t) {
    const qk_float8 *f = op->float8;
    (void)t;
    return (code_table){_mm_cvtsi32_si128(f->shift), _mm512_set1_epi32(f->mask), _mm512_set1_ps(f->unit)};
}

/* Exact but where the processor is told to take subnormals for zero. */
QK_INLINE vp code8(vi v, int s, code_table t) {
    const __m512i bits = _mm512_sra_epi32(s == 3 ? v : _mm512_slli_epi32(v, 24 - 8 * s), t.shift);
    return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_and_si512(bits, t.mask)), t.unit);
}

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
