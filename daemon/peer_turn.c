/* Whose turn it is.
 *
 *   host->fresh     uid A --> uid B                had nothing to do before
 *   host->waiting   uid C --> uid D --> uid E      have had a step and have more, in turns
 *                     |         |         |
 *                   peer      peer      peer       its connections, first come first served
 *                     |                   |
 *                   peer                peer
 *
 * The first uid's first peer gets one step; then the uid goes behind those that wait, and the peer
 * behind the uid's others if there is more to do for it. Who is fresh is served first, so that
 * small calls do not wait for those who always have something to do; each turn works for one that
 * waits all the same. A step looks at the clock between two messages and two sends
 * (peer_step_is_over), so it is as long as its longest message takes, beyond STEP_NS.
 *
 * Who misbehaves leaves that circle (peer_user.c) and gets a shorter step now and then.
 *
 * Sockets are told of by an epoll of our own below the loop's, edge-triggered: each event is noted
 * once, at the cost of a few loads, and a socket that waits for its turn costs nothing until then.
 * uv_poll knows level triggers only, so that a thousand waiting sockets would be told of again in
 * every turn, and changing what it watches costs two calls into the kernel. */
#include "daemon/peer_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <unistd.h>

#define TURN_NS        50000u /* then a look at what is new */
#define STEP_NS        50000u
#define PACED_STEP_NS  20000u
#define EVENTS_AT_ONCE 256
#define LOOKS_AT_ONCE  16u /* for more events; what is left then is told of in the next turn */

/* ---- what is to be done ------------------------------------------------------------------ */

void peer_ready(struct peer *p)
{
    struct peer_host *h = p->host;
    if (p->queued || p->closed || p == h->served) { /* who is served is looked at afterwards */
        return;
    }
    if (!p->user->queue) {
        peer_user_enqueue(h, p->user, &h->fresh);
    }
    if (p->gone && p->user->queue == &h->paced) {
        TAILQ_INSERT_HEAD(&p->user->ready, p, turn); /* its requests are not to run any longer */
    } else {
        TAILQ_INSERT_TAIL(&p->user->ready, p, turn);
    }
    p->queued = true;
}

int peer_watch(struct peer *p)
{
    struct epoll_event e = {
        .events = EPOLLIN | EPOLLRDHUP | EPOLLET | (p->socket_full ? EPOLLOUT : 0u), .data.ptr = p};
    if (p->closed || e.events == p->events) {
        return 0;
    }
    p->events = e.events;
    /* It looks at the socket once more: room that has come since it was full is told of. */
    return epoll_ctl(p->host->sockets, EPOLL_CTL_MOD, p->fd, &e) < 0 ? -errno : 0;
}

