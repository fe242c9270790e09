/* Decoder layers one after another, for one new token a sequence, in one parallel region.
 *
 * A small model's layer takes some 50 us, in which opening a region for every product costs as much as
 * the second thread gains. Here threads meet where one needs what the others made, six times a layer:
 *
 *     norm, q k v | keys into the cache | turn, attend | o | add, norm, gate up, gate | down, add |
 *
 * What is short (norms, sums) every thread computes for itself; rows of weights, heads and features
 * are shared out evenly. Each number is computed by the functions of the single calls, so that results
 * are theirs bit for bit. What is left out goes through `between.c`: kernels that run only as a
 * whole, and gate and up as one layer whose halves share a block. */
#include <omp.h>
#include <stdlib.h>
#include <string.h>

#include "blocks.h"
#include "region.h"

/* What is the same for all threads: a layer, and where its parts lie. */
typedef struct {
    const qk_block *c;
    int64_t last, seen; /* the new token's position, positions to read */
    const void *mask;
    qk_part_fn *qkv, *o, *sides, *down;
} layer;

typedef struct {
    char *heads, *mixed, *out, *gate, *gated, *next;
    meeting meeting;
} common;

typedef struct {
    int id, team;
    char *normed, *sum;
    float *room, *scores;
} own;

static int64_t from_of(const own *o, int64_t all) { return all * o->id / o->team; }
static int64_t to_of(const own *o, int64_t all) { return all * (o->id + 1) / o->team; }

/* This thread's share of `n` layers of one x. */
static int products(qk_part_fn *part, const own *o, const qk_call *calls, int64_t n) {
    int64_t all = 0;
    for (int64_t i = 0; i < n; i++) all += qk_blocks(calls[i].op);
    return part(calls, n, from_of(o, all), to_of(o, all));
}

/* One norm for each of some heads, in place. */
static void norm_heads(const qk_block *c, const own *o, int which, char *x, int64_t heads) {
    if (!c->norm[which]) return;
    const qk_norm n = {c->norm[which], x, NULL, NULL, x, c->type, c->form[which],
                       heads, c->dim, c->eps[which], c->isa};
    UNIT(qk_norm_rows, c->isa)(&n, o->room);
}

/* Keys of the new tokens turned into the cache, values copied there. */
static void fill_cache(const layer *l, const common *m, const own *o) {
    const qk_block *c = l->c;
    const int64_t size = qk_size(c->type), all = c->batch * c->kv_heads;
    const qk_heads t = qk_heads_of(c, m->heads);
    for (int64_t at = from_of(o, all); at < to_of(o, all); at++) {
        const int64_t b = at / c->kv_heads, h = at % c->kv_heads;
        const qk_rotate keys = qk_keys_of(c, &t, l->last);
        norm_heads(c, o, 3, t.k + (b * t.kv_row + h * c->dim) * size, 1);
        UNIT(qk_rotate_some, c->isa)(&keys, at, at + 1);
        qk_copy_value(c, &t, l->last, b, h);
    }
}

static void attend(const layer *l, const common *m, const own *o) {
    const qk_block *c = l->c;
    const int64_t all = c->batch * c->heads, from = from_of(o, all), to = to_of(o, all);
    const qk_heads t = qk_heads_of(c, m->heads);
    const qk_rotate queries = qk_queries_of(c, &t);
    for (int64_t at = from; at < to; at++) {
        const int64_t b = at / c->heads, h = at % c->heads;
        norm_heads(c, o, 2, t.q + (b * t.q_row + h * c->dim) * qk_size(c->type), 1);
    }
    UNIT(qk_rotate_some, c->isa)(&queries, from, to);
    const qk_step step = qk_step_of(c, &t, m->mixed, l->mask, l->seen);
    UNIT(qk_step_heads, c->isa)(&step, from, to, o->scores);
}

/* Features [from, to) of act(gate) * up, whose rows lie `row` numbers apart. */
static void gate_rows(const qk_block *c, const char *gate, const char *up, int64_t row, char *y,
                      int64_t wide, int64_t from, int64_t to) {
    const int64_t size = qk_size(c->type);
    for (int64_t b = 0; b < c->batch; b++) {
        const qk_gate g = {gate + b * row * size, up + b * row * size, y + b * wide * size,
                           c->type, c->act, wide, c->isa};
        UNIT(qk_gate_some, c->isa)(&g, from, to);
    }
}

