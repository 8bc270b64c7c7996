#include "daemon/peer_internal.h"

#include "daemon/log.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static struct peer *peer_of(struct caller *c)
{
    return (struct peer *)((char *)c - offsetof(struct peer, caller));
}

/* ---- the end ----------------------------------------------------------------------------- */

static void on_poll_closed(uv_handle_t *handle)
{
    free(handle->data);
}

void peer_close(struct peer *p)
{
    if (p->closed) {
        return;
    }
    p->closed = true;
    caller_finish(&p->caller);
    LIST_REMOVE(p, entry);
    p->host->n_peers--;
    if (p->dirty) {
        p->dirty = false;
        LIST_REMOVE(p, dirty_entry);
    }
    if (p->ring) {
        shutdown(p->fd, SHUT_RDWR); /* before its rings read as zeros: the client learns why */
        peer_ring_destroy(p);
    }
    peer_input_finish(&p->input);
    ipc_buffer_finish(&p->out);
    uv_close((uv_handle_t *)&p->poll, on_poll_closed);
    close(p->fd);
    quota_give(p->host->quotas, p->uid, &p->held);
    p->host->on_closed(p->host);
}

/* ---- which events ------------------------------------------------------------------------ */

static void on_poll(uv_poll_t *poll, int status, int events);

void peer_watch(struct peer *p)
{
    int events = UV_DISCONNECT | (peer_may_read(p, &p->input) ? UV_READABLE : 0) |
                 (p->socket_full ? UV_WRITABLE : 0);
    if (p->closed || events == p->events) {
        return;
    }
    int rc = uv_poll_start(&p->poll, events, on_poll);
    if (rc < 0) {
        log_error("uid %u: the connection cannot be watched: %s", p->uid, uv_strerror(rc));
        peer_close(p);
        return;
    }
    p->events = events;
}

void peer_mark_dirty(struct peer *p)
{
    if (!p->dirty && !p->closed) {
        p->dirty = true;
        LIST_INSERT_HEAD(&p->host->dirty, p, dirty_entry);
    }
}

/* ---- input ------------------------------------------------------------------------------- */

/* One recvmsg. There is no room for control data on purpose: descriptors that a client sends are
 * then closed by the kernel before they ever exist here, and MSG_CTRUNC tells of them. */
static void on_readable(struct peer *p)
{
    struct iovec iov = {.iov_base = p->host->scratch,
                        .iov_len = p->input.frame ? PEER_SCRATCH_BYTES : PEER_READ_BYTES};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    ssize_t n = recvmsg(p->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) {
        return;
    }
    if (n <= 0) {
        peer_close(p);
        return;
    }
    if (msg.msg_flags & MSG_CTRUNC) {
        log_warning("uid %u sent file descriptors, which no client does: disconnected", p->uid);
        peer_close(p);
        return;
    }
    p->input.frame_ns = uv_hrtime();
    peer_feed(p, &p->input, p->host->scratch, (size_t)n);
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    struct peer *p = poll->data;
    if (status < 0) {
        peer_close(p);
        return;
    }
    if (events & UV_READABLE && peer_may_read(p, &p->input)) {
        on_readable(p);
    } else if (events & UV_DISCONNECT) {
        peer_close(p);
    }
    if (!p->closed && events & UV_WRITABLE) {
        peer_flush(p);
    }
    peer_watch(p);
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
    peer_mark_dirty(p);
}

static void sink_resumed(struct caller *c)
{
    struct peer *p = peer_of(c);
    peer_feed_rest(p, &p->input);
    if (p->ring) {
        peer_feed_rest(p, &p->ring->input);
        peer_ring_wake(p->ring);
    }
    peer_mark_dirty(p); /* the flush looks at which events to watch */
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
    int rc = p ? uv_poll_init(host->loop, &p->poll, fd) : -ENOMEM;
    if (rc < 0) {
        free(p);
        close(fd);
        return rc;
    }
    p->host = host;
    p->fd = fd;
    p->uid = uid;
    p->held = *held;
    p->opened_ns = uv_hrtime();
    p->poll.data = p;
    ipc_buffer_init(&p->out);
    peer_input_init(&p->input);
    caller_init(&p->caller, host->service, &sink, &p->out, uid, admin);
    LIST_INSERT_HEAD(&host->all, p, entry);
    host->n_peers++;
    peer_watch(p);
    return 0;
}

static bool is_unfinished(const struct peer *p, const struct peer_input *in, uint64_t now)
{
    return in->frame && peer_may_read(p, in) && now > in->frame_ns &&
           now - in->frame_ns > p->host->reader_timeout_ns;
}

static bool is_late(const struct peer *p, uint64_t now)
{
    const struct peer_host *h = p->host;
    if (!p->greeted && now - p->opened_ns > h->handshake_ns) {
        log_info("uid %u: no message within the handshake's time: disconnected", p->uid);
        return true;
    }
    if (p->stalled_ns && now > p->stalled_ns && now - p->stalled_ns > h->reader_timeout_ns) {
        log_info("uid %u: did not read its answers: disconnected", p->uid);
        return true;
    }
    if (is_unfinished(p, &p->input, now) || (p->ring && is_unfinished(p, &p->ring->input, now))) {
        log_info("uid %u: left a message unfinished: disconnected", p->uid);
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
            log_info("uid %u: did not read for %u requests, which were ended", p->uid, ended);
        }
    }
}

void peers_check_deadlines(struct peer_host *host, uint64_t now)
{
    struct peer *next;
    for (struct peer *p = LIST_FIRST(&host->all); p; p = next) {
        next = LIST_NEXT(p, entry);
        if (is_late(p, now)) {
            peer_close(p);
        } else {
            end_paused(p, now);
        }
    }
}

void peers_flush(struct peer_host *host)
{
    struct peer *p;
    while ((p = LIST_FIRST(&host->dirty)) != NULL) {
        LIST_REMOVE(p, dirty_entry);
        p->dirty = false;
        peer_flush(p);
    }
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
