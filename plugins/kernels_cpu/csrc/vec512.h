/* AVX-512 primitives shared by the float32 and the bfloat16 unit. */
#ifndef QK_VEC512_H
#define QK_VEC512_H

#include <immintrin.h>

#include "qk.h"

#define VW 16
#define NV 2
#define MAX_TILE 12
#define SHORT_TILE 7
#define MAX_DECODE 7 /* 8 run out of registers: 735 us become 1189 (4096 x 4096, g128) */
#define PARTS(tokens) ((tokens) == 1 ? 4 : (tokens) == 2 ? 2 : 1)

typedef __m512 vf;
typedef __m512i vi;

#define vzero() _mm512_setzero_ps()
#define vset(f) _mm512_set1_ps(f)
#define vadd(a, b) _mm512_add_ps(a, b)
#define vsub(a, b) _mm512_sub_ps(a, b)
#define vmul(a, b) _mm512_mul_ps(a, b)
#define vfma(a, b, c) _mm512_fmadd_ps(a, b, c)
#define vload(p) _mm512_loadu_ps(p)
#define vstore(p, v) _mm512_storeu_ps(p, v)
#define vload_codes(p) _mm512_loadu_si512(p)
#define load_f16(p) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(p)))
#define load_u8(p) \
    _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define load_i8(p) \
    _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p))))
#define load_table(table, p) \
    _mm512_i32gather_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))), table, 4)

static inline __m512 qk_widen(__m256i halves) { /* bfloat16 to float32 */
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
/* 2^(e - 127): the exponent of a float32, but for 0, a subnormal, and 255, not a number. */
static inline __m512 qk_power(__m512i e) {
    const __m512i bits = _mm512_max_epi32(_mm512_slli_epi32(e, 23), _mm512_set1_epi32(0x400000));
    const __mmask16 none = _mm512_cmpeq_epi32_mask(e, _mm512_set1_epi32(255));
    return _mm512_castsi512_ps(_mm512_mask_or_epi32(bits, none, bits, _mm512_set1_epi32(0x400000)));
}
#define load_e8m0(p) qk_power(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(p))))
/* fp8 e4m3 as float16 less 2^8: a fraction of what a gather from a table takes. */
static inline __m512 qk_e4m3(__m128i codes) {
    const __m256i bits = _mm256_srai_epi16(_mm256_slli_epi16(_mm256_cvtepu8_epi16(codes), 8), 1);
    return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_and_si256(bits, _mm256_set1_epi16((int16_t)0xBF80))),
                         _mm512_set1_ps(0x1p8f));
}
#define load_e4m3(p) qk_e4m3(_mm_loadu_si128((const __m128i *)(p)))
#define load_bf16(p) qk_widen(_mm256_loadu_si256((const __m256i *)(p)))

/* Byte `s` of every 32-bit lane as a signed integer, in float32. */
static inline __attribute__((always_inline)) __m512 qk_signed_byte(__m512i v, int s) {
    const __m512i top = s == 3 ? v : _mm512_slli_epi32(v, 24 - 8 * s);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24));
}

#endif
