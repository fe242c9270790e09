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
 * those of the blocks. Rows of fields may lie in heads of `head` rows whose halves are interleaved: row
 * i of a head at 2 i, row head / 2 + i at 2 i + 1. x, y and the bias are in order. */
#ifndef QK_STORED_H
#define QK_STORED_H

#include "qk.h"

enum { QK_BLOCKS, QK_ROWS_STORED, QK_WORDS_STORED, QK_ACROSS_STORED, QK_FIELDS_STORED };

/* Where row `r` is stored, and which row is stored at `at`. */
static inline int64_t qk_place_of(const qk_op *op, int64_t r) {
    if (!op->head) return r;
    const int64_t half = op->head / 2, i = r % op->head;
    return r - i + 2 * (i % half) + i / half;
}
static inline int64_t qk_row_at(const qk_op *op, int64_t at) {
    if (!op->head) return at;
    const int64_t i = at % op->head;
    return at - i + i % 2 * (op->head / 2) + i / 2;
}

/* Bytes that `qk_fetch` needs for `blocks` blocks of rows. */
int64_t qk_fetch_bytes(const qk_op *, int64_t blocks);

/* Rows [row, row + rows) as whole blocks of qk.h in `room`, zeros where there are fewer rows; `row`
 * is a multiple of 8. Returns the tensors of those blocks; what no block holds stays as it was. */
qk_tensors qk_fetch(const qk_op *, const qk_tensors *, int64_t row, int64_t rows, void *room);

/* Few tokens without fetching: bfloat16 x by AVX512-BF16, or any x by AVX-512. */
qk_shared_fn qk_shared_stored_bf16, qk_shared_stored_avx512;
int64_t qk_most_stored_bf16(void), qk_most_stored_at_once_bf16(void), qk_most_stored_avx512(void);
int qk_fits_stored_bf16(const qk_op *), qk_fits_stored_avx512(const qk_op *);

#endif
