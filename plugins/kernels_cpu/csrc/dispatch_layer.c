/* The operator of a decoder layer; layer.py says what it does. Written like dispatch.c. */
#include <stdatomic.h>
#include <string.h>

#include "dispatch.h"

/* What a decoder layer is given; in the order of the operator. */
enum { X, TABLE, NORMS, TEXT, COS, SIN, KEYS, VALUES, MASK, AT, SCALE, EPS };
enum { MOST_NORMS = 4 };

/* A table of weights is one tensor of int64: where it lies, when it was filled, for which layers, then
 * their packed calls. Python fills it (layer.py), again after weights have changed. */
enum { WHERE, WHEN, WHOSE, CALLS };
/* A copy of a table leads to the table itself, if that is still there. */
static const int64_t *filled(const int64_t *table, int64_t mark) {
    const int64_t own = table[WHERE];
    if (own != (int64_t)(uintptr_t)table || table[WHEN] != qk_weights_now()) {
        if (qk_fill(own)) return NULL;
        table = (const int64_t *)(uintptr_t)own;
    }
    return table[WHOSE] == mark ? table + CALLS : NULL;
}

static double number_of(value v) {
    double d;
    memcpy(&d, &v, sizeof d);
    return d;
}

/* Whether `h` has these sizes; a size of -1 is any; where `broad`, 1 in `h` stands for any. */
static int has(handle h, int64_t dim, const int64_t *want, int broad) {
    int64_t n, *sizes;
    torch.dim(h, &n);
    if (n != dim) return 0;
    torch.sizes(h, &sizes);
    for (int64_t i = 0; i < dim; i++)
        if (want[i] >= 0 && sizes[i] != want[i] && !(broad && sizes[i] == 1)) return 0;
    return 1;
}

/* The numbers of `h`, dense; *copy is a tensor that is to be dropped. 0, or 1 for want of memory. */
static int numbers_of(handle h, handle *copy, const void **out) {
    int64_t dim, *sizes, *strides;
    int32_t number;
    torch.dim(h, &dim);
    torch.sizes(h, &sizes);
    torch.strides(h, &strides);
    if (!qk_dense_strides(dim, sizes, strides)) {
        torch.dtype(h, &number);
        if (qk_new_like(dim, sizes, number, copy) || torch.copy(*copy, h, 0)) return 1;
        h = *copy;
    }
    torch.data(h, (void **)out);
    return 0;
}

static int cache_of(handle h, int64_t *steps, void **out) {
    int64_t *strides, *sizes;
    torch.strides(h, &strides);
    torch.sizes(h, &sizes);
    torch.data(h, out);
    memcpy(steps, strides, 3 * sizeof *steps);
    return sizes[3] != 1 && strides[3] != 1;
}

static const char *sizes_differ(const block *b, const handle *h, int64_t batch) {
    int64_t *sizes, *others;
    if (!has(h[KEYS], 4, (int64_t[]){batch, b->kv_heads, -1, b->dim}, 0)) return "decoder layer: keys have other sizes";
    torch.sizes(h[KEYS], &sizes);
    if (!has(h[VALUES], 4, sizes, 0)) return "decoder layer: values have other sizes than keys";
    if (!has(h[MASK], 4, (int64_t[]){batch, b->heads, 1, sizes[2]}, 1)) return "decoder layer: the mask has other sizes";
    torch.sizes(h[MASK], &others);
    if (others[3] != sizes[2]) return "decoder layer: the mask has other sizes";
    if (!has(h[COS], 3, (int64_t[]){batch, 1, b->rotated}, 1)) return "decoder layer: angles have other sizes";
    torch.sizes(h[COS], &others);
    if (others[2] != b->rotated || !has(h[SIN], 3, others, 0)) return "decoder layer: angles have other sizes";
    int64_t dim;
    torch.dim(h[AT], &dim);
    if (dim && !has(h[AT], 1, (int64_t[]){1}, 0)) return "decoder layer: the position is not one number";
    return NULL;
}

static const char *types_differ(const block *b, const handle *h) {
    int32_t number;
    for (int i = X; i <= VALUES; i++)
        if (i != TABLE && i != NORMS && i != TEXT && qk_type_of(h[i]) != b->type) return "decoder layer: a tensor has another dtype";
    if (!qk_type_of(h[MASK])) return "decoder layer: the mask is neither bool nor float";
    for (int i = TABLE; i <= AT; i += AT - TABLE) {
        torch.dtype(h[i], &number);
        if (number != qk_int64) return "decoder layer: table or position is not of int64";
    }
    return NULL;
}

/* All that a call takes from the stack, besides the tensors that lie there. */
typedef struct {
    handle norms[MOST_NORMS], copies[MOST_NORMS + 4];
    double eps[MOST_NORMS];
    size_t norm_count, eps_count;
} taken;

