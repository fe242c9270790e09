/* x and codes as float32, AVX-512 without AVX512-BF16, and x of any type: products are exact where x is
 * bfloat16 or float16, and added up in float32.
 *
 * A lookup gives 16 codes at once: those of one nibble of every 32-bit lane. Included by stored_x.h. */
#ifndef QK_STORED_FLOATS_H
#define QK_STORED_FLOATS_H

#define NAME(f) f##_avx512
#define KP 1 /* columns in 32 bits of x */

typedef float xelem;
typedef float xunit;
typedef __m512 vc; /* expanded codes, or x beside them */
typedef __m512 code_table;

#define bcast(x) _mm512_set1_ps(x)
#define load_x(p) _mm512_loadu_ps(p)

/* x of one token in order, as float32 in `row`, zeros behind it. */
static const float *token(const qk_op *op, const void *x, int64_t xtype, int64_t m, float *row) {
    qk_token_f32(x, xtype, m, op, NULL, row);
    memset(row + op->k, 0, (padded(op->k) - op->k) * sizeof *row);
    return row;
}

enum { ROW_BYTES = sizeof(float) }; /* of that room, a column */

#define SIDE_BY_SIDE 2 /* rows */
#define JOINT 2        /* of which so many meet x once it is loaded: x of four tokens leaves the first cache */
#define STREAMS 0      /* one token reads long rows one by one */
#define STEPS(width) ((width) == 8 ? 4 : 8) /* vectors of a piece's codes */
#define X_OF(width, j) (j)                  /* the vector of x that vector j of codes meets */

/* Rows and fields: lane l of vector j meets what `step_codes` makes of lane l of the codes,
 *     4 bits          column 8 l + j of 128
 *     4 bits, fields  column 32 (l / 4) + 16 (j % 2) + 4 (l % 4) + j / 2
 *     8 bits          column 4 l + j of 64; where one scale is enough, 16 j + l, which is their order */
static void arrange_token(const qk_op *op, const float *x, float *out) {
    if (op->order == QK_WORDS_STORED || op->order == QK_ACROSS_STORED ||
        (op->order == QK_ROWS_STORED && op->width == 8 && is_wide(op))) {
        memcpy(out, x, padded(op->k) * sizeof *x);
        return;
    }
    const int64_t columns = 512 / op->width, steps = STEPS(op->width);
    __m512i at[8];
    for (int j = 0; j < steps; j++) {
        int32_t from[16];
        for (int l = 0; l < 16; l++)
            from[l] = op->width == 8                  ? 4 * l + j
                      : op->order == QK_FIELDS_STORED ? l / 4 * 32 + j % 2 * 16 + l % 4 * 4 + j / 2
                                                      : 8 * l + j;
        at[j] = _mm512_loadu_si512(from);
    }
    for (int64_t i = 0; i < op->k; i += columns)
        for (int j = 0; j < steps; j++) _mm512_storeu_ps(out + i + 16 * j, _mm512_i32gather_ps(at[j], x + i, 4));
}

static inline float sum_of(const float *x, int64_t n) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < n; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + i));
    return _mm512_reduce_add_ps(sum);
}

/* The values of 4-bit codes less their bias. */
static inline code_table table_of(const qk_op *op) { return _mm512_loadu_ps(op->table); }

/* The lookup reads the low four bits of a lane and ignores the rest. */
QK_INLINE vc nibble(__m512i w, int j, code_table table) {
    return _mm512_permutexvar_ps(j ? _mm512_srli_epi32(w, 4 * j) : w, table);
}

QK_INLINE __m512 dot(__m512 acc, vc c, vc x) { return _mm512_fmadd_ps(c, x, acc); }

/* Half of a row's 128 outputs: the words of which nibbles 0 to 3 are meant. */
QK_INLINE __m512i across_half(const __m512i *rows, const int high) {
    return high ? _mm512_srli_epi32(rows[0], 16) : rows[0];
}

/* Vector j of half h of 128 outputs as pairs of outputs that follow each other: sums of nibbles j and
 * 4 + j, which are outputs 2 j and 2 j + 1 of a word. */
