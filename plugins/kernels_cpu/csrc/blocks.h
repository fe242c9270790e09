/* What the two ways through a decoder layer share (blocks.c, between.c). Baseline instruction set. */
#ifndef QK_BLOCKS_H
#define QK_BLOCKS_H

#include <string.h>

#include "between_calls.h"
#include "step.h"

enum { ISA_AVX2 = 1, ISA_AVX512 }; /* as in cpu.c */
enum { MOST_CALLS = 7 };           /* of a decoder layer */

#ifdef QK_HAVE_STEP_AVX512
#define UNIT(name, isa) ((isa) >= ISA_AVX512 ? name##_avx512 : name##_avx2)
#else
#define UNIT(name, isa) name##_avx2
#endif

/* The layers one by one, each in several parallel regions; as `qk_decoder_blocks`. */
int qk_decoder_chain(const qk_block *, int64_t n);

/* `call` for `count` rows of x. */
static inline qk_call qk_for_x(const qk_call *call, const void *x, void *y, int64_t type, int64_t count) {
    qk_call c = *call;
    c.x = x, c.y = y, c.xtype = type, c.count = count, c.segments = NULL;
    return c;
}

/* Queries, keys and values of the new tokens: where they lie, and how far those of two sequences. */
typedef struct {
    char *q, *k, *v;
    int64_t q_row, kv_row;
} qk_heads;

/* One layer gives rows of all heads, three give the queries of all rows, then the keys, ... */
static inline qk_heads qk_heads_of(const qk_block *c, char *at) {
    const int64_t one = c->qkv == 1, size = qk_size(c->type), rows = one ? 1 : c->batch;
    const int64_t q_n = c->heads * c->dim, kv_n = c->kv_heads * c->dim, all = q_n + 2 * kv_n;
    char *const k = at + rows * q_n * size;
    return (qk_heads){at, k, k + rows * kv_n * size, one ? all : q_n, one ? all : kv_n};
}

/* Queries turned in place. */
static inline qk_rotate qk_queries_of(const qk_block *c, const qk_heads *t) {
    return (qk_rotate){
        t->q, c->cos, c->sin, t->q, c->type, c->batch, c->heads, 1, c->dim, c->rotated,
        {t->q_row, c->dim, 0}, {t->q_row, c->dim, 0}, {c->angle_stride, 0}, c->isa};
}

/* Keys turned into the cache. */
static inline qk_rotate qk_keys_of(const qk_block *c, const qk_heads *t, int64_t last) {
    return (qk_rotate){
        t->k, c->cos, c->sin, (char *)c->keys + last * c->k_stride[2] * qk_size(c->type), c->type,
        c->batch, c->kv_heads, 1, c->dim, c->rotated,
        {t->kv_row, c->dim, 0}, {c->k_stride[0], c->k_stride[1], 0}, {c->angle_stride, 0}, c->isa};
}

static inline void qk_copy_value(const qk_block *c, const qk_heads *t, int64_t last, int64_t b, int64_t h) {
    const int64_t to = b * c->v_stride[0] + h * c->v_stride[1] + last * c->v_stride[2];
    const int64_t size = qk_size(c->type);
    memcpy((char *)c->values + to * size, t->v + (b * t->kv_row + h * c->dim) * size, c->dim * size);
}

static inline qk_step qk_step_of(const qk_block *c, const qk_heads *t, void *y, const void *mask, int64_t seen) {
    return (qk_step){
        t->q, c->keys, c->values, mask, y, c->type, c->mask_type,
        c->batch, c->heads, c->kv_heads, seen, c->dim, c->dim, {t->q_row, c->dim},
        {c->k_stride[0], c->k_stride[1], c->k_stride[2]},
        {c->v_stride[0], c->v_stride[1], c->v_stride[2]},
        {c->mask_stride[0], c->mask_stride[1], c->mask_stride[2]}, c->scale, c->isa};
}

/* The new token's position, the mask to obey and how many positions there are to read: a mask over
 * room that is not in use yet is obeyed, in whatever way is the fastest. Not 0: outside. */
int qk_look(const qk_block *, int64_t *last, int64_t *seen, const void **mask);

#endif
