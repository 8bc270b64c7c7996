/* client/connection.c - a connection's life, its buffers, and what a loop calls. */
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
    client_input_init(&g->in);
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
    client_input_finish(&g->in);
    client_ring_drop_fds(g);
    client_ring_destroy(g);
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

/* Bytes of the output that wait for the socket. */
static size_t socket_queue(const struct gqa *g)
{
    return g->ring != NULL ? g->out_by_socket : g->out.bytes - g->out_sent;
}

int gqa_events(const struct gqa *g)
{
    if (g->lost < 0) {
        return 0;
    }
    /* A socket is always writable: that is how poll returns at once for what came in a ring. */
    bool due = g->ring != NULL && client_ring_arm(g->ring);
    bool waiting = socket_queue(g) > 0 && g->write_error == 0;
    return POLLIN | (waiting || due ? POLLOUT : 0);
}

static ssize_t send_to_socket(const struct gqa *g, size_t bytes)
{
    ssize_t n;
    do {
        n = send(g->fd, g->out.data + g->out_sent, bytes, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n < 0) {
        return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;
    }
    return n;
}

/* Sends what waits. A failure is kept, not told: the daemon's last words may still be readable. */
static bool flush_out(struct gqa *g)
{
    bool progress = false;
    while (g->out_sent < g->out.bytes && g->write_error == 0) {
        bool by_socket = socket_queue(g) > 0;
        ssize_t n = by_socket ? send_to_socket(g, socket_queue(g))
                              : client_ring_put(g->ring, g->out.data + g->out_sent,
                                                g->out.bytes - g->out_sent, false);
        if (n < 0) {
            g->write_error = (int)n;
        }
        if (n <= 0) {
            break;
        }
        g->out_sent += (size_t)n;
        g->out_by_socket -= g->ring != NULL && by_socket ? (size_t)n : 0;
        progress = true;
    }
    if (g->out_sent == g->out.bytes) {
        g->out.bytes = 0;
        g->out_sent = 0;
    }
    return progress;
}

/* One whole message at the end of the output. -EMSGSIZE, -ENOBUFS, -ENOMEM. */
static int append(struct gqa *g, const struct ipc_buffer *head, const struct ipc_buffer *rest)
{
    size_t bytes = head->bytes + (rest != NULL ? rest->bytes : 0);
    if (head->error < 0) {
        return head->error;
    }
    if (bytes > PROTO_FRAME_BYTES_MAX) {
        return -EMSGSIZE;
    }
    size_t room = CLIENT_OUT_BYTES_MAX;
    room += bytes <= CLIENT_SMALL_BYTES ? CLIENT_OUT_BYTES_RESERVE : 0;
    if (g->out.bytes - g->out_sent + bytes > room) {
        return -ENOBUFS;
    }
    if (g->out_sent > g->out.bytes / 2) {
        memmove(g->out.data, g->out.data + g->out_sent, g->out.bytes - g->out_sent);
        g->out.bytes -= g->out_sent;
        g->out_sent = 0;
    }
    size_t before = g->out.bytes;
    ipc_pack_raw(&g->out, head->data, head->bytes);
    if (rest != NULL) {
        ipc_pack_raw(&g->out, rest->data, rest->bytes);
    }
    if (g->out.error < 0) {
        /* The earlier messages are whole and stay. */
        int err = g->out.error;
        g->out.error = 0;
        g->out.bytes = before;
        return err;
    }
    return 0;
}

static ssize_t send_both(const struct gqa *g, const struct ipc_buffer *head,
                         const struct ipc_buffer *rest)
{
    struct iovec parts[2] = {{.iov_base = head->data, .iov_len = head->bytes},
                             {.iov_base = rest->data, .iov_len = rest->bytes}};
    const struct msghdr msg = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t n;
    do {
        n = sendmsg(g->fd, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n < 0) {
        return errno == EAGAIN || errno == EWOULDBLOCK ? 0 : -errno;
    }
    return n;
}

static ssize_t put_both(struct gqa *g, const struct ipc_buffer *head, const struct ipc_buffer *rest)
{
    ssize_t n = client_ring_put(g->ring, head->data, head->bytes, true);
    if (n < (ssize_t)head->bytes) {
        return n;
    }
    ssize_t m = client_ring_put(g->ring, rest->data, rest->bytes, false);
    return m < 0 ? m : n + m;
}

/* A long message while nothing waits is sent from where it lies; only what does not go at once is
 * copied. A failure is kept, as in flush_out(). -ENOMEM, before anything is sent. */
static int send_directly(struct gqa *g, const struct ipc_buffer *head,
                         const struct ipc_buffer *rest)
{
    int r = ipc_buffer_reserve(&g->out, head->bytes + rest->bytes);
    if (r < 0) {
        return r;
    }
    ssize_t n = g->ring != NULL ? put_both(g, head, rest) : send_both(g, head, rest);
    if (n < 0) {
        g->write_error = (int)n;
        n = 0;
    }
    size_t gone = (size_t)n, of_head = gone < head->bytes ? gone : head->bytes;
    ipc_pack_raw(&g->out, head->data + of_head, head->bytes - of_head);
    ipc_pack_raw(&g->out, rest->data + (gone - of_head), rest->bytes - (gone - of_head));
    return 0;
}

int client_send(struct gqa *g, const struct ipc_buffer *head, const struct ipc_buffer *rest)
{
    size_t bytes = head->bytes + (rest != NULL ? rest->bytes : 0);
    if (rest != NULL && g->out.bytes == 0 && g->write_error == 0 && head->error == 0 &&
        bytes >= CLIENT_DIRECT_BYTES_MIN && bytes <= PROTO_FRAME_BYTES_MAX) {
        return send_directly(g, head, rest);
    }
    int r = append(g, head, rest);
    if (r == 0) {
        flush_out(g);
    }
    return r;
}

/* The socket's bytes come first in the output: the ring's make room. */
int client_send_by_socket(struct gqa *g, const struct ipc_buffer *message)
{
    size_t n = message->bytes;
    int r = append(g, message, NULL);
    if (r < 0) {
        return r;
    }
    if (g->ring != NULL) {
        size_t place = g->out_sent + g->out_by_socket;
        memmove(g->out.data + place + n, g->out.data + place, g->out.bytes - n - place);
        memcpy(g->out.data + place, message->data, n);
        g->out_by_socket += n;
    }
    flush_out(g);
    return 0;
}

/* Descriptors come with the answer to ring.open only; what else may come is closed. */
static void take_fds(struct gqa *g, struct msghdr *msg)
{
    for (struct cmsghdr *c = CMSG_FIRSTHDR(msg); c != NULL; c = CMSG_NXTHDR(msg, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) {
            continue;
        }
        size_t n = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < n; i++) {
            int fd;
            memcpy(&fd, CMSG_DATA(c) + i * sizeof(fd), sizeof(fd));
            if (g->n_ring_fds < CLIENT_RING_FDS) {
                g->ring_fds[g->n_ring_fds++] = fd;
            } else {
                close(fd);
            }
        }
    }
}

/* One recvmsg. Bytes read; 0 at the end of the stream; -EAGAIN; -errno. */
static ssize_t receive(struct gqa *g)
{
    int r = client_input_room(&g->in);
    if (r < 0) {
        return r;
    }
    union {
        char space[CMSG_SPACE(CLIENT_RING_FDS * sizeof(int))];
        struct cmsghdr align;
    } control;
    struct iovec iov = {.iov_base = g->in.data + g->in.end, .iov_len = g->in.capacity - g->in.end};
    struct msghdr msg = {.msg_iov = &iov, .msg_iovlen = 1};
    if (g->awaits_ring) {
        msg.msg_control = control.space;
        msg.msg_controllen = sizeof(control.space);
    }
    ssize_t n;
    do {
        n = recvmsg(g->fd, &msg, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    } while (n < 0 && errno == EINTR);
    if (n < 0) {
        return errno == EWOULDBLOCK ? -EAGAIN : -errno;
    }
    if (g->awaits_ring) {
        take_fds(g, &msg);
    }
    g->in.end += (size_t)n;
    return n;
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
    client_input_reset(&g->in);
    client_ring_drop_fds(g);
    client_ring_destroy(g);
    g->awaits_ring = false;
    g->out_sent = g->out_by_socket = 0;
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

/* What has come was dispatched, with that result. */
static int after_input(struct gqa *g, int r)
{
    if (r == -EPROTO) {
        return client_lose(g, r, "the daemon sent something that is no message of the protocol");
    }
    if (r < 0) {
        return client_lose(g, r, "no memory to read a message");
    }
    expire(g, false);
    return g->lost < 0 ? -ENOTCONN : 1;
}

/* The socket has nothing more to say: why. */
static int after_end(struct gqa *g)
{
    const struct client_input *in = g->ring != NULL ? &g->ring->input : &g->in;
    return client_lose(g, -ECONNRESET,
                       in->first < in->end
                           ? "connection lost: the daemon went away in the middle of a message"
                           : "connection lost: the daemon went away");
}

/* -EPROTO from the rings may only mean that their memory went with the connection. */
static int process_ring(struct gqa *g)
{
    client_ring_disarm(g->ring);
    int r = client_ring_take(g);
    if (r == -EPROTO && g->lost == 0) {
        ssize_t n;
        do {
            n = receive(g);
        } while (n > 0);
        if (n != -EAGAIN) {
            return after_end(g);
        }
    }
    return r == 0 ? 0 : after_input(g, r < 0 ? r : 0);
}

static int process(struct gqa *g)
{
    bool progress = flush_out(g);
    int r = g->ring != NULL ? process_ring(g) : 0;
    if (r != 0) {
        return r;
    }
    ssize_t n = receive(g);
    if (n > 0) {
        return after_input(g, client_input_dispatch(g, &g->in));
    }
    if (n == -ENOMEM) {
        return client_lose(g, -ENOMEM, "no memory to read a message");
    }
    if (n != -EAGAIN) {
        return after_end(g);
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
