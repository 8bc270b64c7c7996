/* daemon/sched/deadline.h - whether a request can end in time.
 *
 * Only what is hopeless is told so: the estimate takes the prompt at the speed of full steps and
 * every token at that of a sequence alone, and may be wrong by DEADLINE_DOUBT. Before steps of both
 * kinds were seen, nothing is hopeless. */
#ifndef DAEMON_SCHED_DEADLINE_H
#define DAEMON_SCHED_DEADLINE_H

#include "daemon/sched/cost.h"

#define DEADLINE_DOUBT 0.25

struct deadline_work {
    uint64_t prompt_tokens; /* still to be computed */
    uint64_t cached_tokens; /* before these */
    uint64_t tokens_least;  /* that it generates in any case */
    uint32_t n_batch;       /* rows of a full step */
};

/* Milliseconds that the work takes at least; 0 while nothing is known. */
double deadline_needed_ms(const struct cost *c, const struct deadline_work *work);
static inline bool deadline_is_hopeless(double needed_ms, double left_ms)
{
    return (1 - DEADLINE_DOUBT) * needed_ms > left_ms;
}

#endif
