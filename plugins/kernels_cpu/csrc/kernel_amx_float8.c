/* 8-bit floats, many tokens by matrix units; see kernel_bf16.c. */
#define QK_AMX
#define QK_FLOAT8
#include "kernel_bf16.c"
