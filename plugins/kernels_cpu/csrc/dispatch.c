/* Operators of torch's dispatcher in C: what Python does between the dispatcher and the kernels for
 * every call (sizes, addresses, an output) without Python.
 *
 * Written against torch's stable C ABI (torch 2.10: torch/csrc/stable/c/shim.h and
 * torch/csrc/inductor/aoti_torch/c/shim.h; how values lie on the stack is in
 * torch/csrc/stable/stableivalue_conversions.h). The library is not linked to torch: native.py looks
 * the functions up and hands over their addresses. A tensor, list or string on the stack is owned by
 * whoever takes it. An error is raised by torch's own check, which unwinds this unit's frames; it is
 * compiled with -fexceptions.
 *
 * Layout texts are read once, by Python (`qk_describe`), and found by their hash afterwards. The
 * table only grows; Python adds to it under its global lock, entries are complete before they show. */
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "between_calls.h"
#include "int8.h"

typedef uint64_t value;
typedef void *handle;

/* In the order of native.py. Functions return 0, or another number where they fail. */
typedef struct {
    int32_t (*sizes)(handle, int64_t **);
    int32_t (*strides)(handle, int64_t **);
    int32_t (*dim)(handle, int64_t *);
    int32_t (*dtype)(handle, int32_t *);
    int32_t (*data)(handle, void **);
    int32_t (*drop)(handle);
    int32_t (*empty)(int64_t, const int64_t *, const int64_t *, int32_t, int32_t, int32_t, handle *);
    int32_t (*copy)(handle, handle, int32_t);
    int32_t (*list_size)(handle, size_t *);
    int32_t (*list_item)(handle, size_t, value *);
    int32_t (*list_drop)(handle);
    int32_t (*string_size)(handle, size_t *);
    int32_t (*string_data)(handle, const char **);
    int32_t (*string_drop)(handle);
    int32_t (*call)(const char *, const char *, value *, uint64_t);
    void (*check)(_Bool, const char *, const char *, uint32_t, const char *);
} torch_api;

/* What a layout text says: `slots` are the buffers of qk_tensors' (qk_int8_tensors') members. `kind`
 * is 0, or 1 for int8 activations. */
typedef struct {
    const char *text;
    int64_t length, kind;
    const void *op;
    int64_t slots[8], buffers, n, k;
} layout;

enum { FLOATS, INT8, BLOCK }; /* kinds */

/* What the text of a decoder layer says; of `head` `k` features, `n` numbers in the table of weights.
 * `mark` stands for the texts of its layers. */
typedef struct {
    layout head;
    int64_t mark, type, heads, kv_heads, dim, rotated, form[2], act;
} block;

enum { MOST_DIM = 8, MOST_LAYERS = 64, MOST_BUFFERS = 16, PLACES = 1 << 14 };

static torch_api torch;
static int64_t dtypes[4][2]; /* torch's number, ours; bool is last */
static int64_t isa, wide_rows, int64_number;
static int (*describe)(const char *, int64_t length, int64_t kind);
static int (*fill)(int64_t table);
static _Atomic(const layout *) table[PLACES];

int qk_linear(const qk_call *);
int qk_linear_shared(const qk_call *, int64_t n);
int qk_linear_w8a8(const qk_int8_call *);
int qk_linear_w8a8_shared(const qk_int8_call *, int64_t n);

/* Counts every change of what packed calls hold: addresses of weights, the instruction set. */
static _Atomic int64_t weights_now = 1;

void qk_weights_changed(void) { atomic_fetch_add(&weights_now, 1); }
int64_t qk_weights_now(void) { return atomic_load(&weights_now); }

/* `rows`: from so many on bfloat16 calls belong to torch's matmul (its matrix units); 0 = never. */
void qk_native_limits(int64_t limit, int64_t rows) {
    isa = limit, wide_rows = rows;
    qk_weights_changed();
}

void qk_native_api(void **functions, const int64_t *numbers, void *reader, void *filler) {
    memcpy(&torch, functions, sizeof torch);
    memcpy(dtypes, numbers, sizeof dtypes);
    int64_number = numbers[8];
    memcpy(&describe, &reader, sizeof describe);
    memcpy(&fill, &filler, sizeof fill);
}

static uint64_t hash_of(const char *text, int64_t length, int64_t kind) {
    uint64_t h = 0x9e3779b97f4a7c15u ^ (uint64_t)(length * 4 + kind), word;
    for (; length >= 8; length -= 8, text += 8) {
        memcpy(&word, text, 8);
        h = (h ^ word) * 0xff51afd7ed558ccdu;
        h ^= h >> 32;
    }
    for (; length > 0; length--) h = (h ^ (uint8_t)*text++) * 0x100000001b3u;
    return h ^ h >> 29;
}

