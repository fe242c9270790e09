/* Codes out of blocks, and single rows dequantized (embedding). AVX2 + F16C, written as
 * scalar code; compiled without contraction so that a row equals the float32 oracle bit for bit. */
#include <omp.h>

#include "common.h"
#include "stored.h"

static inline uint32_t join_nibbles(uint32_t w) {
    uint32_t even = w & 0xFFFF, odd = w >> 16;
    even = (even | even << 8) & 0x00FF00FF;
    odd = (odd | odd << 8) & 0x00FF00FF;
    return ((even | even << 4) & 0x0F0F0F0F) | ((odd | odd << 4) & 0x0F0F0F0F) << 4;
}

static inline uint32_t shift_bytes(uint32_t w, uint8_t by) {
    uint32_t out = 0;
    for (int i = 0; i < 4; i++) out |= (uint32_t)(uint8_t)((w >> (8 * i)) + by) << (8 * i);
    return out;
}

/* All `rows` rows of blocks as row-major 32-bit words of codes: the inverse of qk_load's
 * QK_BY_ROW. 8-bit codes are stored less `bias`, modulo 256. */
void qk_unload(const void *blocks, void *stream, int64_t words, int64_t rows, int64_t width,
               int64_t bias) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < qk_div_up(rows, QK_ROWS); b++) {
        const uint32_t *block = (const uint32_t *)blocks + b * words * QK_ROWS;
        const int64_t count = qk_min(QK_ROWS, rows - b * QK_ROWS);
        uint32_t *row = (uint32_t *)stream + b * QK_ROWS * words;
        for (int64_t i = 0; i < words; i++)
            for (int64_t r = 0; r < count; r++) {
                const uint32_t w = block[i * QK_ROWS + r];
                row[r * words + i] = width == 4 ? join_nibbles(w) : shift_bytes(w, (uint8_t)bias);
            }
    }
}

static float factor(const qk_factor *f, const void *base, int64_t block, int64_t k_total, int64_t k,
                    int64_t lane) {
    const int64_t at = (block * qk_div_up(k_total, f->group) + k / f->group) * QK_ROWS + lane;
    switch (f->type) {
    case QK_F32:
    case QK_F16:
    case QK_BF16: return qk_read(base, f->type, at);
    case QK_U8: return ((const uint8_t *)base)[at];
    case QK_I8: return ((const int8_t *)base)[at];
    case QK_SINGLE: return *(const float *)base;
    case QK_DIVISOR: return 1.0f / *(const float *)base;
    default: return f->table[((const uint8_t *)base)[at]];
    }
}

static float product(const qk_factor f[2], const void *const base[2], int64_t block,
                     int64_t k_total, int64_t k, int64_t lane) {
    const float fine = factor(&f[0], base[0], block, k_total, k, lane);
    return f[1].type ? factor(&f[1], base[1], block, k_total, k, lane) * fine : fine;
}

static void row(const qk_op *op, const qk_tensors *t, int64_t n, void *out, int64_t type,
                int64_t at) {
    const int64_t block = n / QK_ROWS, lane = n % QK_ROWS, groups = qk_div_up(op->k, op->group);
    const float *table = qk_table(op, t);
    for (int64_t q = 0; q < groups; q++) {
        const int64_t k0 = q * op->group, k1 = qk_min(op->k, k0 + op->group);
        const float s = product(op->scale, t->scales, block, op->k, k0, lane);
        float shift = -op->shift, o = 0;
        if (op->zero_kind == QK_ZERO_CODE)
            shift = op->bias - ((const uint8_t *)t->zeros)[(block * groups + q) * QK_ROWS + lane];
        if (op->zero_kind == QK_ZERO_FLOAT)
            shift = op->bias - qk_read(t->zeros, op->zero_type, (block * groups + q) * QK_ROWS + lane);
        if (op->zero_kind == QK_ZERO_OFFSET) {
            shift = op->bias;
            o = product(op->offset, t->offset, block, op->k, k0, lane);
        }
        const int add = op->zero_kind == QK_ZERO_OFFSET;
        if (op->width == 4) {
            const uint32_t *w =
                (const uint32_t *)t->codes + (block * op->k + k0) / 8 * QK_ROWS + lane;
            for (int64_t k = k0; k < k1; k += 8, w += QK_ROWS) {
                const uint32_t word = join_nibbles(*w);
                for (int j = 0; j < 8; j++) {
                    const float v = (table[(word >> (4 * j)) & 15] + shift) * s;
                    qk_write(out, type, at + k + j, add ? v + o : v);
                }
            }
        } else {
            const int8_t *c = (const int8_t *)t->codes + (block * op->k + k0) * QK_ROWS + lane * 4;
            for (int64_t k = k0; k < k1; k += 4, c += QK_ROWS * 4)
                for (int j = 0; j < 4; j++) {
                    const float code = op->float8 ? op->float8->values[(uint8_t)c[j]] : (float)c[j];
                    const float v = (code + shift) * s;
                    qk_write(out, type, at + k + j, add ? v + o : v);
                }
        }
    }
}

/* The same of weights in another order, by way of a block that holds this row. Returns 0, or 1 when
 * memory is not there. */
static int stored_row(const qk_op *op, const qk_tensors *t, int64_t n, void *out, int64_t type,
                      int64_t at) {
    void *room = qk_alloc(qk_fetch_bytes(op, 1));
    if (!room) return 1;
    const qk_tensors one = qk_fetch(op, t, n, 1, room);
    row(op, &one, 0, out, type, at);
    free(room);
    return 0;
}

/* y[i] = dequantized row x[i] (int64), in stored column order. 0, 1 when memory is not there, or 2 for
 * an id outside [0, n). */
int qk_rows(const qk_call *c) {
    const qk_op *op = c->op;
    const int64_t *ids = c->x;
    int failed = 0;
    for (int64_t i = 0; i < c->count; i++)
        if (ids[i] < 0 || ids[i] >= op->n) return 2;
#pragma omp parallel for schedule(static) reduction(| : failed) if (c->count * op->k > 1 << 14)
    for (int64_t i = 0; i < c->count; i++) {
        if (op->order) failed |= stored_row(op, &c->tensors, ids[i], c->y, c->xtype, i * op->k);
        else row(op, &c->tensors, ids[i], c->y, c->xtype, i * op->k);
    }
    return failed;
}
