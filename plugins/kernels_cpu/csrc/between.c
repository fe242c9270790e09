/* Calls between linear layers, and those that run several layers; compiled for the baseline
 * instruction set like cpu.c. */
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"
#include "round_calls.h"

int qk_linear(const qk_call *), qk_linear_shared(const qk_call *, int64_t), qk_attention(const qk_step *);

int qk_rms_norm(const qk_norm *c) { return UNIT(qk_norm, c->isa)(c, omp_get_max_threads()); }

int qk_gated(const qk_gate *c) {
    UNIT(qk_gate, c->isa)(c, omp_get_max_threads());
    return 0;
}

int qk_rotary(const qk_rotate *c) {
    UNIT(qk_rotate, c->isa)(c, omp_get_max_threads());
    return 0;
}

int qk_round(const qk_round_call *c) {
#ifdef QK_HAVE_ROUND_AVX512
    if (c->isa >= ISA_AVX512) return qk_round_avx512(c, omp_get_max_threads());
#endif
    return qk_round_avx2(c, omp_get_max_threads());
}

/* Scratch memory of `sizes` numbers each, in lines of 64 bytes; parts[0] is to be freed. */
static int parts_of(char **parts, const int64_t *sizes, int64_t count, int64_t type) {
    int64_t bytes = 0;
    for (int64_t i = 0; i < count; i++) bytes += qk_div_up(sizes[i] * qk_size(type), 64) * 64;
    void *p = NULL;
    if (posix_memalign(&p, 64, bytes ? (size_t)bytes : 64)) return 1;
    for (int64_t i = 0; i < count; i++) {
        parts[i] = p;
        p = parts[i] + qk_div_up(sizes[i] * qk_size(type), 64) * 64;
    }
    return 0;
}

static int64_t wide_of(const qk_mlp *c) { return c->calls[0].op->n * c->sides / 2; }

/* The MLP with scratch of 2 * wide numbers a row, and, where one layer has both sides, of wide more. */
static int mlp_into(const qk_mlp *c, char *gate, void *gated) {
    const int64_t wide = wide_of(c), half = wide * qk_size(c->type);
    char *up = gate + half * c->count;
    if (c->sides == 2) {
        const qk_call both[2] = {qk_for_x(&c->calls[0], c->x, gate, c->type, c->count),
                                 qk_for_x(&c->calls[1], c->x, up, c->type, c->count)};
        const int status = qk_linear_shared(both, 2);
        if (status) return status;
        const qk_gate g = {gate, up, gate, c->type, c->act, c->count * wide, c->isa};
        qk_gated(&g);
        gated = gate;
    } else {
        const qk_call both = qk_for_x(&c->calls[0], c->x, gate, c->type, c->count);
        const int status = qk_linear(&both);
        if (status) return status;
        for (int64_t row = 0; row < c->count; row++) {
            const char *one = gate + 2 * half * row, *two = one + half;
            const qk_gate g = {c->up_first ? two : one, c->up_first ? one : two,
                               (char *)gated + half * row, c->type, c->act, wide, c->isa};
            qk_gated(&g);
        }
    }
    const qk_call down = qk_for_x(&c->calls[c->sides], gated, c->y, c->type, c->count);
    return qk_linear(&down);
}

int qk_gated_mlp(const qk_mlp *c) {
    char *parts[2];
    const int64_t rows = c->count * wide_of(c), sizes[2] = {2 * rows, c->sides == 1 ? rows : 0};
    if (parts_of(parts, sizes, 2, c->type)) return 1;
    const int status = mlp_into(c, parts[0], parts[1]);
    free(parts[0]);
    return status;
}

/* One norm for each head, in place. */
static int norm_heads(const qk_block *c, int which, char *x, int64_t row, int64_t heads) {
    for (int64_t b = 0; c->norm[which] && b < c->batch; b++) {
        char *at = x + b * row * qk_size(c->type);
        const qk_norm n = {c->norm[which], at, NULL, NULL, at, c->type, c->form[which],
                           heads, c->dim, c->eps[which], c->isa};
        if (qk_rms_norm(&n)) return 1;
    }
    return 0;
}

/* Queries turned in place; keys turned into the cache, values copied there. */
static void into_cache(const qk_block *c, int64_t last, const qk_heads *t) {
    const qk_rotate queries = qk_queries_of(c, t), keys = qk_keys_of(c, t, last);
    qk_rotary(&queries);
    qk_rotary(&keys);
    for (int64_t b = 0; b < c->batch; b++)
        for (int64_t h = 0; h < c->kv_heads; h++) qk_copy_value(c, t, last, b, h);
}

