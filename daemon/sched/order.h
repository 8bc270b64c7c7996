/* daemon/sched/order.h - who goes first: by priority, then by fair share, then by age.
 *
 * Waiting raises a priority, one level every ORDER_AGEING_NS, but no higher than the highest that
 * anybody here has asked for: so nobody starves behind a stream of urgent requests, and those who
 * have asked for nothing are all alike, however long one user's line is. On one level, whoever has
 * had least by weight goes first (fair.h), and of one user whoever came first. */
#ifndef DAEMON_SCHED_ORDER_H
#define DAEMON_SCHED_ORDER_H

#include <stdbool.h>
#include <stdint.h>

#define ORDER_AGEING_NS 15000000000u

struct order_key {
    int32_t priority;
    uint64_t since_ns; /* when it came */
    double served;     /* its user's virtual time */
    uint64_t turn_ns;  /* its place in its user's line */
};

/* A priority with what waiting has added; highest: of all that are compared. */
int32_t order_level(int32_t priority, uint64_t since_ns, int32_t highest, uint64_t now_ns);
/* Whether a goes before b. */
bool order_before(const struct order_key *a, const struct order_key *b, int32_t highest,
                  uint64_t now_ns);

/* ---- a full queue ---- */

/* How often places in the queue come free, learned from the times at which they did. Zeroed:
 * nothing is known. */
struct order_pace {
    uint64_t last_ns;
    double interval_ns;
};

void order_pace_note(struct order_pace *p, uint64_t now_ns);
/* Milliseconds after which a place should be free. */
uint32_t order_retry_ms(const struct order_pace *p, uint64_t now_ns);

#define ORDER_RETRY_MS_LEAST   10u
#define ORDER_RETRY_MS_UNKNOWN 100u
#define ORDER_RETRY_MS_MOST    60000u

#endif
