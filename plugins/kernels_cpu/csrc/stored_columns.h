/* Words and across: a vector holds outputs side by side, and a row of the file some columns of all
 * outputs. Included by kernel_stored.c.
 *
 * Threads share K, so that each reads whole rows, one after another: two threads that take half of each
 * row read 36 GB/s where whole rows give 47. K is cut into the same pieces whatever the number of threads;
 * their totals are added up in order at the end. Work goes by tiles, some rows of a part of a group:
 * of some outputs all rows are taken before the next ones, so that sums stay in registers. Meanwhile the
 * next tile is fetched in the order in which it lies. Vectors begin where a line of the cache does. */
#include "stored_x.h"

enum {
    CHUNK = 128,         /* outputs that are a thread's or another's: 8 vectors of words, one across */
    MOST_SUMS = 16384,   /* sums that a thread keeps at once */
    TILE_BYTES = 65536,  /* of words */
    ACROSS_ROWS = 8,     /* of a tile */
    ROW_STEPS = ACROSS_ROWS / KP,
    PIECE_COLUMNS = 1024, MOST_PIECES = 8, /* of K */
    SIDE = 4,            /* vectors of words side by side */
};

/* Some outputs times a piece of K. `column` is the first output; below 0 and from n on there are none. */
typedef struct {
    const qk_op *op;
    const qk_tensors *t;
    const arranged *a;
    code_table table;
    int64_t column, count, first, stop; /* outputs, parts */
    int64_t ld, sum_ld; /* floats from one token's totals, sums, to the next one's */
    int64_t row_bytes, parts, tall;
    float *sum, *total;
} block;

/* Columns [first, stop) of K of one part. */
typedef struct {
    int64_t first, stop, part, group;
    int begins, ends; /* the part */
    int64_t soon;     /* the group whose scales the next tile asks for, or -1 */
} span;

/* Lines that are fetched: `run` of each row. */
typedef struct {
    const char *at, *row;
    int64_t left, run, ld;
} ahead;

QK_INLINE void fetch_lines(ahead *f, const int lines) {
#pragma GCC unroll 8
    for (int i = 0; i < lines; i++) _mm_prefetch(f->at + 64 * i, _MM_HINT_T0);
    f->at += 64 * lines;
    f->left -= lines;
    if (f->left <= 0) f->left = f->run, f->at = f->row += f->ld;
}

/* Which of `n` things from `at` on, at most 16, there are. */
QK_INLINE __mmask16 lanes_at(int64_t at, int64_t n) {
    if (at <= -16 || at >= n) return 0;
    return at < 0 ? (__mmask16)(first_lanes(n - at) & 0xFFFF << -at) : first_lanes(n - at);
}

/* total += s (sum + what codes lack times the sum of x) + offset times it, of 16 outputs. */
QK_INLINE void scale_part(const block *b, const span *s, int64_t at, const __m512 *sum, int64_t step,
                          const int tokens) {
    const qk_op *op = b->op;
    const int64_t column = b->column + at, place = s->group * op->n + column;
    const __mmask16 m = lanes_at(column, op->n);
    const __m512 scale = read_floats(b->t->scales[0], op->scale[0].type, place, m);
    __m512 more = _mm512_setzero_ps();
    if (op->zero_kind != QK_ZERO_FOLDED) more = of_sums(op, b->t, scale, place, m);
#pragma GCC unroll 4
    for (int i = 0; i < tokens; i++) {
        float *total = b->total + i * b->ld + at;
        __m512 v = _mm512_fmadd_ps(scale, sum[i * step], _mm512_loadu_ps(total));
        if (op->zero_kind != QK_ZERO_FOLDED)
            v = _mm512_fmadd_ps(more, _mm512_set1_ps(b->a->sums[i * b->parts + s->part]), v);
        _mm512_storeu_ps(total, v);
    }
}

