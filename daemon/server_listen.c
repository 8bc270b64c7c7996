/* Listening sockets, and who may come in. */
#include "daemon/server_internal.h"

#include "daemon/log.h"
#include "daemon/notify.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <libgen.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define ACCEPTS_PER_WAKE  4      /* those that are left wake the loop again */
#define REFUSALS_PER_WAKE 16     /* the same, once there was a connection of a uid that is slowed */
#define NOBODY_UID        65534u /* the kernel's name for "a uid that your namespace cannot name" */
#define PEER_GROUPS_MAX   1024

#define REFUSED_RETRY_AFTER_MS 1000u

/* A uid that is slowed may have so many connections. Refusing more lets the listener rest: a storm
 * of them takes a percent of the loop's time, and lets others wait for 10 ms with their connect(),
 * or, with the backlog full of it, for most of a second. */
#define SLOWED_CONNECTIONS_MAX 64u
#define LISTENER_REST_NS       10000000u

/* ---- identity ---------------------------------------------------------------------------- */

/* The kernel tells the groups of the process that connected; no name service is asked. */
static bool is_in_group(int fd, gid_t own, gid_t wanted)
{
    gid_t groups[PEER_GROUPS_MAX];
    socklen_t bytes = sizeof(groups);
    if (own == wanted) {
        return true;
    }
    if (getsockopt(fd, SOL_SOCKET, SO_PEERGROUPS, groups, &bytes) < 0) {
        return false;
    }
    for (size_t i = 0; i < bytes / sizeof(groups[0]); i++) {
        if (groups[i] == wanted) {
            return true;
        }
    }
    return false;
}

/* ---- refusing ---------------------------------------------------------------------------- */

/* Tells why, if the socket takes it at once, and closes. */
static void refuse(int fd, uid_t uid, const struct ipc_error *e)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    pack_error_notification(&b, e);
    if (!b.error) {
        ssize_t n = send(fd, b.data, b.bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
        (void)n; /* a courtesy */
    }
    ipc_buffer_finish(&b);
    close(fd);
    log_debug("uid %u: connection refused: %s", uid, e->message);
}

static bool is_welcome(struct server *s, const struct ucred *who, struct ipc_error *e)
{
    const struct config *c = s->config;
    if (who->uid == NOBODY_UID || who->uid == (uid_t)-1) {
        ipc_error_set(e, PROTO_E_ACCESS_DENIED,
                      "uid %u is what the kernel shows for users of another namespace", who->uid);
        return false;
    }
    if (c->user_mode && who->uid != geteuid()) {
        ipc_error_set(e, PROTO_E_ACCESS_DENIED, "this daemon serves uid %u only, not uid %u",
                      geteuid(), who->uid);
        return false;
    }
    if (s->state >= SERVER_DRAINING) {
        ipc_error_set(e, PROTO_E_DRAINING, "the daemon is about to end");
        return false;
    }
    if (s->peers.n_peers >= c->max_connections) {
        ipc_error_set(e, PROTO_E_BUSY, "%u connections are open, which is the limit",
                      c->max_connections);
        e->retry_after_ms = REFUSED_RETRY_AFTER_MS;
        return false;
    }
    return true;
}

/* Strikes it, too: who does not stop is not forgiven. */
static bool is_slowed_down(struct server *s, uid_t uid, struct ipc_error *e)
{
    struct penalty *p = penalty_find(&s->penalties, uid);
    const struct quota_user *held = p && p->slowed ? quota_user(&s->quotas, uid) : NULL;
    uint64_t now = held ? uv_hrtime() : 0;
    if (!held || held->used.of[QUOTA_CONNECTIONS] < SLOWED_CONNECTIONS_MAX ||
        !penalty_is_paced(&s->penalties, p, now)) {
        return false;
    }
    penalty_strike(&s->penalties, p, PENALTY_CONNECTION, now);
    p->n_refused++;
    ipc_error_set(e, PROTO_E_BUSY,
                  "uid %u has misbehaved: while it is slowed it may have %u connections "
                  "(max_strikes_per_user)",
                  uid, SLOWED_CONNECTIONS_MAX);
    e->retry_after_ms = REFUSED_RETRY_AFTER_MS;
    return true;
}

/* Takes fd over. 0: it is served; -EBUSY: refused; -EAGAIN: so is whoever comes next; or what
 * peer_create() says. */
