/* Whether floats are finite, looked at where they lie: beside codes in blocks, or one behind another. A
 * number is finite unless all bits of its exponent are set, and then (bits & exponent) + its lowest bit
 * sets the sign's. Every cache line is read once, which is what it costs: of blocks a thread reads in
 * several places at once, since one place brings it a third less than memory gives. */
#include <immintrin.h>

#include "finite.h"

#define UNIT (1 << 20) /* bytes that a thread looks at at once */
#define PLACES 8       /* where it reads at once, */
#define STEP 16        /* values in turn, */
#define AHEAD 2048     /* bytes before they are asked for */

#define LOOP(T, f, low)                                                                    \
    for (int64_t i = 0; i < columns; i++) {                                                \
        const T *v = (const T *)(row + i * column);                                        \
        for (int64_t j = 0; j < span; j++) bad |= (uint32_t)(T)((v[j] & (T)(f)) + (T)(low)); \
    }                                                                                      \
    return bad >> (8 * sizeof(T) - 1) & 1

/* `span` and `column` known to the compiler where values follow each other. */
#define ROW(name, T)                                                                                  \
    static inline __attribute__((always_inline)) uint32_t name##_of(                                  \
        const uint8_t *row, int64_t columns, int64_t column, int64_t span, uint32_t f, uint32_t low) { \
        uint32_t bad = 0;                                                                             \
        LOOP(T, f, low);                                                                              \
    }                                                                                                 \
    static uint32_t name(const uint8_t *row, int64_t columns, int64_t column, int64_t span,           \
                         uint32_t f, uint32_t low) {                                                  \
        if (column == span * (int64_t)sizeof(T))                                                      \
            return name##_of(row, columns * span, sizeof(T), 1, f, low);                              \
        return name##_of(row, columns, column, span, f, low);                                         \
    }

ROW(narrow, uint16_t)
ROW(wide, uint32_t)

/* The lines of the next STEP values that have not been asked for. */
static inline void ask(const uint8_t *v, int64_t column) {
    if (column >= 64)
        for (int64_t j = 0; j < STEP; j++) _mm_prefetch((const char *)v + (STEP + j) * column, _MM_HINT_T0);
    else
        for (int64_t b = 0; b < STEP * column; b += 64) _mm_prefetch((const char *)v + AHEAD + b, _MM_HINT_T0);
}

/* All bits that any of `n` values in blocks of `column` bytes has after the addition. */
#define BLOCKS(name, T)                                                                            \
    static uint32_t name(const uint8_t *values, int64_t n, int64_t column, uint32_t f, uint32_t low) { \
        const int64_t each = n / PLACES / STEP * STEP;                                             \
        uint32_t bad = 0;                                                                          \
        for (int64_t i = 0; i < each; i += STEP)                                                   \
            for (int64_t p = 0; p < PLACES; p++) {                                                 \
                const uint8_t *v = values + (p * each + i) * column;                               \
                ask(v, column);                                                                    \
                for (int64_t j = 0; j < STEP; j++) bad |= (*(const T *)(v + j * column) & f) + low; \
            }                                                                                      \
        for (int64_t i = PLACES * each; i < n; i++)                                                \
            bad |= (*(const T *)(values + i * column) & f) + low;                                  \
        return bad;                                                                                \
    }

BLOCKS(narrow_blocks, uint16_t)
BLOCKS(wide_blocks, uint32_t)

/* Single values in blocks, or two of 16 bits side by side, which are looked at as one. */
static uint32_t blocks(const qk_floats *a, const uint8_t *values, int64_t n, uint32_t f, uint32_t low) {
    if (a->type == QK_F32) return wide_blocks(values, n, a->column, f, low) >> 31;
    if (a->span == 1) return narrow_blocks(values, n, a->column, f, low) >> 15 & 1;
    return (wide_blocks(values, n, a->column, f | f << 16, low | low << 16) & 0x80008000) != 0;
}

static int64_t rows_of_unit(const qk_floats *a) { return qk_div_up(UNIT, a->row); }

static uint32_t some_rows(const qk_floats *a, int64_t from, int64_t to) {
    const uint32_t f = a->type == QK_F16 ? 0x7C00 : a->type == QK_BF16 ? 0x7F80 : 0x7F800000;
    const uint32_t low = f & (~f + 1);
    const int64_t size = a->type == QK_F32 ? 4 : 2;
    const uint8_t *row = (const uint8_t *)a->values + from * a->row;
    const int apart = a->column > a->span * size && a->span * size <= 4;
    if (apart && a->row == a->columns * a->column)
        return blocks(a, row, (to - from) * a->columns, f, low);
    uint32_t bad = 0;
    for (int64_t r = from; r < to; r++, row += a->row)
        bad |= apart       ? blocks(a, row, a->columns, f, low)
               : size == 2 ? narrow(row, a->columns, a->column, a->span, f, low)
                           : wide(row, a->columns, a->column, a->span, f, low);
    return bad;
}

/* Threads take units as they come: one that others keep from running holds nobody up. */
int qk_all_finite(const qk_floats *all, int64_t n) {
    int64_t units = 0;
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) units += qk_div_up(all[i].rows, rows_of_unit(all + i));
#pragma omp parallel reduction(| : bad) if (units > 1)
    {
        const qk_floats *a = all;
        int64_t before = 0; /* units of those before `a`; a thread's own units ascend */
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t u = 0; u < units; u++) {
            for (int64_t mine; u - before >= (mine = qk_div_up(a->rows, rows_of_unit(a))); a++) before += mine;
            const int64_t rows = rows_of_unit(a), from = (u - before) * rows;
            bad |= some_rows(a, from, qk_min(a->rows, from + rows));
        }
    }
    return !bad;
}
