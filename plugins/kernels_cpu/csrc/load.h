/* In which order stored words of codes lie; load.c draws them. */
#ifndef QK_LOAD_H
#define QK_LOAD_H

#include "qk.h"

enum { QK_BY_ROW, QK_BY_WORD, QK_ACROSS, QK_FIELDS, QK_STREAMS, QK_WORD_STREAMS, QK_PAIRS, QK_SWAPPED };

/* `bytes` bytes from `at` on hold `width` bits of each code of a block: value v of every run of
 * `stride` bytes lies in byte v % stride, at bit width * (v / stride). */
typedef struct {
    int64_t at, bytes, width, stride;
} qk_field;

/* Mirrored by loading.py. 8-bit codes are kept less `bias`, modulo 256. QK_FIELDS: rows of blocks
 * of `block` bytes, a code is the bits of its `fields` fields, the first one's lowest. */
typedef struct {
    int64_t order, k, width, bias, isa;
    int64_t slot[8]; /* QK_ACROSS: nibble that holds row j of 8 */
    int64_t block, fields;
    qk_field field[2];
    int64_t bits, planes; /* QK_STREAMS: of a code; whether its bits lie in planes */
} qk_source;

void qk_load(void *blocks, const void *stored, int64_t first, int64_t n, const qk_source *);

/* What AVX-512 does better. `block`: a whole block of 32 rows; 0 where it does not know the source.
 * `columns`: 8 columns of the words [w, stop), first % 32 == 0; returns up to which word. */
typedef struct {
    int (*block)(uint32_t *block, const uint8_t *rows, int64_t row_bytes, const qk_source *);
    int64_t (*columns)(uint32_t *blocks, const uint32_t *in, int64_t words, int64_t per_row,
                       int64_t first, int64_t i, int64_t w, int64_t stop, const qk_source *);
} qk_wide;

extern const qk_wide qk_wide_avx512;

/* It, where the processor has it and is not limited to less; else NULL. */
const qk_wide *qk_wide_here(void);

/* The orders from QK_STREAMS on. */
void qk_load_streams(void *blocks, const void *stored, int64_t first, int64_t n, const qk_source *);

void qk_load_by(void *blocks, const void *stored, int64_t first, int64_t n, const qk_source *,
                const qk_wide *);

/* Values of `size` bytes from rows whose values lie `column` bytes apart and which lie `row` bytes
 * apart, into [block][groups][32] from row `first` on. */
typedef struct {
    int64_t groups, size, row, column;
} qk_grid;

void qk_load_grid(void *blocks, const void *values, int64_t first, int64_t n, const qk_grid *);

#endif
