/* What the operators in C share: torch's functions, layouts by their text. See dispatch.c. */
#ifndef QK_DISPATCH_H
#define QK_DISPATCH_H

#include <stddef.h>

#include "between_calls.h"

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
 * is 0, or 1 for int8 activations; `type` that of the rows of an embedding. */
typedef struct {
    const char *text;
    int64_t length, kind;
    const void *op;
    int64_t slots[8], buffers, n, k, type;
} layout;

enum { FLOATS, INT8, BLOCK }; /* kinds */

/* What the text of a decoder layer says; of `head` `k` features, `n` numbers in the table of weights.
 * `mark` stands for the texts of its layers. 2 or 4 norms; the others as in qk_block. */
typedef struct {
    layout head;
    int64_t mark, type, heads, kv_heads, dim, rotated, norms, form[4], act, qkv, sides, up_first;
} block;

enum { MOST_DIM = 8 };

extern torch_api qk_torch;
#define torch qk_torch

extern int64_t qk_limit; /* the instruction set */
extern int64_t qk_int64; /* torch's number of the dtype */
extern int (*qk_fill)(int64_t table); /* Python's `fill_table` */
extern int64_t (*qk_held)(int64_t handle); /* Python's `held_at` */

/* Of CPython's C API: items are borrowed, NULL where there is none. */
typedef struct {
    int (*ensure)(void);
    void (*release)(int);
    void *(*dict_item)(void *, void *);
    void *(*list_item)(void *, intptr_t);
    void (*clear)(void);
} python_api;

extern python_api qk_python;

int64_t qk_weights_now(void);
const layout *qk_layout_of(handle string, int64_t kind); /* NULL where it cannot be read */
int64_t qk_type_of(handle);                              /* our number of its dtype, or QK_NONE */
int qk_dense_strides(int64_t dim, const int64_t *sizes, const int64_t *strides);
int qk_new_like(int64_t dim, const int64_t *sizes, int32_t number, handle *out); /* dense memory */
void qk_fail(const char *message); /* raises; unwinds this frame */

#endif