/* Scales and zero points of `count` outputs that the next tile asks for are fetched. */
QK_INLINE void fetch_scales(const block *b, const span *s, int64_t at, const int count) {
    if (s->soon < 0) return;
    const qk_op *op = b->op;
    const int64_t place = s->soon * op->n + b->column + at, size = qk_size(op->scale[0].type);
    const char *scales = (const char *)b->t->scales[0] + place * size;
    for (int64_t i = 0; i < count * size; i += 64) _mm_prefetch(scales + i, _MM_HINT_T0);
    if (op->zero_kind != QK_ZERO_CODE) return;
    for (int i = 0; i < count; i += 64) _mm_prefetch((const char *)b->t->zeros + place + i, _MM_HINT_T0);
}

/* All rows of SIDE vectors of words, outputs from `at` of the block on. */
QK_INLINE void words_step(const block *b, const span *s, int64_t at, ahead *next, const int whole,
                          const int tokens) {
    const qk_op *op = b->op;
    const int64_t column = b->column + at, ld = padded(op->k) / KP;
    const int parts = tokens == 1 ? 2 : 1;
    const char *w = (const char *)b->t->codes + s->first / 8 * b->row_bytes + column * 4;
    const xunit *x = (const xunit *)b->a->x + s->first / KP;
    float *const acc = b->sum + at;
    fetch_scales(b, s, at, 16 * SIDE);
    __m512 sum[MOST_TOKENS][SIDE][2];
    __mmask16 m[SIDE];
#pragma GCC unroll 4
    for (int v = 0; v < SIDE; v++) {
        m[v] = lanes_at(column + 16 * v, op->n);
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++) {
            sum[i][v][0] = s->begins ? _mm512_setzero_ps() : _mm512_loadu_ps(acc + i * b->sum_ld + 16 * v);
            sum[i][v][1] = _mm512_setzero_ps();
        }
    }
    for (int64_t k = s->first; k < s->stop; k += 8, w += b->row_bytes, x += 8 / KP) {
        __m512i codes[SIDE];
        fetch_lines(next, SIDE);
#pragma GCC unroll 4
        for (int v = 0; v < SIDE; v++)
            codes[v] = whole ? _mm512_loadu_si512(w + 64 * v) : _mm512_maskz_loadu_epi32(m[v], w + 64 * v);
#pragma GCC unroll 8
        for (int j = 0; j < 8 / KP; j++) {
            vc c[SIDE];
#pragma GCC unroll 4
            for (int v = 0; v < SIDE; v++) c[v] = nibble(codes[v], j, b->table);
#pragma GCC unroll 4
            for (int i = 0; i < tokens; i++) {
                const vc xi = bcast(x[i * ld + j]);
#pragma GCC unroll 4
                for (int v = 0; v < SIDE; v++) sum[i][v][j % parts] = dot(sum[i][v][j % parts], c[v], xi);
            }
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < SIDE; v++) {
        __m512 all[MOST_TOKENS];
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++)
            all[i] = parts == 2 ? _mm512_add_ps(sum[i][v][0], sum[i][v][1]) : sum[i][v][0];
        if (s->ends) scale_part(b, s, at + 16 * v, all, 1, tokens);
        else
#pragma GCC unroll 4
            for (int i = 0; i < tokens; i++) _mm512_storeu_ps(acc + i * b->sum_ld + 16 * v, all[i]);
    }
}

QK_INLINE void words_tile(const block *b, const span *s, ahead next, const int tokens) {
    const int64_t n = b->op->n;
    for (int64_t at = 0; at < b->count; at += 16 * SIDE) {
        const int64_t column = b->column + at;
        if (column >= 0 && column + 16 * SIDE <= n) words_step(b, s, at, &next, 1, tokens);
        else words_step(b, s, at, &next, 0, tokens);
    }
}

/* Rows of the span into `halves` of neighbouring vectors, from half `first` on. A half is 64 outputs in
 * an order of their own, four vectors of sums; `step` floats lie between those of two tokens. `rows`, where
 * not 0, is how many there are: each then has a load of its own, without which the processor takes the
 * step from row to row for a stream and fetches rows below the tile (14336 x 4096: 23 GB/s, not 28). */
