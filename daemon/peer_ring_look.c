/* When rings are looked at.
 *
 * The client rings the doorbell only if the daemon has told that it waits (daemon_wait); its ring
 * is then awake and looked at in every turn of the loop. While a core is idle, and a client's
 * requests follow each other so closely that looking for the next one pays, the loop does not
 * sleep: each turn looks at the awake rings for SLICE_NS and then at everything else. An awake ring
 * that stays empty falls asleep when the loop does: it tells that it waits, is looked at once more,
 * and costs nothing from then on.
 *
 * Looking in vain may cost more than time: a client that was woken on this core has to wait until
 * it is over. So a ring is looked for only after a request that came within the window, and after
 * n windows in a row without one 2^n - 1 of them are left out. */
#include "daemon/peer_internal.h"

#define SLICE_NS      5000u
#define FRUITLESS_MAX 5u

void peer_ring_wake(struct peer_ring *r)
{
    if (!r->awake) {
        r->awake = true;
        LIST_INSERT_HEAD(&r->peer->host->awake, r, awake_entry);
    }
}

void peer_ring_fall_asleep(struct peer_ring *r)
{
    if (r->awake) {
        r->awake = false;
        LIST_REMOVE(r, awake_entry);
    }
}

/* A request was found. Looking for the next one pays if this one came soon enough after the last,
 * and if looking was not for nothing of late. */
static bool is_worth_looking(struct peer_ring *r, uint64_t now)
{
    bool soon = now - r->found_ns <= r->peer->host->ring_poll_ns;
    r->found_ns = now;
    if (r->is_looked_for) {
        r->is_looked_for = false;
        r->n_fruitless = 0;
    }
    if (!soon || r->n_left_out > 0) {
        r->n_left_out -= r->n_left_out > 0;
        return false;
    }
    r->is_looked_for = true;
    return true;
}

static void looked_in_vain(struct peer_ring *r)
{
    if (r->is_looked_for) {
        r->is_looked_for = false;
        r->n_fruitless += r->n_fruitless < FRUITLESS_MAX;
        r->n_left_out = (1u << r->n_fruitless) - 1;
    }
}

/* Serves those that have something. *ret_look becomes true where looking for more will pay. */
static void serve_awake(struct peer_host *host, bool *ret_look)
{
    struct peer_ring *r;
    bool some = false;
    LIST_FOREACH(r, &host->awake, awake_entry)
    {
        bool input = peer_ring_may_take(r);
        if (!input && !peer_ring_may_put(r)) {
            continue;
        }
        r->pending = true;
        peer_ready(r->peer);
        if (!peer_is_paced(r->peer)) {
            some = true;
            *ret_look |= !input || is_worth_looking(r, uv_hrtime());
        }
    }
    if (some) {
        peers_serve(host);
    }
}

/* Tells what is waited for; whoever finds something after all stays awake. */
static void try_to_sleep(struct peer_ring *r)
{
    _Atomic uint32_t *wait = &r->map.control->daemon_wait;
    bool room = peer_ring_waits_for_room(r);
    ring_wait_for(wait, RING_WAIT_FUTEX | (room ? RING_WAIT_ROOM : 0));
    if (peer_ring_may_take(r) || (room ? peer_ring_has_room(r) : peer_ring_is_over(r))) {
        ring_wait_for(wait, RING_WAIT_NOTHING);
    } else {
        peer_ring_fall_asleep(r);
    }
}

/* Of a uid that is paced: what is in it waits for a step of its peer, and keeps nobody awake. */
static void set_aside(struct peer_ring *r)
{
    if (!r->pending) {
        try_to_sleep(r);
    }
    if (r->awake) {
        r->pending = true;
        peer_ready(r->peer);
        peer_ring_fall_asleep(r);
    }
}

static void stay_awake(uv_idle_t *idle)
{
}

void peers_serve_rings(struct peer_host *host)
{
    struct peer_ring *next;
    bool look = false;
    serve_awake(host, &look);
    if (LIST_EMPTY(&host->awake)) {
        uv_idle_stop(&host->spinning);
        return;
    }
    uint64_t start = uv_hrtime(), now = start;
    uint64_t poll_ns = host->ring_poll_ns > 0 && host->has_idle_core(host) ? host->ring_poll_ns : 0;
    while (true) {
        host->ring_poll_until = look ? now + poll_ns : host->ring_poll_until;
        look = false;
        if (now - start >= SLICE_NS || now >= host->ring_poll_until || poll_ns == 0) {
            break;
        }
        ring_pause();
        serve_awake(host, &look);
        now = uv_hrtime();
    }
    for (struct peer_ring *r = LIST_FIRST(&host->awake); r; r = next) {
        next = LIST_NEXT(r, awake_entry);
        if (peer_is_paced(r->peer)) {
            set_aside(r);
        } else if (poll_ns == 0 || now >= host->ring_poll_until) {
            looked_in_vain(r);
            try_to_sleep(r);
        }
    }
    if (LIST_EMPTY(&host->awake)) {
        uv_idle_stop(&host->spinning);
    } else {
        uv_idle_start(&host->spinning, stay_awake); /* the loop's poll does not sleep then */
    }
}
