/* Weights in the order in which files store them (qk_op.order), used where they lie:
 *
 *     QK_ROWS_STORED     [N][K]         a row's codes follow each other, lowest bits first
 *     QK_WORDS_STORED    [K / 8][N]     words of 8 codes of one row, lowest bits first
 *     QK_ACROSS_STORED   [K][N / 8]     words of 8 rows' codes of one column; rows 0 2 4 6 1 3 5 7
 *     QK_FIELDS_STORED   [N][K / 32]    blocks of `block` bytes: a float16 scale, a float16 offset
 *                                       where there is one, 32 codes from byte `at` on. Of 4 bits:
 *                                       byte i holds code i and, above it, code 16 + i
 *
 * Scales and zero points lie [N][groups]; beside words and across [groups][N]; in fields they are
 * those of the blocks. */
#ifndef QK_STORED_H
#define QK_STORED_H

#include "qk.h"

enum { QK_BLOCKS, QK_ROWS_STORED, QK_WORDS_STORED, QK_ACROSS_STORED, QK_FIELDS_STORED };

/* Bytes that `qk_fetch` needs for `blocks` blocks of rows. */
int64_t qk_fetch_bytes(const qk_op *, int64_t blocks);

/* Rows [row, row + rows) as whole blocks of qk.h in `room`, zeros where there are fewer rows; `row`
 * is a multiple of 8. Returns the tensors of those blocks; what no block holds stays as it was. */
qk_tensors qk_fetch(const qk_op *, const qk_tensors *, int64_t row, int64_t rows, void *room);

/* Few tokens without fetching: bfloat16 x, AVX512-BF16. */
qk_shared_fn qk_shared_stored;
int64_t qk_most_stored(void);
int qk_fits_stored(const qk_op *);

#endif
