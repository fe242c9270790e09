/* round.h for this instruction set. */
#define NAME(f) f##_avx512

#include "round.h"
