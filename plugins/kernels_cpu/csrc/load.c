/* Stored words of 4- and 8-bit codes into blocks (qk.h), from the order in which files hold them:
 *
 *     QK_BY_ROW    [N][words of K]    a row is one stream of codes, lowest first
 *     QK_BY_WORD   [words of K][N]    the same words, transposed
 *     QK_ACROSS    [K][N / 8]         a word holds one column of 8 rows; `slot` says in which nibble
 *     QK_FIELDS    [N][blocks of K]   bytes that hold codes beside other things, their bits in one
 *                                     field or two (load.h)
 *
 * Memory-bound: every source line is used whole while it is in a register, since the 32 rows of a
 * block often lie a power of two apart and would push each other out of the first-level cache. */
#include <omp.h>
#include <string.h>

#include "load_words.h"

/* v: 8 words of 8 rows, transposed, of runs of 2 * stride codes: as words of a block. */
static inline void finish_halves(vi8 v[8], int64_t stride) {
    vi8 low[4], high[4];
    for (int j = 0; j < 4; j++) {
        low[j] = word_of_bytes(v[2 * j], v[2 * j + 1]);
        high[j] = word_of_bytes(_mm256_srli_epi32(v[2 * j], 4), _mm256_srli_epi32(v[2 * j + 1], 4));
    }
    const int half = (int)stride / 8; /* words of half a run: 1, 2 or 4 */
    for (int j = 0; j < 4; j++) {
        const int at = j / half * 2 * half + j % half;
        v[at] = low[j];
        v[at + half] = high[j];
    }
}

#define AHEAD 64 /* words of a row: four lines */

/* Rows [low, high) of a block; row `low` begins at `rows`. */
static void from_rows(uint32_t *block, const uint32_t *rows, int64_t words, int64_t low,
                      int64_t high, const qk_source *s) {
    const int64_t whole = low + (high - low) / 8 * 8, aligned = words / 8 * 8;
    for (int64_t line = 0; line < aligned; line += 16)
        for (int64_t r = low; r < whole; r += 8) {
            const uint32_t *row = rows + (r - low) * words;
            for (int j = 0; j < 8; j++) _mm_prefetch(row + j * words + line + AHEAD, _MM_HINT_T0);
            for (int64_t i = line; i < qk_min(line + 16, aligned); i += 8) {
                vi8 v[8];
                for (int j = 0; j < 8; j++) v[j] = load(row + j * words + i);
                transpose8(v);
                for (int j = 0; j < 8; j++) store(block + (i + j) * QK_ROWS + r, finish(v[j], s));
            }
        }
    for (int64_t r = low; r < high; r++)
        for (int64_t i = r < whole ? aligned : 0; i < words; i++)
            block[i * QK_ROWS + r] = finish_word(rows[(r - low) * words + i], s);
}

/* ------------------------------------------------------------------------- blocks of fields */

/* Rows [low, high), high - low a multiple of 8, whose codes lie in the halves of one field's bytes:
 * 16 bytes of them in a block, or whole pieces of 32. K is a multiple of 64. */
static void from_halves(uint32_t *block, const uint8_t *rows, int64_t row_bytes, int64_t low,
                        int64_t high, const qk_source *s) {
    const qk_field f = s->field[0];
    const int64_t step = f.bytes < 32 ? 2 * s->block : s->block;
    const int64_t pieces = f.bytes < 32 ? 1 : f.bytes / 32, second = f.bytes < 32 ? s->block : 16;
    for (int64_t k = 0, at = f.at; k < s->k; at += step)
        for (int64_t p = 0; p < pieces; p++, k += 64)
            for (int64_t r = low; r < high; r += 8) {
                const uint8_t *row = rows + (r - low) * row_bytes + at + 32 * p;
                vi8 v[8];
                for (int j = 0; j < 8; j++) {
                    _mm_prefetch(row + j * row_bytes + 4 * AHEAD, _MM_HINT_T0);
                    v[j] = load_two(row + j * row_bytes, row + j * row_bytes + second);
                }
                transpose8(v);
                finish_halves(v, f.stride);
                for (int j = 0; j < 8; j++) store(block + (k / 8 + j) * QK_ROWS + r, v[j]);
            }
}

