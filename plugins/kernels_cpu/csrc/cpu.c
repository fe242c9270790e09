/* Run-time dispatch; the only unit compiled for the baseline instruction set. */
#include <cpuid.h>
#include <omp.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "int8.h"
#include "step.h"
#include "stored.h"

#if defined(QK_HAVE_AMX) && defined(QK_HAVE_AMX_FLOAT8) && defined(QK_HAVE_AMX_INT8)
#define QK_TILES /* matrix units */
#endif

enum { ISA_NONE, ISA_AVX2, ISA_AVX512, ISA_BF16, ISA_AMX };

/* Matrix units for bfloat16 and int8, which a process on Linux has to ask for once. */
static int has_amx(void) {
#ifdef QK_AMX_EMULATED
    return 1;
#elif defined(QK_TILES)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    static int known; /* 1: no, 2: yes */
    unsigned a, b, c, d;
    if (!known) {
        const int there = __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
        known = there && !syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) ? 2 : 1;
    }
    return known == 2;
#else
    return 0;
#endif
}

/* The best instruction set that this processor has and this library was built with. */
int qk_isa(void) {
    __builtin_cpu_init();
#ifdef QK_HAVE_BF16
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"))
        return has_amx() && __builtin_cpu_supports("avx512vbmi") ? ISA_AMX : ISA_BF16;
#endif
#ifdef QK_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return ISA_AVX512;
#endif
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
        return ISA_AVX2;
    return ISA_NONE;
}

int qk_has_vnni(void) {
#ifdef QK_HAVE_VNNI
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw");
#else
    return 0;
#endif
}

int qk_version(void) { return QK_VERSION; }

static int exact_in_bf16(const qk_call *c) {
    const float *table = qk_table(c->op, &c->tensors);
    for (int i = 0; c->op->width == 4 && i < 16; i++) {
        union { float f; uint32_t u; } v = {table[i]};
        if (v.u & 0xffff) return 0;
    }
    return 1;
}

typedef struct {
    qk_linear_fn *linear;
    qk_shared_fn *shared;
    int64_t (*most)(void);
    qk_part_fn *part; /* NULL: a shared call cannot be had in parts */
} unit;

#define UNIT(name) (unit){qk_linear_##name, qk_shared_##name, qk_most_shared_##name, qk_part_##name}

/* The unit that runs a call of 8-bit floats. */
static unit float8_unit(const qk_call *c) {
#ifdef QK_TILES
    if (c->isa >= ISA_AMX && c->xtype == QK_BF16)
        return (unit){qk_linear_amx_float8, qk_shared_bf16_float8, qk_most_shared_bf16_float8, qk_part_bf16_float8};
#endif
#ifdef QK_HAVE_BF16_FLOAT8
    if (c->isa >= ISA_BF16 && c->xtype == QK_BF16 && __builtin_cpu_supports("avx512vbmi"))
        return UNIT(bf16_float8);
#endif
#ifdef QK_HAVE_AVX512_FLOAT8
    if (c->isa >= ISA_AVX512)
        return UNIT(avx512_float8);
#endif
    if (c->isa >= ISA_AVX2)
        return UNIT(avx2_float8);
    return (unit){0};
}

/* Which unit lets few tokens meet codes where files have them, not blocks made of them: that of
 * ISA_AVX512 or ISA_BF16, or 0. */
int qk_in_place(const qk_op *op, int64_t isa, int64_t xtype) {
    (void)isa, (void)xtype;
    if (!op->order) return 0;
#if defined(QK_HAVE_STORED_BF16) && defined(QK_HAVE_BF16)
    if (isa >= ISA_BF16 && xtype == QK_BF16 && qk_fits_stored_bf16(op) && __builtin_cpu_supports("avx512vbmi"))
        return ISA_BF16;
#endif
#if defined(QK_HAVE_STORED_AVX512) && defined(QK_HAVE_AVX512)
    if (isa >= ISA_AVX512 && qk_fits_stored_avx512(op)) return ISA_AVX512;
#endif
    return 0;
}

/* The unit that runs a call: the best one its operation and types allow. */
static unit unit_of(const qk_call *c) {
    if (c->op->float8) return float8_unit(c);
    const int in_place = qk_in_place(c->op, c->isa, c->xtype);
    (void)in_place;
#ifdef QK_HAVE_BF16
    if (c->isa >= ISA_BF16 && c->xtype == QK_BF16 && exact_in_bf16(c)) {
        unit found = UNIT(bf16);
#ifdef QK_HAVE_STORED_BF16
        if (in_place == ISA_BF16)
            found = (unit){qk_linear_bf16, qk_shared_stored_bf16, qk_most_stored_bf16, NULL};
#endif
#if defined(QK_TILES) && defined(QK_HAVE_STORED_BF16)
        if (c->isa >= ISA_AMX) {
            found.linear = qk_linear_amx;
            if (in_place == ISA_BF16) found.most = qk_most_stored_at_once_bf16; /* blocks take half as long */
        }
#endif
        return found;
    }
#endif
#ifdef QK_HAVE_AVX512
#ifdef QK_HAVE_STORED_AVX512
    if (in_place == ISA_AVX512) return (unit){qk_linear_avx512, qk_shared_stored_avx512, qk_most_stored_avx512, NULL};
#endif
    if (c->isa >= ISA_AVX512)
        return UNIT(avx512);
#endif
    if (c->isa >= ISA_AVX2 && c->op->lut)
        return UNIT(avx2_lookup);
    if (c->isa >= ISA_AVX2) return UNIT(avx2);
    return (unit){0};
}

