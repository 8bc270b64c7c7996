/* A peer's rings: made, served, taken away; when they are looked at, peer_ring_look.c decides.
 *
 * A doorbell that rings without end and for nothing is not listened to for a moment: whoever does
 * that waits for the next tick, and costs the others a few turns of the loop.
 *
 * Nothing here can block on what the client shares. The doorbell is drained with RWF_NOWAIT, for
 * O_NONBLOCK is the client's to clear; the client is woken by a futex in its ring or by a message
 * that the socket takes at once or not at all. */
#include "daemon/peer_internal.h"

#include "daemon/log.h"

#include <assert.h>
#include <errno.h>
#include <linux/sockios.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

/* Rings whose descriptors may lie unread in a connection's socket: in flight they count against all
 * of the daemon's, which the kernel bounds. */
#define UNREAD_MAX     2u
#define REOPEN_MS      1000u
#define IDLE_BELLS_MAX 64u /* in a row; who plays well rings for nothing once in a while */

_Static_assert(PEER_SCRATCH_BYTES >= RING_RECORD_MAX, "a record fits the scratch buffer");

/* ---- waking ------------------------------------------------------------------------------ */

/* [2, "gqa.wake", []] */
static const uint8_t wake_message[] = {0x93, 0x02, 0xa8, 'g', 'q', 'a',
                                       '.',  'w',  'a',  'k', 'e', 0x90};

/* The client was found waiting for this. A socket that is full of what it has not read wakes it as
 * well. */
static void wake_client(struct peer_ring *r, uint32_t wait)
{
    if (wait & RING_WAIT_FUTEX) {
        ring_bell_ring(&r->map.control->client_bell);
    } else if (wait & RING_WAIT_MESSAGE) {
        ssize_t n =
            send(r->peer->fd, wake_message, sizeof(wake_message), MSG_DONTWAIT | MSG_NOSIGNAL);
        (void)n; /* a socket that is broken is found out by its poll */
    }
}

static void on_doorbell(uv_poll_t *poll, int status, int events);

static int listen_to(struct peer_ring *r)
{
    r->is_muted = false;
    return uv_poll_start(&r->doorbell, UV_READABLE, on_doorbell);
}

static void mute(struct peer_ring *r)
{
    uv_poll_stop(&r->doorbell);
    r->is_muted = true;
}

/* It rang for something, or may ring again. May close the peer. */
static void heed(struct peer_ring *r)
{
    r->idle_bells = 0;
    if (r->is_muted && listen_to(r) < 0) {
        peer_close(r->peer);
    }
}

void peer_ring_tick(struct peer *p)
{
    if (p->ring) {
        heed(p->ring);
    }
}

static void on_doorbell(uv_poll_t *poll, int status, int events)
{
    struct peer_ring *r = poll->data;
    uint64_t count;
    struct iovec iov = {.iov_base = &count, .iov_len = sizeof(count)};
    ssize_t n = preadv2(r->doorbell_fd, &iov, 1, -1, RWF_NOWAIT);
    if (status < 0 || (n < 0 && errno != EAGAIN && errno != EINTR)) {
        peer_broke(r->peer, "its doorbell cannot be read");
        return;
    }
    if (peer_is_paced(r->peer)) {
        mute(r); /* until its step */
        r->pending = true;
        peer_ready(r->peer);
        return;
    }
    if (++r->idle_bells > IDLE_BELLS_MAX) {
        log_debug("uid %u: its doorbell rings for nothing: not listened to for a moment",
                  r->peer->uid);
        peer_strike(r->peer, PENALTY_IDLE_BELLS);
        mute(r);
    }
    peer_ring_wake(r);
}

/* ---- output ------------------------------------------------------------------------------ */

bool peer_ring_is_drained(const struct peer_ring *r)
{
    return r->batch == 0 && ring_out_is_drained(&r->out);
}

void peer_ring_sent(struct peer_ring *r)
{
    close(r->fds[0]);
    close(r->fds[1]);
    r->fds[0] = r->fds[1] = -1;
    quota_change(r->peer->host->quotas, r->peer->uid, QUOTA_FDS, r->held.of[QUOTA_FDS], 1);
    r->held.of[QUOTA_FDS] = 1;
    r->peer->n_unread_rings++;
}

/* Descriptors are in flight until the client takes them out of the socket; to have seen them
 * (MSG_PEEK) is not to have taken them. */
