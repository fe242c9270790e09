/* Words and across: a vector holds outputs side by side. Sums of a group, and scaled sums, of some
 * thousand outputs lie in the first-level cache, so that codes are read in the order in which they
 * lie, which is what memory is fast at. Included by kernel_stored.c. */
#include "stored_x.h"

enum { CHUNK = 128 }; /* outputs that one thread takes at a time */
enum { MOST_SUMS = 8192 }; /* sums that a thread keeps at once */
enum { ACROSS_ROWS = 8 };  /* rows that are read side by side, so that sums are loaded less often */

/* total += s (sum + what codes lack times the sum of x) + offset times it, of 16 outputs. */
QK_INLINE void scale_part(const qk_op *op, const qk_tensors *t, const arranged *a, int64_t part,
                          int64_t column, int64_t token, __m512 sum, float *total) {
    const int64_t q = part / parts_per_group(op), at = q * op->n + column;
    const __mmask16 m = first_lanes(op->n - column);
    const __m512 s = read_floats(t->scales[0], op->scale[0].type, at, m);
    __m512 v = _mm512_fmadd_ps(s, sum, _mm512_loadu_ps(total));
    if (op->zero_kind != QK_ZERO_FOLDED) {
        const __m512 sums = _mm512_set1_ps(a->sums[token * parts_of(op) + part]);
        v = _mm512_fmadd_ps(of_sums(op, t, s, at, m), sums, v);
    }
    _mm512_storeu_ps(total, v);
}

/* 16 words of one row into the sums of 16 outputs. */
QK_INLINE void words_vector(__m512i codes, __m512i table, const __m512i x[][4], float *acc,
                            int64_t ld, const int fresh, const int tokens) {
    const __m512i c[4] = {nibble(codes, 0, table), nibble(codes, 1, table), nibble(codes, 2, table),
                          nibble(codes, 3, table)};
#pragma GCC unroll 4
    for (int i = 0; i < tokens; i++) {
        __m512 sum = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + i * ld);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum = dot(sum, c[j], x[i][j]);
        _mm512_storeu_ps(acc + i * ld, sum);
    }
}

/* Row i of words: `count` outputs from `column` on, into acc[tokens][ld]; `fresh`: the first row.
 * Meanwhile what lies `next` words further is fetched. */
QK_INLINE void words_row(const qk_op *op, const qk_tensors *t, const arranged *a, __m512i table,
                         int64_t i, int64_t column, int64_t count, int64_t next, float *acc,
                         int64_t ld, const int fresh, const int tokens) {
    const uint32_t *w = (const uint32_t *)t->codes + i * op->n + column;
    const int32_t *pairs = (const int32_t *)a->pairs + 4 * i;
    __m512i x[MOST_TOKENS][4];
#pragma GCC unroll 4
    for (int k = 0; k < tokens; k++)
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) x[k][j] = _mm512_set1_epi32(pairs[k * padded(op->k) / 2 + j]);
    int64_t n = 0;
    for (; n + 16 <= count; n += 16) {
        _mm_prefetch((const char *)(w + n + next), _MM_HINT_T0);
        words_vector(_mm512_loadu_si512(w + n), table, x, acc + n, ld, fresh, tokens);
    }
    if (n < count) {
        const __m512i codes = _mm512_maskz_loadu_epi32(first_lanes(count - n), w + n);
        words_vector(codes, table, x, acc + n, ld, fresh, tokens);
    }
}

/* Columns [first, stop) of K, at most ACROSS_ROWS, into acc[tokens][ld]: 128 outputs from `column` on in
 * an order of their own, [nibble][half] vectors. One token or two. */
QK_INLINE void across_chunk(const qk_op *op, const qk_tensors *t, const arranged *a, __m512i table,
                            int64_t first, int64_t stop, int64_t column, float *acc, int64_t ld,
                            const int fresh, const int tokens) {
    const int64_t per_row = op->n / 8, row = padded(op->k) / 2;
    const __mmask16 m = first_lanes((op->n - column) / 8);
    __m512 sum[2][8];
#pragma GCC unroll 2
    for (int i = 0; i < tokens; i++)
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++)
            sum[i][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + i * ld + 16 * v);
    for (int64_t k = first; k < stop; k += 2) {
        const uint32_t *w = (const uint32_t *)t->codes + k * per_row + column / 8;
        const int32_t *x = (const int32_t *)a->pairs + k / 2;
        _mm_prefetch((const char *)(w + ACROSS_ROWS * per_row), _MM_HINT_T0);
        _mm_prefetch((const char *)(w + (ACROSS_ROWS + 1) * per_row), _MM_HINT_T0);
        const __m512i one = _mm512_maskz_loadu_epi32(m, w), two = _mm512_maskz_loadu_epi32(m, w + per_row);
        const __m512i low = _mm512_unpacklo_epi16(one, two), high = _mm512_unpackhi_epi16(one, two);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) {
            const __m512i c = nibble(low, j, table), d = nibble(high, j, table);
#pragma GCC unroll 2
            for (int i = 0; i < tokens; i++) {
                const __m512i xi = _mm512_set1_epi32(x[i * row]);
                sum[i][2 * j] = dot(sum[i][2 * j], c, xi);
                sum[i][2 * j + 1] = dot(sum[i][2 * j + 1], d, xi);
            }
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < tokens; i++)
#pragma GCC unroll 8
        for (int v = 0; v < 8; v++) _mm512_storeu_ps(acc + i * ld + 16 * v, sum[i][v]);
}

/* Those vectors as 128 outputs in order. */
QK_INLINE void in_order(const float *acc, __m512 out[8]) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m512d v[4];
        for (int j = 0; j < 4; j++) v[j] = _mm512_loadu_pd(acc + 32 * j + 16 * h);
        const __m512d a = _mm512_unpacklo_pd(v[0], v[1]), b = _mm512_unpacklo_pd(v[2], v[3]);
        const __m512d c = _mm512_unpackhi_pd(v[0], v[1]), d = _mm512_unpackhi_pd(v[2], v[3]);
        const __m512d ab = _mm512_shuffle_f64x2(a, b, 0x44), cd = _mm512_shuffle_f64x2(c, d, 0x44);
        const __m512d ef = _mm512_shuffle_f64x2(a, b, 0xEE), gh = _mm512_shuffle_f64x2(c, d, 0xEE);
        out[h] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ab, cd, 0x88));
        out[2 + h] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ab, cd, 0xDD));
        out[4 + h] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ef, gh, 0x88));
        out[6 + h] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ef, gh, 0xDD));
    }
}