QK_INLINE __m512 across_pairs(const float *acc, const int h, const int j) {
    const __m512 even = _mm512_loadu_ps(acc + 16 * j), odd = _mm512_loadu_ps(acc + 64 + 16 * j);
    return h ? _mm512_unpackhi_ps(even, odd) : _mm512_unpacklo_ps(even, odd);
}

/* ------------------------------------------------------------------------------------- rows */

typedef struct {
    __m512 table;
    __m512i flip; /* codes of 8 bits, two's complement after that */
    int flips;
} row_codes;

static row_codes row_codes_of(const qk_op *op) {
    return (row_codes){table_of(op), _mm512_set1_epi8(op->bias == 128 ? (char)0x80 : 0), op->bias == 128};
}


QK_INLINE vc step_codes(__m512i v, const int j, const int width, const row_codes *t) {
    return width == 8 ? qk_signed_byte(_mm512_xor_si512(v, t->flip), j) : nibble(v, j, t->table);
}

/* Codes of 8 bits in order, 16 a vector; where `left` is not 0, only so many are there. */
QK_INLINE void load_bytes(const uint8_t *at, int64_t left, const row_codes *t, vc *c) {
    uint8_t room[64];
    if (left) {
        memset(room, 0, sizeof room);
        memcpy(room, at, left);
        at = room;
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m128i v = _mm_loadu_si128((const __m128i *)(at + 16 * j));
        if (t->flips) v = _mm_xor_si128(v, _mm512_castsi512_si128(t->flip));
        c[j] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v));
    }
}
#define LOADS_BYTES

/* Which of the numbers at the beginning of a piece's blocks, two each, are a lane's scale and offset. */
typedef struct {
    __m512i scales, offsets;
    int64_t block, at;
} field_places;

static field_places places_of(const qk_op *op) {
    int32_t scales[16], offsets[16];
    for (int l = 0; l < 16; l++) {
        scales[l] = op->width == 8 ? l / 8 * 2 : l / 4 * 2;
        offsets[l] = scales[l] + 1;
    }
    return (field_places){_mm512_loadu_si512(scales), _mm512_loadu_si512(offsets), op->block, op->at};
}

QK_INLINE int head_at(const uint8_t *at) {
    int v;
    memcpy(&v, at, sizeof v);
    return v;
}

/* The codes of a piece of fields, and the scale and the offset of each lane; where `left` is not 0, only
 * so many bytes are there. */
QK_INLINE __m512i load_fields(const field_places *f, const uint8_t *at, int64_t left, const int width,
                              const int offset, __m512 *s, __m512 *o) {
    enum { MOST_BYTES = 128 }; /* of the blocks of a piece */
    uint8_t room[MOST_BYTES];
    if (left) {
        memset(room, 0, sizeof room);
        memcpy(room, at, left);
        at = room;
    }
    const uint8_t *const second = at + f->block, *const third = second + f->block, *const last = third + f->block;
    __m512i v;
    __m256 heads;
    if (width == 8) {
        v = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(at + f->at)));
        v = _mm512_inserti64x4(v, _mm256_loadu_si256((const __m256i *)(second + f->at)), 1);
        heads = _mm256_cvtph_ps(_mm_setr_epi32(head_at(at), head_at(second), 0, 0));
    } else {
        v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i *)(at + f->at)));
        v = _mm512_mask_broadcast_i32x4(v, 0x00F0, _mm_loadu_si128((const __m128i *)(second + f->at)));
        v = _mm512_mask_broadcast_i32x4(v, 0x0F00, _mm_loadu_si128((const __m128i *)(third + f->at)));
        v = _mm512_mask_broadcast_i32x4(v, 0xF000, _mm_loadu_si128((const __m128i *)(last + f->at)));
        heads = _mm256_cvtph_ps(_mm_setr_epi32(head_at(at), head_at(second), head_at(third), head_at(last)));
    }
    const __m512 both = _mm512_castps256_ps512(heads);
    *s = _mm512_permutexvar_ps(f->scales, both);
    if (offset) *o = _mm512_permutexvar_ps(f->offsets, both);
    return v;
}

#endif
