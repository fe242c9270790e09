/* x and codes as pairs of bfloat16, whose exact products AVX512-BF16 adds up in float32. AVX512-VBMI.
 *
 * A lookup gives 32 codes at once: those of one nibble of every 16-bit lane. Included by stored_x.h. */
#ifndef QK_STORED_PAIRS_H
#define QK_STORED_PAIRS_H

#define NAME(f) f##_bf16
#define KP 2 /* columns in 32 bits of x */

typedef uint16_t xelem;
typedef int32_t xunit;
typedef __m512i vc; /* expanded codes, or x beside them */
typedef __m512i code_table;

#define bcast(x) _mm512_set1_epi32(x)
#define load_x(p) _mm512_loadu_si512(p)

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

/* x of one token in order, which is how it comes: bfloat16. `row` is room that is not needed. */
QK_INLINE const uint16_t *token(const qk_op *op, const void *x, int64_t xtype, int64_t m, uint16_t *row) {
    (void)xtype, (void)row;
    return (const uint16_t *)x + m * op->k;
}

enum { ROW_BYTES = 0 }; /* of that room, a column */

static void arrange_token(const qk_op *op, const uint16_t *x, uint16_t *out) {
    if (op->width == 8) arrange_halves(x, op->k, out);
    else if (op->order == QK_WORDS_STORED) arrange_words(x, op->k, out);
    else if (op->order == QK_ACROSS_STORED) memcpy(out, x, op->k * sizeof *x);
    else
        for (int64_t i = 0; i < op->k; i += PIECE)
            arrange_piece(x + i, qk_min(PIECE, op->k - i), op->order == QK_FIELDS_STORED, out + i);
}

static inline float sum_of(const uint16_t *x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, load_bf16(x + i));
    return _mm512_reduce_add_ps(sum);
}

/* The values of 4-bit codes less their bias as bfloat16, twice. */
static inline code_table table_of(const qk_op *op) {
    uint16_t t[32];
    for (int i = 0; i < 32; i++) t[i] = qk_to_bf16(op->table[i % 16]);
    return _mm512_loadu_si512(t);
}

QK_INLINE vc nibble(__m512i w, int j, code_table table) {
    return _mm512_permutexvar_epi16(j ? _mm512_srli_epi16(w, 4 * j) : w, table);
}

QK_INLINE __m512 dot(__m512 acc, vc c, vc x) { return _mm512_dpbf16_ps(acc, (__m512bh)c, (__m512bh)x); }

/* 64 outputs of two columns: words of both rows side by side. */
QK_INLINE __m512i across_half(const __m512i *rows, const int high) {
    return high ? _mm512_unpackhi_epi16(rows[0], rows[1]) : _mm512_unpacklo_epi16(rows[0], rows[1]);
}

/* Vector j of half h of 128 outputs, pairs of outputs that follow each other. */
QK_INLINE __m512 across_pairs(const float *acc, const int h, const int j) {
    return _mm512_loadu_ps(acc + 64 * h + 16 * j);
}

/* ------------------------------------------------------------------------------------- rows */

typedef struct {
    __m512i low, high; /* values of nibbles: a code of 8 bits is the sum of two, 16 h + 8 and l - 8 */
} row_codes;

static row_codes row_codes_of(const qk_op *op) {
    uint16_t low[32], high[32];
    for (int i = 0; i < 32; i++) {
        const int h = i % 16, top = op->bias == 128 ? h - 8 : (h ^ 8) - 8;
        low[i] = qk_to_bf16(op->width == 8 ? (float)(h - 8) : op->table[h]);
        high[i] = op->width == 8 ? qk_to_bf16((float)(16 * top + 8)) : low[i];
    }
    return (row_codes){_mm512_loadu_si512(low), _mm512_loadu_si512(high)};
}

#define SIDE_BY_SIDE 4 /* rows */
#define JOINT 1        /* of which so many meet x once it is loaded */
#define STREAMS 1      /* one token reads long rows one by one */
#define STEPS(width) 4                               /* vectors of a piece's codes */
#define X_OF(width, j) ((width) == 8 ? (j) / 2 : (j)) /* the vector of x that vector j of codes meets */

QK_INLINE vc step_codes(__m512i v, const int j, const int width, const row_codes *t) {
    (void)width;
    return nibble(v, j, j % 2 ? t->high : t->low);
}

/* Where the codes, and each block's scale and offset in its lanes, lie in the blocks of a piece. */
typedef struct {
    __m512i codes, scales, offsets;
    int64_t second; /* byte at which the second vector of the blocks begins */
} field_places;

static field_places places_of(const qk_op *op) {
    uint8_t codes[64];
    uint16_t scales[32], offsets[32];
    const int64_t per = op->width == 8 ? 2 : 4, second = per * op->block - 64;
    for (int i = 0; i < 64; i++) {
        const int64_t at = i / (64 / per) * op->block + op->at + i % (64 / per);
        codes[i] = (uint8_t)(at < 64 ? at : 64 + at - second);
    }
    for (int i = 0; i < 32; i++) { /* of words of 16 bits; blocks have an even size */
        const int64_t at = i % 16 / (16 / per) * op->block, from = at + 2 < 64 ? at : 64 + at - second;
        scales[i] = (uint16_t)(from / 2), offsets[i] = (uint16_t)(from / 2 + 1);
    }
    return (field_places){_mm512_loadu_si512(codes), _mm512_loadu_si512(scales),
                          _mm512_loadu_si512(offsets), second};
}

QK_INLINE __m512 field_floats(__m512i a, __m512i at, __m512i b) {
    return _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutex2var_epi16(a, at, b)));
}

/* The codes of a piece of fields, and the scale and the offset of each lane; where `left` is not 0, only
 * so many bytes are there. */
QK_INLINE __m512i load_fields(const field_places *f, const uint8_t *at, int64_t left, const int width,
                              const int offset, __m512 *s, __m512 *o) {
    const uint8_t *behind = at + f->second;
    __m512i one = left ? _mm512_maskz_loadu_epi8(first_bytes(left), at) : _mm512_loadu_si512(at);
    __m512i two = left ? _mm512_maskz_loadu_epi8(first_bytes(left - f->second), behind) : _mm512_loadu_si512(behind);
    (void)width;
    from_memory(one);
    from_memory(two);
    *s = field_floats(one, f->scales, two);
    if (offset) *o = field_floats(one, f->offsets, two);
    return _mm512_permutex2var_epi8(one, f->codes, two);
}

#endif
