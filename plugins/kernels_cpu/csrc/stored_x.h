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
    uint16_t *pairs; /* [tokens][padded k], see `arrange` */
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

/* 128 columns as four vectors: lane i of vector j meets nibble j of the 16-bit lane i of the codes.
 *     rows     lane i: column 4 i + j
 *     fields   lane i, u = i % 8: columns 2 u, 16 + 2 u, 2 u + 1, 17 + 2 u of block i / 8 */
static inline void arrange_piece(const uint16_t *x, int64_t count, int fields, uint16_t *out) {
    uint16_t row[PIECE] __attribute__((aligned(64))) = {0}, at[4][32];
    static const int off[4] = {0, 16, 1, 17};
    if (count < PIECE) {
        memcpy(row, x, count * sizeof *x);
        x = row;
    }
    for (int j = 0; j < 4; j++)
        for (int i = 0; i < 32; i++)
            at[j][i] = (uint16_t)(fields ? (i % 16) / 8 * 32 + off[j] + 2 * (i % 8) : (4 * i + j) % 64);
    for (int h = 0; h < 2; h++) {
        const __m512i a = _mm512_loadu_si512(x + 64 * h), b = _mm512_loadu_si512(x + 64 * h + 32);
        for (int j = 0; j < 4; j++) {
            const __m512i v = _mm512_permutex2var_epi16(a, _mm512_loadu_si512(at[j]), b);
            _mm256_storeu_si256((__m256i *)(out + 32 * j + 16 * h), _mm512_castsi512_si256(v));
        }
    }
}

/* Words hold columns 0 to 3 below 4 to 7: pairs (0, 4), (1, 5), (2, 6), (3, 7). */
static inline void arrange_words(const uint16_t *x, int64_t k, uint16_t *out) {
    uint16_t at[32];
    for (int i = 0; i < 32; i++) at[i] = (uint16_t)(i / 8 * 8 + i % 8 / 2 + i % 2 * 4);
    for (int64_t i = 0; i < k; i += 32) {
        const __mmask32 m = k - i >= 32 ? 0xFFFFFFFF : (1u << (k - i)) - 1;
        const __m512i v = _mm512_maskz_loadu_epi16(m, x + i);
        _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(_mm512_loadu_si512(at), v));
    }
}

/* Of 64 columns the even ones before the odd ones. */
static inline void arrange_halves(const uint16_t *x, int64_t k, uint16_t *out) {
    uint16_t at[32];
    for (int i = 0; i < 32; i++) at[i] = (uint16_t)(2 * i);
    const __m512i even = _mm512_loadu_si512(at), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (int64_t i = 0; i < k; i += 64) {
        const __mmask64 m = k - i >= 64 ? ~0ull : (1ull << (k - i)) - 1;
        const __m512i a = _mm512_maskz_loadu_epi16((__mmask32)m, x + i);
        const __m512i b = _mm512_maskz_loadu_epi16((__mmask32)(m >> 32), x + i + 32);
        _mm512_storeu_si512(out + i, _mm512_permutex2var_epi16(a, even, b));
        _mm512_storeu_si512(out + i + 32, _mm512_permutex2var_epi16(a, odd, b));
    }
}

static inline float sum_of(const uint16_t *x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, load_bf16(x + i));
    return _mm512_reduce_add_ps(sum);
}

static void arrange(arranged *a, const qk_op *op, const uint16_t *x, int64_t tokens) {
    const int64_t parts = parts_of(op), part = part_of(op), per = parts_per_group(op);
    a->order = op->order, a->k = op->k, a->group = op->group, a->width = op->width;
    a->with_sums = op->zero_kind != QK_ZERO_FOLDED;
    if (op->order == QK_FIELDS_STORED) memset(a->lanes, 0, tokens * padded(op->k) / 8 * sizeof(float));
    for (int64_t m = 0; m < tokens; m++, x += op->k) {
        uint16_t *out = a->pairs + m * padded(op->k);
        if (op->width == 8) arrange_halves(x, op->k, out);
        else if (op->order == QK_WORDS_STORED) arrange_words(x, op->k, out);
        else if (op->order == QK_ACROSS_STORED) memcpy(out, x, op->k * sizeof *x);
        else
            for (int64_t i = 0; i < op->k; i += PIECE)
                arrange_piece(x + i, qk_min(PIECE, op->k - i), op->order == QK_FIELDS_STORED, out + i);
        if (op->zero_kind == QK_ZERO_FOLDED) continue;
        for (int64_t p = 0; p < parts; p++) {
            const int64_t end = qk_min(op->k, (p / per + 1) * op->group);
            const int64_t first = p / per * op->group + p % per * part;
            const float sum = first < end ? sum_of(x + first, qk_min(part, end - first)) : 0;
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

/* The values of 4-bit codes less their bias as bfloat16, twice. */
static inline __m512i pair_table(const qk_op *op) {
    uint16_t t[32];
    for (int i = 0; i < 32; i++) t[i] = qk_to_bf16(op->table[i % 16]);
    return _mm512_loadu_si512(t);
}

QK_INLINE __m512i nibble(__m512i w, int j, __m512i table) {
    return _mm512_permutexvar_epi16(j ? _mm512_srli_epi16(w, 4 * j) : w, table);
}

QK_INLINE __m512 dot(__m512 acc, __m512i c, __m512i x) {
    return _mm512_dpbf16_ps(acc, (__m512bh)c, (__m512bh)x);
}

#endif
