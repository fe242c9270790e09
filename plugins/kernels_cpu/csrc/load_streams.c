/* Orders whose codes are not as wide as in the blocks (qk.h), and two that are:
 *
 *     QK_STREAMS        [N][words of K]   2, 3, 5, 6 or 7 bits a code, one behind the other; or, with
 *                                         `planes`, of 32 codes first the low bits, then further ones:
 *                                         2 + 1, 4 + 1, 4 + 2, 4 + 2 + 1
 *     QK_WORD_STREAMS   [words of K][N]   the same words, transposed
 *     QK_PAIRS          [N / 2][K]        a byte holds 4-bit codes of one column, of row 2 i below
 *     QK_SWAPPED        [N][K / 2]        a byte holds two 4-bit codes, the first one above
 *
 * 32 columns of 8 rows at once: their words, one row a lane, give the codes by shifts that are
 * constants. K is a multiple of 32; of 64 for QK_SWAPPED. */
#include <omp.h>
#include <string.h>

#include "load_words.h"

/* Code `j` of 32 from the words of a run. */
QK_INLINE vi8 code_of(const vi8 *w, const int j, const int bits, const int planes) {
    static const int widths[8][3] = {{0}, {0}, {2}, {2, 1}, {4}, {4, 1}, {4, 2}, {4, 2, 1}};
    vi8 code = _mm256_setzero_si256();
    int base = 0, up = 0;
#pragma GCC unroll 3
    for (int p = 0; p < 3 && up < bits; p++) {
        const int width = planes ? widths[bits][p] : bits;
        const int word = base + j * width / 32, bit = j * width % 32;
        vi8 v = bit ? _mm256_srli_epi32(w[word], bit) : w[word];
        if (bit + width > 32) v = _mm256_or_si256(v, _mm256_slli_epi32(w[word + 1], 32 - bit));
        if (bit + width != 32) v = _mm256_and_si256(v, _mm256_set1_epi32((1 << width) - 1));
        code = _mm256_or_si256(code, up ? _mm256_slli_epi32(v, up) : v);
        base += width, up += width;
    }
    return code;
}

/* 8 words of 4 codes a row, or 4 words of 8. */
QK_INLINE void words_of_run(const vi8 *w, vi8 *out, const int bits, const int planes, vi8 bias) {
    const int per = bits <= 4 ? 8 : 4;
#pragma GCC unroll 8
    for (int i = 0; i < 32 / per; i++) {
        vi8 word = _mm256_setzero_si256();
#pragma GCC unroll 8
        for (int j = 0; j < per; j++) {
            const int at = per == 4 ? 8 * j : 16 * (j % 2) + 4 * (j / 2);
            const vi8 code = code_of(w, per * i + j, bits, planes);
            word = _mm256_or_si256(word, at ? _mm256_slli_epi32(code, at) : code);
        }
        out[i] = per == 4 ? _mm256_sub_epi8(word, bias) : word;
    }
}

#define RUN(b)                                                     \
    case b:                                                        \
        if (s->planes) words_of_run(w, out, b, 1, bias);           \
        else words_of_run(w, out, b, 0, bias);                     \
        break;

static void run_of_words(const vi8 *w, vi8 *out, const qk_source *s) {
    const vi8 bias = _mm256_set1_epi8((char)s->bias);
    switch (s->bits) {
        RUN(2)
        RUN(3)
        RUN(5)
        RUN(6)
        RUN(7)
    }
}

/* Lanes below `count` of `words` vectors into neighbouring words of a block. */
static inline void put(uint32_t *at, const vi8 *v, int64_t words, int64_t count) {
    for (int64_t i = 0; i < words; i++, at += QK_ROWS) {
        if (count == 8) store(at, v[i]);
        else memcpy(at, &v[i], count * sizeof *at);
    }
}

