/* attention.h for this instruction set. */
#define NAME(f) f##_avx2

#include "attention.h"
