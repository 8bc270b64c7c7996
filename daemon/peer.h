/* daemon/peer.h - one connection: bytes in, messages to the handlers, bytes out.
 *
 * A peer owns its socket, and rings in shared memory if it asked for them; the same messages travel
 * in both. The socket is non-blocking and watched by a uv_poll_t. It reads through one
 * scratch buffer that all peers share, so that an idle connection costs its struct only. Work is
 * bounded per wake-up: one recvmsg, one bounded send. Output is flushed once per turn of the loop,
 * for all peers that have some (peers_flush).
 *
 * Loop thread only. */
#ifndef DAEMON_PEER_H
#define DAEMON_PEER_H

#include "daemon/handlers.h"
#include "daemon/quota.h"

#include <uv.h>

#define PEER_SCRATCH_BYTES (256u << 10) /* more than a socket holds, as a rule */

struct peer;
struct peer_ring;
LIST_HEAD(peer_list, peer);
LIST_HEAD(peer_ring_list, peer_ring);

/* What peers share; embedded in the server. */
struct peer_host {
    uv_loop_t *loop;
    struct service *service;
    uint8_t *scratch; /* PEER_SCRATCH_BYTES */
    struct peer_list all, dirty;
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
    void (*on_closed)(struct peer_host *host);
};

/* Takes over fd in every case, and what is held of the uid's quotas for it with success, to give it
 * back when it closes. -ENOMEM, or what libuv says. */
int peer_create(struct peer_host *host, int fd, uid_t uid, bool admin,
                const struct quota_amounts *held);

/* Closes what waited too long; called about once a second. */
void peers_check_deadlines(struct peer_host *host, uint64_t now_ns);
/* Sends what has gathered; called once per turn of the loop, before it sleeps. */
void peers_flush(struct peer_host *host);
/* Then this: takes what is in rings, looks at them for a moment, decides whether the loop may
 * sleep. */
void peers_serve_rings(struct peer_host *host);

void peers_notify_draining(struct peer_host *host);
/* Cancels all calls of all peers. */
void peers_cut(struct peer_host *host);
/* Every peer closes as soon as its output is delivered. */
void peers_end(struct peer_host *host);
/* Closes all at once. */
void peers_close(struct peer_host *host);

#endif
