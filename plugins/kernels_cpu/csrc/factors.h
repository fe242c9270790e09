/* One matrix as a vector kernel sees it, and its scales as vectors of float32. Included by each
 * unit after its primitives; NAME, VW, vf, vload, vmul, vset, load_* and code_table are those of
 * kernel.h. */
#include "common.h"

typedef struct {
    const qk_op *op;
    qk_tensors t;
    int64_t groups, scale_groups[2], offset_groups[2]; /* per row */
    float single[2]; /* inverses of divisors */
    code_table table;
} NAME(view);

/* `v` stays where it is: its tensors may point into it. */
static void NAME(make_view)(NAME(view) *v, const qk_op *op, const qk_tensors *t, int64_t expert) {
    v->op = op;
    v->t = qk_expert(op, t, expert);
    v->groups = qk_div_up(op->k, op->group);
    for (int i = 0; i < 2; i++) {
        v->scale_groups[i] = op->scale[i].type ? qk_div_up(op->k, op->scale[i].group) : 0;
        v->offset_groups[i] = op->offset[i].type ? qk_div_up(op->k, op->offset[i].group) : 0;
        if (op->scale[i].type != QK_DIVISOR) continue;
        v->single[i] = 1.0f / *(const float *)v->t.scales[i];
        v->t.scales[i] = &v->single[i];
    }
    v->table = make_table(op, &v->t);
}

/* VW values of a factor: rows [VW * vec, VW * (vec + 1)) of a block, the group of column k. */
QK_INLINE vf NAME(factor)(const qk_factor *f, const void *base, int64_t block, int64_t groups,
                          int64_t k, int vec) {
    const int64_t at = (block * groups + k / f->group) * QK_ROWS + vec * VW;
    const uint8_t *bytes = (const uint8_t *)base + at;
    const uint16_t *halves = (const uint16_t *)base + at;
    switch (f->type) {
    case QK_F32: return vload((const float *)base + at);
    case QK_F16: return load_f16(halves);
    case QK_BF16: return load_bf16(halves);
    case QK_U8: return load_u8(bytes);
    case QK_I8: return load_i8(bytes);
    case QK_SINGLE:
    case QK_DIVISOR: return vset(*(const float *)base);
    case QK_E8M0: return load_e8m0(bytes);
    case QK_E4M3: return load_e4m3(bytes);
    default: return load_table(f->table, bytes);
    }
}

/* Product of the factors of a scale (or offset), coarsest first. */
QK_INLINE vf NAME(product)(const qk_factor f[2], const void *const base[2], const int64_t groups[2],
                           int64_t block, int64_t k, int vec) {
    vf fine = NAME(factor)(&f[0], base[0], block, groups[0], k, vec);
    if (!f[1].type) return fine;
    return vmul(NAME(factor)(&f[1], base[1], block, groups[1], k, vec), fine);
}
