/* From the output's buffer to the client, by socket or ring, at the pace at which it takes.
 *
 * All output is one stream of messages. A prefix of it, up to the answer to ring.open, goes by the
 * socket; then the ring carries it, up to the answer to ring.close; then the socket again. Nothing
 * goes by one as long as something before it waits for the other, so that the client has to look
 * at one place at a time. */
#include "daemon/peer_internal.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

#define SEND_BYTES      (1u << 20)   /* per step */
#define CONGESTED_BYTES (256u << 10) /* of output: reading and generating pause above */
#define RELIEVED_BYTES  (64u << 10)  /* and go on below */
#define KEEP_BYTES      (8u << 10)   /* an empty output buffer larger than this is freed */

/* What waits for the client counts among what its uid's programs do not read. */
static void count_output(struct peer *p)
{
    uint64_t *held = &p->held.of[QUOTA_OUTPUT_BYTES];
    quota_change(p->host->quotas, p->uid, QUOTA_OUTPUT_BYTES, *held, peer_queued(p));
    *held = peer_queued(p);
}

/* ---- congestion -------------------------------------------------------------------------- */

static void note_congestion(struct peer *p)
{
    if (!p->caller.congested && peer_queued(p) > CONGESTED_BYTES) {
        p->caller.congested = true;
        p->congested_ns = uv_hrtime();
    }
}

static void update_congestion(struct peer *p)
{
    note_congestion(p);
    if (p->caller.congested && peer_queued(p) < RELIEVED_BYTES) {
        p->caller.congested = false;
        p->congested_ns = 0;
        caller_uncongested(&p->caller);
        peer_ready(p); /* for what was read and not looked at, or not read */
        if (p->ring) {
            peer_ring_wake(p->ring);
        }
    }
}

/* ---- the buffer -------------------------------------------------------------------------- */

void peer_output_finish(struct peer *p)
{
    service_free(p->host->service, p->out.data, p->out.capacity);
    ipc_buffer_init(&p->out);
}

static void output_empty(struct peer *p)
{
    p->out_sent = 0;
    if (p->out.capacity > KEEP_BYTES) {
        peer_output_finish(p);
    } else {
        p->out.bytes = 0;
    }
}

/* Moves what is left to the front once more than half is gone: each byte is moved once at most. */
static void output_compact(struct peer *p)
{
    if (p->out_sent > p->out.bytes / 2) {
        memmove(p->out.data, p->out.data + p->out_sent, peer_queued(p));
        p->out.bytes -= p->out_sent;
        p->out_sent = 0;
    }
}

/* ---- the two ways ------------------------------------------------------------------------ */

/* Bytes that left; -EAGAIN; -errno. The descriptors go with the first byte. */
static ssize_t by_socket(struct peer *p, const uint8_t *data, size_t bytes, struct peer_ring *with)
{
    union {
        char space[CMSG_SPACE(3 * sizeof(int))];
        struct cmsghdr align;
    } control = {0};
    struct iovec iov = {.iov_base = (void *)data, .iov_len = bytes};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (with) {
        const int fds[3] = {with->fds[0], with->fds[1], with->doorbell_fd};
        msg.msg_control = control.space;
        msg.msg_controllen = sizeof(control.space);
        struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(sizeof(fds));
        memcpy(CMSG_DATA(c), fds, sizeof(fds));
    }
    ssize_t n = sendmsg(p->fd, &msg, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0) {
        return errno == EINTR ? -EAGAIN : -errno;
    }
    if (n > 0 && with) {
        peer_ring_sent(with);
    }
    return n;
}

static size_t up_to(size_t bytes, uint64_t distance)
{
    return distance < bytes ? (size_t)distance : bytes;
}

bool peer_ring_let_go(struct peer *p)
{
    struct peer_ring *r = p->ring;
    if (!r || p->out_gone < r->last) {
        return false;
    }
    if (!peer_ring_is_drained(r)) {
        peer_ring_wake(r); /* so that it asks to be told */
        return false;
    }
    peer_ring_destroy(p);
    return true;
}