static int admit(struct server *s, int fd)
{
    struct ucred who;
    socklen_t bytes = sizeof(who);
    struct ipc_error e;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &who, &bytes) < 0) {
        close(fd);
        return -EBUSY;
    }
    bool slowed_down = is_slowed_down(s, who.uid, &e);
    if (slowed_down || !is_welcome(s, &who, &e)) {
        refuse(fd, who.uid, &e);
        return slowed_down ? -EAGAIN : -EBUSY;
    }
    struct quota_amounts held = {.of = {[QUOTA_CONNECTIONS] = 1, [QUOTA_FDS] = 1}};
    if (quota_take(&s->quotas, who.uid, &held, &e) < 0) {
        refuse(fd, who.uid, &e);
        return -EBUSY;
    }
    bool admin = who.uid == 0 || who.uid == geteuid() ||
                 (s->has_admin_gid && is_in_group(fd, who.gid, s->admin_gid));
    int rc = peer_create(&s->peers, fd, who.uid, admin, &held);
    if (rc < 0) {
        log_error("uid %u: the connection cannot be served: %s", who.uid, strerror(-rc));
        quota_give(&s->quotas, who.uid, &held);
    }
    return rc;
}

/* ---- accepting --------------------------------------------------------------------------- */

/* Out of descriptors: the connection would stay in the backlog and wake the loop for ever. One is
 * kept in reserve to take it and hang up. */
static void refuse_without_fd(struct server *s, int listen_fd)
{
    static const struct ipc_error e = {.code = PROTO_E_BUSY,
                                       .retry_after_ms = REFUSED_RETRY_AFTER_MS,
                                       .message = "the daemon has no descriptors left"};
    if (s->reserve_fd >= 0) {
        close(s->reserve_fd);
        int fd = accept4(listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) {
            refuse(fd, (uid_t)-1, &e);
        }
    }
    s->reserve_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    log_paced(&s->fd_lines, uv_hrtime(), LOG_LEVEL_WARNING,
              "no descriptors left: a connection was refused");
}

static void on_connection(uv_poll_t *poll, int status, int events);

void listen_rested(struct peer_alarm *a)
{
    struct server *s = (struct server *)((char *)a - offsetof(struct server, rested));
    for (uint32_t i = 0; i < s->n_listeners; i++) {
        struct listener *l = &s->listeners[i];
        if (l->rests && l->fd >= 0) {
            uv_poll_start(&l->poll, UV_READABLE, on_connection);
        }
        l->rests = false;
    }
}

static void on_connection(uv_poll_t *poll, int status, int events)
{
    struct listener *l = poll->data;
    bool go_on = true;
    for (int i = 0; i < (go_on ? ACCEPTS_PER_WAKE : REFUSALS_PER_WAKE); i++) {
        int fd = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
        if (fd >= 0) {
            go_on &= admit(l->server, fd) != -EAGAIN;
        } else if (errno == EMFILE || errno == ENFILE) {
            refuse_without_fd(l->server, l->fd);
        } else if (errno != EINTR && errno != ECONNABORTED) {
            break; /* EAGAIN: all are in; anything else will be seen again */
        }
    }
    if (!go_on) {
        uv_poll_stop(poll);
        l->rests = true;
        peer_alarm_set(&l->server->rested, uv_hrtime() + LISTENER_REST_NS);
    }
}

/* Takes over fd. */
static int watch_listener(struct server *s, int fd)
{
    if (s->n_listeners == SERVER_LISTENERS_MAX) {
        close(fd);
        return -E2BIG;
    }
    struct listener *l = &s->listeners[s->n_listeners];
    *l = (struct listener){.server = s, .fd = fd};
    int flags = fcntl(fd, F_GETFL);
    int rc = flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -errno : 0;
    rc = rc < 0 ? rc : uv_poll_init(&s->loop, &l->poll, fd);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    l->poll.data = l;
    s->n_listeners++;
    return uv_poll_start(&l->poll, UV_READABLE, on_connection);
}

/* ---- our own socket ---------------------------------------------------------------------- */

/* 0: the path is free now; -EADDRINUSE: somebody answers there. */
static int clear_stale(const struct sockaddr_un *address)
{
    struct stat st;
    if (lstat(address->sun_path, &st) < 0) {
        return errno == ENOENT ? 0 : -errno;
    }
    if (!S_ISSOCK(st.st_mode)) {
        return -EEXIST;
    }
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return -errno;
    }
    /* EAGAIN: a full backlog is alive as well. */
    int rc = connect(fd, (const struct sockaddr *)address, sizeof(*address)) == 0 ? 0 : -errno;
    close(fd);
    if (rc != -ECONNREFUSED) {
        return rc == 0 || rc == -EAGAIN ? -EADDRINUSE : rc;
    }
    return unlink(address->sun_path) < 0 ? -errno : 0;
}

/* Whose socket it is: the user's alone, or the group's as well. */
static int set_mode(const struct config *c, const char *path)
{
    const struct group *g = !c->user_mode && c->group[0] ? getgrnam(c->group) : NULL;
    if (!c->user_mode && !g) {
        log_warning("group '%s' does not exist: only root and the daemon's user may connect",
                    c->group);
    }
    if (g && chown(path, (uid_t)-1, g->gr_gid) < 0) {
        return -errno;
    }
    return chmod(path, g ? 0660 : 0600) < 0 ? -errno : 0;
}

