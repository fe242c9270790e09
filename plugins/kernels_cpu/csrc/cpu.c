/* Run-time dispatch; the only unit compiled for the baseline instruction set. */
#include <cpuid.h>
#include <omp.h>

#include "int8.h"

enum { ISA_NONE, ISA_AVX2, ISA_AVX512, ISA_BF16 };

/* The best instruction set that this processor has and this library was built with. */
int qk_isa(void) {
    __builtin_cpu_init();
#ifdef QK_HAVE_BF16
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw")) return ISA_BF16;
#endif
#ifdef QK_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) return ISA_AVX512;
#endif
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return ISA_AVX2;
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

/* Matrix units for bfloat16 that the system has switched on: torch's matmul uses them. */
int qk_has_amx(void) {
#ifdef QK_HAVE_AVX512
    unsigned a, b, c, d, low, high;
    if (qk_isa() < ISA_AVX512 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (d >> 22 & 1) && (d >> 24 & 1) && (low >> 17 & 3) == 3;
#else
    return 0;
#endif
}

int qk_version(void) { return QK_VERSION; }

static int exact_in_bf16(const qk_op *op) {
    for (int i = 0; op->width == 4 && i < 16; i++) {
        union { float f; uint32_t u; } v = {op->table[i]};
        if (v.u & 0xffff) return 0;
    }
    return 1;
}

/* y = x W^T. Returns 0, 1 (no memory) or 3 (no such instruction set). */
int qk_linear(const qk_call *c) {
    const int64_t threads = omp_get_max_threads();
    const qk_segment one = {0, 0, c->count}, *segs = c->segments ? c->segments : &one;
    const int64_t n = c->segments ? c->count : 1;
#ifdef QK_HAVE_BF16
    if (c->isa >= ISA_BF16 && c->xtype == QK_BF16 && exact_in_bf16(c->op))
        return qk_linear_bf16(c->op, &c->tensors, c->x, c->xtype, c->y, segs, n, threads);
#endif
#ifdef QK_HAVE_AVX512
    if (c->isa >= ISA_AVX512)
        return qk_linear_avx512(c->op, &c->tensors, c->x, c->xtype, c->y, segs, n, threads);
#endif
    if (c->isa >= ISA_AVX2)
        return qk_linear_avx2(c->op, &c->tensors, c->x, c->xtype, c->y, segs, n, threads);
    return 3;
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

/* int8 weights and int8 activations with the codes that the operation names (int8.h). */
int qk_linear_w8a8(const qk_int8_call *c) {
    const int64_t threads = omp_get_max_threads();
    const qk_segment one = {0, 0, c->count}, *segs = c->segments ? c->segments : &one;
    const int64_t n = c->segments ? c->count : 1;
#ifdef QK_HAVE_INT8_VNNI
    if (c->isa >= ISA_AVX512 && qk_has_vnni())
        return qk_w8a8_vnni(c->op, &c->tensors, c->x, c->xtype, c->y, segs, n, threads);
#endif
    if (c->isa >= ISA_AVX2)
        return qk_w8a8_avx2(c->op, &c->tensors, c->x, c->xtype, c->y, segs, n, threads);
    return 3;
}

/* Blocks [x, x + count) as bfloat16 weights at y, [k][count * 32]; `x` is a number here. */
int qk_dense(const qk_call *c) {
#ifdef QK_HAVE_AVX512
    qk_dense_avx512(c->op, &c->tensors, (int64_t)(intptr_t)c->x, c->count, c->y);
    return 0;
#else
    (void)c;
    return 3;
#endif
}
