/* Eight codes of four bits in each 32-bit word, in any order, one per byte: zero points of many layers. */
#include <immintrin.h>
#include <string.h>

#include "unpack.h"

#define UNIT (1 << 15) /* words that a thread takes at once */

/* Four words a step: every code's byte is fetched, and of some of them the upper half. */
static void some(const uint32_t *words, uint8_t *out, int64_t count, const int64_t *slot) {
    uint8_t from[32], upper[32];
    for (int i = 0; i < 32; i++) {
        from[i] = (uint8_t)(i / 8 * 4 + slot[i % 8] / 2);
        upper[i] = slot[i % 8] & 1 ? 0xFF : 0;
    }
    const __m256i order = _mm256_loadu_si256((const __m256i *)from);
    const __m256i high = _mm256_loadu_si256((const __m256i *)upper), low = _mm256_set1_epi8(15);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        const __m128i four = _mm_loadu_si128((const __m128i *)(words + i));
        const __m256i v = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(four), order);
        const __m256i one = _mm256_blendv_epi8(v, _mm256_srli_epi16(v, 4), high);
        _mm256_storeu_si256((__m256i *)(out + 8 * i), _mm256_and_si256(one, low));
    }
    for (; i < count; i++)
        for (int j = 0; j < 8; j++) out[8 * i + j] = words[i] >> (4 * slot[j]) & 15;
}

void qk_unpack(const qk_packed *all, int64_t n) {
    int64_t units = 0;
    for (int64_t i = 0; i < n; i++) units += qk_div_up(all[i].words, UNIT);
#pragma omp parallel if (units > 1)
    {
        const qk_packed *a = all;
        int64_t before = 0; /* units of those before `a`; a thread's own units ascend */
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t u = 0; u < units; u++) {
            for (int64_t mine; u - before >= (mine = qk_div_up(a->words, UNIT)); a++) before += mine;
            const int64_t at = (u - before) * UNIT;
            some((const uint32_t *)a->from + at, (uint8_t *)a->to + 8 * at, qk_min(UNIT, a->words - at),
                 a->slot);
        }
    }
}