static const layout *find(const char *text, int64_t length, int64_t kind) {
    uint64_t at = hash_of(text, length, kind);
    for (int i = 0; i < PLACES; i++) {
        const layout *l = atomic_load_explicit(&table[(at + i) % PLACES], memory_order_acquire);
        if (!l) return NULL;
        if (l->length == length && l->kind == kind && !memcmp(l->text, text, length)) return l;
    }
    return NULL;
}

/* Called by `describe`; `l` and all it points to stay. Returns 0, or 1 when the table is full. */
int qk_native_layout(const layout *l) {
    uint64_t at = hash_of(l->text, l->length, l->kind);
    for (int i = 0; i < PLACES; i++)
        if (!atomic_load_explicit(&table[(at + i) % PLACES], memory_order_relaxed)) {
            atomic_store_explicit(&table[(at + i) % PLACES], l, memory_order_release);
            return 0;
        }
    return 1;
}

static const layout *layout_of(handle string, int64_t kind) {
    size_t length;
    const char *text;
    torch.string_size(string, &length);
    torch.string_data(string, &text);
    const layout *l = find(text, length, kind);
    if (!l && describe(text, length, kind) == 0) l = find(text, length, kind);
    return l;
}

static void fail(const char *message) { torch.check(0, "quant_cpu", "dispatch.c", 0, message); }

/* All that one call holds: `held` tensors of the list were taken from it. */
typedef struct {
    handle x, list, dense;
    int64_t held;
    handle tensors[MOST_LAYERS * MOST_BUFFERS];
} owned;

static int take(owned *o) {
    value item;
    if (torch.list_item(o->list, o->held, &item)) return 1;
    o->tensors[o->held++] = (handle)(uintptr_t)item;
    return 0;
}

static void release(owned *o) {
    size_t given = 0;
    torch.list_size(o->list, &given);
    while (o->held < (int64_t)given && o->held < MOST_LAYERS * MOST_BUFFERS && !take(o)) continue;
    for (int64_t i = 0; i < o->held; i++) torch.drop(o->tensors[i]);
    torch.list_drop(o->list);
    torch.drop(o->x);
    if (o->dense) torch.drop(o->dense);
}

static void hold(owned *o, const value *stack) {
    o->x = (handle)(uintptr_t)stack[0], o->list = (handle)(uintptr_t)stack[1];
    o->dense = NULL, o->held = 0;
}

static int dense(int64_t dim, const int64_t *sizes, const int64_t *strides) {
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; i--) {
        if (sizes[i] != 1 && strides[i] != step) return 0;
        step *= sizes[i];
    }
    return 1;
}

/* Memory like a tensor's, but dense. */
static int new_like(int64_t dim, const int64_t *sizes, int32_t number, handle *out) {
    int64_t steps[MOST_DIM];
    for (int64_t i = dim - 1, step = 1; i >= 0; step *= sizes[i--]) steps[i] = step;
    return torch.empty(dim, sizes, steps, number, 0, 0, out);
}

static int64_t type_of(handle x) {
    int32_t number;
    torch.dtype(x, &number);
    for (int i = 0; i < 4; i++)
        if (dtypes[i][0] == number) return dtypes[i][1];
    return QK_NONE;
}

/* y for `n` layers of x: [..., N] of one, or as kernels.merged says of several (`joint`). Takes what
 * `o` holds; *out is NULL where there is an error, which is returned. */
