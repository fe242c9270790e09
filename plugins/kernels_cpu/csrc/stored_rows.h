/* Rows as they are stored, or blocks of fields: sums run along the lanes of a vector and are added
 * up at the end of a row. Included by kernel_stored.c.
 *
 * 4 bits: 64 bytes are 128 codes; the 16-bit lanes hold four codes each, whose x lies in four
 * vectors (stored_x.h). Groups are whole multiples of 128 columns, or 64 or 32 of them.
 * 8 bits: 16 codes at a time become float32. */
#include "stored_x.h"

#define ROWS_AHEAD 4 /* sets of rows: what is fetched ahead of use */

QK_INLINE int64_t scale_room(const qk_op *op) { return qk_div_up(op->k, op->group) + 16; }

/* The scales of `rows` rows as float32, and what zero points add to the sums. */
QK_INLINE void row_scales(const qk_op *op, const qk_tensors *t, const arranged *a, int64_t row,
                          const int rows, const int tokens, __m512 total[][MOST_TOKENS]) {
    const int64_t groups = qk_div_up(op->k, op->group);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++) total[r][i] = _mm512_setzero_ps();
        for (int64_t q = 0; q < groups; q += 16) {
            const __mmask16 m = first_lanes(groups - q);
            const int64_t at = (row + r) * groups + q;
            const __m512 s = read_floats(t->scales[0], op->scale[0].type, at, m);
            _mm512_storeu_ps(a->scales + r * scale_room(op) + q, s);
            if (op->zero_kind == QK_ZERO_FOLDED) continue;
            const __m512 lacks = of_sums(op, t, s, at, m);
#pragma GCC unroll 4
            for (int i = 0; i < tokens; i++)
                total[r][i] = _mm512_fmadd_ps(lacks, _mm512_maskz_loadu_ps(m, a->sums + i * groups + q), total[r][i]);
        }
    }
}

/* total += s (sum of 128 codes times x) */
QK_INLINE __m512 add_piece(__m512 total, const __m512i c[4], const uint16_t *x, __m512 s) {
    __m512 acc = dot(_mm512_setzero_ps(), c[0], _mm512_loadu_si512(x));
    acc = dot(acc, c[1], _mm512_loadu_si512(x + 32));
    acc = dot(acc, c[2], _mm512_loadu_si512(x + 64));
    acc = dot(acc, c[3], _mm512_loadu_si512(x + 96));
    return _mm512_fmadd_ps(acc, s, total);
}

QK_INLINE void store_sums(float *out, __m512 total[][MOST_TOKENS], const int rows, const int tokens) {
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++) out[i * QK_ROWS + r] = _mm512_reduce_add_ps(total[r][i]);
}

/* Piece p of `rows` rows; only its `mask`ed bytes are there where `last`. */
QK_INLINE void piece4(const qk_op *op, const arranged *a, const uint8_t *codes, int64_t p,
                      __m512i table, __m512i lanes, __m512 total[][MOST_TOKENS], const int rows,
                      const int tokens, const int wide, const int last, __mmask64 mask) {
    const int64_t bytes = op->k / 2, ld = padded(op->k);
    const float *scales = a->scales + (wide ? a->piece_group[p] : p * PIECE / op->group);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++, codes += bytes, scales += scale_room(op)) {
        const uint8_t *at = codes + 64 * p;
        _mm_prefetch((const char *)at + ROWS_AHEAD * rows * bytes, _MM_HINT_T0);
        const __m512i w = last ? _mm512_maskz_loadu_epi8(mask, at) : _mm512_loadu_si512(at);
        const __m512i c[4] = {nibble(w, 0, table), nibble(w, 1, table), nibble(w, 2, table),
                              nibble(w, 3, table)};
        const __m512 s = wide ? _mm512_set1_ps(*scales)
                              : _mm512_permutexvar_ps(lanes, _mm512_maskz_loadu_ps(0xF, scales));
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++)
            total[r][i] = add_piece(total[r][i], c, a->pairs + i * ld + p * PIECE, s);
    }
}

QK_INLINE void rows4(const qk_op *op, const qk_tensors *t, const arranged *a, __m512i table,
                     int64_t row, float *out, const int rows, const int tokens, const int wide) {
    const uint8_t *codes = (const uint8_t *)t->codes + row * op->k / 2;
    const int64_t pieces = op->k / PIECE, left = op->k % PIECE / 2;
    const __m512i lanes = _mm512_srl_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
        _mm_cvtsi32_si128(op->group == 64 ? 3 : 2));
    __m512 total[4][MOST_TOKENS];
    row_scales(op, t, a, row, rows, tokens, total);
    for (int64_t p = 0; p < pieces; p++)
        piece4(op, a, codes, p, table, lanes, total, rows, tokens, wide, 0, 0);
    if (left) piece4(op, a, codes, pieces, table, lanes, total, rows, tokens, wide, 1, (1ull << left) - 1);
    store_sums(out, total, rows, tokens);
}

/* Where 64 bytes of codes, and each block's scale and offset in four lanes, lie in four blocks. */
typedef struct {
    __m512i codes, scales, offsets;
    int64_t second; /* byte at which the second vector of the four blocks begins */
} field_places;

