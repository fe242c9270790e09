/* Few tokens on weights where files have them (stored.h): bfloat16 activations by AVX512-BF16, or with
 * QK_STORED_FLOATS any activations by AVX-512. Codes become numbers by a lookup, exact for every value;
 * products are added up in float32. What is left out: groups that fit no vector and more tokens go through
 * blocks (`qk_fetch`), in which the arithmetic is that of kernel.h. */
#include <omp.h>

#include "stored_columns.h"
#include "stored_rows.h"

/* Above MOST_TOKENS, some at a time: each time codes are expanded again, which takes less than to make
 * blocks of them (4096 x 4096, two threads, 8 tokens of words: 0.5 ms, 6 through blocks). */
enum { MOST_IN_TURN = 16 };

int64_t NAME(qk_most_stored)(void) { return MOST_IN_TURN; }
int64_t NAME(qk_most_stored_at_once)(void) { return MOST_TOKENS; }

int NAME(qk_fits_stored)(const qk_op *op) {
    const int64_t g = op->group;
    if (op->width == 8) return g == 32 || g % 64 == 0 || g == op->k;
    if (op->order == QK_WORDS_STORED) return g % 8 == 0;
    if (op->order == QK_ACROSS_STORED) return g % 2 == 0;
    return g == 32 || g == 64 || g % PIECE == 0 || g == op->k;
}

/* What one thread needs for one layer. */
typedef struct {
    arranged a;
    float *sum; /* [tokens][outputs], of words and across: of a part */
    float acc[MOST_TOKENS * QK_ROWS], lines[MOST_TOKENS * QK_ROWS * 16]; /* of rows: sums, and their lanes */
} room;

#define ROWS_CASE(N)                                                               \
    case N:                                                                        \
        if (w->op->width == 8 && fields) rows_of(w, row, count, lines, N, 8, FIELDS);  \
        else if (w->op->width == 8 && wide) rows_of(w, row, count, lines, N, 8, WIDE); \
        else if (w->op->width == 8) rows_of(w, row, count, lines, N, 8, LANES);        \
        else if (offset) rows_of(w, row, count, lines, N, 4, FIELDS_OFFSET);       \
        else if (fields) rows_of(w, row, count, lines, N, 4, FIELDS);              \
        else if (wide) rows_of(w, row, count, lines, N, 4, WIDE);                  \
        else rows_of(w, row, count, lines, N, 4, LANES);                           \
        break;

static void block_of_rows(const row_work *w, int64_t row, int64_t count, int64_t tokens, float *lines) {
    const qk_op *op = w->op;
    const int fields = op->order == QK_FIELDS_STORED, offset = fields && op->zero_kind == QK_ZERO_OFFSET;
    const int wide = is_wide(op);
    switch (tokens) {
        ROWS_CASE(1)
        ROWS_CASE(2)
        ROWS_CASE(3)
        ROWS_CASE(4)
    }
}

/* Blocks [from, to) of 32 rows. */
static void by_rows(const qk_call *c, room *m, int64_t from, int64_t to) {
    const qk_op *op = c->op;
    const qk_tensors *t = &c->tensors;
    const row_work w = row_work_of(op, t, &m->a);
    for (int64_t block = from; block < to; block++) {
        const int64_t first = block * QK_ROWS, count = qk_min(QK_ROWS, op->n - first);
        block_of_rows(&w, first, count, c->count, m->lines);
        for (int64_t i = 0; i < c->count * QK_ROWS; i += 16)
            _mm512_storeu_ps(m->acc + i, sums_of_lanes(m->lines + i * 16));
        for (int64_t i = 0; i < c->count; i++) {
            const float *sums = m->acc + i * QK_ROWS;
            if (!op->head)
                qk_store(sums, count, t->bias, op->bias_type, c->y, c->xtype, i * op->n + first, first);
            else
                for (int64_t r = 0; r < count; r++) {
                    const int64_t row = qk_row_at(op, first + r);
                    qk_store(sums + r, 1, t->bias, op->bias_type, c->y, c->xtype, i * op->n + row, row);
                }
        }
    }
}

static int64_t units(const qk_call *c) { return is_columns(c->op) ? column_units(c) : qk_blocks(c->op); }

/* One thread's share of a call: units [from, to) of all layers' units in a row. Every thread arranges
 * x for itself. Returns 0, or 1 when memory is not there. */
