/* Words of eight rows at once: what the AVX2 units of loading share. */
#ifndef QK_LOAD_WORDS_H
#define QK_LOAD_WORDS_H

#include "load_fields.h"

static inline vi8 join(vi8 v, int by, int mask) {
    return _mm256_and_si256(_mm256_or_si256(v, _mm256_srli_epi32(v, by)), _mm256_set1_epi32(mask));
}

/* n0 n1 .. n7 -> n0 n2 n4 n6 | n1 n3 n5 n7 in each word */
static inline vi8 split_nibbles(vi8 w) {
    const vi8 low = _mm256_set1_epi32(0x0F0F0F0F);
    vi8 even = _mm256_and_si256(w, low), odd = _mm256_and_si256(_mm256_srli_epi32(w, 4), low);
    even = join(join(even, 4, 0x00FF00FF), 8, 0xFFFF);
    odd = join(join(odd, 4, 0x00FF00FF), 8, 0xFFFF);
    return _mm256_or_si256(even, _mm256_slli_epi32(odd, 16));
}

static inline vi8 finish(vi8 w, const qk_source *s) {
    return s->width == 4 ? split_nibbles(w) : _mm256_sub_epi8(w, _mm256_set1_epi8((char)s->bias));
}

static inline uint32_t finish_word(uint32_t w, const qk_source *s) {
    const vi8 v = finish(_mm256_set1_epi32((int)w), s);
    return (uint32_t)_mm256_cvtsi256_si32(v);
}

/* v[i] word j <-> v[j] word i */
static inline void transpose8(vi8 v[8]) {
    vi8 a[8], b[8];
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32(v[i], v[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32(v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        v[i] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x20);
        v[i + 4] = _mm256_permute2x128_si256(b[i], b[i + 4], 0x31);
    }
}

static inline vi8 load(const uint32_t *p) { return _mm256_loadu_si256((const vi8 *)p); }
static inline void store(uint32_t *p, vi8 v) { _mm256_storeu_si256((vi8 *)p, v); }

/* Four bytes of a run in halves: k0 k2 | k1 k3 as two bytes of the low nibbles. */
static inline vi8 pair_nibbles(vi8 bytes) {
    const vi8 v = _mm256_and_si256(bytes, _mm256_set1_epi32(0x0F0F0F0F));
    return _mm256_and_si256(_mm256_or_si256(v, _mm256_srli_epi32(v, 12)), _mm256_set1_epi32(0xFFFF));
}

/* Eight codes from the low nibbles of eight bytes, as a block's word. */
static inline vi8 word_of_bytes(vi8 first, vi8 second) {
    const vi8 v = _mm256_or_si256(pair_nibbles(first), _mm256_slli_epi32(pair_nibbles(second), 16));
    const vi8 up = _mm256_and_si256(_mm256_slli_epi32(v, 8), _mm256_set1_epi32(0x00FF0000));
    const vi8 down = _mm256_and_si256(_mm256_srli_epi32(v, 8), _mm256_set1_epi32(0x0000FF00));
    const vi8 kept = _mm256_and_si256(v, _mm256_set1_epi32((int)0xFF0000FF));
    return _mm256_or_si256(kept, _mm256_or_si256(up, down)); /* E0 O0 E1 O1 -> E0 E1 O0 O1 */
}

#endif
