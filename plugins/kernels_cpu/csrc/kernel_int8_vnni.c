/* The int8 kernel on AVX512-VNNI: vpdpbusd multiplies four bytes of u with four codes of a token.
 * 12 tokens by 32 rows of sums fill 24 of the 32 registers. */
#include <immintrin.h>

#include "common.h"
#include "int8.h"

#define NAME(f) f##_vnni
#define TILE 12
#define MOST_PARTS 4

QK_INLINE __m512i quad(const int8_t *x) {
    int word;
    memcpy(&word, x, sizeof word);
    return _mm512_set1_epi32(word);
}

QK_INLINE void tile_of(const uint8_t *w, const int8_t *x, int64_t quads, const int tokens,
                       int32_t *acc) {
    const int parts = tokens == 1 ? 4 : tokens <= 3 ? 2 : 1; /* sums that hide the latency */
    const int64_t ahead = qk_min(quads * QK_ROWS * 4, 1 << 16); /* the next chunk: fits L2 */
    __m512i sum[TILE][2][MOST_PARTS];
#pragma GCC unroll 12
    for (int m = 0; m < tokens; m++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++)
#pragma GCC unroll 4
            for (int p = 0; p < parts; p++) {
                const int32_t *at = acc + m * QK_ROWS + 16 * j;
                sum[m][j][p] = p ? _mm512_setzero_si512() : _mm512_loadu_si512(at);
            }
    for (int64_t k = 0; k < quads; k += parts)
#pragma GCC unroll 4
        for (int p = 0; p < parts; p++, w += QK_ROWS * 4, x += 4 * tokens) {
            _mm_prefetch((const char *)w + ahead, _MM_HINT_T1);
            _mm_prefetch((const char *)w + ahead + 64, _MM_HINT_T1);
            const __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + 64);
#pragma GCC unroll 12
            for (int m = 0; m < tokens; m++) {
                const __m512i v = quad(x + 4 * m);
                sum[m][0][p] = _mm512_dpbusd_epi32(sum[m][0][p], a, v);
                sum[m][1][p] = _mm512_dpbusd_epi32(sum[m][1][p], b, v);
            }
        }
#pragma GCC unroll 12
    for (int m = 0; m < tokens; m++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
#pragma GCC unroll 4
            for (int p = 1; p < parts; p++)
                sum[m][j][0] = _mm512_add_epi32(sum[m][j][0], sum[m][j][p]);
            _mm512_storeu_si512(acc + m * QK_ROWS + 16 * j, sum[m][j][0]);
        }
}

#define CASE(N) \
    case N: tile_of(w, x, quads, N, acc); break;

/* Not inlined or cloned: where GCC 12 knows some arguments it spills the sums, 2.5 times slower. */
__attribute__((noinline, noclone)) static void NAME(tile)(const uint8_t *w, const int8_t *x,
                                                          int64_t quads, int tokens, int32_t *acc) {
    switch (tokens) {
        CASE(1)
        CASE(2)
        CASE(3)
        CASE(4)
        CASE(5)
        CASE(6)
        CASE(7)
        CASE(8)
        CASE(9)
        CASE(10)
        CASE(11)
        CASE(12)
    }
}

#include "kernel_int8.h"
