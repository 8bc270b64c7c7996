/* daemon/peer_internal.h - what the files of a peer share.
 *
 *   peer.c            its life, a step of work for it, what the handlers tell it
 *   peer_user.c       the uids, and the waiting of those that are paced
 *   peer_turn.c       whose turn it is
 *   peer_deadlines.c  who has waited too long
 *   peer_input.c      from a stream of bytes, however it comes, to whole messages
 *   peer_output.c     from the output's buffer to the client, by socket or ring, at its pace
 *   peer_ring.c       its rings in shared memory
 *   peer_ring_look.c  when they are looked at
 *   peer_area.c       that memory's life, which may be longer than the rings'
 */
#ifndef DAEMON_PEER_INTERNAL_H
#define DAEMON_PEER_INTERNAL_H

#include "daemon/log.h"
#include "daemon/peer.h"

#include "ipc/ring_map.h"

/* Bytes taken in a step: few while small messages come, more inside of a long one. */
#define PEER_READ_BYTES (16u << 10)

/* A uid that is connected. */
struct peer_user {
    LIST_ENTRY(peer_user) entry;
    TAILQ_ENTRY(peer_user) turn;   /* in queue, while some of its peers are ready */
    struct peer_user_queue *queue; /* host->fresh, host->waiting, host->paced or NULL */
    TAILQ_HEAD(, peer) ready;      /* in the order in which they came */
    uid_t uid;
    uint32_t n_refs;         /* its peers, and who serves one of them just now */
    struct penalty *penalty; /* a reference */
    struct log_pace lines;   /* about its connections that were ended */
};

/* A stream of messages that comes in pieces. A peer has one from its socket and one from its ring;
 * in what order messages of the two are taken is not told. */
struct peer_input {
    struct ipc_scanner scanner;
    uint8_t *frame; /* the message that is coming in */
    size_t frame_bytes, frame_capacity;
    bool refused;        /* there was no room for it: what still comes of it is thrown away */
    uint64_t held_bytes; /* of QUOTA_INPUT_BYTES, for it */
    uint64_t begun_ns;   /* when its first bytes came, */
    uint8_t *rest;       /* bytes that were read but may not be looked at yet */
    size_t rest_bytes;
    uint64_t frame_ns; /* and when the last ones did */
};

/* A peer's rings. Places in the output are counted in bytes since the connection began
 * (peer_output_end()): what goes by the socket, and what by the ring, is told by them alone. */
struct peer_ring {
    struct peer *peer;
    LIST_ENTRY(peer_ring) awake_entry;
    bool awake;           /* looked at in every turn; else its doorbell calls */
    bool pending;         /* something was seen in it: for the peer's next step */
    uint64_t found_ns;    /* when a request was last found in it */
    bool is_looked_for;   /* the next one, since then */
    uint32_t n_fruitless; /* windows of looking in a row in which none came, up to a few */
    uint32_t n_left_out;  /* windows still to be left out for that */
    struct ring_map map;
    struct ring_in in;
    struct ring_out out;
    struct peer_input input;
    uv_poll_t doorbell;
    int doorbell_fd;          /* an eventfd, shared with the client: nothing here may block on it */
    uint32_t idle_bells;      /* in a row: it rang, and there was nothing */
    bool is_heard;            /* something was taken from it */
    bool is_muted;            /* too many of them: not listened to until the next tick */
    int fds[2];               /* memfds of the rings and the data area; -1 once they are sent */
    uint64_t announced;       /* the answer to ring.open begins there and takes the fds along */
    uint64_t first;           /* from there on the ring carries; UINT64_MAX until it is known */
    uint64_t last;            /* up to there; UINT64_MAX until ring.close */
    bool ends;                /* the next message is its last */
    size_t batch;             /* bytes that the last record told to come behind it */
    struct peer_area *memory; /* what map maps; a reference */
    struct quota_amounts held; /* descriptors: the memory's bytes go with it */
};

/* The shared memory of a connection's rings, as long as somebody may touch it: the rings, or a
 * request that writes rows there. Then it is given back to the system, on the task pool in its
 * uid's turn, for half a gigabyte takes tens of milliseconds; only then its bytes count as free
 * again. */