QK_INLINE void across_rows(const block *b, const span *s, int64_t at, ahead *next, float *acc, int64_t step,
                           const int whole, const int first, const int halves, const int tokens,
                           const int rows) {
    const int64_t column = b->column + at, ld = padded(b->op->k) / KP;
    const int64_t count = rows ? rows : s->stop - s->first;
    const int vectors = (halves + 1) / 2, lines = KP * halves / 2 ? KP * halves / 2 : 1 - first; /* of a step */
    const char *w = (const char *)b->t->codes + s->first * b->row_bytes + column / 2;
    const xunit *x = (const xunit *)b->a->x + s->first / KP;
    __m512 sum[MOST_TOKENS][4][4];
    __mmask16 m[2];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; v++) m[v] = lanes_at(column / 8 + 16 * v, b->op->n / 8);
#pragma GCC unroll 4
    for (int i = 0; i < tokens; i++)
#pragma GCC unroll 4
        for (int h = 0; h < halves; h++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                sum[i][h][j] = s->begins ? _mm512_setzero_ps()
                                         : _mm512_loadu_ps(acc + i * step + 64 * (first + h) + 16 * j);
#pragma GCC unroll ROW_STEPS
    for (int64_t k = 0; k < count; k += KP, w += KP * b->row_bytes, x++) {
        __m512i row[2][KP];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
#pragma GCC unroll 2
            for (int r = 0; r < KP; r++) {
                const char *const from = w + 64 * v + r * b->row_bytes;
                row[v][r] = whole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi32(m[v], from);
            }
        fetch_lines(next, lines);
#pragma GCC unroll 4
        for (int h = 0; h < halves; h++) {
            const __m512i codes = across_half(row[h / 2], (first + h) % 2);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const vc c = nibble(codes, j, b->table);
#pragma GCC unroll 4
                for (int i = 0; i < tokens; i++)
                    sum[i][h][j] = dot(sum[i][h][j], c, bcast(x[i * ld]));
            }
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < tokens; i++)
#pragma GCC unroll 4
        for (int h = 0; h < halves; h++)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
                _mm512_storeu_ps(acc + i * step + 64 * (first + h) + 16 * j, sum[i][h][j]);
}

/* Those vectors as 128 outputs in order. */
QK_INLINE void in_order(const float *acc, __m512 out[8]) {
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
        __m512d v[4];
        for (int j = 0; j < 4; j++) v[j] = _mm512_castps_pd(across_pairs(acc, h, j));
        const __m512d a = _mm512_unpacklo_pd(v[0], v[1]), b = _mm512_unpacklo_pd(v[2], v[3]);
        const __m512d c = _mm512_unpackhi_pd(v[0], v[1]), d = _mm512_unpackhi_pd(v[2], v[3]);
        const __m512d ab = _mm512_shuffle_f64x2(a, b, 0x44), cd = _mm512_shuffle_f64x2(c, d, 0x44);
        const __m512d ef = _mm512_shuffle_f64x2(a, b, 0xEE), gh = _mm512_shuffle_f64x2(c, d, 0xEE);
        out[h] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ab, cd, 0x88));
        out[2 + h] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ab, cd, 0xDD));
        out[4 + h] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ef, gh, 0x88));
        out[6 + h] = _mm512_castpd_ps(_mm512_shuffle_f64x2(ef, gh, 0xDD));
    }
}

/* All rows of the span, of `vectors` times 128 outputs. */
QK_INLINE void across_step(const block *b, const span *s, int64_t at, ahead *next, const int whole,
                           const int vectors, const int tokens, const int rows) {
    fetch_scales(b, s, at, CHUNK * vectors);
    const int halves = tokens == 1 ? 2 * vectors : tokens == 2 ? 2 : 1; /* whose sums fit the registers */
#pragma GCC unroll 2
    for (int h = 0; h < 2 * vectors; h += halves)
        across_rows(b, s, at, next, b->sum + at, b->sum_ld, whole, h, halves, tokens, rows);
    if (!s->ends) return;
    for (int v = 0; v < vectors; v++) {
        __m512 sum[MOST_TOKENS][8];
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++) in_order(b->sum + at + CHUNK * v + i * b->sum_ld, sum[i]);
        for (int j = 0; j < 8; j++) scale_part(b, s, at + CHUNK * v + 16 * j, sum[0] + j, 8, tokens);
    }
}

