/* Whole blocks of rows, and columns across rows, 16 rows or words at once; the orders are drawn in
 * load.c. A piece is 64 bytes of a row as 16 words of a block; 16 pieces are transposed.
 *
 *     4 bits   the nibbles of a word's 8 codes are brought together by one multiply-add of bytes
 *              (code + 16 * the code two further on), 8 instructions for 128 codes
 *     fields   pieces of 16 or 32 bytes of neighbouring blocks; or by way of a byte for each code */
#include <stddef.h>

#include "load_fields.h"

typedef __m512i v16;

#define AHEAD 512 /* bytes of a row */

QK_INLINE v16 bytes_of(char b) { return _mm512_set1_epi8(b); }
QK_INLINE v16 in_lanes(int d, int c, int b, int a) { return _mm512_set4_epi32(d, c, b, a); }

/* Bytes c0 .. c7 -> c0 c2 c4 c6 | c1 c3 c5 c7 as nibbles, in 16-bit halves below 256. */
QK_INLINE v16 join_codes(v16 codes) {
    const v16 at = in_lanes(0x0F0D0B09, 0x0E0C0A08, 0x07050301, 0x06040200);
    return _mm512_maddubs_epi16(_mm512_shuffle_epi8(codes, at), _mm512_set1_epi16(0x1001));
}

QK_INLINE v16 low_nibbles(v16 v) { return _mm512_and_si512(v, bytes_of(15)); }
QK_INLINE v16 high_nibbles(v16 v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }

/* Codes of a stream as words of a block. */
QK_INLINE v16 split_words(v16 v) {
    const v16 at = in_lanes(0x0F0E0706, 0x0D0C0504, 0x0B0A0302, 0x09080100);
    const v16 by = _mm512_set1_epi16(0x1001);
    const v16 even = _mm512_maddubs_epi16(low_nibbles(v), by);
    const v16 odd = _mm512_maddubs_epi16(high_nibbles(v), by);
    return _mm512_shuffle_epi8(_mm512_packus_epi16(even, odd), at);
}

/* Codes in halves: of every 16 bytes two words of low nibbles, then two of high ones. */
QK_INLINE v16 split_halves(v16 v) {
    return _mm512_packus_epi16(join_codes(low_nibbles(v)), join_codes(high_nibbles(v)));
}

/* 64 bytes that lie in pieces of `size` bytes, `step` bytes apart. */
QK_INLINE v16 gathered(const uint8_t *p, const int size, int64_t step) {
    if (size == 64) return _mm512_loadu_si512(p);
    if (size == 32)
        return _mm512_inserti64x4(_mm512_castsi256_si512(load_two(p, p + 16)),
                                  load_two(p + step, p + step + 16), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(load_two(p, p + step)),
                              load_two(p + 2 * step, p + 3 * step), 1);
}

/* r[i] word j <-> r[j] word i */
QK_INLINE void transpose16(v16 r[16]) {
    v16 t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xDD);
        t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xDD);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xDD);
        r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xDD);
    }
}

enum { WORDS4, WORDS8, HALVES8, HALVES16, HALVES32, BYTES4, BYTES8 };

/* Which word of 16 lies at place `p` of a piece. */
QK_INLINE int place(const int kind, const int p) {
    const int lane = p / 4, i = p % 4;
    if (kind == HALVES8) return 4 * lane + (i == 1 ? 2 : i == 2 ? 1 : i);
    if (kind == HALVES32) return lane / 2 * 8 + lane % 2 * 2 + i % 2 + i / 2 * 4;
    if (kind == BYTES4) return 2 * lane + i % 2 + i / 2 * 8;
    return p;
}

QK_INLINE v16 piece(const uint8_t *p, const int kind, const int size, int64_t step, v16 bias) {
    if (kind == BYTES4)
        return _mm512_packus_epi16(join_codes(_mm512_loadu_si512(p)), join_codes(_mm512_loadu_si512(p + 64)));
    const v16 v = gathered(p, size, step);
    if (kind == WORDS4) return split_words(v);
    if (kind == WORDS8 || kind == BYTES8) return _mm512_sub_epi8(v, bias);
    return split_halves(v);
}

