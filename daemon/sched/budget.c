#include "daemon/sched/budget.h"

static double clamp(double x, double least, double most)
{
    return x < least ? least : x > most ? most : x;
}

uint32_t budget_rows(const struct budget *b, const struct cost *cost, double depth, uint32_t max,
                     uint32_t *n_mixed)
{
    const struct cost_work nothing = {0};
    if (!b->decoding) {
        *n_mixed = 0;
        return max;
    }
    if (b->own_ms > 0 && *n_mixed + 1 >= BUDGET_PROBE) {
        *n_mixed = 0;
        return 0;
    }
    ++*n_mixed;
    if (!cost_knows_prefill(cost) || b->alone_ms <= 0) {
        return max < BUDGET_UNKNOWN ? max : BUDGET_UNKNOWN;
    }
    double limit_ms = BUDGET_STRETCH * b->alone_ms;
    limit_ms = limit_ms > b->target_ms ? limit_ms : b->target_ms;
    /* A step of prompts alone has its base to pay as well. */
    double used_ms = b->alone_ms + (b->own_ms > 0 ? 0 : cost_ms(cost, &nothing));
    double row_ms = cost_row_ms(cost, depth);
    double rows = row_ms > 0 ? (limit_ms - used_ms) / row_ms : max;
    double least = max < BUDGET_LEAST ? max : BUDGET_LEAST;
    return (uint32_t)clamp(rows, least, max);
}
