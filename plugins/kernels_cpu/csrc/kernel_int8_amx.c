/* The int8 kernel on matrix units; see kernel_int8_vnni.c. */
#define QK_AMX
#include "kernel_int8_vnni.c"
