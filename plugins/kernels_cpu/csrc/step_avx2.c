/* attention.h and between.h for this instruction set. */
#define NAME(f) f##_avx2

#include "attention.h"
#include "between.h"
