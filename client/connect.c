/* client/connect.c - finding the daemon's socket, connecting, and hello. */
#include "client/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#define SYSTEM_SOCKET "/run/gqad/gqad.sock"

static int set_nonblocking(int fd)
{
    int flags = fcntl(fd, F_GETFL);
    return flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -errno : 0;
}

/* A Unix socket's connect() blocks only while the listener's backlog is full, and SO_SNDTIMEO
 * bounds that; it cannot be polled for. */
static int connect_until(int fd, const struct sockaddr_un *address, uint64_t deadline_us)
{
    if (deadline_us == CLIENT_AT_ONCE) {
        int r = set_nonblocking(fd);
        if (r < 0) {
            return r;
        }
        return connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 ? 0 : -errno;
    }
    for (;;) {
        uint64_t now = client_now_us();
        if (now >= deadline_us) {
            return -ETIMEDOUT;
        }
        uint64_t left = deadline_us - now;
        struct timeval t = {.tv_sec = (time_t)(left / 1000000u),
                            .tv_usec = (suseconds_t)(left % 1000000u)};
        if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof(t)) < 0) {
            return -errno;
        }
        if (connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0) {
            return set_nonblocking(fd);
        }
        if (errno == EAGAIN || errno == EWOULDBLOCK) {
            return -ETIMEDOUT;
        }
        if (errno != EINTR) {
            return -errno;
        }
    }
}

static int open_socket(const char *path, uint64_t deadline_us, int *ret_fd,
                       struct gqa_error *ret_error)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path)) {
        return client_fail(ret_error, -ENAMETOOLONG, "%s: a socket's path has at most %zu bytes",
                           path, sizeof(address.sun_path) - 1);
    }
    memcpy(address.sun_path, path, strlen(path));
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        int err = -errno;
        return client_fail(ret_error, err, "socket: %s", strerror(-err));
    }
    int r = connect_until(fd, &address, deadline_us);
    if (r < 0) {
        close(fd);
        return client_fail(ret_error, r, "%s: %s", path, strerror(-r));
    }
    *ret_fd = fd;
    return 0;
}

/* The first socket that answers. One that is absent or dead gives way to the next; one that
 * refuses us (EACCES) does not: another daemon's answer would only hide that. */
int client_find_socket(const char *given, uint64_t deadline_us, int *ret_fd,
                       struct gqa_error *ret_error)
{
    const char *path = given != NULL ? given : getenv("GQA_SOCKET");
    if (path != NULL && path[0] != '\0') {
        return open_socket(path, deadline_us, ret_fd, ret_error);
    }
    const char *runtime = getenv("XDG_RUNTIME_DIR");
    char user[PATH_MAX];
    if (runtime == NULL || runtime[0] != '/' ||
        snprintf(user, sizeof(user), "%s/gqad.sock", runtime) >= (int)sizeof(user)) {
        return open_socket(SYSTEM_SOCKET, deadline_us, ret_fd, ret_error);
    }
    int r = open_socket(user, deadline_us, ret_fd, ret_error);
    if (r != -ENOENT && r != -ECONNREFUSED && r != -ENAMETOOLONG) {
        return r;
    }
    r = open_socket(SYSTEM_SOCKET, deadline_us, ret_fd, NULL);
    return r < 0 ? client_fail(ret_error, r, "no daemon answers at %s (nor at %s): %s",
                               SYSTEM_SOCKET, user, strerror(-r))
                 : 0;
}

struct gqa_params *client_hello_params(const struct gqa *g)
{
    struct gqa_params *p;
    if (gqa_params_create(&p) < 0) {
        return NULL;
    }
    gqa_params_str(p, "client", g->client != NULL ? g->client : "libgqa/" GQA_VERSION);
    gqa_params_u64(p, "version_min", GQA_PROTOCOL_VERSION_MIN);
    gqa_params_u64(p, "version_max", GQA_PROTOCOL_VERSION);
    return p;
}

uint32_t client_left_ms(uint64_t deadline_us)
{
    uint64_t now = client_now_us();
    uint64_t left = now < deadline_us ? (deadline_us - now + 999u) / 1000u : 1;
    return left < UINT32_MAX ? (uint32_t)left : UINT32_MAX;
}

int client_hello_accept(struct gqa *g, struct gqa_reply *reply, struct gqa_error *ret_error)
{
    uint64_t version;
    int r = gqa_value_u64(gqa_value_get(gqa_reply_value(reply), "protocol"), &version);
    if (r < 0) {
        r = client_fail(ret_error, -EPROTO, "gqa.hello: the answer tells no protocol version");
    } else if (version < GQA_PROTOCOL_VERSION_MIN || version > GQA_PROTOCOL_VERSION) {
        r = client_fail(ret_error, -EPROTONOSUPPORT,
                        "gqa.hello: the daemon speaks protocol version %llu, this library %u to %u",
                        (unsigned long long)version, GQA_PROTOCOL_VERSION_MIN,
                        GQA_PROTOCOL_VERSION);
    }
    if (r < 0) {
        gqa_reply_destroy(reply);
        return r;
    }
    gqa_reply_destroy(g->hello);
    g->hello = reply;
    return 0;
}

