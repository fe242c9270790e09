/* 8-bit floats; see kernel_bf16.c. */
#define QK_FLOAT8
#include "kernel_bf16.c"