static int some_units(const qk_call *calls, int64_t n, int64_t from, int64_t to, float *totals) {
    const int64_t tokens = calls->count;
    enum { X, SUMS, LANE_SUMS, GROUPS, SCALES, SUM, ROW, ROOMS };
    int64_t bytes[ROOMS] = {0}, first = 0;
    for (int64_t i = 0; i < n; i++) {
        const qk_op *op = calls[i].op;
        const int64_t need[ROOMS] = {tokens * padded(op->k) * (int64_t)sizeof(xelem), tokens * parts_of(op) * 4, tokens * padded(op->k) / 2,
                                     padded(op->k) / 64 * 4, 16 * scale_room(op),
                                     is_columns(op) ? MOST_SUMS * 4 : 0, padded(op->k) * ROW_BYTES};
        for (int r = 0; r < ROOMS; r++)
            if (bytes[r] < need[r]) bytes[r] = qk_div_up(need[r], 64) * 64;
    }
    int64_t at[ROOMS], all_bytes = 0;
    for (int r = 0; r < ROOMS; r++) at[r] = all_bytes, all_bytes += bytes[r];
    char *scratch = qk_alloc(all_bytes);
    if (!scratch) return 1;
    room m = {.a = {.x = scratch + at[X], .row = scratch + at[ROW], .sums = (float *)(scratch + at[SUMS]),
                    .lanes = (float *)(scratch + at[LANE_SUMS]), .piece_group = (int32_t *)(scratch + at[GROUPS]),
                    .scales = (float *)(scratch + at[SCALES])},
              .sum = (float *)(scratch + at[SUM])};
    for (int64_t i = 0; i < n; i++) {
        const qk_op *op = calls[i].op;
        const int64_t all = units(calls + i), low = from - first, high = to - first;
        const int64_t begin = low < 0 ? 0 : low, end = qk_min(high, all);
        float *const mine = totals;
        first += all;
        if (is_columns(op)) totals += totals_of(calls + i);
        if (begin >= end) continue;
        const arranged *a = &m.a;
        const int kept = a->order == op->order && a->k == op->k && a->group == op->group &&
                         (op->zero_kind == QK_ZERO_FOLDED || a->with_sums) && a->width == op->width;
        if (!kept) arrange(&m.a, op, calls->x, calls->xtype, tokens);
        if (is_columns(op)) by_columns(calls + i, &m.a, m.sum, mine, begin, end);
        else by_rows(calls + i, &m, begin, end);
    }
    free(scratch);
    return 0;
}

/* One of `team` threads' share of the outputs whose totals are there. */
static void finish(const qk_call *calls, int64_t n, const float *totals, int64_t id, int64_t team) {
    for (int64_t i = 0; i < n; i++) {
        if (!is_columns(calls[i].op)) continue;
        const int64_t all = chunks_of(calls + i);
        finish_columns(calls + i, totals, all * id / team, all * (id + 1) / team);
        totals += totals_of(calls + i);
    }
}

/* At most MOST_TOKENS tokens. */
static int some_tokens(const qk_call *calls, int64_t n, int64_t threads) {
    int64_t all = 0, work = 0, room = 0;
    int failed = 0;
    for (int64_t i = 0; i < n; i++) {
        all += units(calls + i);
        work += calls[i].op->n * calls[i].op->k * calls->count;
        if (is_columns(calls[i].op)) room += totals_of(calls + i);
    }
    float *totals = room ? qk_alloc(room * sizeof *totals) : NULL;
    if (room && !totals) return 1;
#pragma omp parallel num_threads(threads) if (work >= 1 << 16) reduction(| : failed)
    {
        const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
        failed |= some_units(calls, n, all * id / team, all * (id + 1) / team, totals);
        if (room) {
#pragma omp barrier
            finish(calls, n, totals, id, team);
        }
    }
    free(totals);
    return failed;
}

int NAME(qk_shared_stored)(const qk_call *calls, int64_t n, int64_t threads) {
    const int64_t tokens = calls->count, k = calls->op->k, size = qk_size(calls->xtype), turns = qk_div_up(tokens, MOST_TOKENS);
    if (turns == 1) return some_tokens(calls, n, threads);
    qk_call *part = qk_alloc(n * sizeof *part);
    int failed = !part;
    for (int64_t i = 0; i < turns && !failed; i++) { /* even turns: 5 tokens make 3 and 2 */
        const int64_t first = tokens * i / turns, count = tokens * (i + 1) / turns - first;
        for (int64_t j = 0; j < n; j++) {
            part[j] = calls[j];
            part[j].x = (const char *)calls[j].x + first * k * size;
            part[j].y = (char *)calls[j].y + first * calls[j].op->n * size;
            part[j].count = count;
        }
        failed = some_tokens(part, n, threads);
    }
    free(part);
    return failed;
}