static bool is_rings_turn(const struct peer *p)
{
    return p->ring && p->out_gone >= p->ring->first;
}

/* Sends some of the next bytes, at most so many, by the way that is theirs. */
static ssize_t send_some(struct peer *p, size_t bytes)
{
    const uint8_t *data = p->out.data + p->out_sent;
    struct peer_ring *with = NULL;
    if (is_rings_turn(p) && !peer_ring_let_go(p)) {
        bytes = up_to(bytes, p->ring->last - p->out_gone);
        return bytes > 0 ? peer_ring_put(p->ring, data, bytes) : -EAGAIN;
    }
    if (p->ring && p->out_gone < p->ring->announced) {
        bytes = up_to(bytes, p->ring->announced - p->out_gone);
    } else if (p->ring) {
        bytes = up_to(bytes, p->ring->first - p->out_gone);
        with = p->out_gone == p->ring->announced ? p->ring : NULL;
    }
    return by_socket(p, data, bytes, with);
}

void peer_output_grew(struct peer *p)
{
    struct peer_ring *r = p->ring;
    if (r && r->first == UINT64_MAX) {
        r->first = peer_output_end(p);
    } else if (r && r->ends && r->last == UINT64_MAX) {
        r->last = peer_output_end(p);
    }
    count_output(p);
    note_congestion(p);
    peer_mark_dirty(p);
}

/* What a ring carries is delivered when the client has taken it: an ending peer's memory goes. */
static bool is_delivered(struct peer *p)
{
    if (is_rings_turn(p) && !peer_ring_let_go(p) && !peer_ring_is_drained(p->ring)) {
        peer_ring_wake(p->ring);
        return false;
    }
    return true;
}

/* Sends until all is gone or it has been enough: 0. -EAGAIN: the client takes no more now. Another
 * -errno: the end. */
static int drain_output(struct peer *p)
{
    size_t budget = SEND_BYTES;
    while (peer_queued(p) > 0 && budget > 0) {
        ssize_t n = send_some(p, peer_queued(p) < budget ? peer_queued(p) : budget);
        if (n < 0) {
            return (int)n;
        }
        p->out_sent += (size_t)n;
        p->out_gone += (uint64_t)n;
        budget -= (size_t)n;
        p->stalled_ns = 0;
        if (peer_step_is_over(p->host)) {
            break;
        }
    }
    return 0;
}

static void note_stall(struct peer *p, bool stalled)
{
    if (!stalled) {
        p->stalled_ns = 0;
    } else if (p->stalled_ns == 0) {
        p->stalled_ns = uv_hrtime();
    }
}

/* That a client has gone is its own affair. */
static void log_unsent(struct peer *p, int rc)
{
    if (rc != -EPIPE && rc != -ECONNRESET) {
        log_paced(&p->host->unsent_lines, uv_hrtime(), LOG_LEVEL_WARNING,
                  "uid %u: its answers cannot be sent (%s): disconnected", p->uid, strerror(-rc));
    }
}

void peer_flush(struct peer *p)
{
    int rc = p->out.error ? -ENOMEM : drain_output(p);
    if (rc < 0 && rc != -EAGAIN) {
        if (rc == -EPROTO) {
            peer_broke(p, "its completion ring's head is nonsense");
            return;
        }
        log_unsent(p, rc);
        peer_close(p);
        return;
    }
    count_output(p);
    bool waits = peer_queued(p) > 0;
    p->socket_full = waits && rc == -EAGAIN && !is_rings_turn(p);
    if (waits) {
        output_compact(p);
        if (is_rings_turn(p)) {
            peer_ring_wake(p->ring);
        }
        if (rc == 0) {
            peer_mark_dirty(p); /* the rest in another step */
        }
    } else {
        output_empty(p);
        bool delivered = is_delivered(p);
        if (p->ending && delivered) {
            peer_close(p);
            return;
        }
        waits = p->ending;
    }
    note_stall(p, waits);
    update_congestion(p);
    rc = peer_watch(p);
    if (rc < 0) {
        log_error("uid %u: the connection cannot be watched: %s", p->uid, strerror(-rc));
        peer_close(p);
    }
}