static void take_lists(const value *stack, taken *t) {
    const handle norms = (handle)(uintptr_t)stack[NORMS], eps = (handle)(uintptr_t)stack[EPS];
    torch.list_size(norms, &t->norm_count);
    torch.list_size(eps, &t->eps_count);
    for (size_t i = 0; i < t->norm_count; i++) {
        value item;
        torch.list_item(norms, i, &item);
        if (i < MOST_NORMS) t->norms[i] = (handle)(uintptr_t)item;
        else torch.drop((handle)(uintptr_t)item);
    }
    for (size_t i = 0; i < t->eps_count && i < MOST_NORMS; i++) {
        value item;
        torch.list_item(eps, i, &item);
        t->eps[i] = number_of(item);
    }
    torch.list_drop(norms);
    torch.list_drop(eps);
}

static const char *norms_differ(const block *b, const taken *t) {
    if ((int64_t)t->norm_count != b->norms || t->eps_count != t->norm_count)
        return "decoder layer: another number of norms";
    for (int i = 0; i < b->norms; i++)
        if (qk_type_of(t->norms[i]) != b->type || !has(t->norms[i], 1, i < 2 ? &b->head.k : &b->dim, 0))
            return "decoder layer: a norm has another size or dtype";
    return NULL;
}

/* NULL, or what is wrong. */
static const char *run_block(const block *b, const value *stack, taken *t, handle *out) {
    handle h[AT + 1];
    for (int i = X; i <= AT; i++) h[i] = (handle)(uintptr_t)stack[i];
    int64_t *sizes, *strides;
    int32_t number;
    const void *table, *at;
    const char *error = types_differ(b, h);
    if (error || (error = norms_differ(b, t))) return error;
    if (!has(h[X], 3, (int64_t[]){-1, 1, b->head.k}, 0)) return "decoder layer: x has other sizes";
    torch.sizes(h[X], &sizes);
    torch.dtype(h[X], &number);
    qk_block c = {.isa = qk_limit, .type = b->type, .act = b->act, .batch = sizes[0], .heads = b->heads,
                  .kv_heads = b->kv_heads, .dim = b->dim, .rotated = b->rotated, .qkv = b->qkv,
                  .sides = b->sides, .up_first = b->up_first, .scale = number_of(stack[SCALE])};
    memcpy(c.form, b->form, sizeof c.form);
    memcpy(c.eps, t->eps, sizeof c.eps);
    if ((error = sizes_differ(b, h, c.batch))) return error;
    if (!has(h[TABLE], 1, (int64_t[]){b->head.n}, 0)) return "decoder layer: this is no table of weights";
    if (qk_new_like(3, sizes, number, out)) return "decoder layer: no memory";
    torch.sizes(h[COS], &sizes);
    c.angle_stride = sizes[0] > 1 ? b->rotated : 0;
    torch.sizes(h[KEYS], &sizes);
    c.length = sizes[2];
    torch.sizes(h[MASK], &sizes);
    torch.strides(h[MASK], &strides);
    for (int i = 0; i < 2; i++) c.mask_stride[i] = sizes[i] > 1 ? strides[i] : 0;
    c.mask_stride[2] = strides[3], c.mask_type = qk_type_of(h[MASK]);
    torch.data(h[MASK], (void **)&c.mask);
    if (cache_of(h[KEYS], c.k_stride, &c.keys) || cache_of(h[VALUES], c.v_stride, &c.values))
        return "decoder layer: features of the cache do not lie together";
    handle *spare = t->copies;
    int failed = numbers_of(h[X], spare++, &c.x) | numbers_of(h[COS], spare++, &c.cos);
    failed |= numbers_of(h[SIN], spare++, &c.sin) | numbers_of(h[TABLE], spare++, &table);
    for (int i = 0; i < b->norms; i++) failed |= numbers_of(t->norms[i], spare++, &c.norm[i]);
    if (failed) return "decoder layer: no memory";
    torch.data(h[AT], (void **)&at);
    torch.data(*out, &c.y);
    c.at = at, c.calls = (const qk_call *)filled(table, b->mark);
    if (!c.calls) return "decoder layer: its weights are not those that the graph was made for";
    if (!c.batch) return NULL;
    const int status = qk_decoder_block(&c);
    if (status == QK_OUTSIDE) return "decoder layer: the position is outside of the cache";
    return status ? "decoder layer: no memory for the kernel's scratch space" : NULL;
}

void qk_op_decoder_layer(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    handle string = (handle)(uintptr_t)stack[TEXT], out = NULL;
    taken t = {{NULL}};
    take_lists(stack, &t);
    const layout *l = qk_layout_of(string, BLOCK);
    const char *error = l ? run_block((const block *)l, stack, &t, &out) : "decoder layer: the layout cannot be read";
    torch.string_drop(string);
    for (int i = X; i <= AT; i++)
        if (i != TEXT && i != NORMS) torch.drop((handle)(uintptr_t)stack[i]);
    for (int i = 0; i < MOST_NORMS; i++)
        if (t.norms[i]) torch.drop(t.norms[i]);
    for (int i = 0; i < MOST_NORMS + 4; i++)
        if (t.copies[i]) torch.drop(t.copies[i]);
    if (error && out) torch.drop(out);
    if (error) qk_fail(error);
    stack[0] = (value)(uintptr_t)out;
}
