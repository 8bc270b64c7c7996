/* Who is waited for, and for how long.
 *
 * Connections under a deadline are in a list of their own: those that have not said a word, left a
 * message unfinished, do not take their answers, or have rings, which are looked at once a second.
 * The thousands that merely idle are not in it and cost nothing. A round over the list is begun
 * once a second and made in pieces, one for each turn of the loop. */
#include "daemon/peer_internal.h"

#define CHECKED_AT_ONCE 64u
#define SLOW_BYTES      (1u << 20)

static bool has_deadline(const struct peer *p)
{
    return !p->greeted || p->stalled_ns || p->congested_ns || peer_input_has_begun(&p->input) ||
           p->ring;
}

void peer_note_deadline(struct peer *p)
{
    if (!p->is_timed && has_deadline(p)) {
        p->is_timed = true;
        LIST_INSERT_HEAD(&p->host->timed, p, timed_entry);
    }
}

void peer_forget_deadline(struct peer *p)
{
    if (!p->is_timed) {
        return;
    }
    p->is_timed = false;
    if (p->host->timed_next == p) {
        p->host->timed_next = LIST_NEXT(p, timed_entry);
    }
    LIST_REMOVE(p, timed_entry);
}

static bool is_unfinished(const struct peer *p, const struct peer_input *in, uint64_t now)
{
    return peer_input_has_begun(in) && now > in->frame_ns &&
           now - in->frame_ns > p->host->reader_timeout_ns;
}

/* A byte now and then makes no message: each MiB of it has the time that a silence has. */
static bool is_slow(const struct peer *p, const struct peer_input *in, uint64_t now)
{
    return peer_input_has_begun(in) && now > in->begun_ns &&
           now - in->begun_ns > (1 + in->frame_bytes / SLOW_BYTES) * p->host->reader_timeout_ns;
}

/* While we do not read, it is not the client that lets us wait. */
static void excuse(const struct peer *p, struct peer_input *in, uint64_t now)
{
    if (peer_input_has_begun(in) && !peer_may_read(p, in)) {
        in->begun_ns = in->frame_ns = now;
    }
}

static bool is_late(struct peer *p, uint64_t now)
{
    const struct peer_host *h = p->host;
    if (is_slow(p, &p->input, now) || (p->ring && is_slow(p, &p->ring->input, now))) {
        peer_log_end(p, LOG_LEVEL_INFO, "a message came too slowly");
        return true;
    }
    if (p->queued) { /* for us to take it in */
        return false;
    }
    if (!p->greeted && now - p->opened_ns > h->handshake_ns) {
        peer_log_end(p, LOG_LEVEL_INFO, "no message within the handshake's time");
        return true;
    }
    if (p->stalled_ns && now > p->stalled_ns && now - p->stalled_ns > h->reader_timeout_ns) {
        peer_log_end(p, LOG_LEVEL_INFO, "did not read its answers");
        return true;
    }
    if (is_unfinished(p, &p->input, now) || (p->ring && is_unfinished(p, &p->ring->input, now))) {
        peer_log_end(p, LOG_LEVEL_INFO, "left a message unfinished");
        return true;
    }
    return false;
}

/* Requests that are paused hold blocks of the KV cache and places among the running: not for as
 * long as the client likes. That it reads a little makes no difference. */
static void end_paused(struct peer *p, uint64_t now)
{
    uint64_t limit = p->host->paused_timeout_ns;
    if (p->congested_ns && now > p->congested_ns && now - p->congested_ns > limit) {
        unsigned ended = caller_end_paused(&p->caller, (uint32_t)(limit / 1000000u));
        if (ended > 0) {
            log_paced(&p->user->lines, now, LOG_LEVEL_INFO,
                      "uid %u: did not read for %u requests, which were ended", p->uid, ended);
        }
    }
}

static void check(struct peer *p, uint64_t now)
{
    excuse(p, &p->input, now);
    if (p->ring) {
        excuse(p, &p->ring->input, now);
    }
    if (!p->late && is_late(p, now)) {
        peer_strike(p, PENALTY_LATE);
        p->late = true; /* closing takes its time: a step each */
        peer_ready(p);
    }
    end_paused(p, now);
    peer_ring_tick(p);
}

void peers_check_deadlines(struct peer_host *host)
{
    if (!host->timed_next) { /* else the last round is still being made */
        host->timed_next = LIST_FIRST(&host->timed);
    }
}

bool peers_check_some(struct peer_host *host, uint64_t now)
{
    for (unsigned i = 0; i < CHECKED_AT_ONCE && host->timed_next; i++) {
        struct peer *p = host->timed_next;
        host->timed_next = LIST_NEXT(p, timed_entry);
        if (has_deadline(p)) {
            check(p, now);
        } else {
            peer_forget_deadline(p);
        }
    }
    return host->timed_next != NULL;
}