/* umask is 0077 since main(): the socket is private until its mode is set. */
static int bind_and_listen(struct server *s, const struct sockaddr_un *address, int *ret)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return -errno;
    }
    int rc = bind(fd, (const struct sockaddr *)address, sizeof(*address)) < 0 ? -errno : 0;
    if (rc == 0) {
        s->owns_socket = lstat(address->sun_path, &s->socket_stat) == 0;
        rc = set_mode(s->config, address->sun_path);
    }
    if (rc == 0 && listen(fd, SERVER_BACKLOG) < 0) {
        rc = -errno;
    }
    if (rc < 0) {
        close(fd);
        return rc;
    }
    *ret = fd;
    return 0;
}

/* Two daemons that start at one moment must not remove each other's socket: the folder is locked
 * from the look at the old one until the new one listens. */
static int open_own(struct server *s)
{
    const char *path = s->config->socket;
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof(address.sun_path)) {
        log_error("socket %s: the path has %zu bytes, a socket's may have %zu", path, strlen(path),
                  sizeof(address.sun_path) - 1);
        return -ENAMETOOLONG;
    }
    strcpy(address.sun_path, path);

    char copy[sizeof(address.sun_path)];
    strcpy(copy, path);
    const char *folder = dirname(copy);
    int lock = open(folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (lock < 0 || flock(lock, LOCK_EX) < 0) {
        int rc = -errno;
        log_error("socket %s: folder %s: %s", path, folder, strerror(-rc));
        if (lock >= 0) {
            close(lock);
        }
        return rc;
    }
    int fd = -1;
    int rc = clear_stale(&address);
    rc = rc < 0 ? rc : bind_and_listen(s, &address, &fd);
    close(lock);
    if (rc < 0) {
        log_error("socket %s: %s", path,
                  rc == -EADDRINUSE ? "another daemon serves there" : strerror(-rc));
        return rc;
    }
    log_info("listening on %s", path);
    return watch_listener(s, fd);
}

/* ---- opening and closing ----------------------------------------------------------------- */

int listen_adopt(struct server *s, int fd)
{
    struct stat st;
    int type;
    socklen_t bytes = sizeof(type);
    int flags = fcntl(fd, F_GETFL);
    if (fstat(fd, &st) < 0 || !S_ISSOCK(st.st_mode) ||
        getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &bytes) < 0 || type != SOCK_STREAM) {
        log_error("--serve-fd %d is not a connected stream socket", fd);
        return -ENOTSOCK;
    }
    if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ||
        fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
        return -errno;
    }
    int rc = admit(s, fd);
    if (rc < 0) {
        log_error("--serve-fd %d: its connection was refused", fd);
    }
    return rc < 0 ? rc : 0;
}

static int find_admin_group(struct server *s)
{
    const char *name = s->config->admin_group;
    if (!name[0]) {
        return 0;
    }
    const struct group *g = getgrnam(name);
    if (!g) {
        log_error("admin_group: there is no group '%s'", name);
        return -EINVAL;
    }
    s->admin_gid = g->gr_gid;
    s->has_admin_gid = true;
    return 0;
}

int listen_open(struct server *s, const struct server_options *options)
{
    int first;
    int count;
    s->reserve_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    int rc = find_admin_group(s);
    if (rc < 0) {
        return rc;
    }
    rc = notify_listen_fds(&first, &count);
    if (rc < 0) {
        log_error("the sockets that were passed are not listening Unix stream sockets");
        return rc;
    }
    for (int i = 0; i < count; i++) {
        rc = watch_listener(s, first + i);
        if (rc < 0) {
            log_error("a passed socket cannot be watched: %s", strerror(-rc));
            return rc;
        }
    }
    if (count > 0) {
        log_info("listening on %d passed socket%s", count, count > 1 ? "s" : "");
        return 0;
    }
    return options->listen ? open_own(s) : 0;
}

void listen_close(struct server *s)
{
    struct stat st;
    for (uint32_t i = 0; i < s->n_listeners; i++) {
        struct listener *l = &s->listeners[i];
        if (l->fd >= 0) {
            uv_close((uv_handle_t *)&l->poll, NULL);
            close(l->fd);
            l->fd = -1;
        }
    }
    if (s->owns_socket && lstat(s->config->socket, &st) == 0 &&
        st.st_ino == s->socket_stat.st_ino && st.st_dev == s->socket_stat.st_dev) {
        unlink(s->config->socket);
    }
    s->owns_socket = false;
}