static inline vi8 first_lanes(int64_t count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* `count` rows from `rows` on, 32 columns: the words of their codes. */
static void from_streams(uint32_t *out, const uint8_t *rows, int64_t count, const qk_source *s) {
    const int64_t row_bytes = s->k * s->bits / 8, words = s->width;
    const vi8 mask = first_lanes(s->bits);
    for (int64_t run = 0; run < s->k / 32; run++, out += words * QK_ROWS) {
        vi8 w[8], made[8];
        for (int64_t j = 0; j < 8; j++) {
            const uint8_t *at = rows + qk_min(j, count - 1) * row_bytes + run * 4 * s->bits;
            _mm_prefetch(at + 512, _MM_HINT_T0);
            w[j] = _mm256_maskload_epi32((const int *)at, mask); /* not what is behind the last row */
        }
        transpose8(w);
        run_of_words(w, made, s);
        put(out, made, words, count);
    }
}

/* Columns of run `run` of rows [row, row + count) of a part of n rows. */
static void from_word_streams(uint32_t *out, const uint32_t *in, int64_t n, int64_t row, int64_t run,
                              int64_t count, const qk_source *s) {
    const vi8 mask = first_lanes(count);
    vi8 w[8], made[8];
    for (int64_t i = 0; i < s->bits; i++) {
        const uint32_t *at = in + (run * s->bits + i) * n + row;
        _mm_prefetch(at + s->bits * n, _MM_HINT_T0);
        w[i] = _mm256_maskload_epi32((const int *)at, mask);
    }
    run_of_words(w, made, s);
    put(out, made, s->width, count);
}

/* Rows 0 .. count - 1 (even but for the last ones) from byte rows of pairs. */
static void from_pairs(uint32_t *out, const uint8_t *pairs, int64_t count, const qk_source *s) {
    const vi8 low = _mm256_set1_epi8(15), bias = _mm256_set1_epi8((char)s->bias);
    const int64_t last = (count - 1) / 2;
    for (int64_t k = 0; k < s->k; k += 32, out += s->width * QK_ROWS) {
        vi8 v[8];
        for (int64_t j = 0; j < 4; j++) {
            const uint8_t *at = pairs + qk_min(j, last) * s->k + k;
            const vi8 both = load_two(at, at + 16);
            _mm_prefetch(at + 512, _MM_HINT_T0);
            v[2 * j] = _mm256_and_si256(both, low);
            v[2 * j + 1] = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        }
        transpose8(v);
        for (int j = 0; j < s->width; j++)
            v[j] = s->width == 8 ? _mm256_sub_epi8(v[j], bias) : word_of_bytes(v[2 * j], v[2 * j + 1]);
        put(out, v, s->width, count);
    }
}

static void from_swapped(uint32_t *out, const uint8_t *rows, int64_t count, const qk_source *s) {
    const vi8 low = _mm256_set1_epi8(15);
    for (int64_t k = 0; k < s->k; k += 64, out += 8 * QK_ROWS) {
        vi8 v[8];
        for (int64_t j = 0; j < 8; j++) {
            const uint8_t *at = rows + qk_min(j, count - 1) * (s->k / 2) + k / 2;
            const vi8 both = load_two(at, at + 16);
            _mm_prefetch(at + 512, _MM_HINT_T0);
            const vi8 first = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
            v[j] = _mm256_or_si256(first, _mm256_slli_epi16(_mm256_and_si256(both, low), 4));
        }
        transpose8(v);
        for (int j = 0; j < 8; j++) v[j] = split_nibbles(v[j]);
        put(out, v, 8, count);
    }
}

#define TILE 8 /* blocks of rows written side by side */

void qk_load_streams(void *blocks, const void *stored, int64_t first, int64_t n, const qk_source *s) {
    const int64_t words = s->k * s->width / 32, start = first / QK_ROWS, end = first + n;
    const int64_t stop = qk_div_up(end, QK_ROWS), tile = s->order == QK_WORD_STREAMS ? TILE : 1;
#pragma omp parallel for schedule(static)
    for (int64_t b = start; b < stop; b += tile) {
        const int64_t low = b * QK_ROWS < first ? first : b * QK_ROWS;
        const int64_t high = qk_min(end, (b + tile) * QK_ROWS);
        const int64_t runs = s->order == QK_WORD_STREAMS ? s->k / 32 : 1;
        for (int64_t run = 0; run < runs; run++)
            for (int64_t r = low, count; r < high; r += count) {
                count = qk_min(qk_min(8, high - r), QK_ROWS - r % QK_ROWS);
                uint32_t *out = (uint32_t *)blocks + r / QK_ROWS * words * QK_ROWS + r % QK_ROWS;
                const uint8_t *in = stored;
                const int64_t row = r - first;
                if (s->order == QK_WORD_STREAMS)
                    from_word_streams(out + run * s->width * QK_ROWS, stored, n, row, run, count, s);
                else if (s->order == QK_STREAMS)
                    from_streams(out, in + row * (s->k * s->bits / 8), count, s);
                else if (s->order == QK_PAIRS) from_pairs(out, in + row / 2 * s->k, count, s);
                else from_swapped(out, in + row * (s->k / 2), count, s);
            }
    }
}