QK_INLINE void across_tile(const block *b, const span *s, ahead next, const int tokens) {
    const int64_t n = b->op->n;
    for (int64_t at = 0, step; at < b->count; at += step) {
        const int64_t column = b->column + at;
        step = CHUNK;
        if (column < 0 || column + CHUNK > n) across_step(b, s, at, &next, 0, 1, tokens, 0);
        else if (tokens > 1 || at + 2 * CHUNK > b->count || column + 2 * CHUNK > n)
            across_step(b, s, at, &next, 1, 1, tokens, 0);
        else {
            step = 2 * CHUNK;
            if (s->stop - s->first == ACROSS_ROWS) across_step(b, s, at, &next, 1, 2, tokens, ACROSS_ROWS);
            else across_step(b, s, at, &next, 1, 2, tokens, 0);
        }
    }
}

static int is_columns(const qk_op *op) {
    return op->order == QK_WORDS_STORED || op->order == QK_ACROSS_STORED;
}

/* How many outputs would lie before the first one in its line, where every row begins there. */
static int64_t outputs_before(const qk_call *c) {
    const int across = c->op->order == QK_ACROSS_STORED;
    const int64_t in_line = (int64_t)((uintptr_t)c->tensors.codes % 64);
    const int64_t row_bytes = across ? c->op->n / 2 : c->op->n * 4;
    return row_bytes % 64 || in_line % 4 ? 0 : across ? in_line * 2 : in_line / 4;
}

/* Pieces of K whose totals are made one by one. */
static int64_t pieces_of(const qk_op *op) {
    const int64_t most = qk_min(op->k / PIECE_COLUMNS, parts_of(op));
    return most < 1 ? 1 : qk_min(most, MOST_PIECES);
}

static int64_t chunks_of(const qk_call *c) { return qk_div_up(c->op->n + outputs_before(c), CHUNK); }

static int64_t column_units(const qk_call *c) { return pieces_of(c->op) * chunks_of(c); }

/* Totals of a call: [pieces][tokens][chunks]. */
static int64_t totals_of(const qk_call *c) { return column_units(c) * c->count * CHUNK + QK_ROWS; }

/* The tile of `b` from column `k` on; 0 where K or the piece ends. */
static int next_span(const block *b, int64_t k, span *s) {
    const qk_op *op = b->op;
    const int64_t part = part_of(op), per = parts_per_group(op), q = k / op->group;
    const int64_t first = q * op->group, end = qk_min(op->k, first + op->group), p = (k - first) / part;
    if (k >= op->k || q * per + p >= b->stop) return 0;
    const int64_t begin = first + p * part, over = qk_min(end, begin + part), to = qk_min(over, k + b->tall);
    *s = (span){k, to, q * per + p, q, k == begin, to == over, -1};
    return 1;
}

/* The column at which a part begins. */
static int64_t column_of(const qk_op *op, int64_t part) {
    const int64_t per = parts_per_group(op);
    return part / per * op->group + part % per * part_of(op);
}

static ahead lines_of(const block *b, int64_t k) {
    const int across = b->op->order == QK_ACROSS_STORED;
    const int64_t bytes = across ? b->count / 2 : b->count * 4;
    const int64_t begin = across ? b->column / 2 : b->column * 4;
    const char *at = (const char *)b->t->codes + (across ? k : k / 8) * b->row_bytes + begin;
    return (ahead){at, at, bytes / 64, bytes / 64, b->row_bytes};
}

#define TILE_OF(N)                                                \
    case N:                                                       \
        if (across) across_tile(b, &s, next, N);                  \
        else words_tile(b, &s, next, N);                          \
        break;

