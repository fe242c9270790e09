/* Rows as they are stored, or blocks of fields: some rows side by side, or one after the other; sums
 * run along the lanes of a vector, those of 16 rows are added up together. Included by kernel_stored.c.
 *
 * A piece is 64 bytes of codes, 128 of 4 bits or 64 of 8, which STEPS vectors of numbers are made of, and x
 * lies as they ask for it (stored_pairs.h, stored_floats.h). Groups are whole multiples of a piece (WIDE), or
 * 32 or 64 columns (LANES).
 *
 * What was loaded from memory is read once: GCC would fold the load into every use, and reading lines
 * that are still on their way again and again took up to twice as long (`from_memory`). */
#include "stored_x.h"

#define AHEAD_ROWS 8192 /* bytes of codes that are fetched ahead: what memory takes to answer */
#define LONG_ROW 1024   /* bytes: with STREAMS one token reads such rows one by one, which memory gives best */

enum { WIDE, LANES, FIELDS, FIELDS_OFFSET }; /* where scales lie */

/* What is the same for all rows of a layer. */
typedef struct {
    const qk_op *op;
    const qk_tensors *t;
    const arranged *a;
    row_codes values;
    __m512i lanes;     /* which of a piece's scales each lane takes */
    field_places f;
    int64_t bytes, step, pieces, left; /* of a row, of a piece; left: bytes behind the last piece */
    int64_t groups, scale_shift, ahead_scales;
} row_work;

static row_work row_work_of(const qk_op *op, const qk_tensors *t, const arranged *a) {
    const int64_t fields = op->order == QK_FIELDS_STORED, per = op->width == 8 ? 2 : 4;
    const int64_t step = fields ? per * op->block : 64;
    row_work w = {.op = op, .t = t, .a = a, .step = step, .groups = qk_div_up(op->k, op->group),
                  .values = row_codes_of(op)};
    if (fields) w.f = places_of(op);
    w.bytes = fields ? op->k / 32 * op->block : op->k * op->width / 8;
    w.pieces = w.bytes / step, w.left = w.bytes % step;
    const int64_t shift = op->group == 32 ? (op->width == 8 ? 3 : 2) : 3;
    w.lanes = _mm512_srl_epi32(
        _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm_cvtsi64_si128(shift));
    w.scale_shift = op->group == 32 ? (op->width == 8 ? 1 : 2) : 1; /* scales of a piece, as a power of two */
    w.ahead_scales = (SIDE_BY_SIDE + AHEAD_ROWS / w.bytes) * w.groups;
    return w;
}

QK_INLINE int64_t scale_room(const qk_op *op) { return qk_div_up(op->k, op->group) + 16; }

QK_INLINE void fetch_ahead(const void *base, int64_t type, int64_t at) {
    _mm_prefetch((const char *)base + at * (type == QK_F32 ? 4 : type == QK_U8 ? 1 : 2), _MM_HINT_T0);
}

/* The scales of a row as float32, and what zero points add to the sums. */
QK_INLINE void row_scales(const row_work *w, int64_t row, float *scales, const int tokens, __m512 *total) {
    const qk_op *op = w->op;
    const qk_tensors *t = w->t;
    for (int64_t q = 0; q < w->groups; q += 16) {
        const __mmask16 m = first_lanes(w->groups - q);
        const int64_t at = row * w->groups + q, ahead = at + w->ahead_scales;
        const __m512 s = read_floats(t->scales[0], op->scale[0].type, at, m);
        fetch_ahead(t->scales[0], op->scale[0].type, ahead);
        _mm512_storeu_ps(scales + q, s);
        if (op->zero_kind == QK_ZERO_FOLDED) continue;
        if (op->zero_kind == QK_ZERO_CODE) fetch_ahead(t->zeros, QK_U8, ahead);
        if (op->zero_kind == QK_ZERO_OFFSET) fetch_ahead(t->offset[0], op->offset[0].type, ahead);
        const __m512 lacks = of_sums(op, t, s, at, m);
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++)
            total[i] = _mm512_fmadd_ps(lacks, _mm512_maskz_loadu_ps(m, w->a->sums + i * w->groups + q), total[i]);
    }
}

/* total += scales (sum of the codes of piece p times x), of `rows` rows that meet the same x; of the last
 * piece only `left` bytes are there. */
QK_INLINE void piece(const row_work *w, const uint8_t *at, int64_t p, const float *scales, int64_t room,
                     __m512 (*total)[MOST_TOKENS], const int rows, const int tokens, const int width,
                     const int kind, int64_t left) {
    const int64_t ld = padded(w->op->k), columns = 512 / width;
    const int steps = STEPS(width);
    __m512 s[JOINT], o[JOINT];
    vc c[JOINT][8];
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++, at += w->bytes, scales += room) {
        __m512i v;
        if (kind >= FIELDS) v = load_fields(&w->f, at, left, width, kind == FIELDS_OFFSET, &s[r], &o[r]);
        else {
            v = left ? _mm512_maskz_loadu_epi8(first_bytes(left), at) : _mm512_loadu_si512(at);
            s[r] = kind == WIDE ? _mm512_set1_ps(scales[w->a->piece_group[p]])
                                : _mm512_permutexvar_ps(w->lanes, _mm512_maskz_loadu_ps(0xF, scales + (p << w->scale_shift)));
        }
#ifdef LOADS_BYTES
        if (kind == WIDE && width == 8) {
            load_bytes(at, left, &w->values, c[r]);
            continue;
        }
#endif
        from_memory(v);
#pragma GCC unroll 8
        for (int j = 0; j < steps; j++) c[r][j] = step_codes(v, j, width, &w->values);
    }
