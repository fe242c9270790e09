/* Whether floats are finite, looked at where they lie: beside codes in blocks, or one behind another. A
 * number is finite unless all bits of its exponent are set, and then (bits & exponent) + its lowest bit
 * sets the sign's. Every cache line is read once, which is what it costs. */
#include "finite.h"

#define UNIT (1 << 20) /* bytes that a thread looks at at once */

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
        return span == 1 ? name##_of(row, columns, column, 1, f, low)                                 \
                         : name##_of(row, columns, column, span, f, low);                             \
    }

ROW(narrow, uint16_t)
ROW(wide, uint32_t)

/* Two values of 16 bits side by side are looked at as one. */
static uint32_t pairs(const uint8_t *row, int64_t columns, int64_t column, uint32_t f, uint32_t low) {
    uint32_t bad = 0;
    f |= f << 16, low |= low << 16;
    for (int64_t i = 0; i < columns; i++) bad |= (*(const uint32_t *)(row + i * column) & f) + low;
    return (bad & 0x80008000) != 0;
}

static int64_t rows_of_unit(const qk_floats *a) { return qk_div_up(UNIT, a->row); }

static uint32_t some_rows(const qk_floats *a, int64_t from, int64_t to) {
    const uint32_t f = a->type == QK_F16 ? 0x7C00 : a->type == QK_BF16 ? 0x7F80 : 0x7F800000;
    const uint32_t low = f & (~f + 1);
    const int two = a->type != QK_F32, pair = two && a->span == 2 && a->column > 4;
    uint32_t bad = 0;
    for (int64_t r = from; r < to; r++) {
        const uint8_t *row = (const uint8_t *)a->values + r * a->row;
        bad |= pair  ? pairs(row, a->columns, a->column, f, low)
               : two ? narrow(row, a->columns, a->column, a->span, f, low)
                     : wide(row, a->columns, a->column, a->span, f, low);
    }
    return bad;
}

/* Threads take units as they come: one that others keep from running holds nobody up. */
int qk_all_finite(const qk_floats *all, int64_t n) {
    int64_t units = 0;
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) units += qk_div_up(all[i].rows, rows_of_unit(all + i));
#pragma omp parallel for schedule(dynamic, 1) reduction(| : bad) if (units > 1)
    for (int64_t u = 0; u < units; u++) {
        const qk_floats *a = all;
        int64_t left = u;
        for (int64_t mine; left >= (mine = qk_div_up(a->rows, rows_of_unit(a))); a++) left -= mine;
        const int64_t rows = rows_of_unit(a);
        bad |= some_rows(a, left * rows, qk_min(a->rows, (left + 1) * rows));
    }
    return !bad;
}
