/* Floats of one type in rows: `columns` places `column` bytes apart, `span` values beside each other in
 * each, rows `row` bytes apart. Mirrored by finite.py. */
#ifndef QK_FINITE_H
#define QK_FINITE_H

#include "qk.h"

typedef struct {
    const void *values;
    int64_t type, rows, columns, span, row, column;
} qk_floats;

/* 1 if every value of all `n` is finite, else 0. */
int qk_all_finite(const qk_floats *, int64_t n);

#endif
