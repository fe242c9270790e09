/* 4-bit codes of any values; see kernel_avx2.c. */
#define QK_LOOKUP
#include "kernel_avx2.c"
