/* daemon/peer.h - one connection: bytes in, messages to the handlers, bytes out.
 *
 * A peer owns its socket, and rings in shared memory if it asked for them; the same messages travel
 * in both. It reads through one scratch buffer that all peers share, so that an idle connection
 * costs its struct only.
 *
 * Nothing is done where an event is told: the peer is queued among its uid's, and peers_serve()
 * works for the uids in turns, a bounded step each, until the turn's time is up. What is left waits
 * for the next turn, which comes without sleeping, after a look at what is new. So nobody waits
 * for more than a step of each other uid, however much one of them has to do (peer_turn.c). A uid
 * that misbehaves waits between its steps (penalty.h).
 *
 * Loop thread only. */
#ifndef DAEMON_PEER_H
#define DAEMON_PEER_H

#include "daemon/handlers.h"
#include "daemon/log.h"
#include "daemon/peer_alarm.h"
#include "daemon/penalty.h"
#include "daemon/quota.h"

#include <uv.h>

#define PEER_SCRATCH_BYTES (256u << 10) /* more than a socket holds, as a rule */

struct peer;
struct peer_ring;
struct peer_user;
LIST_HEAD(peer_list, peer);
LIST_HEAD(peer_ring_list, peer_ring);
LIST_HEAD(peer_user_list, peer_user);
TAILQ_HEAD(peer_user_queue, peer_user);

/* What peers share; embedded in the server. */
struct peer_host {
    uv_loop_t *loop;
    struct service *service;
    uint8_t *scratch;               /* PEER_SCRATCH_BYTES */
    struct peer_list all, gone;     /* gone: closed, and freed when the turn ends */
    struct peer_list timed;         /* those that are under a deadline, */
    struct peer *timed_next;        /* and who of them is looked at next; NULL: no round is made */
    struct peer_user_list users;    /* those that are connected */
    struct peer_user_queue fresh;   /* those that are to be worked for: who had nothing to do, */
    struct peer_user_queue waiting; /* then who has had a step and has more */
    struct peer_user_queue paced;   /* those that misbehaved: a step now and then (penalty.h) */
    uint64_t paced_due_ns;          /* none of them is due before */
    struct peer_alarm paced_alarm;  /* so that the loop does not sleep beyond that */
    struct peer *served;            /* just now */
    uint64_t step_ends_ns;          /* its step */
    uv_idle_t working;              /* active while there are some that wait: no sleep */
    int sockets;                    /* an epoll of all of them, edge-triggered */
    uv_poll_t sockets_poll;
    struct peer_ring_list awake; /* rings that are looked at in every turn */
    uv_idle_t spinning;          /* active while there are some: the loop does not sleep */
    uint64_t ring_poll_ns;       /* for so long after a request they are looked at; 0: not at all */
    uint64_t ring_poll_until;
    bool (*has_idle_core)(const struct peer_host *host); /* or else the loop sleeps at once */
    uint32_t n_peers;
    uint64_t handshake_ns;      /* a connection without a whole message is closed after it */
    uint64_t reader_timeout_ns; /* one that does not take its output, too */
    uint64_t paused_timeout_ns; /* its requests are ended when they wait so long for it */
    struct quota_table *quotas;
    struct penalty_table *penalties;
    struct log_pace unsent_lines; /* of the log: answers that cannot be sent */
    void (*on_closed)(struct peer_host *host);
};

/* With the loop; what else is above is to be set before the first peer comes. -errno. */
int peers_init(struct peer_host *host, uv_loop_t *loop);
/* All peers are closed and the loop's handles as well. */
void peers_finish(struct peer_host *host);

/* Takes over fd in every case, and what is held of the uid's quotas for it with success, to give it
 * back when it closes. -ENOMEM, or what libuv says. */
int peer_create(struct peer_host *host, int fd, uid_t uid, bool admin,
                const struct quota_amounts *held);

/* Sees to it that what waited too long is closed, in the turns to come; called about once a second.
 */
void peers_check_deadlines(struct peer_host *host);
/* Works for those that have something to do, for a bounded time; called once per turn of the loop,
 * before it sleeps. */
void peers_serve(struct peer_host *host);
/* Then this: looks at rings for a moment, serves those that have something, decides whether the
 * loop may sleep for them. */
void peers_serve_rings(struct peer_host *host);

void peers_notify_draining(struct peer_host *host);
/* Cancels all calls of all peers. */
void peers_cut(struct peer_host *host);
/* Every peer closes as soon as its output is delivered. */
void peers_end(struct peer_host *host);
/* Closes all at once. */
void peers_close(struct peer_host *host);

#endif
