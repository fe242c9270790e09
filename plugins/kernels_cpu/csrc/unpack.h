/* Codes of four bits, eight to a 32-bit word; code j of a word lies in its nibble slot[j]. Mirrored by
 * unpack.py. */
#ifndef QK_UNPACK_H
#define QK_UNPACK_H

#include "qk.h"

typedef struct {
    const void *from;
    void *to; /* 8 bytes a word */
    int64_t words, slot[8];
} qk_packed;

/* All `n` of them, threads sharing the words. */
void qk_unpack(const qk_packed *, int64_t n);

#endif