static void count_unread(struct peer *p)
{
    int bytes = 1;
    if (ioctl(p->fd, SIOCOUTQ, &bytes) == 0 && bytes == 0) {
        p->n_unread_rings = 0;
    }
}

/* The records of a batch tell how much of it is still to come, so one that did not fit goes on
 * before another begins. All of it lies in the output already. */
ssize_t peer_ring_put(struct peer_ring *r, const uint8_t *data, size_t bytes)
{
    size_t batch = r->batch > 0 ? r->batch : bytes;
    size_t done = 0;
    assert(batch <= bytes);
    int rc = ring_out_put(&r->out, data, batch, &done);
    if (rc < 0) {
        return rc;
    }
    r->batch = batch - done;
    if (ring_out_publish(&r->out)) {
        wake_client(
            r, ring_take_wait(&r->map.control->client_wait, RING_WAIT_FUTEX | RING_WAIT_MESSAGE));
    }
    return done > 0 ? (ssize_t)done : -EAGAIN;
}

/* ---- input ------------------------------------------------------------------------------- */

static void end_broken(struct peer_ring *r)
{
    peer_broke(r->peer, "its submission ring is nonsense (a tail that cannot be, or a record that "
                        "does not fit)");
}

/* One helping, and whether there was any. The peer may be closed afterwards. */
static bool take(struct peer_ring *r)
{
    struct peer *p = r->peer;
    uint8_t *scratch = p->host->scratch;
    size_t taken = 0, bytes = 0;
    bool last;
    while (taken < PEER_READ_BYTES && peer_may_read(p, &r->input) &&
           !(taken > 0 && peer_step_is_over(p->host))) {
        int rc = ring_in_take(&r->in, PROTO_FRAME_BYTES_MAX, scratch, &bytes, &last);
        if (rc < 0) {
            end_broken(r);
            return true;
        }
        if (rc == 0) {
            break;
        }
        if (!r->is_heard) { /* not later: wake-ups may lie in the socket then */
            r->is_heard = true;
            count_unread(p);
        }
        taken += bytes;
        r->input.frame_ns = uv_hrtime();
        peer_feed(p, &r->input, scratch, bytes);
    }
    if (taken > 0 && !p->closed && ring_in_publish(&r->in)) {
        wake_client(r, ring_take_wait(&r->map.control->client_wait, RING_WAIT_ROOM));
    }
    return taken > 0;
}

bool peer_ring_waits_for_room(const struct peer_ring *r)
{
    const struct peer *p = r->peer;
    bool ends = p->ending || p->out_gone >= r->last;
    return p->out_gone >= r->first && (peer_queued(p) > 0 || (ends && !peer_ring_is_drained(r)));
}

bool peer_ring_has_room(const struct peer_ring *r)
{
    bool to_put = peer_queued(r->peer) > 0 && r->peer->out_gone < r->last;
    return to_put ? ring_out_has_moved(&r->out) : peer_ring_is_drained(r);
}

bool peer_ring_is_over(const struct peer_ring *r)
{
    const struct peer *p = r->peer;
    bool ends = p->ending && p->out_gone >= r->first && peer_queued(p) == 0;
    return (ends || p->out_gone >= r->last) && peer_ring_is_drained(r);
}

bool peer_ring_may_put(const struct peer_ring *r)
{
    bool ends = r->peer->ending || r->peer->out_gone >= r->last;
    return (peer_ring_waits_for_room(r) || ends) && peer_ring_has_room(r);
}

bool peer_ring_may_take(const struct peer_ring *r)
{
    return peer_may_read(r->peer, &r->input) && ring_in_has_some(&r->in);
}

void peer_ring_serve(struct peer_ring *r)
{
    struct peer *p = r->peer;
    if (r->pending) {
        r->pending = false;
        peer_ring_wake(r); /* one that is paced was let fall asleep */
    }
    if (r->input.rest && peer_may_take(p)) {
        peer_feed_rest(p, &r->input);
        peer_ring_wake(r); /* it may have fallen asleep over what it could not take */
    }
    bool some = take(r); /* which may close the peer */
    if (!p->closed && peer_ring_may_put(r)) {
        p->dirty = some = true;
    }
    if (p->closed) {
        return;
    }
    if (some) {
        heed(r);
    } else if (r->is_muted && r->idle_bells <= IDLE_BELLS_MAX && listen_to(r) < 0) {
        peer_close(p); /* it was muted until this step */
    }
}

