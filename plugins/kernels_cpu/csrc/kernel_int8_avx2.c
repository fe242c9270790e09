/* The int8 kernel on AVX2: bytes widened to 16 bits, so that no product saturates (vpmaddubsw
 * would). 3 tokens by 16 rows of sums, two sums a row, fill 12 of the 16 registers. */
#include <immintrin.h>

#include "common.h"
#include "int8.h"

#define NAME(f) f##_avx2
#define TILE 3

QK_INLINE __m256i quad(const int8_t *x) { /* four codes as int16, four times */
    int word;
    memcpy(&word, x, sizeof word);
    return _mm256_cvtepi8_epi16(_mm_set1_epi32(word));
}

/* Eight row sums from two vectors of pairs (rows 0 to 3, rows 4 to 7). */
QK_INLINE __m256i join(__m256i a, __m256i b) {
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xD8);
}

QK_INLINE void tile_of(const uint8_t *w, const int8_t *x, int64_t quads, const int tokens,
                       int32_t *acc) {
    for (int half = 0; half < 2; half++) {
        const uint8_t *row = w + half * QK_ROWS * 2;
        const int8_t *codes = x;
        __m256i sum[TILE][4];
#pragma GCC unroll 3
        for (int m = 0; m < tokens; m++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sum[m][j] = _mm256_setzero_si256();
        for (int64_t k = 0; k < quads; k++, row += QK_ROWS * 4, codes += 4 * tokens) {
            __m256i v[TILE];
#pragma GCC unroll 3
            for (int m = 0; m < tokens; m++) v[m] = quad(codes + 4 * m);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const __m256i u =
                    _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(row + 16 * j)));
#pragma GCC unroll 3
                for (int m = 0; m < tokens; m++)
                    sum[m][j] = _mm256_add_epi32(sum[m][j], _mm256_madd_epi16(u, v[m]));
            }
        }
#pragma GCC unroll 3
        for (int m = 0; m < tokens; m++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                __m256i *at = (__m256i *)(acc + m * QK_ROWS + half * 16 + j * 8);
                const __m256i more = join(sum[m][2 * j], sum[m][2 * j + 1]);
                _mm256_storeu_si256(at, _mm256_add_epi32(_mm256_loadu_si256(at), more));
            }
    }
}

static void NAME(tile)(const uint8_t *w, const int8_t *x, int64_t quads, int tokens, int32_t *acc) {
    switch (tokens) {
    case 1: tile_of(w, x, quads, 1, acc); break;
    case 2: tile_of(w, x, quads, 2, acc); break;
    case 3: tile_of(w, x, quads, 3, acc); break;
    }
}

/* acc[r] += sum of x (w ^ flip) of each row; columns are a multiple of 16. */
static void NAME(rows)(const uint8_t *w, int64_t k, int64_t count, uint32_t flip, const int8_t *x,
                       int64_t columns, int32_t *acc) {
    const __m128i f = _mm_set1_epi32((int)flip);
    for (int64_t r = 0; r < count; r++) {
        __m256i sum = _mm256_setzero_si256();
        for (int64_t c = 0; c < columns; c += 16) {
            const __m128i u = _mm_xor_si128(_mm_loadu_si128((const __m128i *)(w + r * k + c)), f);
            const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(x + c)));
            sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_cvtepu8_epi16(u), v));
        }
        int32_t part[8];
        _mm256_storeu_si256((__m256i *)part, sum);
        for (int i = 0; i < 8; i++) acc[r] += part[i];
    }
}

#include "kernel_int8.h"
