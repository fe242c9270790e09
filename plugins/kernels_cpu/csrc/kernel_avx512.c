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

/* Blocks [block, block + blocks) as bfloat16 weights [k][blocks * 32], for a matmul of torch's own
 * where that has matrix units. Scaled and rounded: what the matmul itself would do to a weight. */
static void dense_block(const NAME(view) *v, int64_t block, uint16_t *out, int64_t ld) {
    const qk_op *op = v->op;
    const int width = IS4(op) ? 4 : 8, per = width == 4 ? PER4 : PER8;
    const uint8_t *codes = (const uint8_t *)v->t.codes + block * QK_ROWS * op->k * width / 8;
    for (int64_t q = 0; q < v->groups; q++) {
        const int64_t k0 = q * op->group, k1 = qk_min(op->k, k0 + op->group);
        for (int j = 0; j < NV; j++) {
            const vf s = NAME(product)(op->scale, v->t.scales, v->scale_groups, block, k0, j);
            const int folded = op->zero_kind == QK_ZERO_FOLDED;
            const vf shift = folded ? vzero() : NAME(shift)(v, block, q, j);
            vf o = vzero();
            if (op->zero_kind == QK_ZERO_OFFSET)
                o = NAME(product)(op->offset, v->t.offset, v->offset_groups, block, k0, j);
            const uint8_t *at = codes + k0 / per * QK_ROWS * 4 + j * VW * 4;
            for (int64_t k = k0; k < k1; k += per, at += QK_ROWS * 4) {
                const vi w = vload_codes(at);
                for (int i = 0; i < per; i++) {
                    const vf c = width == 4 ? code4(w, i, v->table) : code8(w, i, v->table);
                    float value[VW];
                    vstore(value, vfma(vadd(c, shift), s, o));
                    for (int r = 0; r < VW; r++)
                        out[(k + i) * ld + j * VW + r] = qk_to_bf16(value[r]);
                }
            }
        }
    }
}

int NAME(qk_dense)(const qk_op *op, const qk_tensors *t, int64_t block, int64_t blocks,
                    uint16_t *out) {
    NAME(view) v;
    qk_tensors held = *t;
    void *fetched = NULL;
    if (op->order) { /* blocks of other weights than those in blocks are made first */
        const int64_t row = block * QK_ROWS;
        fetched = qk_alloc(qk_fetch_bytes(op, blocks));
        if (!fetched) return 1;
        held = qk_fetch(op, t, row, qk_min(blocks * QK_ROWS, op->n - row), fetched);
        block = 0;
    }
    NAME(make_view)(&v, op, &held, 0);
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < blocks; b++)
        dense_block(&v, block + b, out + b * QK_ROWS, blocks * QK_ROWS);
    free(fetched);
    return 0;
}