/* 16 words of 16 rows that lie `stride` bytes apart. */
QK_INLINE void pieces(uint32_t *out, const uint8_t *rows, int64_t stride, const int kind,
                      const int size, int64_t step, v16 bias) {
    v16 r[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) {
        if (kind < BYTES4) _mm_prefetch((const char *)rows + j * stride + AHEAD, _MM_HINT_T1);
        r[j] = piece(rows + j * stride, kind, size, step, bias);
    }
    transpose16(r);
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) _mm512_storeu_si512(out + place(kind, j) * QK_ROWS, r[j]);
}

/* A block whose pieces are read where they lie: `size` bytes, `step` apart, `bytes` in a row there. */
QK_INLINE void direct(uint32_t *block, const uint8_t *rows, int64_t row_bytes, const qk_source *s,
                      const int kind, const int size, int64_t step, int64_t bytes) {
    const v16 bias = bytes_of((char)s->bias);
    const int64_t next = size == 64 ? step : 64 / size * step; /* from one run of bytes to the next */
    const int64_t at = s->order == QK_FIELDS ? s->field[0].at : 0;
    uint32_t *out = block, *stop = block + s->k * s->width / 32 * QK_ROWS;
    for (int64_t run = at; out < stop; run += next)
        for (int64_t i = 0; i < (size == 64 ? bytes : 64); i += 64, out += 16 * QK_ROWS)
            for (int half = 0; half < 2; half++)
                pieces(out + 16 * half, rows + 16 * half * row_bytes + run + i, row_bytes, kind, size, step, bias);
}

/* A block by way of a byte for each code. */
QK_INLINE void spread(uint32_t *block, const uint8_t *rows, int64_t row_bytes, const qk_source *s,
                      const int kind) {
    const v16 bias = bytes_of((char)s->bias);
    const int64_t per = block_codes(s), step = kind == BYTES4 ? 128 : 64;
    uint8_t codes[16][QK_CHUNK] __attribute__((aligned(64)));
    for (int64_t k = 0; k < s->k; k += QK_CHUNK) {
        const int64_t count = qk_min(QK_CHUNK, s->k - k) / per;
        for (int half = 0; half < 2; half++) {
            const uint8_t *in = rows + 16 * half * row_bytes + k / per * s->block;
            for (int j = 0; j < 16; j++, in += row_bytes) {
                for (int64_t line = 0; line < count * s->block; line += 64)
                    _mm_prefetch((const char *)in + count * s->block + line, _MM_HINT_T1);
                spread_blocks(codes[j], in, count, s);
            }
            uint32_t *out = block + k * s->width / 32 * QK_ROWS + 16 * half;
            for (int64_t c = 0; c < count * per; c += step, out += 16 * QK_ROWS)
                pieces(out, codes[0] + c, QK_CHUNK, kind, 64, 0, bias);
        }
    }
}

#define SIZES(kind)                                                                          \
    do {                                                                                     \
        if (bytes == 16) direct(block, rows, row_bytes, s, kind, 16, s->block, bytes);       \
        else if (bytes == 32) direct(block, rows, row_bytes, s, kind, 32, s->block, bytes);  \
        else direct(block, rows, row_bytes, s, kind, 64, s->block, bytes);                   \
        return 1;                                                                            \
    } while (0)

