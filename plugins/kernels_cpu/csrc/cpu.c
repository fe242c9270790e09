/* Run-time dispatch; the only unit compiled for the baseline instruction set. */
#include <omp.h>

#include "qk.h"

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

int qk_version(void) { return QK_VERSION; }

static int exact_in_bf16(const qk_op *op) {
    for (int i = 0; op->width == 4 && i < 16; i++) {
        union { float f; uint32_t u; } v = {op->table[i]};
        if (v.u & 0xffff) return 0;
    }
    return 1;
}

/* y = x W^T for the segments; `isa` is at most qk_isa(). 0, 1 (no memory) or 3 (no such isa). */
int qk_linear(const qk_op *op, const qk_tensors *t, const void *x, int64_t xtype, void *y,
              const qk_segment *segs, int64_t segments, int64_t isa) {
    const int64_t threads = omp_get_max_threads();
#ifdef QK_HAVE_BF16
    if (isa >= ISA_BF16 && xtype == QK_BF16 && exact_in_bf16(op))
        return qk_linear_bf16(op, t, x, xtype, y, segs, segments, threads);
#endif
#ifdef QK_HAVE_AVX512
    if (isa >= ISA_AVX512) return qk_linear_avx512(op, t, x, xtype, y, segs, segments, threads);
#endif
    if (isa >= ISA_AVX2) return qk_linear_avx2(op, t, x, xtype, y, segs, segments, threads);
    return 3;
}
