/* The operators of decoder layers; layer.py, layers.py and held.py say what they do. Written like
 * dispatch.c. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "dispatch.h"

/* What a decoder layer is given; in the order of the operators. */
enum { X, TABLE, NORMS, TEXT, COS, SIN, KEYS, VALUES, MASK, AT, SCALE, EPS };
enum { MOST_NORMS = 4, MOST_BLOCKS = 64 };

/* A table of weights is one tensor of int64: where it lies, when it was filled, for which layers, then
 * their packed calls. Python fills it (layer.py), again after weights have changed. */
enum { WHERE, WHEN, WHOSE, CALLS };
/* A copy of a table leads to the table itself, if that is still there. Any will do where `mark` is 0. */
static const int64_t *filled(const int64_t *table, int64_t mark) {
    const int64_t own = table[WHERE];
    if (own != (int64_t)(uintptr_t)table || table[WHEN] != qk_weights_now()) {
        if (qk_fill(own)) return NULL;
        table = (const int64_t *)(uintptr_t)own;
    }
    return !mark || table[WHOSE] == mark ? table + CALLS : NULL;
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

static const char *cache_differs(const block *b, const handle *h, int64_t batch, int64_t length) {
    int64_t dim, *sizes;
    if (!has(h[KEYS], 4, (int64_t[]){batch, b->kv_heads, -1, b->dim}, 0)) return "decoder layer: keys have other sizes";
    torch.sizes(h[KEYS], &sizes);
    if (sizes[2] != length) return "decoder layer: the mask has other sizes";
    if (!has(h[VALUES], 4, sizes, 0)) return "decoder layer: values have other sizes than keys";
    torch.dim(h[AT], &dim);
    if (dim && !has(h[AT], 1, (int64_t[]){1}, 0)) return "decoder layer: the position is not one number";
    return NULL;
}

static const char *mask_differs(const block *b, const handle *h, int64_t batch) {
    int64_t *others;
    if (!has(h[MASK], 4, (int64_t[]){batch, b->heads, 1, -1}, 1)) return "decoder layer: the mask has other sizes";
    if (!has(h[COS], 3, (int64_t[]){batch, 1, b->rotated}, 1)) return "decoder layer: angles have other sizes";
    torch.sizes(h[COS], &others);
    if (others[2] != b->rotated || !has(h[SIN], 3, others, 0)) return "decoder layer: angles have other sizes";
    return NULL;
}

/* Of one layer, and of what it has in common with those before it where it is the `first`. */
static const char *types_differ(const block *b, const handle *h, int first) {
    int32_t number;
    for (int i = first ? X : KEYS; i <= VALUES; i++)
        if (i != TABLE && i != NORMS && i != TEXT && qk_type_of(h[i]) != b->type) return "decoder layer: a tensor has another dtype";
    if (first && !qk_type_of(h[MASK])) return "decoder layer: the mask is neither bool nor float";
    for (int i = TABLE; i <= AT; i += AT - TABLE) {
        torch.dtype(h[i], &number);
        if (number != qk_int64) return "decoder layer: table or position is not of int64";
    }
    return NULL;
}

/* What one layer is given. Nothing here is owned but `copies`. */
typedef struct {
    const block *b;
    handle h[AT + 1], norm[MOST_NORMS], copies[MOST_NORMS + 4];
    double eps[MOST_NORMS];
    int64_t norms, eps_count;
} given;

static const char *norms_differ(const block *b, const given *g) {
    if (g->norms != b->norms || g->eps_count != g->norms)
        return "decoder layer: another number of norms";
    for (int i = 0; i < b->norms; i++)
        if (qk_type_of(g->norm[i]) != b->type || !has(g->norm[i], 1, i < 2 ? &b->head.k : &b->dim, 0))
            return "decoder layer: a norm has another size or dtype";
    return NULL;
}

/* What all layers of a call are given; NULL, or what is wrong. `types_differ` has nothing against it. */
static const char *pack_common(given *g, qk_block *out) {
    const block *b = g->b;
    handle *h = g->h;
    int64_t *sizes, *strides;
    const char *error;
    if (!has(h[X], 3, (int64_t[]){-1, 1, b->head.k}, 0)) return "decoder layer: x has other sizes";
    torch.sizes(h[X], &sizes);
    qk_block c = {.isa = qk_limit, .type = b->type, .act = b->act, .batch = sizes[0], .heads = b->heads,
                  .kv_heads = b->kv_heads, .dim = b->dim, .rotated = b->rotated, .qkv = b->qkv,
                  .sides = b->sides, .up_first = b->up_first};
    memcpy(c.form, b->form, sizeof c.form);
    if ((error = mask_differs(b, h, c.batch))) return error;
    torch.sizes(h[COS], &sizes);
    c.angle_stride = sizes[0] > 1 ? b->rotated : 0;
    torch.sizes(h[MASK], &sizes);
    torch.strides(h[MASK], &strides);
    for (int i = 0; i < 2; i++) c.mask_stride[i] = sizes[i] > 1 ? strides[i] : 0;
    c.mask_stride[2] = strides[3], c.mask_type = qk_type_of(h[MASK]), c.length = sizes[3];
    torch.data(h[MASK], (void **)&c.mask);
    int failed = numbers_of(h[X], g->copies, &c.x);
    failed |= numbers_of(h[COS], g->copies + 1, &c.cos);
    failed |= numbers_of(h[SIN], g->copies + 2, &c.sin);
    *out = c;
    return failed ? "decoder layer: no memory" : NULL;
}

/* The call of one layer, of which `common` is known; NULL, or what is wrong. */
static const char *pack(given *g, const qk_block *common, qk_block *out) {
    const block *b = g->b;
    handle *h = g->h;
    const void *table, *at;
    const char *error = norms_differ(b, g);
    if (error) return error;
    qk_block c = *common;
    memcpy(c.eps, g->eps, sizeof c.eps);
    if ((error = cache_differs(b, h, c.batch, c.length))) return error;
    if (!has(h[TABLE], 1, (int64_t[]){b->head.n}, 0)) return "decoder layer: this is no table of weights";
    if (cache_of(h[KEYS], c.k_stride, &c.keys) || cache_of(h[VALUES], c.v_stride, &c.values))
        return "decoder layer: features of the cache do not lie together";
    int failed = numbers_of(h[TABLE], g->copies + 3, &table);
    for (int i = 0; i < b->norms; i++) failed |= numbers_of(g->norm[i], g->copies + 4 + i, &c.norm[i]);
    if (failed) return "decoder layer: no memory";
    torch.data(h[AT], (void **)&at);
    c.at = at, c.calls = (const qk_call *)filled(table, b->mark);
    if (!c.calls) return "decoder layer: its weights are not those that the graph was made for";
    *out = c;
    return NULL;
}

/* All layers, each on the y of the one before; NULL, or what is wrong. */
static const char *run_blocks(given *g, int64_t n, double scale, handle *out) {
    qk_block *c = malloc((size_t)n * sizeof *c);
    const char *error = c ? NULL : "decoder layer: no memory";
    int64_t *sizes;
    int32_t number;
    qk_block common;
    for (int64_t i = 0; i < n && !error; i++) {
        error = types_differ(g[i].b, g[i].h, i == 0);
        if (!error && i == 0) error = pack_common(g, &common);
        if (!error) error = pack(&g[i], &common, &c[i]);
        c[i].scale = scale;
    }
    if (!error) {
        torch.sizes(g->h[X], &sizes);
        torch.dtype(g->h[X], &number);
        if (qk_new_like(3, sizes, number, out)) error = "decoder layer: no memory";
    }
    if (!error && c->batch) {
        torch.data(*out, &c[n - 1].y);
        const int status = qk_decoder_blocks(c, n);
        if (status == QK_OUTSIDE) error = "decoder layer: the position is outside of the cache";
        else if (status) error = "decoder layer: no memory for the kernel's scratch space";
    }
    free(c);
    return error;
}

/* All that a call takes from the stack. Lists that are longer than they can be are cut: their counts
 * say so. */
typedef struct {
    handle tensors[MOST_BLOCKS * (4 + MOST_NORMS) + MASK];
    int64_t count;
} taken;

static handle take(taken *t, value v) { return t->tensors[t->count++] = (handle)(uintptr_t)v; }

static int64_t take_list(taken *t, value v, handle *out, int64_t most) {
    const handle list = (handle)(uintptr_t)v;
    size_t count;
    torch.list_size(list, &count);
    for (size_t i = 0; i < count; i++) {
        value item;
        torch.list_item(list, i, &item);
        if ((int64_t)i < most) out[i] = take(t, item);
        else torch.drop((handle)(uintptr_t)item);
    }
    torch.list_drop(list);
    return (int64_t)count;
}

static int64_t take_numbers(value v, double *out, int64_t most) {
    const handle list = (handle)(uintptr_t)v;
    size_t count;
    torch.list_size(list, &count);
    for (size_t i = 0; i < count && (int64_t)i < most; i++) {
        value item;
        torch.list_item(list, i, &item);
        out[i] = number_of(item);
    }
    torch.list_drop(list);
    return (int64_t)count;
}

static const block *block_of(handle string) {
    const block *b = (const block *)qk_layout_of(string, BLOCK);
    torch.string_drop(string);
    return b;
}

static void finish(value *stack, taken *t, given *g, int64_t n, const char *error, handle out) {
    for (int64_t i = 0; i < t->count; i++) torch.drop(t->tensors[i]);
    for (int64_t i = 0; i < n; i++)
        for (int j = 0; j < MOST_NORMS + 4; j++)
            if (g[i].copies[j]) torch.drop(g[i].copies[j]);
    if (error && out) torch.drop(out);
    if (error) qk_fail(error);
    stack[0] = (value)(uintptr_t)out;
}

void qk_op_decoder_layer(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    handle out = NULL;
    given g = {0};
    taken t;
    t.count = 0;
    g.b = block_of((handle)(uintptr_t)stack[TEXT]);
    for (int i = X; i <= AT; i++)
        if (i != TEXT && i != NORMS) g.h[i] = take(&t, stack[i]);
    g.norms = take_list(&t, stack[NORMS], g.norm, MOST_NORMS);
    g.eps_count = take_numbers(stack[EPS], g.eps, MOST_NORMS);
    const char *error = "decoder layer: the layout cannot be read";
    if (g.b) error = run_blocks(&g, 1, number_of(stack[SCALE]), &out);
    finish(stack, &t, &g, 1, error, out);
}

/* Norms and eps of all layers, which lie behind each other. */
static const char *share_out(given *g, int64_t n, handle *norms, int64_t norm_count, const double *eps,
                             int64_t eps_count) {
    int64_t at = 0;
    for (int64_t i = 0; i < n; i++) at += g[i].b->norms;
    if (at != norm_count || at != eps_count) return "decoder layers: another number of norms";
    for (int64_t i = 0; i < n; norms += g[i].norms, eps += g[i].norms, i++) {
        g[i].norms = g[i].eps_count = g[i].b->norms;
        memcpy(g[i].norm, norms, (size_t)g[i].norms * sizeof *norms);
        memcpy(g[i].eps, eps, (size_t)g[i].norms * sizeof *eps);
    }
    return NULL;
}

/* What `qk_decoder_blocks` takes for granted. */
static int alike(const block *a, const block *b) {
    return a->head.k == b->head.k && a->type == b->type && a->heads == b->heads && a->act == b->act &&
           a->kv_heads == b->kv_heads && a->dim == b->dim && a->rotated == b->rotated &&
           a->norms == b->norms && a->qkv == b->qkv && a->sides == b->sides &&
           a->up_first == b->up_first && !memcmp(a->form, b->form, sizeof a->form);
}

void qk_op_decoder_layers(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    handle out = NULL, lists[AT + 1][MOST_BLOCKS], norms[MOST_BLOCKS * MOST_NORMS];
    double eps[MOST_BLOCKS * MOST_NORMS];
    given g[MOST_BLOCKS];
    taken t;
    t.count = 0;
    const handle x = take(&t, stack[X]), cos = take(&t, stack[COS]), sin = take(&t, stack[SIN]);
    const handle mask = take(&t, stack[MASK]);
    const int64_t n = take_list(&t, stack[TABLE], lists[TABLE], MOST_BLOCKS);
    int as_many = n > 0 && n <= MOST_BLOCKS;
    for (int i = KEYS; i <= AT; i++)
        if (i != MASK) as_many &= take_list(&t, stack[i], lists[i], MOST_BLOCKS) == n;
    const int64_t norm_count = take_list(&t, stack[NORMS], norms, MOST_BLOCKS * MOST_NORMS);
    const int64_t eps_count = take_numbers(stack[EPS], eps, MOST_BLOCKS * MOST_NORMS);
    const handle texts = (handle)(uintptr_t)stack[TEXT];
    size_t text_count;
    torch.list_size(texts, &text_count);
    as_many &= (int64_t)text_count == n;
    const char *error = as_many ? NULL : "decoder layers: 1 to 64 layers with as many of each thing";
    for (int64_t i = 0; i < n && !error; i++) {
        value text;
        torch.list_item(texts, i, &text);
        g[i] = (given){.b = block_of((handle)(uintptr_t)text)};
        if (!g[i].b) error = "decoder layers: the layout cannot be read";
        else if (!alike(g[0].b, g[i].b)) error = "decoder layers: they differ in more than their weights";
        const handle h[AT + 1] = {[X] = x, [COS] = cos, [SIN] = sin, [MASK] = mask, [TABLE] = lists[TABLE][i],
                                  [KEYS] = lists[KEYS][i], [VALUES] = lists[VALUES][i], [AT] = lists[AT][i]};
        memcpy(g[i].h, h, sizeof h);
    }
    torch.list_drop(texts);
    const int whole = !error;
    if (!error) error = share_out(g, n, norms, norm_count, eps, eps_count);
    if (!error) error = run_blocks(g, n, number_of(stack[SCALE]), &out);
    finish(stack, &t, g, whole ? n : 0, error, out);
}

/* Something that was found in a dict under `key`, or in a list at `index` where there is no key. */
typedef struct {
    void *where, *key;
    int64_t index;
    const void *what;
} place;

/* What a handle stands for, as long as all `places` hold what they held: held.py. */
typedef struct {
    const place *places;
    int64_t place_count, count;
    handle tensors[];
} held;

/* (Tensor[] tensors, int places, int count) -> int, where they are held until `qk_release` */
void qk_op_hold(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    const handle list = (handle)(uintptr_t)stack[0];
    size_t count;
    torch.list_size(list, &count);
    held *h = malloc(sizeof *h + count * sizeof *h->tensors);
    if (h) *h = (held){(const place *)(uintptr_t)stack[1], (int64_t)stack[2], 0};
    for (; h && h->count < (int64_t)count; h->count++) {
        value item;
        torch.list_item(list, h->count, &item);
        h->tensors[h->count] = (handle)(uintptr_t)item;
    }
    torch.list_drop(list);
    if (!h) qk_fail("hold: no memory");
    stack[0] = (value)(uintptr_t)h;
}

void qk_release(int64_t at) {
    held *h = (held *)(uintptr_t)at;
    for (int64_t i = 0; i < h->count; i++) torch.drop(h->tensors[i]);
    free(h);
}

/* Whether nothing was put in the place of something since. In C, for Python's way to look at some 200
 * objects that the weights have pushed out of the caches takes 100 us. */
static int holds(const held *h) {
    const place *p = h->places;
    int64_t i = 0;
    if (!h->place_count || !qk_python.dict_item) return 0;
    const int state = qk_python.ensure();
    for (; i < h->place_count; i++) {
        void *found = p[i].key ? qk_python.dict_item(p[i].where, p[i].key)
                               : qk_python.list_item(p[i].where, p[i].index);
        if (found != p[i].what) break;
    }
    if (i < h->place_count) qk_python.clear();
    qk_python.release(state);
    return i == h->place_count;
}

/* NULL where there is nothing that it stands for. A handle holds its own address and that of what it
 * stands for; a copy of it leads to the same. */
static const held *held_by(handle h) {
    int32_t number;
    int64_t *at;
    torch.dtype(h, &number);
    if (number != qk_int64 || !has(h, 1, (int64_t[]){2}, 0)) return NULL;
    torch.data(h, (void **)&at);
    const held *found = at[0] == (int64_t)(uintptr_t)at ? (const held *)(uintptr_t)at[1] : NULL;
    return found && holds(found) ? found : (const held *)(uintptr_t)qk_held(at[0]);
}

static int64_t take_integers(value v, int64_t *out, int64_t most) {
    const handle list = (handle)(uintptr_t)v;
    size_t count;
    torch.list_size(list, &count);
    for (size_t i = 0; i < count && (int64_t)i < most; i++) torch.list_item(list, i, (value *)&out[i]);
    torch.list_drop(list);
    return (int64_t)count;
}

/* In the order of the operator; `of` are indices of layers, `to` those of the cache's. */
enum { HELD_X, LAYERS, CACHE, OF, TO, HELD_TEXT, HELD_COS, HELD_SIN, HELD_MASK, FIRST, HELD_SCALE, HELD_EPS };

typedef struct {
    int64_t of[MOST_BLOCKS], to[MOST_BLOCKS], n;
    double eps[MOST_BLOCKS * MOST_NORMS];
} places;

/* Layer by layer: a table and its norms; of the cache: keys, values and a position. `common` are what
 * all of them have; its position is that of the cache's first layer. */
static const char *give(given *g, const block *b, const places *p, const held *layers, const held *cache,
                        const handle *common) {
    const int64_t each = 1 + b->norms;
    for (int64_t i = 0; i < p->n; i++) {
        const int64_t of = p->of[i] * each, to = p->to[i] * 3;
        if (of < 0 || of + each > layers->count || to < 0 || to + 3 > cache->count)
            return "decoder layers: there is no such layer";
        g[i] = (given){.b = b, .norms = b->norms, .eps_count = b->norms};
        memcpy(g[i].h, common, sizeof g[i].h);
        g[i].h[TABLE] = layers->tensors[of];
        g[i].h[KEYS] = cache->tensors[to], g[i].h[VALUES] = cache->tensors[to + 1];
        if (to) g[i].h[AT] = cache->tensors[to + 2];
        memcpy(g[i].norm, layers->tensors + of + 1, (size_t)b->norms * sizeof(handle));
        memcpy(g[i].eps, p->eps + i * b->norms, (size_t)b->norms * sizeof(double));
    }
    return NULL;
}

void qk_op_held_layers(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    handle out = NULL;
    given g[MOST_BLOCKS];
    places p;
    taken t;
    t.count = 0;
    const handle common[AT + 1] = {[X] = take(&t, stack[HELD_X]), [COS] = take(&t, stack[HELD_COS]),
                                   [SIN] = take(&t, stack[HELD_SIN]), [MASK] = take(&t, stack[HELD_MASK]),
                                   [AT] = take(&t, stack[FIRST])};
    const handle of = take(&t, stack[LAYERS]), to = take(&t, stack[CACHE]);
    p.n = take_integers(stack[OF], p.of, MOST_BLOCKS);
    const int64_t places = take_integers(stack[TO], p.to, MOST_BLOCKS);
    const int64_t eps = take_numbers(stack[HELD_EPS], p.eps, MOST_BLOCKS * MOST_NORMS);
    const block *b = block_of((handle)(uintptr_t)stack[HELD_TEXT]);
    const char *error = NULL;
    if (p.n < 1 || p.n > MOST_BLOCKS || places != p.n) error = "decoder layers: 1 to 64 layers with as many of each thing";
    else if (!b) error = "decoder layers: the layout cannot be read";
    else if (eps != p.n * b->norms) error = "decoder layers: another number of norms";
    const held *layers = error ? NULL : held_by(of), *cache = error ? NULL : held_by(to);
    if (!error && !(layers && cache)) error = "decoder layers: the layers or the cache of this graph are gone";
    if (!error) error = give(g, b, &p, layers, cache, common);
    const int whole = !error;
    if (!error) error = run_blocks(g, p.n, number_of(stack[HELD_SCALE]), &out);
    for (int64_t i = 0; i < p.n && !error; i++) {
        int64_t *at;
        if (!p.to[i]) continue;
        torch.data(g[i].h[AT], (void **)&at);
        ++*at;
    }
    finish(stack, &t, g, whole ? p.n : 0, error, out);
}
