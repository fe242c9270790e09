/* x as the kernels of stored orders read it, and scales beside them. AVX-512BW, F16C. */
#ifndef QK_STORED_X_H
#define QK_STORED_X_H

#include "common.h"
#include "stored.h"
#include "vec512.h"

#define MOST_TOKENS 4
#define PIECE 128 /* columns of 4-bit codes in a vector */
#define PART 128  /* columns of one group that are summed before they are scaled */

/* One thread's x of `tokens` rows, made for one order, `k` and `group`. */
typedef struct {
    int64_t order, k, group, width, with_sums;
    void *x;         /* [tokens][padded k] xelems, see `arrange_token` */
    void *row;       /* one token in order, where x comes otherwise */
    float *sums;     /* [tokens][parts] */
    float *lanes;    /* [tokens][k / 128][16]: of fields, the sum of each block in one of its 4 lanes */
    int32_t *piece_group; /* [k / 128]: of rows, the group in which a piece begins */
    float *scales;   /* [4][groups and 16]: of the rows in work */
} arranged;

QK_INLINE int64_t padded(int64_t k) { return qk_div_up(k, PIECE) * PIECE; }

/* Parts of columns whose sums zero points ask for: groups, or pieces of them where columns are
 * the outer loop. */
QK_INLINE int64_t part_of(const qk_op *op) {
    const int across = op->order == QK_WORDS_STORED || op->order == QK_ACROSS_STORED;
    return across ? qk_min(op->group, PART) : op->group;
}
QK_INLINE int64_t parts_per_group(const qk_op *op) { return qk_div_up(op->group, part_of(op)); }
QK_INLINE int64_t parts_of(const qk_op *op) {
    return qk_div_up(op->k, op->group) * parts_per_group(op);
}

/* Of rows: whether the codes of a piece (512 bits) share their scale. */
QK_INLINE int is_wide(const qk_op *op) { return op->group % (512 / op->width) == 0 || op->group == op->k; }

QK_INLINE __mmask64 first_bytes(int64_t count) {
    return count >= 64 ? ~0ull : count > 0 ? (1ull << count) - 1 : 0;
}

/* What was loaded from memory is read once: GCC would fold the load into every use, and reading lines
 * that are still on their way again and again took up to twice as long. */
#define from_memory(v) __asm__("" : "+v"(v))

#ifdef QK_STORED_FLOATS
#include "stored_floats.h"
#else
#include "stored_pairs.h"
#endif

static void arrange(arranged *a, const qk_op *op, const void *x, int64_t xtype, int64_t tokens) {
    const int64_t parts = parts_of(op), part = part_of(op), per = parts_per_group(op);
    a->order = op->order, a->k = op->k, a->group = op->group, a->width = op->width;
    a->with_sums = op->zero_kind != QK_ZERO_FOLDED;
    if (op->order == QK_FIELDS_STORED) memset(a->lanes, 0, tokens * padded(op->k) / 8 * sizeof(float));
    for (int64_t m = 0; m < tokens; m++) {
        const xelem *row = token(op, x, xtype, m, a->row);
        arrange_token(op, row, (xelem *)a->x + m * padded(op->k));
        if (op->zero_kind == QK_ZERO_FOLDED) continue;
        for (int64_t p = 0; p < parts; p++) {
            const int64_t end = qk_min(op->k, (p / per + 1) * op->group);
            const int64_t first = p / per * op->group + p % per * part;
            const float sum = first < end ? sum_of(row + first, qk_min(part, end - first)) : 0;
            a->sums[m * parts + p] = sum;
            if (op->order == QK_FIELDS_STORED) a->lanes[m * padded(op->k) / 8 + 4 * p] = sum;
        }
    }
    if (op->order == QK_ROWS_STORED)
        for (int64_t p = 0; p < padded(op->k) * op->width / 512; p++)
            a->piece_group[p] = (int32_t)(p * 512 / op->width / op->group);
}

/* Up to 16 stored floats from `at` on, zeros behind them. */
QK_INLINE __m512 read_floats(const void *base, int64_t type, int64_t at, __mmask16 m) {
    if (type == QK_F32) return _mm512_maskz_loadu_ps(m, (const float *)base + at);
    const __m256i halves = _mm256_maskz_loadu_epi16(m, (const uint16_t *)base + at);
    return type == QK_F16 ? _mm512_cvtph_ps(halves) : qk_widen(halves);
}

QK_INLINE __m512 read_bytes(const void *base, int64_t at, __mmask16 m) {
    const __m128i bytes = _mm_maskz_loadu_epi8(m, (const uint8_t *)base + at);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

QK_INLINE __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? 0xFFFF : (__mmask16)((1u << count) - 1);
}

/* What the sums of x are multiplied by: (what codes lack of c - z) times s, plus the offset. */
QK_INLINE __m512 of_sums(const qk_op *op, const qk_tensors *t, __m512 s, int64_t at, __mmask16 m) {
    __m512 lacks = _mm512_set1_ps(op->zero_kind == QK_ZERO_CONST ? -op->shift : op->bias);
    if (op->zero_kind == QK_ZERO_CODE) lacks = _mm512_sub_ps(lacks, read_bytes(t->zeros, at, m));
    lacks = _mm512_mul_ps(lacks, s);
    if (op->zero_kind == QK_ZERO_OFFSET)
        lacks = _mm512_add_ps(lacks, read_floats(t->offset[0], op->offset[0].type, at, m));
    return lacks;
}

#endif