#pragma GCC unroll 4
    for (int i = 0; i < tokens; i++) {
        const xelem *x = (const xelem *)w->a->x + i * ld + p * columns;
        __m512 acc[JOINT];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) acc[r] = _mm512_setzero_ps();
#pragma GCC unroll 8
        for (int j = 0; j < steps; j++) {
            const vc xj = load_x(x + 16 * KP * X_OF(width, j));
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) acc[r] = dot(acc[r], c[r][j], xj);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            total[r][i] = _mm512_fmadd_ps(acc[r], s[r], total[r][i]);
            if (kind == FIELDS_OFFSET)
                total[r][i] = _mm512_fmadd_ps(o[r], _mm512_loadu_ps(w->a->lanes + i * ld / 8 + 16 * p), total[r][i]);
        }
    }
}

/* Rows [row, row + rows), which lie behind each other: 16 lanes of sums each, [tokens][32][16]. A row
 * that is a `stream` has two sums, of every other piece. What follows is fetched in the order of memory. */
QK_INLINE void some_rows(const row_work *w, int64_t row, float *lines, const int rows, const int stream,
                         const int tokens, const int width, const int kind) {
    const uint8_t *codes = (const uint8_t *)w->t->codes + row * w->bytes;
    const char *ahead = (const char *)codes + AHEAD_ROWS + (rows - 1) * w->bytes;
    const int sums = stream ? 2 : rows, pieces = stream ? 2 : 1;
    const int64_t apart = stream ? w->step : w->bytes, room = stream ? 0 : scale_room(w->op);
    const int joint = stream || rows < JOINT ? 1 : JOINT;
    __m512 total[SIDE_BY_SIDE][MOST_TOKENS];
#pragma GCC unroll 4
    for (int r = 0; r < sums; r++) {
#pragma GCC unroll 4
        for (int i = 0; i < tokens; i++) total[r][i] = _mm512_setzero_ps();
        if (kind < FIELDS && r < rows) row_scales(w, row + r, w->a->scales + r * room, tokens, total[r]);
    }
    int64_t p = 0;
    for (; p + pieces <= w->pieces; p += pieces, codes += pieces * w->step, ahead += sums * w->step) {
#pragma GCC unroll 4
        for (int r = 0; r < sums; r += joint) {
            _mm_prefetch(ahead + 64 * r, _MM_HINT_T0);
            if (joint > 1) _mm_prefetch(ahead + 64 * (r + 1), _MM_HINT_T0);
            piece(w, codes + r * apart, stream ? p + r : p, w->a->scales + r * room, room, total + r, joint, tokens,
                  width, kind, 0);
        }
        if (kind >= FIELDS) _mm_prefetch(ahead + 64 * sums, _MM_HINT_T0);
    }
    if (stream && p < w->pieces) {
        piece(w, codes, p, w->a->scales, room, total, 1, tokens, width, kind, 0);
        p++, codes += w->step;
    }
    if (w->left)
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
            piece(w, codes + r * apart, p, w->a->scales + r * room, room, total + r, 1, tokens, width, kind, w->left);
#pragma GCC unroll 4
    for (int i = 0; i < tokens; i++) {
        if (stream) total[0][i] = _mm512_add_ps(total[0][i], total[1][i]);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) _mm512_storeu_ps(lines + (i * QK_ROWS + r) * 16, total[r][i]);
    }
}

QK_INLINE void rows_of(const row_work *w, int64_t row, int64_t count, float *lines, const int tokens,
                       const int width, const int kind) {
    int64_t r = 0;
    if (STREAMS && tokens == 1 && kind < FIELDS && w->bytes > LONG_ROW)
        for (; r < count; r++) some_rows(w, row + r, lines + r * 16, 1, 1, tokens, width, kind);
    for (; r + SIDE_BY_SIDE <= count; r += SIDE_BY_SIDE)
        some_rows(w, row + r, lines + r * 16, SIDE_BY_SIDE, 0, tokens, width, kind);
    for (; r < count; r++) some_rows(w, row + r, lines + r * 16, 1, 0, tokens, width, kind);
}

/* The sums of the lanes of 16 vectors. */
static inline __m512 sums_of_lanes(const float *lines) {
    __m512 v[16];
    for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_ps(lines + 16 * i);
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int n = 2; n; n /= 2)
        for (int i = 0; i < n; i++) {
            const __m512 a = v[2 * i], b = v[2 * i + 1];
            v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
        }
    return v[0];
}
