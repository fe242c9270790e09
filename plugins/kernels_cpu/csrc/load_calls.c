/* Which unit loads: the only one that knows what was compiled. */
#include <stddef.h>

#include "load.h"

extern int64_t qk_limit; /* as in library.py: none, avx2, avx512, bf16, amx */

static const qk_wide *wide_of(int64_t isa) {
#ifdef QK_HAVE_LOAD_AVX512
    if (isa >= 2) return &qk_wide_avx512;
#endif
    (void)isa;
    return NULL;
}

const qk_wide *qk_wide_here(void) { return wide_of(qk_limit); }

void qk_load(void *blocks, const void *stored, int64_t first, int64_t n, const qk_source *s) {
    const qk_wide *wide = wide_of(s->isa);
    if (s->order >= QK_STREAMS) qk_load_streams(blocks, stored, first, n, s);
    else qk_load_by(blocks, stored, first, n, s, wide);
}
