/* Which unit loads: the only one that knows what was compiled. */
#include <stddef.h>

#include "load.h"

void qk_load(void *blocks, const void *stored, int64_t first, int64_t n, const qk_source *s) {
    const qk_wide *wide = NULL;
#ifdef QK_HAVE_LOAD_AVX512
    if (s->isa >= 2) wide = &qk_wide_avx512; /* as in library.py: none, avx2, avx512, bf16, amx */
#endif
    if (s->order >= QK_STREAMS) qk_load_streams(blocks, stored, first, n, s);
    else qk_load_by(blocks, stored, first, n, s, wide);
}
