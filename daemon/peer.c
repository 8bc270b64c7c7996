#include "daemon/peer.h"

#include "daemon/log.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* Bytes taken per wake-up: few while small messages come, so that one peer's thousand pings do not
 * make the others wait; more inside of a long message. */
#define PEER_READ_BYTES        (16u << 10)
#define PEER_SEND_BYTES        (1u << 20)
#define PEER_CONGESTED_BYTES   (256u << 10) /* of output: reading and generating pause above */
#define PEER_RELIEVED_BYTES    (64u << 10)  /* and go on below */
#define PEER_KEEP_BYTES        (8u << 10)   /* an empty output buffer larger than this is freed */
#define PEER_FRAME_FIRST_BYTES 256u

struct peer {
    struct caller caller;
    struct peer_host *host;
    LIST_ENTRY(peer) entry, dirty_entry;
    uv_poll_t poll;
    int fd;
    int events; /* that poll watches */
    uid_t uid;
    struct ipc_scanner scanner;
    uint8_t *frame; /* the message that is coming in */
    size_t frame_bytes, frame_capacity;
    uint8_t *rest; /* bytes that were read but may not be looked at yet */
    size_t rest_bytes;
    struct ipc_buffer out;
    size_t out_sent;
    struct quota_amounts held; /* of the uid's quotas, for this connection */
    uint64_t opened_ns;
    uint64_t stalled_ns;   /* since when the client takes nothing; 0: it takes */
    uint64_t congested_ns; /* since when its requests are paused; 0: they are not */
    uint64_t frame_ns;     /* when the last bytes of an unfinished message came */
    bool greeted, ending, closed, dirty;
};

static uint64_t now_ns(void)
{
    return uv_hrtime();
}

static struct peer *peer_of(struct caller *c)
{
    return (struct peer *)((char *)c - offsetof(struct peer, caller));
}

static size_t queued(const struct peer *p)
{
    return p->out.bytes - p->out_sent;
}

/* What waits for the client counts among what its uid's programs do not read. */
static void count_output(struct peer *p)
{
    uint64_t *held = &p->held.of[QUOTA_OUTPUT_BYTES];
    quota_change(p->host->quotas, p->uid, QUOTA_OUTPUT_BYTES, *held, queued(p));
    *held = queued(p);
}

/* ---- the end ----------------------------------------------------------------------------- */

static void on_poll_closed(uv_handle_t *handle)
{
    free(handle->data);
}

static void peer_close(struct peer *p)
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
    free(p->frame);
    free(p->rest);
    ipc_buffer_finish(&p->out);
    uv_close((uv_handle_t *)&p->poll, on_poll_closed);
    close(p->fd);
    quota_give(p->host->quotas, p->uid, &p->held);
    p->host->on_closed(p->host);
}

/* ---- which events ------------------------------------------------------------------------ */

static bool may_read(const struct peer *p)
{
    return !p->ending && !p->caller.parsing && !p->caller.congested && p->rest_bytes == 0;
}

static void on_poll(uv_poll_t *poll, int status, int events);

