/* round.h for this instruction set. */
#define NAME(f) f##_avx2

#include "round.h"
