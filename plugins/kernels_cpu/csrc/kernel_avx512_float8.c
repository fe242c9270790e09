/* 8-bit floats; see kernel_avx512.c. */
#define QK_FLOAT8
#include "kernel_avx512.c"