/* Word i of a block's row from codes of a byte each. */
static uint32_t word_of_codes(const uint8_t *codes, int64_t i, const qk_source *s) {
    uint32_t word = 0;
    if (s->width == 8) memcpy(&word, codes + 4 * i, sizeof word);
    else
        for (int j = 0; j < 8; j++) word |= (uint32_t)codes[8 * i + j] << 4 * j;
    return finish_word(word, s);
}

/* Rows [low, high) of a block, by way of a byte for each code. */
static void from_fields(uint32_t *block, const uint8_t *rows, int64_t row_bytes, int64_t low,
                        int64_t high, const qk_source *s) {
    const int64_t per = block_codes(s), some = QK_CHUNK / per, step = s->width == 8 ? 4 : 8;
    uint8_t codes[8][QK_CHUNK + 32];
    for (int64_t k = 0; k < s->k; k += QK_CHUNK) {
        const int64_t stop = qk_min(QK_CHUNK, s->k - k), count = qk_min(some, stop / per);
        for (int64_t r = low; r < high; r += 8) {
            const int64_t here = qk_min(8, high - r);
            for (int64_t j = 0; j < here; j++) {
                const uint8_t *at = rows + (r - low + j) * row_bytes + k / per * s->block;
                for (int64_t line = 0; line < some * s->block; line += 64)
                    _mm_prefetch(at + some * s->block + line, _MM_HINT_T0);
                spread_blocks(codes[j], at, count, s);
            }
            uint32_t *out = block + k / step * QK_ROWS + r;
            if (here < 8) {
                for (int64_t j = 0; j < here; j++)
                    for (int64_t i = 0; i < stop / step; i++)
                        out[i * QK_ROWS + j] = word_of_codes(codes[j], i, s);
                continue;
            }
            for (int64_t c = 0; c < stop; c += 32, out += 32 / step * QK_ROWS) {
                vi8 v[8];
                for (int j = 0; j < 8; j++) v[j] = load((const uint32_t *)(codes[j] + c));
                transpose8(v);
                if (s->width == 8)
                    for (int j = 0; j < 8; j++) store(out + j * QK_ROWS, finish(v[j], s));
                else
                    for (int j = 0; j < 4; j++)
                        store(out + j * QK_ROWS, word_of_bytes(v[2 * j], v[2 * j + 1]));
            }
        }
    }
}

/* Rows [low, high) of a block; row `low` begins at `rows`. */
static void from_blocks(uint32_t *block, const uint8_t *rows, int64_t low, int64_t high,
                        const qk_source *s) {
    const int64_t row_bytes = s->k / block_codes(s) * s->block, bytes = s->field[0].bytes;
    const int halves = s->fields == 1 && s->field[0].width == 4 && s->k % 64 == 0;
    int64_t whole = low;
    if (halves && (bytes == 16 || bytes % 32 == 0)) {
        whole += (high - low) / 8 * 8;
        from_halves(block, rows, row_bytes, low, whole, s);
    }
    from_fields(block, rows + (whole - low) * row_bytes, row_bytes, whole, high, s);
}

/* A tile of blocks [b, stop) from words that lie [words][n]: rows of the part are contiguous. */
static void from_words(uint32_t *blocks, const uint32_t *in, int64_t words, int64_t first,
                       int64_t n, int64_t b, int64_t stop, const qk_source *s) {
    for (int64_t i = 0; i < words; i++)
        for (int64_t at = b; at < stop; at++) {
            uint32_t *out = blocks + (at * words + i) * QK_ROWS;
            const int64_t begin = at * QK_ROWS - first; /* row of the part in lane 0 */
            int64_t r = begin < 0 ? -begin : 0;
            const int64_t high = qk_min(QK_ROWS, n - begin);
            const uint32_t *row = in + i * n + begin;
            _mm_prefetch(row + r + 4 * n, _MM_HINT_T0);
            _mm_prefetch(row + r + 4 * n + 16, _MM_HINT_T0);
            for (; r + 8 <= high; r += 8) store(out + r, finish(load(row + r), s));
            for (; r < high; r++) out[r] = finish_word(row[r], s);
        }
}

/* Exchange the `mask`ed fields of a with those of b `by` bits higher. */
#define SWAP(a, b, by, mask)                                                          \
    do {                                                                              \
        const vi8 d = _mm256_and_si256(_mm256_xor_si256(_mm256_srli_epi32(a, by), b), \
                                       _mm256_set1_epi32(mask));                      \
        b = _mm256_xor_si256(b, d);                                                   \
        a = _mm256_xor_si256(a, _mm256_slli_epi32(d, by));                            \
    } while (0)