struct peer_area {
    struct area area;
    struct ring_map map;
    struct task release;
    struct peer_host *host;
    uid_t uid;
    struct quota_amounts held;
};

struct peer {
    struct caller caller;
    struct peer_host *host;
    LIST_ENTRY(peer) entry;       /* of host->all or host->gone */
    TAILQ_ENTRY(peer) turn;       /* among its user's ready ones, if queued */
    LIST_ENTRY(peer) timed_entry; /* of host->timed, if is_timed */
    struct peer_user *user;
    int fd;
    uint32_t events; /* that the epoll tells of */
    uid_t uid;
    struct peer_input input;
    struct ipc_buffer out;
    size_t out_sent;
    uint64_t out_gone; /* bytes of output that have left, of all times */
    struct peer_ring *ring;
    uint32_t n_unread_rings;   /* whose descriptors may lie in the socket */
    struct quota_amounts held; /* of the uid's quotas, for this connection */
    uint64_t opened_ns;
    uint64_t stalled_ns;   /* since when the client takes nothing; 0: it takes */
    uint64_t congested_ns; /* since when its requests are paused; 0: they are not */
    bool socket_full;      /* output waits for room there */
    bool greeted, ending, closed;
    /* What there is to do, see peer_has_work(). */
    bool readable; /* the socket may have bytes: told once, so kept until it has none */
    bool hung_up;  /* the client has closed its end */
    bool gone;     /* and hears nothing any more */
    bool dirty;    /* output, or an end, may be delivered */
    bool late;     /* it is to be closed */
    bool queued, is_timed;
};

/* ---- peer.c ------------------------------------------------------------------------------ */

/* Stays allocated until the turn ends. */
void peer_close(struct peer *p);
void peer_mark_dirty(struct peer *p);
/* Logs "uid N: WHAT: disconnected", not more often of a uid than is of use. */
void peer_log_end(struct peer *p, enum log_level level, const char *what);
/* Closes the peer, whose client broke the protocol; "uid N: WHAT: disconnected" is logged. */
void peer_broke(struct peer *p, const char *what);
/* A bounded piece of what there is to do; may close the peer. */
void peer_step(struct peer *p);
bool peer_has_work(const struct peer *p);

/* ---- peer_user.c ------------------------------------------------------------------------- */

/* Makes the peer one of its uid's, and has the loop told of its socket. -errno. */
int peer_enter(struct peer *p);
void peer_leave(struct peer *p);
void peer_user_unref(struct peer_host *h, struct peer_user *u);
/* To the end of a queue; NULL: of none. */
void peer_user_move(struct peer_user *u, struct peer_user_queue *to);
/* Where it waits for its next step: among the paced, or for its first one in `otherwise`. */
void peer_user_enqueue(struct peer_host *h, struct peer_user *u, struct peer_user_queue *otherwise);
/* One of the paced that has waited long enough, or need not wait any more; NULL: none. */
struct peer_user *peers_next_paced(struct peer_host *h, uint64_t now);
/* So that the loop does not sleep beyond the first of them. */
void peers_set_paced_alarm(struct peer_host *h);
/* With the loop. -errno, or what libuv says. */
int peers_init_users(struct peer_host *h);
/* Its uid has done what only a faulty or hostile program does, or wasted something. */
void peer_strike(struct peer *p, enum penalty_kind kind);
/* Whether its uid waits between its steps. */
bool peer_is_paced(const struct peer *p);

/* ---- peer_turn.c ------------------------------------------------------------------------- */

/* There is something to do for it. */
void peer_ready(struct peer *p);
/* Has the loop told of room in the socket as well, while output waits for it. -errno. */
int peer_watch(struct peer *p);
/* Whether the step has taken its time: what can wait for the next one is to wait. */
bool peer_step_is_over(const struct peer_host *host);

/* ---- peer_deadlines.c -------------------------------------------------------------------- */

/* After whatever may have put the peer under a deadline. */
void peer_note_deadline(struct peer *p);
/* The peer closes. */
void peer_forget_deadline(struct peer *p);
/* A piece of the round that was begun. Whether there is more of it. */
bool peers_check_some(struct peer_host *host, uint64_t now_ns);