static const char *run(owned *o, const layout **layers, int64_t n, int joint, handle *out) {
    int64_t dim, *sizes, *strides, total = 0, count = 1, buffers = 0, type, first = 0;
    int64_t shape[MOST_DIM], steps[MOST_DIM];
    size_t given;
    int32_t number;
    torch.dim(o->x, &dim);
    torch.sizes(o->x, &sizes);
    torch.strides(o->x, &strides);
    torch.dtype(o->x, &number);
    torch.list_size(o->list, &given);
    type = type_of(o->x);
    for (int64_t i = 0; i < n; i++) buffers += layers[i]->buffers, total += layers[i]->n;
    if (dim < 1 || dim > MOST_DIM || !type || type == QK_U8) return "linear: x has another dtype or more dimensions";
    for (int64_t i = 0; i < n; i++)
        if (sizes[dim - 1] != layers[i]->k) return "linear: x has another number of features";
    if (buffers != (int64_t)given || buffers > MOST_LAYERS * MOST_BUFFERS)
        return "linear: the tensors are not those of the layouts";
    for (int64_t i = 0; i < dim - 1; i++) count *= sizes[i];
    if (!dense(dim, sizes, strides)) {
        if (new_like(dim, sizes, number, &o->dense)) return "linear: no memory";
        if (torch.copy(o->dense, o->x, 0)) return "linear: x cannot be read";
    }
    if (joint) {
        shape[0] = total, shape[1] = count, steps[0] = count, steps[1] = 1;
        if (torch.empty(2, shape, steps, number, 0, 0, out)) return "linear: no memory";
    } else {
        memcpy(shape, sizes, dim * sizeof *shape);
        shape[dim - 1] = total;
        if (new_like(dim, shape, number, out)) return "linear: no memory";
    }
    if (!count) return NULL;
    void *x, *y;
    torch.data(o->dense ? o->dense : o->x, &x);
    torch.data(*out, &y);
    qk_call calls[MOST_LAYERS];
    _Static_assert(sizeof(qk_call) == sizeof(qk_int8_call), "one packing for both");
    const int64_t bytes = type == QK_F32 ? 4 : 2;
    for (int64_t i = 0; i < n; i++) {
        void *at[8];
        while (o->held < first + layers[i]->buffers)
            if (take(o)) return "linear: a tensor is missing";
        for (int s = 0; s < 8; s++) {
            at[s] = NULL;
            if (layers[i]->slots[s] >= 0) torch.data(o->tensors[first + layers[i]->slots[s]], &at[s]);
        }
        calls[i] = (qk_call){.op = layers[i]->op, .x = x, .xtype = type, .y = y, .isa = isa, .count = count};
        memcpy(&calls[i].tensors, at, sizeof at);
        first += layers[i]->buffers;
        y = (char *)y + layers[i]->n * count * bytes;
    }
    int status;
    if (layers[0]->kind == INT8) status = qk_linear_w8a8_shared((const qk_int8_call *)calls, n);
    else status = n > 1 ? qk_linear_shared(calls, n) : qk_linear(calls);
    return status ? "linear: no memory for the kernel's scratch space" : NULL;
}

/* Whether a call of so many rows is left to Python, which has torch's matmul. */
static int is_wide(handle x) {
    int64_t dim, *sizes, count = 1;
    int32_t number;
    if (!wide_rows) return 0;
    torch.dim(x, &dim);
    torch.sizes(x, &sizes);
    torch.dtype(x, &number);
    for (int64_t i = 0; i < dim - 1; i++) count *= sizes[i];
    return count >= wide_rows && dtypes[2][0] == number;
}

/* (Tensor x, Tensor[] tensors, str layout) -> Tensor */
static void single(value *stack, int64_t kind, const char *wide) {
    handle string = (handle)(uintptr_t)stack[2], out = NULL;
    owned o;
    hold(&o, stack);
    if (wide && is_wide(o.x)) {
        if (torch.call(wide, "", stack, 2ull << 56 | 10ull << 48)) fail("linear: it failed as said above");
        return;
    }
    const layout *l = layout_of(string, kind);
    const char *error = l ? run(&o, &l, 1, 0, &out) : "linear: the layout cannot be read";
    torch.string_drop(string);
    release(&o);
    if (error && out) torch.drop(out);
    if (error) fail(error);
    stack[0] = (value)(uintptr_t)out;
}

/* (Tensor x, Tensor[] tensors, str[] layouts) -> Tensor */
static void shared(value *stack, int64_t kind, const char *wide) {
    handle texts = (handle)(uintptr_t)stack[2], out = NULL;
    owned o;
    hold(&o, stack);
    const layout *layers[MOST_LAYERS];
    const char *error = NULL;
    size_t n;
    torch.list_size(texts, &n);
    if (wide && (n > MOST_LAYERS || is_wide(o.x))) {
        if (torch.call(wide, "", stack, 2ull << 56 | 10ull << 48)) fail("linear: it failed as said above");
        return;
    }
    if (n < 1 || n > MOST_LAYERS) error = "linear: 1 to 64 layers can share a call";
    for (size_t i = 0; !error && i < n; i++) {
        value item;
        torch.list_item(texts, i, &item);
        layers[i] = layout_of((handle)(uintptr_t)item, kind);
        torch.string_drop((handle)(uintptr_t)item);
        if (!layers[i]) error = "linear: the layout cannot be read";
    }
    if (!error) error = run(&o, layers, n, 1, &out);
    torch.list_drop(texts);
    release(&o);
    if (error && out) torch.drop(out);
    if (error) fail(error);
    stack[0] = (value)(uintptr_t)out;
}

void qk_op_linear(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    single(stack, FLOATS, "quant_cpu::linear_wide");
}

void qk_op_linear_shared(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    shared(stack, FLOATS, "quant_cpu::linear_shared_wide");
}

void qk_op_linear_w8a8(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    single(stack, INT8, NULL);
}

void qk_op_linear_w8a8_shared(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    shared(stack, INT8, NULL);
}

/* What a decoder layer is given; in the order of the operator. */
enum { X, TABLE, NORM, NORM_2, TEXT, COS, SIN, KEYS, VALUES, MASK, AT, SCALE, EPS, EPS_2 };

