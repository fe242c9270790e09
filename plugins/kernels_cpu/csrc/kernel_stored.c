/* Few tokens on weights where files have them (stored.h): bfloat16 activations, AVX512-BF16. Codes
 * become bfloat16 by a lookup, exact for every value; products are exact and added up in float32.
 * What is left out: other types of x, groups that fit no vector and more tokens go through blocks
 * (`qk_fetch`), in which the arithmetic is that of kernel.h. */
#include <omp.h>

#include "stored_columns.h"
#include "stored_rows.h"

int64_t qk_most_stored(void) { return MOST_TOKENS; }

int qk_fits_stored(const qk_op *op) {
    const int64_t g = op->group;
    if (op->width == 8) return g >= 32;
    if (op->order == QK_WORDS_STORED) return g % 8 == 0;
    if (op->order == QK_ACROSS_STORED) return g % 2 == 0;
    return g == 32 || g == 64 || g % PIECE == 0 || g == op->k;
}

/* What one thread needs for one layer. */
typedef struct {
    arranged a;
    float *sum, *total; /* [tokens][outputs], of words and across: of a part, and scaled */
    float acc[MOST_TOKENS * QK_ROWS];
} room;

/* f(..., rows, tokens, flag) with all three known to the compiler. */
#define FOR_TOKENS(rows, flag, f, ...)                       \
    switch (tokens) {                                        \
    case 1: f(__VA_ARGS__, rows, 1, flag); break;            \
    case 2: f(__VA_ARGS__, rows, 2, flag); break;            \
    case 3: f(__VA_ARGS__, rows, 3, flag); break;            \
    default: f(__VA_ARGS__, rows, 4, flag);                  \
    }

#define FOR_ALL(flag, f, ...)                                            \
    do {                                                                 \
        if (rows == 4 && (flag)) FOR_TOKENS(4, 1, f, __VA_ARGS__)        \
        else if (rows == 4) FOR_TOKENS(4, 0, f, __VA_ARGS__)             \
        else if (flag) FOR_TOKENS(1, 1, f, __VA_ARGS__)                  \
        else FOR_TOKENS(1, 0, f, __VA_ARGS__)                            \
    } while (0)

/* What is the same for all rows. */
typedef struct {
    __m512i table;
    field_places places;
    __m128i flip;
} row_tables;

static void some_rows(const qk_op *op, const qk_tensors *t, const arranged *a, const row_tables *w,
                      int64_t row, float *out, int64_t rows, int64_t tokens) {
    const int fields = op->order == QK_FIELDS_STORED, wide = op->group >= PIECE || op->group == op->k;
    if (op->width == 8) FOR_ALL(fields, rows8, op, t, a, w->flip, row, out);
    else if (fields) FOR_ALL(op->zero_kind == QK_ZERO_OFFSET, fields4, op, t, a, w->table, &w->places, row, out);
    else FOR_ALL(wide, rows4, op, t, a, w->table, row, out);
}

