/* client/deadline.c - how long a call may be silent, and how long it may take. */
#include "client/internal.h"

#include <errno.h>
#include <string.h>

/* Work that queues behind other work is silent for longer than a question to the daemon itself. */
static uint32_t default_timeout_ms(const struct gqa *g, const char *method)
{
    bool is_work = strncmp(method, "text.", 5) == 0 || strncmp(method, "model.", 6) == 0;
    return is_work ? CLIENT_TIMEOUT_LONG_MS : g->timeout_ms;
}

static uint64_t earlier(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

void client_deadline_start(const struct gqa *g, struct client_pending *p,
                           const struct gqa_call_options *o)
{
    uint64_t now = client_now_us();
    uint32_t timeout_ms = o->timeout_ms != 0 ? o->timeout_ms : default_timeout_ms(g, p->method);
    p->silence_us = (uint64_t)timeout_ms * 1000u;
    p->total_ms = o->total_ms;
    p->end_us = o->total_ms != 0 ? now + (uint64_t)o->total_ms * 1000u : UINT64_MAX;
    p->deadline_us = earlier(now + p->silence_us, p->end_us);
}

void client_deadline_heard(struct client_pending *p)
{
    if (!p->cancelled) {
        p->deadline_us = earlier(client_now_us() + p->silence_us, p->end_us);
    }
}

void client_deadline_cancelled(struct client_pending *p)
{
    p->cancelled = true;
    p->deadline_us = client_now_us() + CLIENT_CANCEL_GRACE_MS * 1000u;
}

/* The call's deadline has passed: stops the daemon's work, and says which deadline it was. */
static int give_up(struct gqa *g, const struct client_pending *p, struct gqa_error *ret)
{
    if (p->cancelled) {
        return client_fail(ret, -ECANCELED, "%s: cancelled; the daemon has not confirmed it",
                           p->method);
    }
    client_send_cancel(g, p);
    if (p->deadline_us == p->end_us) {
        return client_fail(ret, -ETIMEDOUT, "%s: not finished within %u ms", p->method,
                           p->total_ms);
    }
    return client_fail(ret, -ETIMEDOUT, "%s: nothing was heard for %llu ms", p->method,
                       (unsigned long long)(p->silence_us / 1000u));
}

unsigned client_expire(struct gqa *g)
{
    unsigned n = 0;
    uint64_t now = client_now_us();
    struct client_pending *p = g->pending;
    while (p != NULL && g->lost == 0) {
        if (p->deadline_us > now) {
            p = p->next;
            continue;
        }
        struct gqa_error e;
        int status = give_up(g, p, &e);
        client_unlink(g, p);
        client_end(p, status, NULL, &e);
        n++;
        p = g->pending; /* the callback may have changed the list */
    }
    return n;
}

uint64_t client_timeout_usec(const struct gqa *g)
{
    uint64_t nearest = UINT64_MAX;
    if (g->lost < 0) {
        return nearest;
    }
    if (g->write_error < 0) {
        return 0;
    }
    for (const struct client_pending *p = g->pending; p != NULL; p = p->next) {
        nearest = earlier(nearest, p->deadline_us);
    }
    return nearest;
}

uint64_t gqa_timeout_usec(const struct gqa *g)
{
    bool due = g->lost == 0 && g->ring != NULL && client_ring_arm(g->ring);
    return due ? 0 : client_timeout_usec(g);
}
