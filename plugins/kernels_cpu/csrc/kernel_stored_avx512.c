/* The same with float32 products; see kernel_stored.c. */
#define QK_STORED_FLOATS
#include "kernel_stored.c"