/* 8 columns of 8 words of 8 rows each: v[i] nibble j <-> v[j] nibble i. */
static inline void transpose_nibbles(vi8 v[8]) {
    for (int i = 0; i < 4; i++) SWAP(v[i], v[i + 4], 16, 0x0000FFFF);
    for (int i = 0; i < 8; i++)
        if (!(i & 2)) SWAP(v[i], v[i + 2], 8, 0x00FF00FF);
    for (int i = 0; i < 8; i += 2) SWAP(v[i], v[i + 1], 4, 0x0F0F0F0F);
}

/* Columns k .. k + 7 of the words [w, stop) of a part that begins at row `first` (of 8). */
static void from_columns(uint32_t *blocks, const uint32_t *in, int64_t words, int64_t per_row,
                         int64_t first, int64_t i, int64_t w, int64_t stop, const qk_source *s) {
    static const int column[8] = {0, 2, 4, 6, 1, 3, 5, 7}; /* order of a block's word */
    for (; w < stop; w += 8) {
        const int64_t have = qk_min(8, stop - w);
        vi8 v[8], by_row[8];
        int32_t lanes[8];
        for (int j = 0; j < 8; j++) lanes[j] = j < have ? -1 : 0;
        const vi8 mask = load((const uint32_t *)lanes);
        for (int j = 0; j < 8; j++) {
            const uint32_t *column_words = in + (i * 8 + column[j]) * per_row + w;
            _mm_prefetch(column_words + 16 * per_row, _MM_HINT_T0);
            v[j] = _mm256_maskload_epi32((const int *)column_words, mask);
        }
        transpose_nibbles(v);
        for (int j = 0; j < 8; j++) by_row[j] = v[s->slot[j]];
        transpose8(by_row);
        for (int64_t j = 0; j < have; j++) {
            const int64_t n = first + (w + j) * 8;
            store(blocks + (n / QK_ROWS * words + i) * QK_ROWS + n % QK_ROWS, by_row[j]);
        }
    }
}

#define TILE 8 /* blocks of rows written side by side: 16 often share lines of the first-level cache */

/* Rows [first, first + n) of K columns. QK_ACROSS needs first and n multiples of 8, K too. */
void qk_load_by(void *blocks, const void *stored, int64_t first, int64_t n, const qk_source *s,
                const qk_wide *wide) {
    const int64_t words = s->k * s->width / 32, start = first / QK_ROWS;
    const int64_t stop = qk_div_up(first + n, QK_ROWS);
    uint32_t *out = blocks;
    if (s->order == QK_BY_ROW || s->order == QK_FIELDS) {
        const int fields = s->order == QK_FIELDS;
        const int64_t row_bytes = fields ? s->k / block_codes(s) * s->block : words * 4;
#pragma omp parallel for schedule(static)
        for (int64_t b = start; b < stop; b++) {
            const int64_t low = b * QK_ROWS < first ? first - b * QK_ROWS : 0;
            const int64_t high = qk_min(QK_ROWS, first + n - b * QK_ROWS);
            const uint8_t *rows = (const uint8_t *)stored + (b * QK_ROWS + low - first) * row_bytes;
            uint32_t *block = out + b * words * QK_ROWS;
            if (wide && high - low == QK_ROWS && wide->block(block, rows, row_bytes, s)) continue;
            if (fields) from_blocks(block, rows, low, high, s);
            else from_rows(block, (const uint32_t *)rows, words, low, high, s);
        }
        return;
    }
#pragma omp parallel for schedule(dynamic)
    for (int64_t b = start; b < stop; b += TILE) {
        const int64_t end = qk_min(stop, b + TILE);
        if (s->order == QK_BY_WORD) {
            from_words(out, stored, words, first, n, b, end, s);
            continue;
        }
        const int64_t from = b * QK_ROWS < first ? first : b * QK_ROWS;
        const int64_t to = qk_min(first + n, end * QK_ROWS);
        for (int64_t i = 0; i < words; i++) {
            int64_t w = (from - first) / 8;
            if (wide && first % QK_ROWS == 0)
                w = wide->columns(out, stored, words, n / 8, first, i, w, (to - first) / 8, s);
            from_columns(out, stored, words, n / 8, first, i, w, (to - first) / 8, s);
        }
    }
}