/* ---- peer_input.c ------------------------------------------------------------------------ */

void peer_input_init(struct peer_input *in);
void peer_input_finish(struct peer *p, struct peer_input *in);
/* Whether a message has begun and not ended. */
static inline bool peer_input_has_begun(const struct peer_input *in)
{
    return in->frame_bytes > 0;
}
/* Whether the peer can take messages: neither ending, nor parsing a long one, nor congested. */
bool peer_may_take(const struct peer *p);
/* Whether bytes of this stream can be used now. */
bool peer_may_read(const struct peer *p, const struct peer_input *in);
/* Takes bytes in, and hands whole messages to the handlers, until the peer has to wait or the step
 * is over; what is left then is kept for peer_feed_rest(). */
void peer_feed(struct peer *p, struct peer_input *in, const uint8_t *data, size_t bytes);
void peer_feed_rest(struct peer *p, struct peer_input *in);

/* ---- peer_output.c ----------------------------------------------------------------------- */

static inline size_t peer_queued(const struct peer *p)
{
    return p->out.bytes - p->out_sent;
}

static inline uint64_t peer_output_end(const struct peer *p)
{
    return p->out_gone + peer_queued(p);
}

/* Frees the buffer, with what is in it. */
void peer_output_finish(struct peer *p);
/* A message was appended. */
void peer_output_grew(struct peer *p);
/* Sends what can be sent, a bounded amount; may close the peer. */
void peer_flush(struct peer *p);
/* Destroys the rings, and tells so, where the client has taken everything up to the answer to
 * ring.close: they are of no more use. */
bool peer_ring_let_go(struct peer *p);

/* ---- peer_ring.c ------------------------------------------------------------------------- */

/* Makes the rings; the message appended next announces them. -EEXIST, -EBUSY, -errno, and e. */
int peer_ring_open(struct peer *p, const struct ring_sizes *sizes, struct ipc_error *e);
/* The message appended next is the last that the ring carries. -ENOENT and e. */
int peer_ring_close(struct peer *p, struct ipc_error *e);
/* Takes some of what the client has put, if it may, and sees whether it has taken something; for
 * the peer's step. The peer may be closed afterwards. */
void peer_ring_serve(struct peer_ring *r);
/* At once: nobody looks at them any more. No ring is legal. */
void peer_ring_destroy(struct peer *p);
/* About once a second. May close the peer. */
void peer_ring_tick(struct peer *p);
/* The descriptors for the announcement are on their way. */
void peer_ring_sent(struct peer_ring *r);
/* Whether the client has taken all that was put. */
bool peer_ring_is_drained(const struct peer_ring *r);
/* Puts what fits of that output, and wakes the client. Bytes put; -EAGAIN: the ring is full;
 * -EPROTO. */
ssize_t peer_ring_put(struct peer_ring *r, const uint8_t *data, size_t bytes);

/* Whether there is something to take, to put, or an end to come to. */
bool peer_ring_may_take(const struct peer_ring *r);
bool peer_ring_may_put(const struct peer_ring *r);
/* Whether the client's taking is waited for, by output or by an end; and whether it has taken what
 * was waited for. */
bool peer_ring_waits_for_room(const struct peer_ring *r);
bool peer_ring_has_room(const struct peer_ring *r);
/* Whether it has taken all that it will ever get there, so that the rings, or the peer, may go. */
bool peer_ring_is_over(const struct peer_ring *r);

/* ---- peer_ring_look.c -------------------------------------------------------------------- */

/* Looks at the rings in every turn again. */
void peer_ring_wake(struct peer_ring *r);
/* Nobody does any more. */
void peer_ring_fall_asleep(struct peer_ring *r);

/* ---- peer_area.c ------------------------------------------------------------------------- */

/* The memory for rings of these sizes, of the peer's uid's quota, with one reference
 * (area_unref()); and its descriptors, the caller's to close. -EBUSY, -errno, and e. */
int peer_area_create(struct peer *p, const struct ring_sizes *sizes, struct peer_area **ret,
                     int ret_fds[2], struct ipc_error *e);

#endif