/* ---- opening and closing ----------------------------------------------------------------- */

static int make_doorbell(struct peer_ring *r)
{
    r->doorbell_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (r->doorbell_fd < 0) {
        return -errno;
    }
    int rc = uv_poll_init(r->peer->host->loop, &r->doorbell, r->doorbell_fd);
    if (rc < 0) {
        close(r->doorbell_fd);
        return rc;
    }
    r->doorbell.data = r;
    return 0;
}

static void on_doorbell_closed(uv_handle_t *handle)
{
    free(handle->data);
}

static void begin(struct peer *p, struct peer_ring *r)
{
    r->map = r->memory->map;
    ring_map_daemon_ends(&r->map, &r->in, &r->out);
    peer_input_init(&r->input);
    ring_wait_for(&r->map.control->daemon_wait, RING_WAIT_FUTEX);
    r->announced = peer_output_end(p);
    r->first = r->last = UINT64_MAX;
    p->ring = r;
    p->caller.area = &r->memory->area;
}

/* Rings with their memory and the watched doorbell. */
static int make(struct peer *p, const struct ring_sizes *sizes, struct ipc_error *e)
{
    struct peer_ring *r = calloc(1, sizeof(*r));
    if (!r) {
        ipc_error_set(e, PROTO_E_NO_MEMORY, "no memory for rings");
        return -ENOMEM;
    }
    r->peer = p;
    int rc = peer_area_create(p, sizes, &r->memory, r->fds, e);
    if (rc < 0) {
        free(r);
        return rc;
    }
    rc = make_doorbell(r);
    if (rc < 0) {
        ipc_error_set(e, PROTO_E_IO, "a doorbell cannot be made: %s", strerror(-rc));
        area_unref(&r->memory->area);
        close(r->fds[0]);
        close(r->fds[1]);
        free(r);
        return rc;
    }
    begin(p, r);
    return 0;
}

int peer_ring_open(struct peer *p, const struct ring_sizes *sizes, struct ipc_error *e)
{
    struct quota_amounts held = {.of = {[QUOTA_FDS] = 3}};
    if (p->ring) {
        ipc_error_set(e, PROTO_E_EXISTS,
                      p->ring->ends ? "the connection's rings are not yet closed: their "
                                      "last message is to be taken first"
                                    : "the connection has rings already");
        return -EEXIST;
    }
    count_unread(p);
    if (p->n_unread_rings >= UNREAD_MAX) {
        ipc_error_set(e, PROTO_E_BUSY,
                      "the descriptors of the %u rings before lie in the connection's socket: they "
                      "are to be received first",
                      p->n_unread_rings);
        e->retry_after_ms = REOPEN_MS;
        return -EBUSY;
    }
    int rc = quota_take(p->host->quotas, p->uid, &held, e);
    if (rc < 0) {
        return rc;
    }
    rc = make(p, sizes, e);
    if (rc < 0) {
        quota_give(p->host->quotas, p->uid, &held);
        return rc;
    }
    p->ring->held = held;
    rc = listen_to(p->ring);
    if (rc < 0) {
        peer_ring_destroy(p);
        ipc_error_set(e, PROTO_E_IO, "the doorbell cannot be watched: %s", uv_strerror(rc));
    }
    return rc;
}

int peer_ring_close(struct peer *p, struct ipc_error *e)
{
    if (!p->ring || p->ring->ends) {
        ipc_error_set(e, PROTO_E_NOT_FOUND, "the connection has no rings");
        return -ENOENT;
    }
    p->ring->ends = true;
    area_retire(&p->ring->memory->area);
    return 0;
}

void peer_ring_destroy(struct peer *p)
{
    struct peer_ring *r = p->ring;
    if (!r) {
        return;
    }
    p->ring = NULL;
    p->caller.area = NULL;
    peer_ring_fall_asleep(r);
    /* Before close(): the client holds the same open eventfd, so that epoll would keep it. */
    uv_close((uv_handle_t *)&r->doorbell, on_doorbell_closed);
    close(r->doorbell_fd);
    if (r->fds[0] >= 0) {
        close(r->fds[0]);
        close(r->fds[1]);
    }
    area_retire(&r->memory->area);
    area_unref(&r->memory->area);
    peer_input_finish(p, &r->input);
    quota_give(p->host->quotas, p->uid, &r->held);
}