/* y = x W^T. Returns 0, 1 (no memory) or 3 (no such instruction set). */
int qk_linear(const qk_call *c) {
    const int64_t threads = omp_get_max_threads();
    const unit u = unit_of(c);
    if (!u.linear) return 3;
    if (!c->segments && c->count <= u.most()) return u.shared(c, 1, threads);
    const qk_segment one = {0, 0, c->count}, *segs = c->segments ? c->segments : &one;
    const int64_t n = c->segments ? c->count : 1;
    return u.linear(c->op, &c->tensors, c->x, c->xtype, c->y, segs, n, threads);
}

qk_part_fn *qk_part_of(const qk_call *calls, int64_t n) {
    const unit u = unit_of(calls);
    for (int64_t i = 0; i < n; i++)
        if (unit_of(calls + i).shared != u.shared) return NULL;
    return u.shared && calls->count <= u.most() ? u.part : NULL;
}

/* The same for `n` layers of one x; together where one unit runs them all, else in turn. */
int qk_linear_shared(const qk_call *calls, int64_t n) {
    const unit u = unit_of(calls);
    int alike = u.shared && calls->count <= u.most();
    for (int64_t i = 1; i < n; i++) alike &= unit_of(calls + i).shared == u.shared;
    if (alike) return u.shared(calls, n, omp_get_max_threads());
    for (int64_t i = 0; i < n; i++) {
        const int status = qk_linear(calls + i);
        if (status) return status;
    }
    return 0;
}

/* The same with activations rounded to int8 per group (kernel_w4a8.c). */
int qk_linear_int8(const qk_call *c) {
#ifdef QK_HAVE_VNNI
    const qk_segment one = {0, 0, c->count}, *segs = c->segments ? c->segments : &one;
    return qk_linear_w4a8(c->op, &c->tensors, c->x, c->xtype, c->y, segs,
                          c->segments ? c->count : 1, omp_get_max_threads());
#else
    (void)c;
    return 3;
#endif
}

#ifdef QK_TILES
enum { LEAST_INT8_TILE = 13 }; /* fewer tokens: weights are read as fast by vectors */

/* Whether the matrix units run it: whole tiles of 64 columns up to the end of every group. */
static int int8_tiles(const qk_int8_call *c, int64_t tokens) {
    return tokens >= LEAST_INT8_TILE && c->op->k % 64 == 0 && c->op->group % 64 == 0;
}
#endif

/* int8 weights and int8 activations with the codes that the operation names (int8.h). */
int qk_linear_w8a8(const qk_int8_call *c) {
    const int64_t threads = omp_get_max_threads();
    const qk_segment one = {0, 0, c->count}, *segs = c->segments ? c->segments : &one;
    const int64_t n = c->segments ? c->count : 1;
#ifdef QK_TILES
    int64_t most = 0;
    for (int64_t i = 0; i < n; i++) most = segs[i].count > most ? segs[i].count : most;
    if (c->isa >= ISA_AMX && int8_tiles(c, most))
        return qk_w8a8_amx(c->op, &c->tensors, c->x, c->xtype, c->y, segs, n, threads);
#endif
#ifdef QK_HAVE_INT8_VNNI
    if (c->isa >= ISA_AVX512 && qk_has_vnni())
        return qk_w8a8_vnni(c->op, &c->tensors, c->x, c->xtype, c->y, segs, n, threads);
#endif
    if (c->isa >= ISA_AVX2)
        return qk_w8a8_avx2(c->op, &c->tensors, c->x, c->xtype, c->y, segs, n, threads);
    return 3;
}

/* Several of them of one x. */
int qk_linear_w8a8_shared(const qk_int8_call *calls, int64_t n) {
#ifdef QK_TILES
    int tiles = calls->isa >= ISA_AMX;
    for (int64_t i = 0; i < n; i++) tiles &= int8_tiles(calls + i, calls->count);
    if (tiles) return qk_w8a8_shared_amx(calls, n, omp_get_max_threads());
#endif
#ifdef QK_HAVE_INT8_VNNI
    if (calls->isa >= ISA_AVX512 && qk_has_vnni())
        return qk_w8a8_shared_vnni(calls, n, omp_get_max_threads());
#endif
    if (calls->isa >= ISA_AVX2) return qk_w8a8_shared_avx2(calls, n, omp_get_max_threads());
    return 3;
}

/* One decode step of attention. */
int qk_attention(const qk_step *s) {
#ifdef QK_HAVE_STEP_AVX512
    if (s->isa >= ISA_AVX512) return qk_step_avx512(s, omp_get_max_threads());
#endif
    if (s->isa >= ISA_AVX2) return qk_step_avx2(s, omp_get_max_threads());
    return 3;
}
