/* The int8 kernel on AVX512-VNNI: vpdpbusd multiplies four bytes of u with four codes of a token.
 * 12 tokens by 32 rows of sums fill 24 of the 32 registers. With QK_AMX: on matrix units. */
#include <immintrin.h>

#include "common.h"
#include "int8.h"

#ifdef QK_AMX
#include "amx.h"

#define NAME(f) f##_amx
#define TILE QK_AMX_TOKENS

/* Whole tiles of 64 columns; blocks lie as the units read weights. */
static void NAME(tile)(const uint8_t *w, const int8_t *x, int64_t k, int64_t columns, int64_t quads,
                       int tokens, int32_t *acc) {
    const int64_t rows = qk_min(16, tokens), more = tokens - rows;
    const int two = more > 0;
    const int8_t *below = x + 16 * columns + k * more;
    x += k * rows;
    const int64_t line = QK_ROWS * 4;
    qk_tiles_for(tokens);
    TILE_LOAD(0, acc, line);
    TILE_LOAD(1, acc + 16, line);
    if (two) {
        TILE_LOAD(2, acc + 16 * QK_ROWS, line);
        TILE_LOAD(3, acc + 16 * QK_ROWS + 16, line);
    }
    for (int64_t i = 0; i < quads; i += 16, w += 16 * line, x += 64 * rows, below += 64 * more) {
        TILE_LOAD(4, x, 64);
        TILE_LOAD(6, w, line);
        TILE_LOAD(7, w + 64, line);
        TILE_INT8(0, 4, 6);
        TILE_INT8(1, 4, 7);
        if (two) {
            TILE_LOAD(5, below, 64);
            TILE_INT8(2, 5, 6);
            TILE_INT8(3, 5, 7);
        }
    }
    TILE_STORE(0, acc, line);
    TILE_STORE(1, acc + 16, line);
    if (two) {
        TILE_STORE(2, acc + 16 * QK_ROWS, line);
        TILE_STORE(3, acc + 16 * QK_ROWS + 16, line);
    }
}

#else
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

#endif

/* acc[r] += sum of x (w ^ flip) of each row: four rows side by side, which is what memory gives best. */
static void NAME(rows)(const uint8_t *w, int64_t k, int64_t count, uint32_t flip, const int8_t *x,
                       int64_t columns, int32_t *acc) {
    const __m512i f = _mm512_set1_epi32((int)flip);
    for (int64_t r = 0; r < count; r += 4) {
        const uint8_t *row[4];
        __m512i sum[4], odd[4];
        for (int i = 0; i < 4; i++) {
            row[i] = w + qk_min(r + i, count - 1) * k;
            sum[i] = odd[i] = _mm512_setzero_si512();
        }
        int64_t c = 0;
        for (; c + 128 <= columns; c += 128) {
            const __m512i a = _mm512_loadu_si512(x + c), b = _mm512_loadu_si512(x + c + 64);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                _mm_prefetch((const char *)row[i] + c + 4 * k, _MM_HINT_T1);
                _mm_prefetch((const char *)row[i] + c + 64 + 4 * k, _MM_HINT_T1);
                const __m512i u = _mm512_loadu_si512(row[i] + c), v = _mm512_loadu_si512(row[i] + c + 64);
                sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_xor_si512(u, f), a);
                odd[i] = _mm512_dpbusd_epi32(odd[i], _mm512_xor_si512(v, f), b);
            }
        }
        for (; c < columns; c += 64) { /* zeros of x count nothing */
            const __mmask64 some = columns - c < 64 ? (1ull << (columns - c)) - 1 : ~0ull;
            const __m512i a = _mm512_maskz_loadu_epi8(some, x + c);
            for (int i = 0; i < 4; i++) {
                const __m512i u = _mm512_maskz_loadu_epi8(some, row[i] + c);
                sum[i] = _mm512_dpbusd_epi32(sum[i], _mm512_xor_si512(u, f), a);
            }
        }
        for (int i = 0; i < qk_min(4, count - r); i++)
            acc[r + i] += _mm512_reduce_add_epi32(_mm512_add_epi32(sum[i], odd[i]));
    }
}

#define HAVE_TURN

static void NAME(turn)(const uint8_t *w, int64_t k, uint32_t flip, uint32_t *out) {
    const __m512i f = _mm512_set1_epi32((int)flip);
    __m512i v[16], t[16];
    for (int i = 0; i < 16; i++) {
        v[i] = _mm512_xor_si512(_mm512_loadu_si512(w + i * k), f);
        _mm_prefetch((const char *)w + i * k + 512, _MM_HINT_T0);
    }
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + 2 + j]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + 2 + j]);
        }
    for (int c = 0; c < 4; c++) { /* v[4 g + c]: words 4 l + c of rows 4 g to 4 g + 3 in lane l */
        const __m512i a = _mm512_shuffle_i32x4(v[c], v[4 + c], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(v[c], v[4 + c], 0xDD);
        const __m512i d = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0x88);
        const __m512i e = _mm512_shuffle_i32x4(v[8 + c], v[12 + c], 0xDD);
        _mm512_storeu_si512(out + c * QK_ROWS, _mm512_shuffle_i32x4(a, d, 0x88));
        _mm512_storeu_si512(out + (4 + c) * QK_ROWS, _mm512_shuffle_i32x4(b, e, 0x88));
        _mm512_storeu_si512(out + (8 + c) * QK_ROWS, _mm512_shuffle_i32x4(a, d, 0xDD));
        _mm512_storeu_si512(out + (12 + c) * QK_ROWS, _mm512_shuffle_i32x4(b, e, 0xDD));
    }
}

#include "kernel_int8.h"