static field_places places_of(const qk_op *op) {
    uint8_t codes[64];
    uint16_t scales[32], offsets[32];
    const int64_t second = 4 * op->block - 64;
    for (int i = 0; i < 64; i++) {
        const int64_t at = i / 16 * op->block + op->at + i % 16;
        codes[i] = (uint8_t)(at < 64 ? at : 64 + at - second);
    }
    for (int i = 0; i < 32; i++) { /* of words of 16 bits; blocks have an even size */
        const int64_t at = i / 4 % 4 * op->block, from = at + 2 < 64 ? at : 64 + at - second;
        scales[i] = (uint16_t)(from / 2), offsets[i] = (uint16_t)(from / 2 + 1);
    }
    return (field_places){_mm512_loadu_si512(codes), _mm512_loadu_si512(scales),
                          _mm512_loadu_si512(offsets), second};
}

QK_INLINE __m512 field_floats(__m512i a, __m512i at, __m512i b) {
    return _mm512_cvtph_ps(_mm512_castsi512_si256(_mm512_permutex2var_epi16(a, at, b)));
}

/* Blocks [4 p, 4 p + 4) of `rows` rows; `count` of them are there. */
QK_INLINE void fields_piece(const qk_op *op, const arranged *a, const uint8_t *codes, int64_t p,
                            __m512i table, const field_places *f, __m512 total[][MOST_TOKENS],
                            const int rows, const int tokens, const int offset, int64_t count) {
    const int64_t bytes = op->k / 32 * op->block, ld = padded(op->k);
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        const uint8_t *at = codes + r * bytes + 4 * p * op->block;
        uint8_t held[128];
        _mm_prefetch((const char *)at + ROWS_AHEAD * rows * bytes, _MM_HINT_T0);
        if (count < 4) {
            memset(held, 0, sizeof held);
            memcpy(held, at, count * op->block);
            at = held;
        }
        const __m512i one = _mm512_loadu_si512(at), two = _mm512_loadu_si512(at + f->second);
        const __m512i w = _mm512_permutex2var_epi8(one, f->codes, two);
        const __m512i c[4] = {nibble(w, 0, table), nibble(w, 1, table), nibble(w, 2, table),
                              nibble(w, 3, table)};
        const __m512 s = field_floats(one, f->scales, two);
        const __m512 o = offset ? field_floats(one, f->offsets, two) : s;
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++) {
            total[r][i] = add_piece(total[r][i], c, a->pairs + i * ld + p * PIECE, s);
            if (offset) {
                const __m512 sums = _mm512_loadu_ps(a->lanes + i * ld / 8 + 16 * p);
                total[r][i] = _mm512_fmadd_ps(o, sums, total[r][i]);
            }
        }
    }
}

QK_INLINE void fields4(const qk_op *op, const qk_tensors *t, const arranged *a, __m512i table,
                       const field_places *f, int64_t row, float *out, const int rows,
                       const int tokens, const int offset) {
    const uint8_t *codes = (const uint8_t *)t->codes + row * (op->k / 32) * op->block;
    const int64_t pieces = op->k / PIECE, left = op->k % PIECE / 32;
    __m512 total[4][MOST_TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++) total[r][i] = _mm512_setzero_ps();
    for (int64_t p = 0; p < pieces; p++)
        fields_piece(op, a, codes, p, table, f, total, rows, tokens, offset, 4);
    if (left) fields_piece(op, a, codes, pieces, table, f, total, rows, tokens, offset, left);
    store_sums(out, total, rows, tokens);
}

/* 16 codes of 8 bits as float32, less 128 where they are unsigned. */
QK_INLINE __m512 wide_codes(const uint8_t *at, __m128i flip) {
    const __m128i bytes = _mm_xor_si128(_mm_loadu_si128((const __m128i *)at), flip);
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
}

QK_INLINE void rows8(const qk_op *op, const qk_tensors *t, const arranged *a, __m128i flip,
                     int64_t row, float *out, const int rows, const int tokens, const int fields) {
    const int64_t bytes = fields ? op->k / 32 * op->block : op->k;
    const uint8_t *at = (const uint8_t *)t->codes + row * bytes;
    __m512 total[4][MOST_TOKENS];
    if (!fields) row_scales(op, t, a, row, rows, tokens, total);
    else
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int i = 0; i < tokens; i++) total[r][i] = _mm512_setzero_ps();
    for (int64_t k = 0, q = 0; k < op->k; q++) {
        const int64_t end = qk_min(op->k, k + op->group);
        __m512 acc[4][MOST_TOKENS], s[4];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            uint16_t half;
            memcpy(&half, at + r * bytes, sizeof half);
            s[r] = _mm512_set1_ps(fields ? _cvtsh_ss(half) : a->scales[r * scale_room(op) + q]);
#pragma GCC unroll 4
            for (int i = 0; i < tokens; i++) acc[r][i] = _mm512_setzero_ps();
        }
        if (fields) at += op->at;
        for (; k < end; k += 16, at += 16)
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                if (k % 64 == 0) _mm_prefetch((const char *)at + (r + rows) * bytes, _MM_HINT_T0);
                const __m512 c = wide_codes(at + r * bytes, flip);
#pragma GCC unroll 4
                for (int i = 0; i < tokens; i++)
                    acc[r][i] = _mm512_fmadd_ps(c, _mm512_loadu_ps(a->wide + i * op->k + k), acc[r][i]);
            }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int i = 0; i < tokens; i++) total[r][i] = _mm512_fmadd_ps(acc[r][i], s[r], total[r][i]);
    }
    store_sums(out, total, rows, tokens);
}