/* A table of weights is one tensor of int64: where it lies, when it was filled, for which layers, then
 * their packed calls. Python fills it (layer.py), again after weights have changed. */
enum { WHERE, WHEN, WHOSE, CALLS };
/* A copy of a table leads to the table itself, if that is still there. */
static const int64_t *filled(const int64_t *table, int64_t mark) {
    const int64_t own = table[WHERE];
    if (own != (int64_t)(uintptr_t)table || table[WHEN] != qk_weights_now()) {
        if (fill(own)) return NULL;
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
    if (!dense(dim, sizes, strides)) {
        torch.dtype(h, &number);
        if (new_like(dim, sizes, number, copy) || torch.copy(*copy, h, 0)) return 1;
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
    for (int i = NORM; i <= NORM_2; i++)
        if (!has(h[i], 1, &b->head.k, 0)) return "decoder layer: a norm has another size";
    int64_t dim;
    torch.dim(h[AT], &dim);
    if (dim && !has(h[AT], 1, (int64_t[]){1}, 0)) return "decoder layer: the position is not one number";
    return NULL;
}

static const char *types_differ(const block *b, const handle *h) {
    int32_t number;
    for (int i = X; i <= VALUES; i++)
        if (i != TABLE && i != TEXT && type_of(h[i]) != b->type) return "decoder layer: a tensor has another dtype";
    if (!type_of(h[MASK])) return "decoder layer: the mask is neither bool nor float";
    for (int i = TABLE; i <= AT; i += AT - TABLE) {
        torch.dtype(h[i], &number);
        if (number != int64_number) return "decoder layer: table or position is not of int64";
    }
    return NULL;
}

/* y, or NULL with an error; what is in `spare` is to be dropped. */
static const char *run_block(const block *b, const value *stack, handle *spare, handle *out) {
    handle h[AT + 1];
    for (int i = X; i <= AT; i++) h[i] = (handle)(uintptr_t)stack[i];
    int64_t *sizes, *strides;
    int32_t number;
    const void *table, *at;
    const char *error = types_differ(b, h);
    if (error) return error;
    if (!has(h[X], 3, (int64_t[]){-1, 1, b->head.k}, 0)) return "decoder layer: x has other sizes";
    torch.sizes(h[X], &sizes);
    torch.dtype(h[X], &number);
    qk_block c = {.isa = isa, .type = b->type, .act = b->act, .form = {b->form[0], b->form[1]},
                  .batch = sizes[0], .heads = b->heads, .kv_heads = b->kv_heads, .dim = b->dim,
                  .rotated = b->rotated, .scale = number_of(stack[SCALE]),
                  .eps = {number_of(stack[EPS]), number_of(stack[EPS_2])}};
    if ((error = sizes_differ(b, h, c.batch))) return error;
    if (!has(h[TABLE], 1, (int64_t[]){b->head.n}, 0)) return "decoder layer: this is no table of weights";
    if (new_like(3, sizes, number, out)) return "decoder layer: no memory";
    torch.sizes(h[COS], &sizes);
    c.angle_stride = sizes[0] > 1 ? b->rotated : 0;
    torch.sizes(h[KEYS], &sizes);
    c.length = sizes[2];
    torch.sizes(h[MASK], &sizes);
    torch.strides(h[MASK], &strides);
    for (int i = 0; i < 2; i++) c.mask_stride[i] = sizes[i] > 1 ? strides[i] : 0;
    c.mask_stride[2] = strides[3], c.mask_type = type_of(h[MASK]);
    torch.data(h[MASK], (void **)&c.mask);
    if (cache_of(h[KEYS], c.k_stride, &c.keys) || cache_of(h[VALUES], c.v_stride, &c.values))
        return "decoder layer: features of the cache do not lie together";
    if (numbers_of(h[X], spare, &c.x) || numbers_of(h[COS], spare + 1, &c.cos) ||
        numbers_of(h[SIN], spare + 2, &c.sin) || numbers_of(h[NORM], spare + 3, &c.norm[0]) ||
        numbers_of(h[NORM_2], spare + 4, &c.norm[1]) || numbers_of(h[TABLE], spare + 5, &table))
        return "decoder layer: no memory";
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
    handle string = (handle)(uintptr_t)stack[TEXT], out = NULL, spare[6] = {NULL};
    const layout *l = layout_of(string, BLOCK);
    const char *error = l ? run_block((const block *)l, stack, spare, &out) : "decoder layer: the layout cannot be read";
    torch.string_drop(string);
    for (int i = X; i <= AT; i++)
        if (i != TEXT) torch.drop((handle)(uintptr_t)stack[i]);
    for (int i = 0; i < 6; i++)
        if (spare[i]) torch.drop(spare[i]);
    if (error && out) torch.drop(out);
    if (error) fail(error);
    stack[0] = (value)(uintptr_t)out;
}
