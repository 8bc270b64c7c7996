/* client/reconnect.c - opening a lost connection again.
 *
 * The new socket takes the old one's number (dup3), so that gqa_fd() never changes. Nothing of the
 * old connection is sent again: its calls have all ended, and the buffers start empty. */
#include "client/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define RETRY_FIRST_US 10000u
#define RETRY_LAST_US  500000u

static int check(const struct gqa *g, struct gqa_error *ret_error)
{
    if (g->dispatching) {
        return client_fail(ret_error, -EDEADLK, "gqa_reconnect() was used inside a callback");
    }
    if (g->fd < 0) {
        return client_fail(ret_error, -ENOTCONN, "the connection was closed");
    }
    if (g->lost == 0) {
        return client_fail(ret_error, -EISCONN, "the connection is not lost");
    }
    if (!g->has_address) {
        return client_fail(ret_error, -EOPNOTSUPP,
                           "a connection by a descriptor or to a spawned daemon cannot be opened "
                           "again");
    }
    return 0;
}

/* Puts a fresh socket under the connection's number. Nothing is said on it yet. */
static int reopen(struct gqa *g, uint64_t deadline_us, struct gqa_error *ret_error)
{
    int fd;
    int r = client_find_socket(g->socket, deadline_us, &fd, ret_error);
    if (r < 0) {
        return r;
    }
    r = dup3(fd, g->fd, O_CLOEXEC) < 0 ? -errno : 0;
    close(fd);
    if (r < 0) {
        return client_fail(ret_error, r, "dup3: %s", strerror(-r));
    }
    client_reopen(g);
    return 0;
}

/* What a daemon that is about to serve looks like from outside. */
static bool is_worth_waiting(int status)
{
    return status == -ENOENT || status == -ECONNREFUSED || status == -ECONNRESET;
}

static void sleep_us(uint64_t us)
{
    struct timespec t = {.tv_sec = (time_t)(us / 1000000u),
                         .tv_nsec = (long)(us % 1000000u) * 1000};
    nanosleep(&t, NULL); /* a signal makes the next attempt come sooner, nothing else */
}

int gqa_reconnect(struct gqa *g, uint32_t timeout_ms, struct gqa_error *ret_error)
{
    int r = check(g, ret_error);
    if (r < 0) {
        return r;
    }
    uint64_t pause_us = RETRY_FIRST_US;
    uint64_t deadline_us =
        client_now_us() + (uint64_t)(timeout_ms != 0 ? timeout_ms : g->timeout_ms) * 1000u;
    for (;;) {
        r = reopen(g, deadline_us, ret_error);
        if (r == 0) {
            r = client_hello(g, deadline_us, ret_error);
            r = r < 0 ? r : client_ring_open_and_wait(g, client_left_ms(deadline_us), ret_error);
            if (r == 0) {
                return 0;
            }
            client_lose(g, -ENOTCONN, "the daemon refused us");
        }
        if (!is_worth_waiting(r) || client_now_us() + pause_us >= deadline_us) {
            return r;
        }
        sleep_us(pause_us);
        pause_us = 2 * pause_us < RETRY_LAST_US ? 2 * pause_us : RETRY_LAST_US;
    }
}

/* The end of it all: hello was answered, and rings are there where they are wanted. */
static void on_reopened(void *arg, int status, const struct gqa_error *error)
{
    struct gqa *g = arg;
    if (status < 0) {
        client_lose(g, -ENOTCONN, "connection lost: the daemon refused us");
    }
    if (g->reconnect.done != NULL) {
        g->reconnect.done(g->reconnect.arg, status, error);
    }
}

static void on_hello(void *arg, uint32_t id, int status, const struct gqa_value *result,
                     const struct gqa_error *error)
{
    struct gqa *g = arg;
    struct gqa_error e;
    struct gqa_reply *reply;
    if (status == 0) {
        status = client_reply_create(g, g->frame, g->frame_bytes, &reply);
        if (status < 0) {
            client_fail(&e, status, "no memory to keep the answer to hello");
        } else {
            status = client_hello_accept(g, reply, &e);
        }
        status =
            status < 0 ? status : client_ring_open(g, g->reconnect.timeout_ms, on_reopened, g, &e);
    } else {
        e = *error;
    }
    if (status <= 0) { /* else ring.open is on its way */
        on_reopened(g, status, status < 0 ? &e : NULL);
    }
}

int gqa_reconnect_async(struct gqa *g, uint32_t timeout_ms, gqa_reconnect_fn done, void *arg,
                        struct gqa_error *ret_error)
{
    int r = check(g, ret_error);
    if (r < 0) {
        return r;
    }
    struct gqa_params *p = client_hello_params(g);
    if (p == NULL) {
        return client_fail(ret_error, -ENOMEM, "no memory");
    }
    r = reopen(g, CLIENT_AT_ONCE, ret_error);
    if (r == 0) {
        struct gqa_call_options o = {.struct_size = sizeof(o),
                                     .timeout_ms = timeout_ms != 0 ? timeout_ms : g->timeout_ms,
                                     .done = on_hello,
                                     .arg = g};
        g->reconnect.timeout_ms = o.timeout_ms;
        g->reconnect.done = done;
        g->reconnect.arg = arg;
        r = gqa_call_async(g, "gqa.hello", p, &o, NULL);
        if (r < 0) {
            client_lose(g, -ENOTCONN, "hello could not be sent");
            client_fail(ret_error, r, "gqa.hello: cannot be sent: %s", strerror(-r));
        }
    }
    gqa_params_destroy(p);
    return r;
}
