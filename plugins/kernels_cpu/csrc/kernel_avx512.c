/* float32 activations (others are widened), AVX-512F: codes become float32 by a 16-entry lookup. */
#include "common.h"
#include "vec512.h"

#define NAME(f) f##_avx512
#define KP 1
#define XTYPE QK_F32

typedef float xelem;
typedef __m512 vp;
typedef __m512 code_table;

#define load_panel(p) _mm512_load_ps(p)
#define store_panel(p, v) _mm512_store_ps(p, v)
#define bcast(x) _mm512_set1_ps(*(x))
#define mac(acc, c, x) _mm512_fmadd_ps(c, x, acc)

QK_INLINE code_table make_table(const qk_op *op) { return _mm512_loadu_ps(op->table); }

/* Column s of 8: the lookup reads the low four bits of a lane and ignores the rest. */
QK_INLINE vp code4(vi v, int s, code_table table) {
    const int shift = 4 * (s / 2) + 16 * (s % 2);
    return _mm512_permutexvar_ps(shift ? _mm512_srli_epi32(v, shift) : v, table);
}

QK_INLINE vp code8(vi v, int s) { return qk_signed_byte(v, s); }

static float x_sum(const float *x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
    return _mm512_reduce_add_ps(sum);
}

#define fill_row(x, xtype, row, op, gather, out) \
    qk_token_f32(x, xtype, row, op, (const int32_t *)(gather), out)

#include "kernel.h"
