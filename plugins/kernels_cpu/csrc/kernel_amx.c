/* Many tokens by matrix units; see kernel_bf16.c. */
#define QK_AMX
#include "kernel_bf16.c"