static int wide_block(uint32_t *block, const uint8_t *rows, int64_t row_bytes, const qk_source *s) {
    if (s->k * s->width / 32 % 16) return 0;
    if (s->order == QK_BY_ROW && s->width == 4) {
        direct(block, rows, row_bytes, s, WORDS4, 64, 64, 64);
        return 1;
    }
    if (s->order == QK_BY_ROW) {
        direct(block, rows, row_bytes, s, WORDS8, 64, 64, 64);
        return 1;
    }
    const int64_t bytes = s->field[0].bytes, width = s->field[0].width;
    const int whole = s->fields == 1 && (bytes == 16 || bytes == 32 || bytes % 64 == 0);
    if (whole && width == 4 && s->width == 4) {
        if (s->field[0].stride == 8) SIZES(HALVES8);
        if (s->field[0].stride == 16) SIZES(HALVES16);
        if (s->field[0].stride == 32) SIZES(HALVES32);
    }
    if (whole && width == 8 && s->width == 8) SIZES(WORDS8);
    if (s->width == 8) spread(block, rows, row_bytes, s, BYTES8);
    else spread(block, rows, row_bytes, s, BYTES4);
    return 1;
}

/* Exchange the `mask`ed fields of a, moved up by `by`, with those of b. */
#define SWAP(a, b, by, mask)                                                              \
    do {                                                                                  \
        const v16 low = _mm512_set1_epi32(mask), up = _mm512_slli_epi32(b, by);           \
        const v16 down = _mm512_srli_epi32(a, by);                                        \
        a = _mm512_ternarylogic_epi32(low, a, up, 0xCA);                                  \
        b = _mm512_ternarylogic_epi32(low, down, b, 0xCA);                                \
    } while (0)

/* v: the words of 8 columns; as words of 8 rows each, row j's in v[slot[j]]. */
QK_INLINE void transpose_nibbles(v16 v[8]) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) SWAP(v[i], v[i + 4], 16, 0x0000FFFF);
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++)
        if (!(i & 2)) SWAP(v[i], v[i + 2], 8, 0x00FF00FF);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) SWAP(v[i], v[i + 1], 4, 0x0F0F0F0F);
}

/* Rows in r[0 .. 7], 16 words of each -> out[i] rows of words (2 i, 2 i + 1). */
QK_INLINE void rows_of_words(v16 r[8], v16 out[8]) {
    v16 t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    } /* lane l of r[i], r[4 + i]: rows 0 .. 3, 4 .. 7 of word 4 l + i */
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2) {
        const v16 a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x44), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xEE);
        const v16 c = _mm512_shuffle_i32x4(r[i + 1], r[5 + i], 0x44), d = _mm512_shuffle_i32x4(r[i + 1], r[5 + i], 0xEE);
        out[i / 2] = _mm512_shuffle_i32x4(a, c, 0x88);
        out[2 + i / 2] = _mm512_shuffle_i32x4(a, c, 0xDD);
        out[4 + i / 2] = _mm512_shuffle_i32x4(b, d, 0x88);
        out[6 + i / 2] = _mm512_shuffle_i32x4(b, d, 0xDD);
    }
}

static int64_t wide_columns(uint32_t *blocks, const uint32_t *in, int64_t words, int64_t per_row,
                            int64_t first, int64_t i, int64_t w, int64_t stop, const qk_source *s) {
    static const int column[8] = {0, 2, 4, 6, 1, 3, 5, 7}; /* order of a block's word */
    for (; w + 16 <= stop; w += 16) {
        v16 v[8], by_row[8], out[8];
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const uint32_t *at = in + (i * 8 + column[j]) * per_row + w;
            _mm_prefetch((const char *)(at + 16 * per_row), _MM_HINT_T1);
            v[j] = _mm512_loadu_si512(at);
        }
        transpose_nibbles(v);
        for (int j = 0; j < 8; j++) by_row[j] = v[s->slot[j]];
        rows_of_words(by_row, out);
#pragma GCC unroll 8
        for (int j = 0; j < 8; j++) {
            const int64_t n = first + (w + 2 * j) * 8;
            _mm512_storeu_si512(blocks + (n / QK_ROWS * words + i) * QK_ROWS + n % QK_ROWS, out[j]);
        }
    }
    return w;
}

const qk_wide qk_wide_avx512 = {wide_block, wide_columns};