/* Whether the mask shows the positions to `last`, all of them and no other: what a causal mask over
 * a cache of fixed size is for a sequence without padding. */
static int shows_all(const qk_block *c, int64_t last) {
    if (c->mask_type != QK_U8 || c->mask_stride[2] != 1) return 0;
    for (int64_t b = 0; b < (c->mask_stride[0] ? c->batch : 1); b++)
        for (int64_t h = 0; h < (c->mask_stride[1] ? c->heads : 1); h++) {
            const char *m = (const char *)c->mask + b * c->mask_stride[0] + h * c->mask_stride[1];
            char later = 0;
            for (int64_t l = last + 1; l < c->length; l++) later |= m[l];
            if (later || memchr(m, 0, (size_t)last + 1)) return 0;
        }
    return 1;
}

int qk_look(const qk_block *c, int64_t *last, int64_t *seen, const void **mask) {
    *last = c->at ? *c->at : c->length - 1;
    if (*last < 0 || *last >= c->length) return 1;
    const int plain = c->at && c->mask && shows_all(c, *last);
    *mask = plain ? NULL : c->mask;
    *seen = plain ? *last + 1 : c->length;
    return 0;
}

static int one_layer(const qk_block *c, const void *x, void *y) {
    const void *mask;
    int64_t last, seen;
    if (qk_look(c, &last, &seen, &mask)) return QK_OUTSIDE;
    const qk_call *o = c->calls + c->qkv;
    const int64_t rows = c->batch, type = c->type, hidden = c->calls->op->k_in;
    const int64_t q_n = c->heads * c->dim, kv_n = c->kv_heads * c->dim, all = q_n + 2 * kv_n;
    enum { NORMED, HEADS, MIXED, SUM, OUT, SIDES, GATED, PARTS };
    qk_mlp mlp = {o + 1, NULL, NULL, type, c->act, rows, c->sides, c->up_first, c->isa};
    const int64_t wide = wide_of(&mlp);
    const int64_t sizes[PARTS] = {rows * hidden, rows * all, rows * q_n, rows * hidden,
                                  rows * hidden, 2 * rows * wide, c->sides == 1 ? rows * wide : 0};
    char *p[PARTS];
    int status;
    if (parts_of(p, sizes, PARTS, type)) return 1;
    const qk_norm first = {c->norm[0], x, NULL, NULL, p[NORMED], type, c->form[0],
                           rows, hidden, c->eps[0], c->isa};
    if ((status = qk_rms_norm(&first))) goto done;
    const int64_t one = c->qkv == 1;
    const qk_heads t = qk_heads_of(c, p[HEADS]);
    char *const to[3] = {t.q, t.k, t.v};
    qk_call qkv[3];
    for (int64_t i = 0; i < c->qkv; i++) qkv[i] = qk_for_x(&c->calls[i], p[NORMED], to[i], type, rows);
    if ((status = one ? qk_linear(qkv) : qk_linear_shared(qkv, 3))) goto done;
    if ((status = norm_heads(c, 2, t.q, t.q_row, c->heads))) goto done;
    if ((status = norm_heads(c, 3, t.k, t.kv_row, c->kv_heads))) goto done;
    into_cache(c, last, &t);
    const qk_step step = qk_step_of(c, &t, p[MIXED], mask, seen);
    const qk_call out = qk_for_x(o, p[MIXED], p[NORMED], type, rows);
    if ((status = qk_attention(&step)) || (status = qk_linear(&out))) goto done;
    /* the sum goes where x + o(a) is kept, its norm over o(a) itself */
    const qk_norm second = {c->norm[1], x, p[NORMED], p[SUM], p[NORMED], type, c->form[1],
                            rows, hidden, c->eps[1], c->isa};
    mlp.x = p[NORMED], mlp.y = p[OUT];
    if ((status = qk_rms_norm(&second)) || (status = mlp_into(&mlp, p[SIDES], p[GATED]))) goto done;
    UNIT(qk_add, c->isa)(p[SUM], p[OUT], y, type, rows * hidden);
done:
    free(p[0]);
    return status;
}

int qk_decoder_chain(const qk_block *c, int64_t n) {
    int status = 0;
    for (int64_t i = 0; i < n && !status; i++) /* all but the first in place: y is written last */
        status = one_layer(&c[i], i ? c[n - 1].y : c->x, c[n - 1].y);
    return status;
}