static void note(struct peer *p, uint32_t events)
{
    p->readable |= (events & EPOLLIN) != 0;
    p->hung_up |= (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
    p->gone |= (events & (EPOLLHUP | EPOLLERR)) != 0;
    p->dirty |= (events & EPOLLOUT) != 0;
    if (peer_has_work(p)) {
        peer_ready(p);
    }
}

/* All that is new, for a first look must not wait; nothing is closed here, so no peer of the batch
 * can be gone. */
static void on_sockets(uv_poll_t *poll, int status, int unused)
{
    struct peer_host *h = poll->data;
    struct epoll_event events[EVENTS_AT_ONCE];
    int n = EVENTS_AT_ONCE;
    for (unsigned look = 0; look < LOOKS_AT_ONCE && n == EVENTS_AT_ONCE; look++) {
        n = epoll_wait(h->sockets, events, EVENTS_AT_ONCE, 0);
        for (int i = 0; i < n; i++) {
            note(events[i].data.ptr, events[i].events);
        }
    }
}

/* ---- turns ------------------------------------------------------------------------------- */

bool peer_step_is_over(const struct peer_host *host)
{
    return uv_hrtime() >= host->step_ends_ns;
}

static void serve_peer(struct peer_host *h, struct peer_user *u)
{
    struct peer *p = TAILQ_FIRST(&u->ready);
    TAILQ_REMOVE(&u->ready, p, turn);
    p->queued = false;
    h->served = p;
    peer_step(p);
    h->served = NULL;
    if (!p->closed) {
        peer_note_deadline(p);
    }
    if (peer_has_work(p)) {
        peer_ready(p);
    }
}

/* One step for a user, of about so long: for one of its peers or, if it waits between its steps,
 * for as many as there is time for. Returns the time after it. */
static uint64_t serve(struct peer_host *h, struct peer_user *u, uint64_t step_ns, uint64_t now)
{
    bool paced = u->queue == &h->paced;
    uint64_t end;
    peer_user_move(u, &h->waiting);
    u->n_refs++; /* one that closes does not take its user along */
    h->step_ends_ns = now + step_ns;
    do {
        serve_peer(h, u);
        end = uv_hrtime();
    } while (paced && !TAILQ_EMPTY(&u->ready) && end < h->step_ends_ns);
    penalty_note_served(h->penalties, u->uid, end);
    if (u->penalty->slowed) {
        penalty_charge(h->penalties, u->penalty, end - now, end);
    }
    if (TAILQ_EMPTY(&u->ready)) {
        peer_user_move(u, NULL);
    } else if (u->penalty->slowed) {
        peer_user_enqueue(h, u, &h->waiting);
    }
    peer_user_unref(h, u);
    return end;
}

static uint64_t serve_first(struct peer_host *h, struct peer_user_queue *queue, uint64_t now)
{
    return serve(h, TAILQ_FIRST(queue), STEP_NS, now);
}

static void free_gone(struct peer_host *h)
{
    struct peer *p;
    while ((p = LIST_FIRST(&h->gone)) != NULL) {
        LIST_REMOVE(p, entry);
        free(p);
    }
}

static void keep_working(uv_idle_t *idle)
{
}

/* Whether the loop may sleep now, and until when. */
static void prepare_sleep(struct peer_host *h, bool has_more)
{
    if (TAILQ_EMPTY(&h->waiting) && TAILQ_EMPTY(&h->fresh) && !has_more) {
        uv_idle_stop(&h->working);
    } else {
        uv_idle_start(&h->working, keep_working); /* the loop's poll does not sleep then */
    }
    peers_set_paced_alarm(h);
}

void peers_serve(struct peer_host *h)
{
    uint64_t now = uv_hrtime(), end = now + TURN_NS;
    bool to_check = peers_check_some(h, now);
    while (now < end && !TAILQ_EMPTY(&h->fresh)) {
        now = serve_first(h, &h->fresh, now);
    }
    if (!TAILQ_EMPTY(&h->waiting)) {
        do {
            now = serve_first(h, &h->waiting, now);
        } while (now < end && !TAILQ_EMPTY(&h->waiting));
    }
    struct peer_user *due = peers_next_paced(h, now);
    if (due) {
        serve(h, due, PACED_STEP_NS, now);
    }
    free_gone(h);
    prepare_sleep(h, to_check);
}

/* ---- the host ---------------------------------------------------------------------------- */

int peers_init(struct peer_host *h, uv_loop_t *loop)
{
    h->loop = loop;
    LIST_INIT(&h->all);
    LIST_INIT(&h->gone);
    LIST_INIT(&h->timed);
    TAILQ_INIT(&h->fresh);
    TAILQ_INIT(&h->waiting);
    LIST_INIT(&h->awake);
    uv_idle_init(loop, &h->working);
    uv_idle_init(loop, &h->spinning);
    h->scratch = malloc(PEER_SCRATCH_BYTES);
    h->sockets = epoll_create1(EPOLL_CLOEXEC);
    int rc = !h->scratch ? -ENOMEM : h->sockets < 0 ? -errno : 0;
    rc = rc < 0 ? rc : peers_init_users(h);
    rc = rc < 0 ? rc : uv_poll_init(loop, &h->sockets_poll, h->sockets);
    h->sockets_poll.data = h;
    return rc < 0 ? rc : uv_poll_start(&h->sockets_poll, UV_READABLE, on_sockets);
}

void peers_finish(struct peer_host *h)
{
    free_gone(h);
    free(h->scratch);
    peer_alarm_finish(&h->paced_alarm);
    if (h->sockets >= 0) {
        close(h->sockets);
    }
}