/* The totals of one block; then the first lines of `after` are fetched. */
static void column_block(const block *b, const block *after, int64_t tokens) {
    const int across = b->op->order == QK_ACROSS_STORED;
    span s, t;
    for (int64_t i = 0; i < tokens; i++) memset(b->total + i * b->ld, 0, b->count * sizeof(float));
    for (int more = next_span(b, column_of(b->op, b->first), &s); more; s = t) {
        more = next_span(b, s.stop, &t);
        if (more && t.ends) s.soon = t.group;
        const ahead next = more ? lines_of(b, t.first) : lines_of(after, column_of(after->op, after->first));
        switch (tokens) {
            TILE_OF(1)
            TILE_OF(2)
            TILE_OF(3)
            TILE_OF(4)
        }
    }
}

/* The block that begins with unit `unit` of [.., stop), pieces of K being the outer ones; its units. */
static int64_t block_at(const qk_call *c, int64_t unit, int64_t stop, float *totals, block *b) {
    const qk_op *op = c->op;
    const int across = op->order == QK_ACROSS_STORED;
    const int64_t all = chunks_of(c), piece = unit / all, chunk = unit % all, pieces = pieces_of(op);
    const int64_t count = qk_min(qk_min(all - chunk, stop - unit), MOST_SUMS / CHUNK / c->count);
    const int64_t bytes = across ? count * CHUNK / 2 : count * CHUNK * 4;
    int64_t tall = across ? ACROSS_ROWS : 16;
    while (!across && tall < PART && tall / 4 * bytes <= TILE_BYTES) tall *= 2;
    b->column = chunk * CHUNK - outputs_before(c), b->count = count * CHUNK;
    b->first = b->parts * piece / pieces, b->stop = b->parts * (piece + 1) / pieces;
    b->ld = all * CHUNK, b->sum_ld = b->count, b->tall = tall;
    b->total = totals + piece * c->count * b->ld + chunk * CHUNK;
    return count;
}

/* Units [from, to) of a call. */
static void by_columns(const qk_call *c, const arranged *a, float *sum, float *totals, int64_t from,
                       int64_t to) {
    const qk_op *op = c->op;
    const int64_t row_bytes = op->order == QK_ACROSS_STORED ? op->n / 2 : op->n * 4;
    block b = {.op = op, .t = &c->tensors, .a = a, .table = table_of(op), .row_bytes = row_bytes,
               .parts = parts_of(op), .sum = sum}, after;
    int64_t units = block_at(c, from, to, totals, &b);
    for (after = b; from < to; b = after) {
        from += units;
        if (from < to) units = block_at(c, from, to, totals, &after);
        column_block(&b, &after, c->count);
    }
}

/* The outputs of chunks [from, to): totals of all pieces of K, added up in order. */
static void finish_columns(const qk_call *c, const float *totals, int64_t from, int64_t to) {
    const qk_op *op = c->op;
    const int64_t before = outputs_before(c), ld = chunks_of(c) * CHUNK, pieces = pieces_of(op);
    const int64_t begin = from * CHUNK < before ? 0 : from * CHUNK - before;
    const int64_t end = qk_min(op->n, to * CHUNK - before);
    for (int64_t t = 0; t < c->count; t++)
        for (int64_t n = begin; n < end; n += QK_ROWS) {
            const float *at = totals + t * ld + n + before;
            float out[QK_ROWS];
            for (int v = 0; v < QK_ROWS; v += 16) {
                __m512 sum = _mm512_loadu_ps(at + v);
                for (int64_t p = 1; p < pieces; p++)
                    sum = _mm512_add_ps(sum, _mm512_loadu_ps(at + p * c->count * ld + v));
                _mm512_storeu_ps(out + v, sum);
            }
            qk_store(out, qk_min(QK_ROWS, end - n), c->tensors.bias, op->bias_type, c->y, c->xtype,
                     t * op->n + n, n);
        }
}