static void watch(struct peer *p)
{
    int events =
        UV_DISCONNECT | (may_read(p) ? UV_READABLE : 0) | (p->stalled_ns ? UV_WRITABLE : 0);
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

static void mark_dirty(struct peer *p)
{
    if (!p->dirty && !p->closed) {
        p->dirty = true;
        LIST_INSERT_HEAD(&p->host->dirty, p, dirty_entry);
    }
}

/* ---- input ------------------------------------------------------------------------------- */

static int frame_append(struct peer *p, const uint8_t *data, size_t bytes)
{
    if (p->frame_bytes + bytes > p->frame_capacity) {
        size_t capacity = p->frame_capacity ? p->frame_capacity * 2 : PEER_FRAME_FIRST_BYTES;
        if (capacity < p->frame_bytes + bytes) {
            capacity = p->frame_bytes + bytes;
        }
        uint8_t *frame = realloc(p->frame, capacity);
        if (!frame) {
            return -ENOMEM;
        }
        p->frame = frame;
        p->frame_capacity = capacity;
    }
    memcpy(p->frame + p->frame_bytes, data, bytes);
    p->frame_bytes += bytes;
    return 0;
}

static void refuse_input(struct peer *p, int rc)
{
    struct ipc_error e;
    if (rc == -EMSGSIZE) {
        ipc_error_set(&e, PROTO_E_INVALID_REQUEST,
                      "a message is longer than %u bytes or has more than %u values",
                      PROTO_FRAME_BYTES_MAX, PROTO_ELEMENTS_MAX);
    } else if (rc == -ELOOP) {
        ipc_error_set(&e, PROTO_E_INVALID_REQUEST, "a message is nested deeper than %u",
                      PROTO_DEPTH_MAX);
    } else if (rc == -ENOMEM) {
        ipc_error_set(&e, PROTO_E_NO_MEMORY, "no memory for a message");
    } else {
        ipc_error_set(&e, PROTO_E_INVALID_REQUEST, "not MessagePack");
    }
    caller_notify_error(&p->caller, &e);
    p->ending = true;
}

static void deliver_frame(struct peer *p)
{
    uint8_t *frame = p->frame;
    size_t bytes = p->frame_bytes;
    p->frame = NULL;
    p->frame_bytes = p->frame_capacity = 0;
    p->greeted = true;
    caller_message(&p->caller, frame, bytes);
}

/* Looks at bytes until they are used or the peer has to wait. Returns how many were used. */
static size_t consume(struct peer *p, const uint8_t *data, size_t bytes)
{
    size_t done = 0;
    while (done < bytes && !p->ending && !p->caller.parsing && !p->caller.congested) {
        size_t used = 0;
        int rc = ipc_scanner_feed(&p->scanner, data + done, bytes - done, &used);
        if (rc == 0) {
            used = bytes - done;
        }
        if (rc >= 0) {
            int appended = frame_append(p, data + done, used);
            rc = appended < 0 ? appended : rc;
        }
        if (rc < 0) {
            refuse_input(p, rc);
            return bytes;
        }
        done += used;
        if (rc > 0) {
            deliver_frame(p);
        }
    }
    return p->ending ? bytes : done;
}

static void feed(struct peer *p, const uint8_t *data, size_t bytes)
{
    size_t used = consume(p, data, bytes);
    if (used == bytes) {
        return;
    }
    uint8_t *rest = malloc(bytes - used);
    if (!rest) {
        refuse_input(p, -ENOMEM);
        return;
    }
    memcpy(rest, data + used, bytes - used);
    p->rest = rest;
    p->rest_bytes = bytes - used;
}

/* What was kept back may be looked at again. */
static void feed_rest(struct peer *p)
{
    uint8_t *rest = p->rest;
    size_t bytes = p->rest_bytes;
    if (rest && !p->caller.parsing && !p->caller.congested) {
        p->rest = NULL;
        p->rest_bytes = 0;
        feed(p, rest, bytes);
        free(rest);
    }
}

/* One recvmsg. There is no room for control data on purpose: descriptors that a client sends are
 * then closed by the kernel before they ever exist here, and MSG_CTRUNC tells of them. */
static void on_readable(struct peer *p)
{
    struct iovec iov = {.iov_base = p->host->scratch,
                        .iov_len = p->frame ? PEER_SCRATCH_BYTES : PEER_READ_BYTES};
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
    p->frame_ns = now_ns();
    feed(p, p->host->scratch, (size_t)n);
}

/* ---- output ------------------------------------------------------------------------------ */

static void note_congestion(struct peer *p)
{
    if (!p->caller.congested && queued(p) > PEER_CONGESTED_BYTES) {
        p->caller.congested = true;
        p->congested_ns = now_ns();
    }
}

static void update_congestion(struct peer *p)
{
    note_congestion(p);
    if (p->caller.congested && queued(p) < PEER_RELIEVED_BYTES) {
        p->caller.congested = false;
        p->congested_ns = 0;
        caller_uncongested(&p->caller);
        feed_rest(p);
    }
}

static void output_empty(struct peer *p)
{
    p->out_sent = 0;
    if (p->out.capacity > PEER_KEEP_BYTES) {
        ipc_buffer_finish(&p->out);
    } else {
        p->out.bytes = 0;
    }
}

/* Moves what is left to the front once more than half is gone: each byte is moved once at most. */
static void output_compact(struct peer *p)
{
    if (p->out_sent > p->out.bytes / 2) {
        memmove(p->out.data, p->out.data + p->out_sent, queued(p));
        p->out.bytes -= p->out_sent;
        p->out_sent = 0;
    }
}

static void flush_output(struct peer *p)
{
    if (p->out.error) {
        log_warning("uid %u: no memory for its answers: disconnected", p->uid);
        peer_close(p);
        return;
    }
    size_t budget = PEER_SEND_BYTES;
    bool blocked = false;
    while (queued(p) > 0 && budget > 0 && !blocked) {
        size_t bytes = queued(p) < budget ? queued(p) : budget;
        ssize_t n = send(p->fd, p->out.data + p->out_sent, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN && errno != EINTR) {
            peer_close(p);
            return;
        }
        blocked = n < 0 && errno == EAGAIN;
        if (n > 0) {
            p->out_sent += (size_t)n;
            budget -= (size_t)n;
            p->stalled_ns = 0;
        }
    }
    count_output(p);
    if (queued(p) > 0) {
        p->stalled_ns = p->stalled_ns ? p->stalled_ns : now_ns();
        output_compact(p);
    } else {
        p->stalled_ns = 0;
        output_empty(p);
        if (p->ending) {
            peer_close(p);
            return;
        }
    }
    update_congestion(p);
    watch(p);
}

static void on_poll(uv_poll_t *poll, int status, int events)
{
    struct peer *p = poll->data;
    if (status < 0) {
        peer_close(p);
        return;
    }
    if (events & UV_READABLE && may_read(p)) {
        on_readable(p);
    } else if (events & UV_DISCONNECT) {
        peer_close(p);
    }
    if (!p->closed && events & UV_WRITABLE) {
        flush_output(p);
    }
    watch(p);
}

/* ---- what the handlers tell -------------------------------------------------------------- */

static void sink_written(struct caller *c)
{
    struct peer *p = peer_of(c);
    count_output(p);
    note_congestion(p);
    mark_dirty(p);
}

/* May come from inside of consume(): the flags tell it to stop. */
static void sink_broken(struct caller *c)
{
    struct peer *p = peer_of(c);
    p->ending = true;
    mark_dirty(p);
}

static void sink_resumed(struct caller *c)
{
    struct peer *p = peer_of(c);
    feed_rest(p);
    mark_dirty(p); /* the flush looks at which events to watch */
}

static const struct caller_sink sink = {
    .written = sink_written, .resumed = sink_resumed, .broken = sink_broken};

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
    p->opened_ns = now_ns();
    p->poll.data = p;
    ipc_buffer_init(&p->out);
    ipc_scanner_init(&p->scanner, PROTO_FRAME_BYTES_MAX);
    caller_init(&p->caller, host->service, &sink, &p->out, uid, admin);
    LIST_INSERT_HEAD(&host->all, p, entry);
    host->n_peers++;
    watch(p);
    return 0;
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
    if (p->frame && may_read(p) && now > p->frame_ns && now - p->frame_ns > h->reader_timeout_ns) {
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
        flush_output(p);
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
        mark_dirty(p);
    }
}

void peers_close(struct peer_host *host)
{
    struct peer *p;
    while ((p = LIST_FIRST(&host->all)) != NULL) {
        peer_close(p);
    }
}
