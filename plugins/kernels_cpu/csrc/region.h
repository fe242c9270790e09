/* Threads of one parallel region that wait for each other between the phases of their work. */
#ifndef QK_REGION_H
#define QK_REGION_H

#include <immintrin.h>
#include <sched.h>
#include <stdatomic.h>

#define MEET_SPINS 1000 /* pauses: 10 to 40 us, more than the parts of a phase differ by */

/* All zero before the first meeting. What threads write stands in lines of its own. */
typedef struct {
    _Alignas(64) _Atomic int here;
    _Alignas(64) _Atomic int turn;
} meeting;

/* Returns when all of `team` threads have come; what they wrote before is seen behind it. Phases take
 * microseconds, so whoever waits looks again and again. Where that takes longer another thread is not
 * running, and may need this very core: it is offered. (Sleeping instead took up to twice as long
 * beside other work, going on without offering the core three times.) */
static inline void meet(meeting *m, int team) {
    const int turn = atomic_load_explicit(&m->turn, memory_order_relaxed);
    if (team == 1) return;
    if (atomic_fetch_add_explicit(&m->here, 1, memory_order_acq_rel) + 1 == team) {
        atomic_store_explicit(&m->here, 0, memory_order_relaxed);
        atomic_store_explicit(&m->turn, turn + 1, memory_order_release);
        return;
    }
    for (int i = 0; atomic_load_explicit(&m->turn, memory_order_acquire) == turn; i++) {
        if (i < MEET_SPINS) _mm_pause();
        else sched_yield();
    }
}

#endif