/* 8 values of 16 bits that lie 2 or 4 bytes apart. */
QK_INLINE __m128i eight_halves(const uint8_t *p, const int column) {
    if (column == 2) return half_of(p);
    const __m128i mask = _mm_set1_epi32(0xFFFF);
    return _mm_packus_epi32(_mm_and_si128(half_of(p), mask), _mm_and_si128(half_of(p + 16), mask));
}

/* Whole blocks of 16-bit values, 8 x 8 at once. Returns the groups done. */
QK_INLINE int64_t grid_of_halves(uint16_t *block, const uint8_t *rows, const qk_grid *s, const int column) {
    const int64_t groups = (s->groups - (column == 4)) / 8 * 8; /* no byte behind the last value */
    for (int64_t g = 0; g < groups; g += 8)
        for (int64_t r = 0; r < QK_ROWS; r += 8) {
            __m128i v[8], t[8];
            for (int j = 0; j < 8; j++) v[j] = eight_halves(rows + (r + j) * s->row + g * column, column);
            for (int j = 0; j < 8; j += 2) {
                t[j] = _mm_unpacklo_epi16(v[j], v[j + 1]);
                t[j + 1] = _mm_unpackhi_epi16(v[j], v[j + 1]);
            }
            for (int j = 0; j < 8; j += 4) {
                v[j] = _mm_unpacklo_epi32(t[j], t[j + 2]);
                v[j + 1] = _mm_unpackhi_epi32(t[j], t[j + 2]);
                v[j + 2] = _mm_unpacklo_epi32(t[j + 1], t[j + 3]);
                v[j + 3] = _mm_unpackhi_epi32(t[j + 1], t[j + 3]);
            }
            for (int j = 0; j < 4; j++) {
                __m128i *at = (__m128i *)(block + (g + 2 * j) * QK_ROWS + r);
                _mm_storeu_si128(at, _mm_unpacklo_epi64(v[j], v[j + 4]));
                _mm_storeu_si128(at + QK_ROWS / 8, _mm_unpackhi_epi64(v[j], v[j + 4]));
            }
        }
    return groups;
}

/* The longer of two strides is walked outside: lines that were read are used up first. */
#define GRID(type)                                                                          \
    do {                                                                                    \
        const int64_t row = s->row, column = s->column, count = high - low;                 \
        if (row == sizeof(type))                                                            \
            for (int64_t g = done; g < s->groups; g++)                                      \
                memcpy(block + (g * QK_ROWS + low) * sizeof(type), rows + g * column,       \
                       count * sizeof(type));                                               \
        else                                                                                \
            for (int64_t r = 0; r < count; r += 4)                                          \
                for (int64_t g = done, some = qk_min(4, count - r); g < s->groups; g++)     \
                    for (int64_t i = r; i < r + some; i++)                                  \
                        ((type *)block)[g * QK_ROWS + low + i] =                            \
                            *(const type *)(rows + i * row + g * column);                   \
    } while (0)

void qk_load_grid(void *blocks, const void *values, int64_t first, int64_t n, const qk_grid *s) {
    const int64_t start = first / QK_ROWS, stop = qk_div_up(first + n, QK_ROWS);
#pragma omp parallel for schedule(static) if (n * s->groups > 1 << 16)
    for (int64_t b = start; b < stop; b++) {
        const int64_t low = b * QK_ROWS < first ? first - b * QK_ROWS : 0;
        const int64_t high = qk_min(QK_ROWS, first + n - b * QK_ROWS);
        const uint8_t *rows = (const uint8_t *)values + (b * QK_ROWS + low - first) * s->row;
        uint8_t *block = (uint8_t *)blocks + b * s->groups * QK_ROWS * s->size;
        int64_t done = 0; /* groups */
        if (s->size == 2 && high - low == QK_ROWS && s->column == 2)
            done = grid_of_halves((uint16_t *)block, rows, s, 2);
        if (s->size == 2 && high - low == QK_ROWS && s->column == 4)
            done = grid_of_halves((uint16_t *)block, rows, s, 4);
        if (s->size == 1) GRID(uint8_t);
        else if (s->size == 2) GRID(uint16_t);
        else GRID(uint32_t);
    }
}
