/* In which order stored words of codes lie; load.c draws them. */
#ifndef QK_LOAD_H
#define QK_LOAD_H

#include "qk.h"

enum { QK_BY_ROW, QK_BY_WORD, QK_ACROSS, QK_HALVES };

/* Mirrored by loading.py. 8-bit codes are kept less `bias`, modulo 256. */
typedef struct {
    int64_t order, k, width, bias, run;
    int64_t slot[8]; /* QK_ACROSS: nibble that holds row j of 8 */
} qk_source;

void qk_load(void *blocks, const void *stored, int64_t first, int64_t n, const qk_source *);

#endif
