/* Blocks of qk.h out of the orders of stored.h, a few at a time into memory that the caches hold: what
 * the kernels for many tokens, for other types and for embeddings read. Needs BMI2. */
#include <immintrin.h>
#include <string.h>

#include "load.h"
#include "stored.h"

#define LINE 16 /* words of a row that are taken at once */

/* n0 n1 .. n7 -> n0 n2 n4 n6 | n1 n3 n5 n7 */
static inline uint32_t split(uint32_t w) {
    return _pext_u32(w, 0x0F0F0F0F) | _pext_u32(w, 0xF0F0F0F0) << 16;
}

/* The same in steps that vectors have. */
static inline uint32_t split_in_steps(uint32_t w) {
    uint32_t even = w & 0x0F0F0F0F, odd = w >> 4 & 0x0F0F0F0F;
    even = (even | even >> 4) & 0x00FF00FF;
    odd = (odd | odd >> 4) & 0x00FF00FF;
    return ((even | even >> 8) & 0xFFFF) | (odd | odd >> 8) << 16;
}

/* How `qk_wide` knows these codes. */
static qk_source source_of(const qk_op *op) {
    qk_source s = {.k = op->k, .width = op->width, .block = op->block, .fields = 1, .bits = op->width};
    s.order = op->order == QK_FIELDS_STORED ? QK_FIELDS : op->order == QK_ROWS_STORED ? QK_BY_ROW : QK_ACROSS;
    s.bias = op->bias == 128 ? 128 : 0;
    s.field[0] = (qk_field){op->at, 4 * op->width, op->width, op->width == 4 ? 16 : 1};
    static const int64_t slot[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    memcpy(s.slot, slot, sizeof slot);
    return s;
}

/* The same of 8 codes in the low nibbles of 8 bytes. */
static inline uint32_t split_bytes(uint64_t v) {
    return (uint32_t)(_pext_u64(v, 0x000F000F000F000F) | _pext_u64(v, 0x0F000F000F000F00) << 16);
}

static void fetch_rows(const qk_op *op, const uint8_t *codes, int64_t rows, uint32_t *out) {
    const int64_t words = op->k * op->width / 32;
    const uint32_t flip = op->bias == 128 ? 0x80808080 : 0;
    for (int64_t line = 0; line < words; line += LINE)
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *row = codes + r * words * 4;
            for (int64_t i = line; i < qk_min(line + LINE, words); i++) {
                uint32_t w;
                memcpy(&w, row + i * 4, sizeof w);
                out[i * QK_ROWS + r] = op->width == 4 ? split(w) : w ^ flip;
            }
        }
}

static void fetch_fields(const qk_op *op, const uint8_t *codes, const int64_t *place, int64_t rows,
                         uint32_t *out) {
    const int64_t blocks = op->k / 32, words = op->width; /* of a block */
    for (int64_t b = 0; b < blocks; b++)
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *at = codes + (place[r] * blocks + b) * op->block + op->at;
            uint32_t *to = out + b * words * QK_ROWS + r;
            uint64_t half[2];
            memcpy(half, at, sizeof half);
            if (op->width == 8) {
                uint32_t w[8];
                memcpy(w, at, sizeof w);
                for (int i = 0; i < 8; i++) to[i * QK_ROWS] = w[i];
                continue;
            }
            for (int i = 0; i < 2; i++) {
                to[i * QK_ROWS] = split_bytes(half[i]);
                to[(2 + i) * QK_ROWS] = split_bytes(half[i] >> 4);
            }
        }
}

static void fetch_words(const qk_op *op, const uint8_t *codes, int64_t rows, uint32_t *out) {
    const uint32_t *in = (const uint32_t *)codes;
    for (int64_t i = 0; i < op->k / 8; i++, in += op->n)
        for (int64_t r = 0; r < rows; r++) out[i * QK_ROWS + r] = split_in_steps(in[r]);
}

/* v[t] nibble s <-> v[s] nibble t */
static inline void turn_nibbles(uint32_t v[8]) {
    static const uint32_t mask[3] = {0x0000FFFF, 0x00FF00FF, 0x0F0F0F0F};
    for (int step = 4, i = 0; step; step /= 2, i++)
        for (int a = 0; a < 8; a++) {
            if (a & step) continue;
            const uint32_t d = (v[a] >> 4 * step ^ v[a + step]) & mask[i];
            v[a + step] ^= d;
            v[a] ^= d << 4 * step;
        }
}

static void fetch_across(const qk_op *op, const uint8_t *codes, int64_t rows, uint32_t *out) {
    static const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7}; /* of rows in a word, and of columns in a block's */
    const uint32_t *in = (const uint32_t *)codes;
    const int64_t per_row = op->n / 8;
    for (int64_t i = 0; i < op->k / 8; i++, in += 8 * per_row)
        for (int64_t r = 0; r < rows; r += 8) {
            uint32_t v[8];
            for (int j = 0; j < 8; j++) v[j] = in[order[j] * per_row + r / 8];
            turn_nibbles(v);
            for (int j = 0; j < 8; j++) out[i * QK_ROWS + r + order[j]] = v[j];
        }
}