/* gate and up, blocks of both that belong together, and the product of the two. */
static int gated(const layer *l, const common *m, const own *o) {
    const qk_block *c = l->c;
    const qk_call *calls = c->calls + c->qkv + 1;
    const int64_t wide = calls->op->n * c->sides / 2, size = qk_size(c->type);
    const int64_t all = qk_div_up(wide, QK_ROWS), a = from_of(o, all), b = to_of(o, all);
    const int64_t from = a * QK_ROWS, to = qk_min(b * QK_ROWS, wide);
    int failed;
    if (c->sides == 2) {
        char *const up = m->gate + c->batch * wide * size;
        const qk_call gate = qk_for_x(calls, o->normed, m->gate, c->type, c->batch);
        const qk_call other = qk_for_x(calls + 1, o->normed, up, c->type, c->batch);
        failed = l->sides(&gate, 1, a, b) | l->sides(&other, 1, a, b);
        gate_rows(c, m->gate, up, wide, m->gated, wide, from, to);
    } else {
        const qk_call both = qk_for_x(calls, o->normed, m->gate, c->type, c->batch);
        const char *second = m->gate + wide * size;
        failed = l->sides(&both, 1, a, b) | l->sides(&both, 1, all + a, all + b);
        gate_rows(c, c->up_first ? second : m->gate, c->up_first ? m->gate : second, 2 * wide,
                  m->gated, wide, from, to);
    }
    return failed;
}

/* down, and the sum with what went around the MLP, into y. */
static int finished(const layer *l, const common *m, const own *o, char *y) {
    const qk_block *c = l->c;
    const qk_call *call = c->calls + c->qkv + 1 + c->sides;
    const qk_call down = qk_for_x(call, m->gated, m->out, c->type, c->batch);
    const int failed = products(l->down, o, &down, 1);
    const int64_t n = call->op->n, all = qk_blocks(call->op), size = qk_size(c->type);
    const int64_t from = from_of(o, all) * QK_ROWS, to = qk_min(to_of(o, all) * QK_ROWS, n);
    for (int64_t b = 0; b < c->batch && from < to; b++) {
        const int64_t at = (b * n + from) * size;
        UNIT(qk_add, c->isa)(o->sum + at, m->out + at, y + at, c->type, to - from);
    }
    return failed;
}

/* One thread's share of a layer. A thread that lacks memory still meets the others. */
static int share(const layer *l, common *m, const own *o, const char *x, char *y) {
    const qk_block *c = l->c;
    const int64_t rows = c->batch, hidden = c->calls->op->k_in;
    const qk_norm first = {c->norm[0], x, NULL, NULL, o->normed, c->type, c->form[0],
                           rows, hidden, c->eps[0], c->isa};
    UNIT(qk_norm_rows, c->isa)(&first, o->room);
    const qk_heads t = qk_heads_of(c, m->heads);
    char *const to[3] = {t.q, t.k, t.v};
    qk_call qkv[3];
    for (int64_t i = 0; i < c->qkv; i++) qkv[i] = qk_for_x(&c->calls[i], o->normed, to[i], c->type, rows);
    int failed = products(l->qkv, o, qkv, c->qkv);
    meet(&m->meeting, o->team);
    fill_cache(l, m, o);
    meet(&m->meeting, o->team);
    attend(l, m, o);
    meet(&m->meeting, o->team);
    const qk_call out = qk_for_x(c->calls + c->qkv, m->mixed, m->out, c->type, rows);
    failed |= products(l->o, o, &out, 1);
    meet(&m->meeting, o->team);
    const qk_norm second = {c->norm[1], x, m->out, o->sum, o->normed, c->type, c->form[1],
                            rows, hidden, c->eps[1], c->isa};
    UNIT(qk_norm_rows, c->isa)(&second, o->room);
    failed |= gated(l, m, o);
    meet(&m->meeting, o->team);
    failed |= finished(l, m, o, y); /* x was read for the last time before they met */
    meet(&m->meeting, o->team);
    return failed;
}

