/* 8-bit floats; see kernel_avx2.c. */
#define QK_FLOAT8
#include "kernel_avx2.c"
