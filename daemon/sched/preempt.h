/* daemon/sched/preempt.h - who gives way, when memory or places among the running run out.
 *
 * Sequences have a rank: by the level (order.h) at which they were given their place, then by age.
 * Only a lower rank gives way to a higher one, so the highest that runs always gets on. A level
 * only rises, when a place is given again, and is bounded: two cannot take turns for ever in
 * throwing each other out. A sequence that rests for a slow reader gives way to all that do not. */
#ifndef DAEMON_SCHED_PREEMPT_H
#define DAEMON_SCHED_PREEMPT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct preempt_rank {
    bool rests; /* for a slow reader */
    int32_t level;
    uint64_t since_ns; /* when its request came */
    uint64_t number;   /* of its start, where they came at once */
};

/* Whether a gives way to b. */
bool preempt_is_lower(const struct preempt_rank *a, const struct preempt_rank *b);

/* ---- places ----
 * A user takes a place from another where it has fewer by weight and still has when it was moved:
 * so a place moves once, and not back. */
struct preempt_share {
    uint32_t n_running, weight;
};
bool preempt_is_owed(const struct preempt_share *asks, const struct preempt_share *holds);

#endif