/* 0, QK_OUTSIDE, or -1 where a layer cannot be had in parts. */
static int plan(const qk_block *c, layer *l) {
    *l = (layer){.c = c};
    if (qk_look(c, &l->last, &l->seen, &l->mask)) return QK_OUTSIDE;
    qk_call calls[MOST_CALLS];
    const int64_t o = c->qkv, sides = o + 1, down = sides + c->sides;
    for (int64_t i = 0; i <= down; i++) calls[i] = qk_for_x(&c->calls[i], NULL, NULL, c->type, c->batch);
    l->qkv = qk_part_of(calls, c->qkv), l->o = qk_part_of(calls + o, 1);
    l->sides = qk_part_of(calls + sides, c->sides), l->down = qk_part_of(calls + down, 1);
    const int halves = c->sides == 2 || calls[sides].op->n % (2 * QK_ROWS) == 0;
    return l->qkv && l->o && l->sides && l->down && halves ? 0 : -1;
}

/* Multiplications of a layer: a smaller one is done before another thread is awake. */
static int64_t work_of(const qk_block *c) {
    int64_t work = 0;
    for (int64_t i = 0; i < c->qkv + c->sides + 2; i++) work += c->calls[i].op->n * c->calls[i].op->k;
    return work * c->batch;
}

static int run(const layer *l, int64_t n) {
    enum { HEADS, MIXED, OUT, GATE, GATED, NEXT, COMMON };
    enum { NORMED = COMMON, SUM, ROOM, SCORES, ALL };
    const qk_block *c = l->c;
    const int64_t rows = c->batch, hidden = c->calls->op->k_in, size = qk_size(c->type);
    int64_t seen = 0, wide = 0, own_bytes = 0, common_bytes = 0, at[ALL];
    for (int64_t i = 0; i < n; i++) {
        const int64_t mine = l[i].c->calls[c->qkv + 1].op->n * c->sides / 2;
        seen = seen < l[i].seen ? l[i].seen : seen, wide = wide < mine ? mine : wide;
    }
    const int64_t bytes[ALL] = {
        rows * (c->heads + 2 * c->kv_heads) * c->dim * size, rows * c->heads * c->dim * size,
        rows * hidden * size, 2 * rows * wide * size, rows * wide * size, rows * hidden * size,
        rows * hidden * size, rows * hidden * size,
        2 * (hidden < c->dim ? c->dim : hidden) * (int64_t)sizeof(float),
        qk_step_room(seen) * (int64_t)sizeof(float)};
    for (int i = 0; i < ALL; i++) {
        int64_t *sum = i < COMMON ? &common_bytes : &own_bytes;
        at[i] = *sum, *sum += qk_div_up(bytes[i], 64) * 64;
    }
    const int64_t threads = work_of(c) * n < 1 << 17 ? 1 : omp_get_max_threads();
    void *scratch;
    if (posix_memalign(&scratch, 64, (size_t)(common_bytes + threads * own_bytes))) return 1;
    char *const p = scratch;
    common m = {p + at[HEADS], p + at[MIXED], p + at[OUT], p + at[GATE], p + at[GATED], p + at[NEXT], {0}};
    int failed = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        char *const q = p + common_bytes + omp_get_thread_num() * own_bytes;
        const own o = {omp_get_thread_num(), omp_get_num_threads(), q + at[NORMED], q + at[SUM],
                       (float *)(q + at[ROOM]), (float *)(q + at[SCORES])};
        for (int64_t i = 0; i < n; i++)
            failed |= share(&l[i], &m, &o, i ? m.next : c->x, i == n - 1 ? l[i].c->y : m.next);
    }
    free(scratch);
    return failed;
}

int qk_decoder_blocks(const qk_block *c, int64_t n) {
    layer *l = malloc((size_t)n * sizeof *l);
    if (!l) return 1;
    int status = 0;
    for (int64_t i = 0; i < n && status <= 0; i++) {
        const int one = plan(&c[i], &l[i]);
        if (one) status = one;
    }
    if (!status) status = run(l, n);
    free(l);
    return status < 0 ? qk_decoder_chain(c, n) : status;
}

int qk_decoder_block(const qk_block *c) { return qk_decoder_blocks(c, 1); }
