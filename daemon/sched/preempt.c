#include "daemon/sched/preempt.h"

bool preempt_is_lower(const struct preempt_rank *a, const struct preempt_rank *b)
{
    if (a->rests != b->rests) {
        return a->rests;
    }
    if (a->level != b->level) {
        return a->level < b->level;
    }
    if (a->since_ns != b->since_ns) {
        return a->since_ns > b->since_ns;
    }
    return a->number > b->number;
}

bool preempt_is_owed(const struct preempt_share *asks, const struct preempt_share *holds)
{
    /* (asks + 1) / its weight <= (holds - 1) / its weight, in whole numbers */
    uint64_t with_one_more = ((uint64_t)asks->n_running + 1) * holds->weight;
    uint64_t with_one_less =
        holds->n_running > 0 ? ((uint64_t)holds->n_running - 1) * asks->weight : 0;
    return with_one_more <= with_one_less;
}