int client_hello(struct gqa *g, uint64_t deadline_us, struct gqa_error *ret_error)
{
    struct gqa_call_options o = {.struct_size = sizeof(o),
                                 .timeout_ms = client_left_ms(deadline_us)};
    struct gqa_reply *reply;
    struct gqa_params *p = client_hello_params(g);
    if (p == NULL) {
        return client_fail(ret_error, -ENOMEM, "no memory");
    }
    int r = gqa_call(g, "gqa.hello", p, &o, &reply, ret_error);
    gqa_params_destroy(p);
    return r < 0 ? r : client_hello_accept(g, reply, ret_error);
}

static int connect_socket(const struct gqa_connect_options *o, uint64_t deadline_us, int *ret_fd,
                          struct gqa_error *ret_error)
{
    if ((o->flags & GQA_CONNECT_FD) == 0) {
        return client_find_socket(o->socket, deadline_us, ret_fd, ret_error);
    }
    int r = set_nonblocking(o->fd);
    if (r < 0) {
        return client_fail(ret_error, r, "file descriptor %d: %s", o->fd, strerror(-r));
    }
    *ret_fd = o->fd;
    return 0;
}

/* What gqa_reconnect() needs to find the daemon again. */
static int remember_address(struct gqa *g, const struct gqa_connect_options *o)
{
    g->has_address = (o->flags & GQA_CONNECT_FD) == 0;
    if (g->has_address && o->socket != NULL && (g->socket = strdup(o->socket)) == NULL) {
        return -ENOMEM;
    }
    return 0;
}

/* What the program leaves open its user may choose. */
static int choose_transport(struct gqa_connect_options *o, struct gqa_error *ret_error)
{
    const char *wanted = getenv("GQA_TRANSPORT");
    if ((o->flags & (GQA_F_SHM | GQA_F_SHM_AUTO)) != 0 || wanted == NULL || wanted[0] == '\0' ||
        strcmp(wanted, "socket") == 0) {
        return 0;
    }
    if (strcmp(wanted, "ring") != 0 && strcmp(wanted, "auto") != 0) {
        return client_fail(ret_error, -EINVAL,
                           "GQA_TRANSPORT is '%.40s'; it may be socket, ring or auto", wanted);
    }
    o->flags |= wanted[0] == 'r' ? GQA_F_SHM : GQA_F_SHM_AUTO;
    return 0;
}

static int choose_spin(struct gqa_connect_options *o, struct gqa_error *ret_error)
{
    const char *wanted = getenv("GQA_SPIN_US");
    if (o->spin_us > 0 || wanted == NULL || wanted[0] == '\0') {
        return 0;
    }
    char *end;
    unsigned long us = strtoul(wanted, &end, 10);
    if (*end != '\0' || wanted[0] < '0' || wanted[0] > '9' || us >= GQA_SPIN_NEVER) {
        return client_fail(ret_error, -EINVAL,
                           "GQA_SPIN_US is '%.40s'; it may be a number of microseconds", wanted);
    }
    o->spin_us = us > 0 ? (uint32_t)us : GQA_SPIN_NEVER;
    return 0;
}

int gqa_connect(const struct gqa_connect_options *options, struct gqa **ret,
                struct gqa_error *ret_error)
{
    struct gqa_connect_options o = {0};
    if (options != NULL) {
        memcpy(&o, options, options->struct_size < sizeof(o) ? options->struct_size : sizeof(o));
    }
    uint32_t timeout_ms = o.timeout_ms != 0 ? o.timeout_ms : CLIENT_TIMEOUT_MS;
    uint64_t deadline_us = client_now_us() + (uint64_t)timeout_ms * 1000u;
    int fd;
    int r = choose_transport(&o, ret_error);
    r = r < 0 ? r : choose_spin(&o, ret_error);
    r = r < 0 ? r : connect_socket(&o, deadline_us, &fd, ret_error);
    if (r < 0) {
        return r;
    }
    struct gqa *g;
    r = client_create(fd, timeout_ms, o.client, &g);
    if (r < 0) {
        client_fail(ret_error, r, "no memory");
        goto err_fd;
    }
    r = remember_address(g, &o);
    if (r < 0) {
        client_fail(ret_error, r, "no memory");
        goto err_unref;
    }
    g->flags = o.flags;
    g->spin_us = o.spin_us;
    g->ring_in_bytes = o.ring_in_bytes;
    g->ring_out_bytes = o.ring_out_bytes;
    r = client_hello(g, deadline_us, ret_error);
    r = r < 0 ? r : client_ring_open_and_wait(g, client_left_ms(deadline_us), ret_error);
    if (r < 0) {
        goto err_unref;
    }
    *ret = g;
    return 0;

err_unref:
    client_unref(g); /* nothing is pending any more, and the fd is closed or given back here */
err_fd:
    if ((o.flags & GQA_CONNECT_FD) == 0) {
        close(fd);
    }
    return r;
}
