#include "daemon/peer_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static struct peer *peer_of(struct caller *c)
{
    return (struct peer *)((char *)c - offsetof(struct peer, caller));
}

/* ---- the end ----------------------------------------------------------------------------- */

void peer_close(struct peer *p)
{
    if (p->closed) {
        return;
    }
    p->closed = true;
    caller_finish(&p->caller);
    LIST_REMOVE(p, entry);
    LIST_INSERT_HEAD(&p->host->gone, p, entry);
    p->host->n_peers--;
    peer_forget_deadline(p);
    peer_leave(p);
    if (p->ring) {
        shutdown(p->fd, SHUT_RDWR); /* before its rings read as zeros: the client learns why */
        peer_ring_destroy(p);
    }
    peer_input_finish(p, &p->input);
    peer_output_finish(p);
    close(p->fd);
    quota_give(p->host->quotas, p->uid, &p->held);
    p->host->on_closed(p->host);
}

/* ---- a step ------------------------------------------------------------------------------ */

void peer_mark_dirty(struct peer *p)
{
    p->dirty = true;
    peer_ready(p);
}

void peer_log_end(struct peer *p, enum log_level level, const char *what)
{
    /* Of who goes on with it, one line tells (penalty.c). */
    if (p->user->penalty->slowed) {
        log_debug("uid %u: %s: disconnected", p->uid, what);
    } else {
        log_paced(&p->user->lines, uv_hrtime(), level, "uid %u: %s: disconnected", p->uid, what);
    }
}

void peer_broke(struct peer *p, const char *what)
{
    peer_log_end(p, LOG_LEVEL_WARNING, what);
    peer_strike(p, PENALTY_VIOLATION);
    peer_close(p);
}

static void client_left(struct peer *p)
{
    if (p->caller.n_calls > 0 || peer_input_has_begun(&p->input)) {
        peer_strike(p, PENALTY_ABRUPT_END);
    }
    peer_close(p);
}

/* More is asked for inside of a long text, all of which its message takes: whatever comes behind a
 * message, and may have to wait, is little. */
static size_t bytes_to_ask(const struct peer_input *in)
{
    uint64_t skip = in->scanner.skip;
    uint64_t most = skip < PEER_SCRATCH_BYTES ? skip : PEER_SCRATCH_BYTES;
    return most > PEER_READ_BYTES ? (size_t)most : PEER_READ_BYTES;
}

/* One recvmsg. There is no room for control data on purpose: descriptors that a client sends are
 * then closed by the kernel before they ever exist here, and MSG_CTRUNC tells of them. */
static void receive(struct peer *p)
{
    struct iovec iov = {.iov_base = p->host->scratch, .iov_len = bytes_to_ask(&p->input)};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t n = recvmsg(p->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    /* Less than asked for is all there was, and what comes now is told anew. */
    p->readable = n < 0 ? errno == EINTR : p->hung_up || (size_t)n == iov.iov_len;
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (n <= 0) {
        client_left(p);
        return;
    }
    if (msg.msg_flags & MSG_CTRUNC) {
        peer_broke(p, "it sent file descriptors, which no client does");
        return;
    }
    p->input.frame_ns = uv_hrtime();
    peer_ring_let_go(p); /* what was received may ask for other ones */
    peer_feed(p, &p->input, p->host->scratch, (size_t)n);
}

bool peer_has_work(const struct peer *p)
{
    if (p->closed) {
        return false;
    }
    bool to_take = p->readable || p->input.rest || (p->ring && p->ring->input.rest);
    return p->late || p->dirty || p->hung_up || (p->ring && p->ring->pending) ||
           (to_take && peer_may_take(p));
}

/* What was read first, then what is to be read; a client that has left is heard to its end, unless
 * it would have to wait for something. */
static void take_input(struct peer *p)
{
    if (p->gone && peer_is_paced(p)) {
        client_left(p); /* what it may have said before is not worth its uid's time */
    } else if (p->input.rest && peer_may_take(p)) {
        peer_ring_let_go(p);
        peer_feed_rest(p, &p->input);
    } else if (p->readable && peer_may_read(p, &p->input)) {
        receive(p);
    } else if (p->hung_up) {
        client_left(p);
    }
}

void peer_step(struct peer *p)
{
    if (p->late) {
        peer_close(p);
        return;
    }
    take_input(p);
    if (!p->closed && p->ring) {
        peer_ring_serve(p->ring);
    }
    if (!p->closed && p->dirty) {
        p->dirty = false;
        peer_flush(p);
    }
}

/* ---- what the handlers tell -------------------------------------------------------------- */

static void sink_written(struct caller *c)
{
    peer_output_grew(peer_of(c));
}

/* May come from inside of peer_feed(): the flags tell it to stop. */
static void sink_broken(struct caller *c)
{
    struct peer *p = peer_of(c);
    p->ending = true;
    peer_strike(p, PENALTY_VIOLATION);
    peer_mark_dirty(p);
}

static void sink_resumed(struct caller *c)
{
    struct peer *p = peer_of(c);
    peer_ready(p);
    if (p->ring) {
        peer_ring_wake(p->ring);
    }
}

static int sink_open_ring(struct caller *c, const struct ring_sizes *sizes, struct ipc_error *e)
{
    return peer_ring_open(peer_of(c), sizes, e);
}

static int sink_close_ring(struct caller *c, struct ipc_error *e)
{
    return peer_ring_close(peer_of(c), e);
}

static const struct caller_sink sink = {.written = sink_written,
                                        .resumed = sink_resumed,
                                        .broken = sink_broken,
                                        .open_ring = sink_open_ring,
                                        .close_ring = sink_close_ring};

/* ---- the host's side --------------------------------------------------------------------- */

int peer_create(struct peer_host *host, int fd, uid_t uid, bool admin,
                const struct quota_amounts *held)
{
    struct peer *p = calloc(1, sizeof(*p));
    if (!p) {
        close(fd);
        return -ENOMEM;
    }
    p->host = host;
    p->fd = fd;
    p->uid = uid;
    int rc = peer_enter(p);
    if (rc < 0) {
        free(p);
        close(fd);
        return rc;
    }
    p->held = *held;
    p->opened_ns = uv_hrtime();
    ipc_buffer_init(&p->out);
    peer_input_init(&p->input);
    caller_init(&p->caller, host->service, &sink, &p->out, uid, admin);
    p->caller.penalty = p->user->penalty;
    LIST_INSERT_HEAD(&host->all, p, entry);
    host->n_peers++;
    peer_note_deadline(p);
    return 0;
}

void peers_notify_draining(struct peer_host *host)
{
    struct peer *p;
    LIST_FOREACH(p, &host->all, entry)
    {
        caller_notify_draining(&p->caller);
    }
}

void peers_cut(struct peer_host *host)
{
    struct peer *p;
    LIST_FOREACH(p, &host->all, entry)
    {
        caller_cut(&p->caller);
    }
}

void peers_end(struct peer_host *host)
{
    struct peer *p;
    LIST_FOREACH(p, &host->all, entry)
    {
        p->ending = true;
        peer_mark_dirty(p);
    }
}

void peers_close(struct peer_host *host)
{
    struct peer *p;
    while ((p = LIST_FIRST(&host->all)) != NULL) {
        peer_close(p);
    }
}
