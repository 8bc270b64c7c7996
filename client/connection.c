/* client/connection.c - a connection's life, its buffers, and the loop's four functions. */
#include "client/internal.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

const char *gqa_version(void)
{
    return GQA_VERSION;
}

uint64_t client_now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

int client_create(int fd, uint32_t timeout_ms, const char *client, struct gqa **ret)
{
    struct gqa *g = calloc(1, sizeof(*g));
    if (g == NULL) {
        return -ENOMEM;
    }
    if (client != NULL && (g->client = strdup(client)) == NULL) {
        free(g);
        return -ENOMEM;
    }
    g->n_refs = 1;
    g->fd = fd;
    g->timeout_ms = timeout_ms != 0 ? timeout_ms : CLIENT_TIMEOUT_MS;
    g->child.lifetime_fd = -1;
    ipc_buffer_init(&g->out);
    ipc_scanner_init(&g->scanner, PROTO_FRAME_BYTES_MAX);
    *ret = g;
    return 0;
}

struct gqa *client_ref(struct gqa *g)
{
    g->n_refs++;
    return g;
}

void client_unref(struct gqa *g)
{
    if (--g->n_refs > 0) {
        return;
    }
    ipc_buffer_finish(&g->out);
    gqa_reply_destroy(g->hello);
    free(g->client);
    free(g->socket);
    free(g->in);
    free(g);
}

struct gqa *gqa_close(struct gqa *g)
{
    if (g == NULL || g->fd < 0) {
        return NULL;
    }
    int fd = g->fd;
    g->fd = -1;
    if (g->lost == 0) {
        g->lost = -ENOTCONN;
    }
    client_end_all(g, -ECANCELED, "the connection was closed");
    close(fd);
    client_child_finish(&g->child);
    client_unref(g);
    return NULL;
}

const struct gqa_value *gqa_server_info(const struct gqa *g)
{
    return gqa_reply_value(g->hello);
}

void gqa_set_notify(struct gqa *g, gqa_notify_fn fn, void *arg)
{
    g->notify = fn;
    g->notify_arg = arg;
}

bool gqa_is_connected(const struct gqa *g)
{
    return g->lost == 0;
}

int gqa_fd(const struct gqa *g)
{
    return g->fd;
}

int gqa_events(const struct gqa *g)
{
    if (g->lost < 0) {
        return 0;
    }
    bool waiting = g->out_sent < g->out.bytes && g->write_error == 0;
    return POLLIN | (waiting ? POLLOUT : 0);
}

/* Sends what waits. A failure is kept, not told: the daemon's last words may still be readable. */
static bool flush_out(struct gqa *g)
{
    bool progress = false;
    while (g->out_sent < g->out.bytes && g->write_error == 0) {
        ssize_t n = send(g->fd, g->out.data + g->out_sent, g->out.bytes - g->out_sent,
                         MSG_NOSIGNAL | MSG_DONTWAIT);
        if (n >= 0) {
            g->out_sent += (size_t)n;
            progress = true;
        } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
            break;
        } else if (errno != EINTR) {
            g->write_error = -errno;
        }
    }
    if (g->out_sent == g->out.bytes) {
        g->out.bytes = 0;
        g->out_sent = 0;
    }
    return progress;
}

int client_send(struct gqa *g, const struct ipc_buffer *message)
{
    if (message->error < 0) {
        return message->error;
    }
    if (message->bytes > PROTO_FRAME_BYTES_MAX) {
        return -EMSGSIZE;
    }
    size_t room = CLIENT_OUT_BYTES_MAX;
    room += message->bytes <= CLIENT_SMALL_BYTES ? CLIENT_OUT_BYTES_RESERVE : 0;
    if (g->out.bytes - g->out_sent + message->bytes > room) {
        return -ENOBUFS;
    }
    if (g->out_sent > g->out.bytes / 2) {
        memmove(g->out.data, g->out.data + g->out_sent, g->out.bytes - g->out_sent);
        g->out.bytes -= g->out_sent;
        g->out_sent = 0;
    }
    size_t before = g->out.bytes;
    ipc_pack_raw(&g->out, message->data, message->bytes);
    if (g->out.error < 0) {
        /* The earlier messages are whole and stay. */
        int err = g->out.error;
        g->out.error = 0;
        g->out.bytes = before;
        return err;
    }
    flush_out(g);
    return 0;
}

/* Makes room for the next recv: moves what is unread to the front, then grows. */
static int make_room(struct gqa *g)
{
    if (g->in_first == g->in_end) {
        g->in_first = g->in_scanned = g->in_end = 0;
        if (g->in_capacity > CLIENT_IN_BYTES_KEPT) {
            free(g->in);
            g->in = NULL;
            g->in_capacity = 0;
        }
    }
    if (g->in_capacity - g->in_end >= CLIENT_READ_BYTES) {
        return 0;
    }
    if (g->in_first > 0) {
        memmove(g->in, g->in + g->in_first, g->in_end - g->in_first);
        g->in_scanned -= g->in_first;
        g->in_end -= g->in_first;
        g->in_first = 0;
    }
    if (g->in_capacity - g->in_end >= CLIENT_READ_BYTES) {
        return 0;
    }
    size_t capacity = g->in_capacity > 0 ? 2 * g->in_capacity : 2 * CLIENT_READ_BYTES;
    uint8_t *in = realloc(g->in, capacity);
    if (in == NULL) {
        return -ENOMEM;
    }
    g->in = in;
    g->in_capacity = capacity;
    return 0;
}