/* Values of `size` bytes, `row` and `column` apart, of the rows at `place`, into [groups][32]. */
static void fetch_grid(const uint8_t *in, int64_t size, int64_t row, int64_t column,
                       const int64_t *place, int64_t rows, int64_t groups, uint8_t *out) {
    if (size == 2 && rows == QK_ROWS && column > size) { /* along four rows, a word of them at once */
        for (int64_t r = 0; r < rows; r += 4) {
            const uint8_t *at[4];
            for (int i = 0; i < 4; i++) at[i] = in + place[r + i] * row;
            for (int64_t q = 0; q < groups; q++) {
                uint16_t four[4];
                for (int i = 0; i < 4; i++) memcpy(&four[i], at[i] + q * column, 2);
                memcpy(out + (q * QK_ROWS + r) * 2, four, sizeof four);
            }
        }
        return;
    }
    for (int64_t q = 0; q < groups; q++)
        for (int64_t r = 0; r < rows; r++) {
            const uint8_t *from = in + place[r] * row + q * column;
            uint8_t *to = out + (q * QK_ROWS + r) * size;
            if (size == 1) *to = *from;
            else if (size == 2) memcpy(to, from, 2);
            else memcpy(to, from, 4);
        }
}

static int64_t grid_bytes(const qk_op *op, int64_t blocks, int64_t size) {
    return qk_div_up(blocks * qk_div_up(op->k, op->group) * QK_ROWS * size, 64) * 64;
}

static int64_t code_bytes(const qk_op *op) { return QK_ROWS * op->k * op->width / 8; }

int64_t qk_fetch_bytes(const qk_op *op, int64_t blocks) {
    if (op->order == QK_BLOCKS) return 0;
    return qk_div_up(blocks * code_bytes(op), 64) * 64 + grid_bytes(op, blocks, qk_size(op->scale[0].type)) +
           (op->zero_kind == QK_ZERO_CODE ? grid_bytes(op, blocks, 1) : 0) +
           (op->offset[0].type ? grid_bytes(op, blocks, qk_size(op->offset[0].type)) : 0);
}

static void places(const qk_op *op, int64_t first, int64_t rows, int64_t *out) {
    for (int64_t r = 0; r < rows; r++) out[r] = qk_place_of(op, first + r);
}

qk_tensors qk_fetch(const qk_op *op, const qk_tensors *t, int64_t row, int64_t rows, void *room) {
    const int64_t groups = qk_div_up(op->k, op->group), blocks = qk_div_up(rows, QK_ROWS);
    const int across = op->order == QK_WORDS_STORED || op->order == QK_ACROSS_STORED;
    const int fields = op->order == QK_FIELDS_STORED;
    const int64_t row_bytes = fields ? op->k / 32 * op->block : op->k * op->width / 8;
    uint8_t *at = room;
    int64_t place[QK_ROWS];
    qk_tensors out = *t;
    const qk_source source = source_of(op);
    const qk_wide *wide = op->order == QK_WORDS_STORED ? NULL : qk_wide_here();
    int64_t done = 0; /* rows */
    if (rows % QK_ROWS) memset(room, 0, qk_fetch_bytes(op, blocks));
    if (wide && op->order == QK_ACROSS_STORED && op->k % 8 == 0) {
        const uint32_t *in = (const uint32_t *)((const uint8_t *)t->codes + row / 2);
        for (int64_t i = 0; i < op->k / 8; i++)
            done = 8 * wide->columns(room, in, op->k / 8, op->n / 8, 0, i, 0, rows / 8, &source);
        done = done / QK_ROWS * QK_ROWS;
    }
    out.codes = at;
    for (int64_t b = 0; b < blocks; b++, at += code_bytes(op)) {
        const int64_t first = row + b * QK_ROWS, count = qk_min(QK_ROWS, row + rows - first);
        const uint8_t *codes = t->codes;
        uint32_t *to = (uint32_t *)at;
        if (b * QK_ROWS < done) continue;
        if (wide && !across && count == QK_ROWS && (!op->head || op->head % (2 * QK_ROWS) == 0)) {
            const int64_t apart = op->head ? 2 * row_bytes : row_bytes; /* halves are interleaved */
            if (wide->block(to, codes + qk_place_of(op, first) * row_bytes, apart, &source)) continue;
        }
        if (op->order == QK_WORDS_STORED) fetch_words(op, codes + first * 4, count, to);
        else if (op->order == QK_ACROSS_STORED) fetch_across(op, codes + first / 2, count, to);
        else if (fields) {
            places(op, first, count, place);
            fetch_fields(op, codes, place, count, to);
        }
        else fetch_rows(op, codes + first * row_bytes, count, to);
    }
    at = (uint8_t *)room + qk_div_up(blocks * code_bytes(op), 64) * 64;
    struct {
        const void **tensor;
        int64_t size, place; /* in a block of fields */
    } grids[3] = {{&out.scales[0], qk_size(op->scale[0].type), 0},
                  {&out.zeros, op->zero_kind == QK_ZERO_CODE ? 1 : 0, 0},
                  {&out.offset[0], op->offset[0].type ? qk_size(op->offset[0].type) : 0, 2}};
    for (int i = 0; i < 3; i++) {
        const int64_t size = grids[i].size;
        if (!size) continue;
        const int64_t by_row = fields ? row_bytes : across ? size : groups * size;
        const int64_t by_group = fields ? op->block : across ? op->n * size : size;
        const uint8_t *in = fields ? (const uint8_t *)t->codes + grids[i].place : *grids[i].tensor;
        for (int64_t b = 0; b < blocks; b++) {
            const int64_t first = row + b * QK_ROWS, count = qk_min(QK_ROWS, row + rows - first);
            places(op, first, count, place);
            fetch_grid(in, size, by_row, by_group, place, count, groups, at + b * groups * QK_ROWS * size);
        }
        *grids[i].tensor = at;
        at += grid_bytes(op, blocks, size);
    }
    return out;
}
