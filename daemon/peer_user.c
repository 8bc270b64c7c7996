/* The uids that are connected: whose each peer is, where it waits for its turn, and the waiting of
 * those that are paced.
 *
 * Who misbehaves and is not alone (penalty.h) leaves the circle of peer_turn.c for host->paced,
 * where it gets a short step, pays for it by waiting, and gets another: none of its events makes
 * the loop work for it in between, so that the loop sleeps, and is woken at once, as if it were not
 * there. */
#include "daemon/peer_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/epoll.h>

#define MORE_LINES 15u /* of the log in a while, about connections of a uid that were ended */

/* ---- whose a peer is --------------------------------------------------------------------- */

static struct peer_user *user_of(struct peer_host *h, uid_t uid)
{
    struct peer_user *u;
    LIST_FOREACH(u, &h->users, entry)
    {
        if (u->uid == uid) {
            return u;
        }
    }
    u = calloc(1, sizeof(*u));
    struct penalty *penalty = u ? penalty_ref(h->penalties, uid) : NULL;
    if (!penalty) {
        free(u);
        return NULL;
    }
    u->uid = uid;
    u->penalty = penalty;
    u->lines.n_more = MORE_LINES;
    TAILQ_INIT(&u->ready);
    LIST_INSERT_HEAD(&h->users, u, entry);
    return u;
}

void peer_user_unref(struct peer_host *h, struct peer_user *u)
{
    if (--u->n_refs == 0) {
        LIST_REMOVE(u, entry);
        penalty_unref(h->penalties, u->penalty);
        free(u);
    }
}

int peer_enter(struct peer *p)
{
    struct peer_user *u = user_of(p->host, p->uid);
    if (!u) {
        return -ENOMEM;
    }
    p->user = u;
    u->n_refs++;
    peer_strike(p, PENALTY_CONNECTION);
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP | EPOLLET, .data.ptr = p};
    p->events = e.events;
    if (epoll_ctl(p->host->sockets, EPOLL_CTL_ADD, p->fd, &e) < 0) {
        int rc = -errno;
        peer_user_unref(p->host, u);
        return rc;
    }
    return 0;
}

void peer_leave(struct peer *p)
{
    struct peer_user *u = p->user;
    if (p->queued) {
        p->queued = false;
        TAILQ_REMOVE(&u->ready, p, turn);
    }
    if (TAILQ_EMPTY(&u->ready)) {
        peer_user_move(u, NULL);
    }
    /* A child that is about to exec may hold the socket as well: closing it is not enough. */
    epoll_ctl(p->host->sockets, EPOLL_CTL_DEL, p->fd, NULL);
    p->user = NULL;
    peer_user_unref(p->host, u);
}

/* ---- where it waits ---------------------------------------------------------------------- */

void peer_user_move(struct peer_user *u, struct peer_user_queue *to)
{
    if (u->queue) {
        TAILQ_REMOVE(u->queue, u, turn);
    }
    u->queue = to;
    if (to) {
        TAILQ_INSERT_TAIL(to, u, turn);
    }
}

static bool is_paced(const struct peer_host *h, const struct peer_user *u, uint64_t now)
{
    return penalty_is_paced(h->penalties, u->penalty, now);
}

void peer_user_enqueue(struct peer_host *h, struct peer_user *u, struct peer_user_queue *otherwise)
{
    bool paced = u->penalty->slowed && is_paced(h, u, uv_hrtime());
    peer_user_move(u, paced ? &h->paced : otherwise);
    if (paced && u->penalty->next_ns < h->paced_due_ns) {
        h->paced_due_ns = u->penalty->next_ns;
    }
}

/* ---- pacing ------------------------------------------------------------------------------ */

void peer_strike(struct peer *p, enum penalty_kind kind)
{
    penalty_strike(p->host->penalties, p->user->penalty, kind, uv_hrtime());
}

bool peer_is_paced(const struct peer *p)
{
    return p->user->penalty->slowed && is_paced(p->host, p->user, uv_hrtime());
}

struct peer_user *peers_next_paced(struct peer_host *h, uint64_t now)
{
    struct peer_user *u, *due = NULL;
    uint64_t next_ns = UINT64_MAX;
    if (now < h->paced_due_ns) {
        return NULL;
    }
    TAILQ_FOREACH(u, &h->paced, turn)
    {
        uint64_t at = is_paced(h, u, now) ? u->penalty->next_ns : now;
        if (at <= now && !due) {
            due = u;
        } else if (at < next_ns) {
            next_ns = at;
        }
    }
    h->paced_due_ns = next_ns;
    return due;
}

void peers_set_paced_alarm(struct peer_host *h)
{
    if (!TAILQ_EMPTY(&h->paced)) {
        peer_alarm_set(&h->paced_alarm, h->paced_due_ns);
    }
}

/* What is due is found before the loop sleeps again. */
static void on_paced_due(struct peer_alarm *a)
{
}

int peers_init_users(struct peer_host *h)
{
    LIST_INIT(&h->users);
    TAILQ_INIT(&h->paced);
    h->paced_due_ns = UINT64_MAX;
    return peer_alarm_init(&h->paced_alarm, h->loop, on_paced_due);
}