/* Blocks [from, to) of 32 rows. */
static void by_rows(const qk_call *c, room *m, int64_t from, int64_t to) {
    const qk_op *op = c->op;
    const qk_tensors *t = &c->tensors;
    const row_tables w = {pair_table(op), places_of(op), _mm_set1_epi8(op->bias == 128 ? (char)0x80 : 0)};
    for (int64_t block = from; block < to; block++) {
        const int64_t first = block * QK_ROWS, count = qk_min(QK_ROWS, op->n - first);
        for (int64_t r = 0; r < count;) {
            const int64_t rows = count - r >= 4 ? 4 : 1;
            some_rows(op, t, &m->a, &w, first + r, m->acc + r, rows, c->count);
            r += rows;
        }
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

#define AHEAD 8192 /* bytes that are fetched ahead: what memory takes to answer */

static int64_t some_columns(int64_t tokens) { return MOST_SUMS / tokens / CHUNK * CHUNK; }

#define WORDS_CASE(N)                                                                         \
    case N:                                                                                   \
        if (fresh) words_row(op, t, &m->a, table, i, column, count, next, m->sum, ld, 1, N);  \
        else words_row(op, t, &m->a, table, i, column, count, next, m->sum, ld, 0, N);        \
        break;

/* Columns [first, stop) of K of `count` outputs from `column` on, into the sums. */
static void words_part(const qk_call *c, const room *m, __m512i table, int64_t first, int64_t stop,
                       int64_t column, int64_t count, int64_t ld) {
    const qk_op *op = c->op;
    const qk_tensors *t = &c->tensors;
    const int64_t next = qk_div_up(AHEAD, count * 4) * op->n;
    for (int64_t i = first / 8; i < stop / 8; i++) {
        const int fresh = i == first / 8;
        switch (c->count) {
            WORDS_CASE(1)
            WORDS_CASE(2)
            WORDS_CASE(3)
            WORDS_CASE(4)
        }
    }
}

static void across_part(const qk_call *c, const room *m, __m512i table, int64_t first, int64_t stop,
                        int64_t column, int64_t count, int64_t ld) {
    const qk_op *op = c->op;
    const qk_tensors *t = &c->tensors;
    for (int64_t i = 0; i < c->count; i += 2) { /* more tokens do not fit the registers */
        arranged a = m->a;
        a.pairs += i * padded(op->k);
        for (int64_t k = first; k < stop; k += ACROSS_ROWS) {
            const int64_t end = qk_min(stop, k + ACROSS_ROWS);
            const int two = c->count - i > 1, fresh = k == first;
            for (int64_t n = 0; n < count; n += CHUNK) {
                float *acc = m->sum + i * ld + n;
                if (two && fresh) across_chunk(op, t, &a, table, k, end, column + n, acc, ld, 1, 2);
                else if (two) across_chunk(op, t, &a, table, k, end, column + n, acc, ld, 0, 2);
                else if (fresh) across_chunk(op, t, &a, table, k, end, column + n, acc, ld, 1, 1);
                else across_chunk(op, t, &a, table, k, end, column + n, acc, ld, 0, 1);
            }
        }
    }
}

/* The sums of one part, scaled, into the totals. */
static void scale_sums(const qk_call *c, const room *m, int64_t part, int64_t column, int64_t count,
                       int64_t ld) {
    const qk_op *op = c->op;
    for (int64_t i = 0; i < c->count; i++)
        for (int64_t n = 0; n < count; n += CHUNK) {
            const int64_t at = i * ld + n;
            __m512 sum[8];
            if (op->order == QK_ACROSS_STORED) in_order(m->sum + at, sum);
            else
                for (int v = 0; v < 8; v++) sum[v] = _mm512_loadu_ps(m->sum + at + 16 * v);
            for (int v = 0; v < 8 && n + 16 * v < count; v++)
                scale_part(op, &c->tensors, &m->a, part, column + n + 16 * v, i, sum[v], m->total + at + 16 * v);
        }
}

/* Chunks [from, to) of 128 outputs, at most MOST_SUMS / tokens at a time. */
static void by_columns(const qk_call *c, room *m, int64_t from, int64_t to) {
    const qk_op *op = c->op;
    const __m512i table = pair_table(op);
    const int64_t part = part_of(op), per = parts_per_group(op), stop = qk_min(op->n, to * CHUNK);
    const int64_t some = some_columns(c->count), ld = some;
    for (int64_t column = from * CHUNK; column < stop; column += some) {
        const int64_t count = qk_min(some, stop - column);
        memset(m->total, 0, c->count * ld * sizeof(float));
        for (int64_t p = 0; p < parts_of(op); p++) {
            const int64_t k = p / per * op->group + p % per * part;
            const int64_t end = qk_min(qk_min(op->k, (p / per + 1) * op->group), k + part);
            if (k >= end) continue;
            if (op->order == QK_WORDS_STORED) words_part(c, m, table, k, end, column, count, ld);
            else across_part(c, m, table, k, end, column, count, ld);
            scale_sums(c, m, p, column, count, ld);
        }
        for (int64_t i = 0; i < c->count; i++)
            for (int64_t n = 0; n < count; n += QK_ROWS)
                qk_store(m->total + i * ld + n, qk_min(QK_ROWS, count - n), c->tensors.bias,
                         op->bias_type, c->y, c->xtype, i * op->n + column + n, column + n);
    }
}

static int is_columns(const qk_op *op) {
    return op->order == QK_WORDS_STORED || op->order == QK_ACROSS_STORED;
}

static int64_t units(const qk_op *op) { return is_columns(op) ? qk_div_up(op->n, CHUNK) : qk_blocks(op); }

/* One thread's share of a call: units [from, to) of all layers' units in a row. Every thread arranges
 * x for itself. Returns 0, or 1 when memory is not there. */
static int some_units(const qk_call *calls, int64_t n, int64_t from, int64_t to) {
    const int64_t tokens = calls->count;
    enum { PAIRS, WIDE, SUMS, LANES, GROUPS, SCALES, SUM, TOTAL, ROOMS };
    int64_t bytes[ROOMS] = {0}, first = 0;
    for (int64_t i = 0; i < n; i++) {
        const qk_op *op = calls[i].op;
        const int64_t columns = is_columns(op) ? some_columns(tokens) : 0;
        const int64_t need[ROOMS] = {tokens * padded(op->k) * 2, op->width == 8 ? tokens * op->k * 4 : 0,
                                     tokens * parts_of(op) * 4, tokens * padded(op->k) / 2,
                                     padded(op->k) / PIECE * 4, 16 * scale_room(op),
                                     tokens * columns * 4, tokens * columns * 4};
        for (int r = 0; r < ROOMS; r++)
            if (bytes[r] < need[r]) bytes[r] = qk_div_up(need[r], 64) * 64;
    }
    int64_t at[ROOMS], all_bytes = 0;
    for (int r = 0; r < ROOMS; r++) at[r] = all_bytes, all_bytes += bytes[r];
    char *scratch = qk_alloc(all_bytes);
    if (!scratch) return 1;
    room m = {.a = {.pairs = (uint16_t *)(scratch + at[PAIRS]), .wide = (float *)(scratch + at[WIDE]),
                    .sums = (float *)(scratch + at[SUMS]), .lanes = (float *)(scratch + at[LANES]),
                    .piece_group = (int32_t *)(scratch + at[GROUPS]), .scales = (float *)(scratch + at[SCALES])},
              .sum = (float *)(scratch + at[SUM]), .total = (float *)(scratch + at[TOTAL])};
    for (int64_t i = 0; i < n; i++) {
        const qk_op *op = calls[i].op;
        const int64_t all = units(op), low = from - first, high = to - first;
        const int64_t begin = low < 0 ? 0 : low, end = qk_min(high, all);
        first += all;
        if (begin >= end) continue;
        const arranged *a = &m.a;
        const int kept = a->order == op->order && a->k == op->k && a->group == op->group &&
                         (op->zero_kind == QK_ZERO_FOLDED || a->with_sums) && a->width == op->width;
        if (!kept) arrange(&m.a, op, calls->x, tokens);
        if (is_columns(op)) by_columns(calls + i, &m, begin, end);
        else by_rows(calls + i, &m, begin, end);
    }
    free(scratch);
    return 0;
}

int qk_shared_stored(const qk_call *calls, int64_t n, int64_t threads) {
    int64_t all = 0, work = 0;
    int failed = 0;
    for (int64_t i = 0; i < n; i++) {
        all += units(calls[i].op);
        work += calls[i].op->n * calls[i].op->k * calls->count;
    }
    if (work < 1 << 16) return some_units(calls, n, 0, all);
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        const int64_t id = omp_get_thread_num(), team = omp_get_num_threads();
        failed |= some_units(calls, n, all * id / team, all * (id + 1) / team);
    }
    return failed;
}
