/* Codes out of the fields of blocks (load.h), a byte each. Needs AVX2. */
#ifndef QK_LOAD_FIELDS_H
#define QK_LOAD_FIELDS_H

#include <immintrin.h>
#include <string.h>

#include "load.h"

#define QK_CHUNK 256 /* codes of a row that are in work at once: whole blocks */

typedef __m256i vi8; /* 8 words */

#define QK_INLINE static inline __attribute__((always_inline))

QK_INLINE __m128i half_of(const uint8_t *p) { return _mm_loadu_si128((const __m128i *)p); }
QK_INLINE vi8 load_two(const uint8_t *low, const uint8_t *high) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(half_of(low)), half_of(high), 1);
}

/* 32 bits as bytes of 0 or 1. */
QK_INLINE vi8 spread_bits(const uint8_t *bits) {
    uint32_t word;
    memcpy(&word, bits, sizeof word);
    const vi8 byte = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const vi8 bit = _mm256_set1_epi64x((int64_t)0x8040201008040201u);
    const vi8 v = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32((int)word), byte), bit);
    return _mm256_and_si256(_mm256_cmpeq_epi8(v, bit), _mm256_set1_epi8(1));
}

/* `width` bits of each of `some` bytes (8, 16 or 32), from bit `bit` on, into as many codes from bit
 * `shift` on; those of the first field (`fresh`) replace what is there. */
QK_INLINE void add_bits(uint8_t *out, const uint8_t *in, const int some, const int width,
                        const int bit, const int shift, const int fresh) {
    const int mask = (1 << width) - 1;
    if (some < 32) {
        __m128i v = some == 8 ? _mm_loadl_epi64((const __m128i *)in) : half_of(in);
        v = _mm_slli_epi16(_mm_and_si128(_mm_srli_epi16(v, bit), _mm_set1_epi8((char)mask)), shift);
        if (!fresh && some == 8) v = _mm_or_si128(v, _mm_loadl_epi64((const __m128i *)out));
        else if (!fresh) v = _mm_or_si128(v, half_of(out));
        if (some == 8) _mm_storel_epi64((__m128i *)out, v);
        else _mm_storeu_si128((__m128i *)out, v);
        return;
    }
    vi8 v = _mm256_and_si256(_mm256_srli_epi16(load_two(in, in + 16), bit), _mm256_set1_epi8((char)mask));
    v = _mm256_slli_epi16(v, shift);
    if (!fresh) v = _mm256_or_si256(v, load_two(out, out + 16));
    _mm256_storeu_si256((vi8 *)out, v);
}

/* One field of a block. */
QK_INLINE void add_field(uint8_t *codes, const uint8_t *in, int64_t bytes, const int width,
                         const int stride, const int shift, const int fresh) {
    if (width == 8) {
        for (int64_t i = 0; i < bytes; i += 32)
            _mm256_storeu_si256((vi8 *)(codes + i), load_two(in + i, in + i + 16));
    } else {
        const int some = stride < 32 ? stride : 32;
        for (int64_t run = 0; run < bytes; run += stride, codes += stride * (8 / width))
#pragma GCC unroll 8
            for (int bit = 0; bit < 8; bit += width)
#pragma GCC unroll 2
                for (int i = 0; i < stride; i += some)
                    add_bits(codes + bit / width * stride + i, in + run + i, some, width, bit, shift, fresh);
    }
}

/* Nibbles in runs of 16 bytes under a stream of fifth bits: in registers, as they are stored at once. */
QK_INLINE void add_five(uint8_t *codes, const uint8_t *low, const uint8_t *top, int64_t bytes) {
    const __m128i mask = _mm_set1_epi8(15);
    for (int64_t i = 0; i < bytes; i += 16, codes += 32) {
        const __m128i v = half_of(low + i);
        const __m128i high = _mm_and_si128(_mm_srli_epi16(v, 4), mask);
        const vi8 both = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_and_si128(v, mask)), high, 1);
        const vi8 fifth = _mm256_slli_epi16(spread_bits(top + i / 4), 4);
        _mm256_storeu_si256((vi8 *)codes, _mm256_or_si256(both, fifth));
    }
}

/* (width, stride) of the first field; of the second one, with the bit it begins at. */
#define FIRST(w, s) \
    case (w) * 128 + (s): add_field(codes, block + f->at, f->bytes, w, s, 0, 1); break;
#define SECOND(w, s, b) \
    case ((w) * 128 + (s)) * 8 + (b): add_field(codes, block + f->at, f->bytes, w, s, b, 0); break;

QK_INLINE int64_t block_codes(const qk_source *s) { return s->field[0].bytes * 8 / s->field[0].width; }

/* The codes of `count` blocks. The fields are those that loading.py lets through. */
static inline void spread_blocks(uint8_t *codes, const uint8_t *block, int64_t count, const qk_source *s) {
    const int64_t per = block_codes(s);
    const int five = s->fields == 2 && s->field[1].stride == 1;
    for (int64_t b = 0; b < count; b++, codes += per, block += s->block) {
        const qk_field *f = &s->field[0];
        if (five) {
            add_five(codes, block + f->at, block + s->field[1].at, f->bytes);
            continue;
        }
        switch (f->width * 128 + f->stride) {
            FIRST(4, 8)
            FIRST(4, 16)
            FIRST(4, 32)
            FIRST(4, 64)
            FIRST(2, 32)
            FIRST(8, 1)
        }
        if (s->fields == 1) continue;
        f = &s->field[1];
        switch ((f->width * 128 + f->stride) * 8 + s->field[0].width) {
            SECOND(1, 32, 4)
            SECOND(2, 32, 4)
            SECOND(1, 32, 2)
        }
    }
}

#endif