/* One recv. Bytes read; 0 at the end of the stream; -EAGAIN; -errno. */
static ssize_t receive(struct gqa *g)
{
    int r = make_room(g);
    if (r < 0) {
        return r;
    }
    ssize_t n;
    do {
        n = recv(g->fd, g->in + g->in_end, g->in_capacity - g->in_end, MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n < 0) {
        return errno == EWOULDBLOCK ? -EAGAIN : -errno;
    }
    g->in_end += (size_t)n;
    return n;
}

/* Dispatches every whole message of the input. A callback may close the connection. */
static int dispatch_input(struct gqa *g)
{
    while (g->lost == 0 && g->in_scanned < g->in_end) {
        size_t used = 0;
        int r =
            ipc_scanner_feed(&g->scanner, g->in + g->in_scanned, g->in_end - g->in_scanned, &used);
        if (r < 0) {
            return -EPROTO;
        }
        g->in_scanned += used;
        if (r == 0) {
            continue;
        }
        const uint8_t *frame = g->in + g->in_first;
        size_t bytes = g->in_scanned - g->in_first;
        g->in_first = g->in_scanned;
        r = client_dispatch(g, frame, bytes);
        if (r < 0) {
            return r;
        }
    }
    return 0;
}

int client_lose(struct gqa *g, int status, const char *why)
{
    if (g->lost == 0) {
        g->lost = status;
        /* The descriptor stays, for its number is the caller's; the daemon need not wait for it. */
        shutdown(g->fd, SHUT_RDWR);
        client_end_all(g, status, why);
    }
    return status;
}

void client_reopen(struct gqa *g)
{
    ipc_buffer_finish(&g->out);
    ipc_buffer_init(&g->out);
    ipc_scanner_init(&g->scanner, PROTO_FRAME_BYTES_MAX);
    g->out_sent = 0;
    g->in_first = g->in_scanned = g->in_end = 0;
    g->n_reads = 0;
    g->write_error = 0;
    g->lost = 0;
}

/* Deadlines are looked at when the input is empty, for what has come is never too late; but also
 * amid a flood of it, once more was read than can have been waiting. */
static unsigned expire(struct gqa *g, bool is_empty)
{
    if (!is_empty && ++g->n_reads < CLIENT_READS_MAX) {
        return 0;
    }
    g->n_reads = 0;
    return client_expire(g);
}

static int process(struct gqa *g)
{
    bool progress = flush_out(g);
    ssize_t n = receive(g);
    if (n > 0) {
        int r = dispatch_input(g);
        if (r == -EPROTO) {
            return client_lose(g, r,
                               "the daemon sent something that is no message of the protocol");
        }
        if (r < 0) {
            return client_lose(g, r, "no memory to read a message");
        }
        expire(g, false);
        return g->lost < 0 ? -ENOTCONN : 1;
    }
    if (n == -ENOMEM) {
        return client_lose(g, -ENOMEM, "no memory to read a message");
    }
    if (n != -EAGAIN) {
        return client_lose(g, -ECONNRESET,
                           g->in_first < g->in_end
                               ? "connection lost: the daemon went away in the middle of a message"
                               : "connection lost: the daemon went away");
    }
    if (g->write_error < 0) {
        return client_lose(g, -ECONNRESET, "connection lost: the daemon does not read any more");
    }
    bool expired = expire(g, true) > 0;
    if (g->lost < 0) {
        return -ENOTCONN; /* a callback closed it, or hello's deadline has passed */
    }
    return expired || progress ? 1 : 0;
}

int gqa_process(struct gqa *g)
{
    if (g->dispatching) {
        return -EDEADLK;
    }
    if (g->lost < 0) {
        return -ENOTCONN;
    }
    client_ref(g);
    g->dispatching = true;
    int r = process(g);
    g->dispatching = false;
    client_unref(g);
    return r;
}

int gqa_wait(struct gqa *g, uint64_t timeout_usec)
{
    if (g->dispatching) {
        return -EDEADLK;
    }
    if (g->lost < 0) {
        return -ENOTCONN;
    }
    uint64_t now = client_now_us(), due = gqa_timeout_usec(g);
    uint64_t left = due <= now ? 0 : due == UINT64_MAX ? UINT64_MAX : due - now;
    bool due_first = left <= timeout_usec && left != UINT64_MAX;
    uint64_t wait = left < timeout_usec ? left : timeout_usec;
    struct timespec t = {.tv_sec = (time_t)(wait / 1000000u),
                         .tv_nsec = (long)(wait % 1000000u) * 1000};
    struct pollfd p = {.fd = g->fd, .events = (short)gqa_events(g)};
    int n = ppoll(&p, 1, wait == UINT64_MAX ? NULL : &t, NULL);
    if (n < 0) {
        return -errno;
    }
    return n > 0 || due_first ? 1 : 0;
}
