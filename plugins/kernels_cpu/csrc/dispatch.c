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

#include "dispatch.h"
#include "int8.h"

enum { MOST_LAYERS = 64, MOST_BUFFERS = 16, PLACES = 1 << 14 };

torch_api qk_torch;
int64_t qk_limit, qk_int64;
static int64_t dtypes[4][2]; /* torch's number, ours; bool is last */
static int (*describe)(const char *, int64_t length, int64_t kind);
int (*qk_fill)(int64_t table);
int64_t (*qk_held)(int64_t handle);
python_api qk_python;
static _Atomic(const layout *) table[PLACES];

int qk_linear(const qk_call *);
int qk_linear_shared(const qk_call *, int64_t n);
int qk_linear_w8a8(const qk_int8_call *);
int qk_linear_w8a8_shared(const qk_int8_call *, int64_t n);
int qk_rows(const qk_call *);

/* Counts every change of what packed calls hold: addresses of weights, the instruction set. */
static _Atomic int64_t weights_now = 1;

void qk_weights_changed(void) { atomic_fetch_add(&weights_now, 1); }
int64_t qk_weights_now(void) { return atomic_load(&weights_now); }

void qk_native_limits(int64_t limit) {
    qk_limit = limit;
    qk_weights_changed();
}

void qk_native_python(void **functions) { memcpy(&qk_python, functions, sizeof qk_python); }

