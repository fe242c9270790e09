/* Whether floats are finite, looked at where they lie: beside codes in blocks, or one behind another. A
 * number is finite unless all bits of its exponent are set, and then (bits & exponent) + its lowest bit
 * sets the sign's. Every cache line is read once, which is what it costs. */
#include "finite.h"

#define LEAST_PARALLEL (1 << 20) /* bytes that the values are spread over */

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

int qk_finite(const qk_floats *a) {
    const uint32_t f = a->type == QK_F16 ? 0x7C00 : a->type == QK_BF16 ? 0x7F80 : 0x7F800000;
    const uint32_t low = f & (~f + 1);
    const int two = a->type != QK_F32, pair = two && a->span == 2 && a->column > 4;
    uint32_t bad = 0;
#pragma omp parallel for reduction(| : bad) if (a->rows * a->row >= LEAST_PARALLEL)
    for (int64_t r = 0; r < a->rows; r++) {
        const uint8_t *row = (const uint8_t *)a->values + r * a->row;
        bad |= pair  ? pairs(row, a->columns, a->column, f, low)
               : two ? narrow(row, a->columns, a->column, a->span, f, low)
                     : wide(row, a->columns, a->column, a->span, f, low);
    }
    return !bad;
}
