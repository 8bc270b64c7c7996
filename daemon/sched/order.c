#include "daemon/sched/order.h"

#define NEWEST_SHARE 0.2 /* of the latest interval in the mean */

int32_t order_level(int32_t priority, uint64_t since_ns, int32_t highest, uint64_t now_ns)
{
    uint64_t waited = now_ns > since_ns ? now_ns - since_ns : 0;
    uint64_t levels = waited / ORDER_AGEING_NS;
    if (priority >= highest) {
        return priority;
    }
    uint64_t below = (uint64_t)((int64_t)highest - priority);
    return levels >= below ? highest : priority + (int32_t)levels;
}

bool order_before(const struct order_key *a, const struct order_key *b, int32_t highest,
                  uint64_t now_ns)
{
    int32_t level_a = order_level(a->priority, a->since_ns, highest, now_ns);
    int32_t level_b = order_level(b->priority, b->since_ns, highest, now_ns);
    if (level_a != level_b) {
        return level_a > level_b;
    }
    if (a->served < b->served || a->served > b->served) {
        return a->served < b->served;
    }
    return a->turn_ns < b->turn_ns;
}

void order_pace_note(struct order_pace *p, uint64_t now_ns)
{
    double interval = p->last_ns > 0 && now_ns > p->last_ns ? (double)(now_ns - p->last_ns) : 0;
    if (interval > 0) {
        p->interval_ns = p->interval_ns > 0
                             ? (1 - NEWEST_SHARE) * p->interval_ns + NEWEST_SHARE * interval
                             : interval;
    }
    p->last_ns = now_ns;
}

uint32_t order_retry_ms(const struct order_pace *p, uint64_t now_ns)
{
    if (p->interval_ns <= 0) {
        return ORDER_RETRY_MS_UNKNOWN;
    }
    double gone = now_ns > p->last_ns ? (double)(now_ns - p->last_ns) : 0;
    /* It is overdue: then it is slower than was known. */
    double ms = (gone < p->interval_ns ? p->interval_ns - gone : gone) / 1e6;
    ms = ms > ORDER_RETRY_MS_LEAST ? ms : ORDER_RETRY_MS_LEAST;
    return ms < ORDER_RETRY_MS_MOST ? (uint32_t)ms : ORDER_RETRY_MS_MOST;
}