void qk_native_api(void **functions, const int64_t *numbers, void *reader, void *filler, void *holder) {
    memcpy(&torch, functions, sizeof torch);
    memcpy(dtypes, numbers, sizeof dtypes);
    qk_int64 = numbers[8];
    memcpy(&describe, &reader, sizeof describe);
    memcpy(&qk_fill, &filler, sizeof qk_fill);
    memcpy(&qk_held, &holder, sizeof qk_held);
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

const layout *qk_layout_of(handle string, int64_t kind) {
    size_t length;
    const char *text;
    torch.string_size(string, &length);
    torch.string_data(string, &text);
    const layout *l = find(text, length, kind);
    if (!l && describe(text, length, kind) == 0) l = find(text, length, kind);
    return l;
}

void qk_fail(const char *message) { torch.check(0, "quant_cpu", "dispatch.c", 0, message); }

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

int qk_dense_strides(int64_t dim, const int64_t *sizes, const int64_t *strides) {
    int64_t step = 1;
    for (int64_t i = dim - 1; i >= 0; i--) {
        if (sizes[i] != 1 && strides[i] != step) return 0;
        step *= sizes[i];
    }
    return 1;
}

/* Memory like a tensor's, but dense. */
int qk_new_like(int64_t dim, const int64_t *sizes, int32_t number, handle *out) {
    int64_t steps[MOST_DIM];
    for (int64_t i = dim - 1, step = 1; i >= 0; step *= sizes[i--]) steps[i] = step;
    return torch.empty(dim, sizes, steps, number, 0, 0, out);
}

int64_t qk_type_of(handle x) {
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
    type = qk_type_of(o->x);
    for (int64_t i = 0; i < n; i++) buffers += layers[i]->buffers, total += layers[i]->n;
    if (dim < 1 || dim > MOST_DIM || !type || type == QK_U8) return "linear: x has another dtype or more dimensions";
    for (int64_t i = 0; i < n; i++)
        if (sizes[dim - 1] != layers[i]->k) return "linear: x has another number of features";
    if (buffers != (int64_t)given || buffers > MOST_LAYERS * MOST_BUFFERS)
        return "linear: the tensors are not those of the layouts";
    for (int64_t i = 0; i < dim - 1; i++) count *= sizes[i];
    if (!qk_dense_strides(dim, sizes, strides)) {
        if (qk_new_like(dim, sizes, number, &o->dense)) return "linear: no memory";
        if (torch.copy(o->dense, o->x, 0)) return "linear: x cannot be read";
    }
    if (joint) {
        shape[0] = total, shape[1] = count, steps[0] = count, steps[1] = 1;
        if (torch.empty(2, shape, steps, number, 0, 0, out)) return "linear: no memory";
    } else {
        memcpy(shape, sizes, dim * sizeof *shape);
        shape[dim - 1] = total;
        if (qk_new_like(dim, shape, number, out)) return "linear: no memory";
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
        calls[i] = (qk_call){.op = layers[i]->op, .x = x, .xtype = type, .y = y, .isa = qk_limit, .count = count};
        memcpy(&calls[i].tensors, at, sizeof at);
        first += layers[i]->buffers;
        y = (char *)y + layers[i]->n * count * bytes;
    }
    int status;
    if (layers[0]->kind == INT8) status = qk_linear_w8a8_shared((const qk_int8_call *)calls, n);
    else status = n > 1 ? qk_linear_shared(calls, n) : qk_linear(calls);
    return status ? "linear: no memory for the kernel's scratch space" : NULL;
}

/* (Tensor x, Tensor[] tensors, str layout) -> Tensor */
static void single(value *stack, int64_t kind) {
    handle string = (handle)(uintptr_t)stack[2], out = NULL;
    owned o;
    hold(&o, stack);
    const layout *l = qk_layout_of(string, kind);
    const char *error = l ? run(&o, &l, 1, 0, &out) : "linear: the layout cannot be read";
    torch.string_drop(string);
    release(&o);
    if (error && out) torch.drop(out);
    if (error) qk_fail(error);
    stack[0] = (value)(uintptr_t)out;
}

/* (Tensor x, Tensor[] tensors, str[] layouts) -> Tensor */
static void shared(value *stack, int64_t kind, const char *many) {
    handle texts = (handle)(uintptr_t)stack[2], out = NULL;
    owned o;
    hold(&o, stack);
    const layout *layers[MOST_LAYERS];
    const char *error = NULL;
    size_t n;
    torch.list_size(texts, &n);
    if (many && n > MOST_LAYERS) {
        if (torch.call(many, "", stack, 2ull << 56 | 10ull << 48)) qk_fail("linear: it failed as said above");
        return;
    }
    if (n < 1 || n > MOST_LAYERS) error = "linear: 1 to 64 layers can share a call";
    for (size_t i = 0; !error && i < n; i++) {
        value item;
        torch.list_item(texts, i, &item);
        layers[i] = qk_layout_of((handle)(uintptr_t)item, kind);
        torch.string_drop((handle)(uintptr_t)item);
        if (!layers[i]) error = "linear: the layout cannot be read";
    }
    if (!error) error = run(&o, layers, n, 1, &out);
    torch.list_drop(texts);
    release(&o);
    if (error && out) torch.drop(out);
    if (error) qk_fail(error);
    stack[0] = (value)(uintptr_t)out;
}

void qk_op_linear(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    single(stack, FLOATS);
}

void qk_op_linear_shared(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    shared(stack, FLOATS, "quant_cpu::linear_shared_many");
}

void qk_op_linear_w8a8(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    single(stack, INT8);
}

void qk_op_linear_w8a8_shared(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    shared(stack, INT8, NULL);
}

/* What is wrong, or NULL; `o` holds the ids as x. */
static const char *rows_of(owned *o, const layout *l, handle *out) {
    int64_t dim, *sizes, *strides, shape[MOST_DIM], count = 1;
    size_t given;
    int32_t number, kind = -1;
    void *x, *y, *at[8] = {NULL};
    torch.dim(o->x, &dim);
    torch.sizes(o->x, &sizes);
    torch.strides(o->x, &strides);
    torch.dtype(o->x, &number);
    torch.list_size(o->list, &given);
    for (int i = 0; i < 3; i++)
        if (dtypes[i][1] == l->type) kind = (int32_t)dtypes[i][0];
    if (dim >= MOST_DIM || kind < 0) return "embedding: ids have too many dimensions, or the layout no dtype";
    if ((int64_t)given != l->buffers) return "embedding: the tensors are not those of the layout";
    for (int64_t i = 0; i < dim; i++) shape[i] = sizes[i], count *= sizes[i];
    shape[dim] = ((const qk_op *)l->op)->k;
    if (number != qk_int64 || !qk_dense_strides(dim, sizes, strides)) {
        if (qk_new_like(dim, sizes, (int32_t)qk_int64, &o->dense)) return "embedding: no memory";
        if (torch.copy(o->dense, o->x, 0)) return "embedding: ids cannot be read";
    }
    if (qk_new_like(dim + 1, shape, kind, out)) return "embedding: no memory";
    while (o->held < l->buffers)
        if (take(o)) return "embedding: a tensor is missing";
    for (int s = 0; s < 8; s++)
        if (l->slots[s] >= 0) torch.data(o->tensors[l->slots[s]], &at[s]);
    torch.data(o->dense ? o->dense : o->x, &x);
    torch.data(*out, &y);
    qk_call c = {.op = l->op, .x = x, .xtype = l->type, .y = y, .isa = qk_limit, .count = count};
    memcpy(&c.tensors, at, sizeof at);
    const int status = qk_rows(&c);
    if (status == 2) return "embedding: an id is outside the table. Check the token ids.";
    return status ? "embedding: no memory for the kernel's scratch space" : NULL;
}

/* (Tensor ids, Tensor[] tensors, str layout) -> Tensor */
void qk_op_embedding(value *stack, uint64_t inputs, uint64_t outputs) {
    (void)inputs, (void)outputs;
    handle string = (handle)(uintptr_t)stack[2], out = NULL;
    owned o;
    hold(&o, stack);
    const layout *l = qk_layout_of(string, FLOATS);
    const char *error = l ? rows_of(&o, l, &out) : "embedding: the layout cannot be read";
    torch.string_drop(string);
    release(&o);
    if (error && out) torch.drop(out);
    if (error) qk_fail(error);
    stack[0] = (value)(uintptr_t)out;
}
