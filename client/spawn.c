/* client/spawn.c - a private daemon for one process.
 *
 * The daemon gets one end of a socket pair to serve (fd 3) and the reading end of a pipe whose end
 * is its own (fd 4): this process holds the only writing end, so the daemon ends when this process
 * does, by whatever death. No path, no signal and no wait for a line on its standard output is
 * needed: its answer to hello says that it serves, the end of the socket that it has died. */
#include "client/internal.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/pidfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

#define CHILD_SERVE_FD    3
#define CHILD_LIFETIME_FD 4
#define FIRST_SAFE_FD     10 /* ours are moved here, so that dup2 in the child hits none of them */
#define ARGS_MAX          64u

/* Descriptors of a start; -1 once they have found their owner. */
struct ends {
    int ours, theirs;      /* the socket pair */
    int lifetime, watched; /* the pipe: write end, read end */
};

static void close_end(int *fd)
{
    if (*fd >= 0) {
        close(*fd);
        *fd = -1;
    }
}

static void ends_finish(struct ends *e)
{
    close_end(&e->ours);
    close_end(&e->theirs);
    close_end(&e->lifetime);
    close_end(&e->watched);
}

static int move_up(int *fd)
{
    int moved = fcntl(*fd, F_DUPFD_CLOEXEC, FIRST_SAFE_FD);
    if (moved < 0) {
        return -errno;
    }
    close(*fd);
    *fd = moved;
    return 0;
}

static int ends_init(struct ends *e)
{
    int pair[2], tube[2];
    *e = (struct ends){-1, -1, -1, -1};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
        return -errno;
    }
    e->ours = pair[0];
    e->theirs = pair[1];
    int r = pipe2(tube, O_CLOEXEC) < 0 ? -errno : 0;
    if (r == 0) {
        e->watched = tube[0];
        e->lifetime = tube[1];
        r = move_up(&e->theirs);
    }
    r = r < 0 ? r : move_up(&e->watched);
    if (r < 0) {
        ends_finish(e);
    }
    return r;
}

/* gqad's path: GQAD_PATH, or beside the running program, or for execvp() to find in PATH. */
static int find_program(const char *given, char path[PATH_MAX])
{
    const char *chosen = given != NULL ? given : getenv("GQAD_PATH");
    if (chosen != NULL && chosen[0] != '\0') {
        return snprintf(path, PATH_MAX, "%s", chosen) < PATH_MAX ? 0 : -ENAMETOOLONG;
    }
    static const char *const beside[] = {"gqad", "../daemon/gqad"};
    char self[PATH_MAX];
    ssize_t n = readlink("/proc/self/exe", self, sizeof(self) - 1);
    if (n > 0) {
        self[n] = '\0';
        *strrchr(self, '/') = '\0';
        for (size_t i = 0; i < sizeof(beside) / sizeof(beside[0]); i++) {
            if (snprintf(path, PATH_MAX, "%s/%s", self, beside[i]) < PATH_MAX &&
                access(path, X_OK) == 0) {
                return 0;
            }
        }
    }
    strcpy(path, "gqad");
    return 0;
}

/* Strings are the options' own or literals; posix_spawn copies them. */
static int make_args(const struct gqa_spawn_options *o, const char *program,
                     const char *args[ARGS_MAX + 1])
{
    size_t n = 0;
    args[n++] = program;
    args[n++] = "--user";
    args[n++] = "--serve-fd";
    args[n++] = "3";
    args[n++] = "--lifetime-fd";
    args[n++] = "4";
    if (o->cache_dir != NULL) {
        args[n++] = "--cache-dir";
        args[n++] = o->cache_dir;
    }
    if (o->models_dir != NULL) {
        args[n++] = "--models-dir";
        args[n++] = o->models_dir;
    }
    for (const char *const *more = o->args; more != NULL && *more != NULL; more++) {
        if (n == ARGS_MAX) {
            return -E2BIG;
        }
        args[n++] = *more;
    }
    args[n] = NULL;
    return 0;
}

/* stdin and stdout are not the daemon's business: the caller's output may be a document. */
static int set_files(posix_spawn_file_actions_t *files, const struct ends *e, bool quiet)
{
    int r = posix_spawn_file_actions_addopen(files, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    if (r == 0) {
        r = posix_spawn_file_actions_addopen(files, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    }
    if (r == 0 && quiet) {
        r = posix_spawn_file_actions_addopen(files, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    }
    if (r == 0) {
        r = posix_spawn_file_actions_adddup2(files, e->theirs, CHILD_SERVE_FD);
    }
    if (r == 0) {
        r = posix_spawn_file_actions_adddup2(files, e->watched, CHILD_LIFETIME_FD);
    }
    return -r;
}

/* A clean start whatever the caller did to its signals, and a process group of its own. */
static int set_attributes(posix_spawnattr_t *attributes)
{
    sigset_t all, none;
    sigfillset(&all);
    sigemptyset(&none);
    int r = posix_spawnattr_setsigdefault(attributes, &all);
    if (r == 0) {
        r = posix_spawnattr_setsigmask(attributes, &none);
    }
    if (r == 0) {
        r = posix_spawnattr_setpgroup(attributes, 0);
    }
    if (r == 0) {
        r = posix_spawnattr_setflags(attributes, POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK |
                                                     POSIX_SPAWN_SETPGROUP);
    }
    return -r;
}

static int start(const char *program, const char *const *args, const struct ends *e, bool quiet,
                 pid_t *ret_pid)
{
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attributes;
    int r = -posix_spawn_file_actions_init(&files);
    if (r < 0) {
        return r;
    }
    r = -posix_spawnattr_init(&attributes);
    if (r < 0) {
        goto err_files;
    }
    r = set_files(&files, e, quiet);
    if (r == 0) {
        r = set_attributes(&attributes);
    }
    if (r == 0) {
        /* The arguments are const by contract; the prototype is older than const. */
        r = -posix_spawnp(ret_pid, program, &files, &attributes, (char *const *)args, environ);
    }
    posix_spawnattr_destroy(&attributes);
err_files:
    posix_spawn_file_actions_destroy(&files);
    return r;
}

/* Waits for the child without anybody's SIGCHLD. True when it is gone (or was never ours). */
static bool wait_child(pid_t pid, int pidfd, uint32_t timeout_ms, int *ret_status)
{
    uint64_t deadline_us = client_now_us() + (uint64_t)timeout_ms * 1000u;
    for (;;) {
        pid_t r = waitpid(pid, ret_status, WNOHANG);
        if (r == pid || (r < 0 && errno != EINTR)) {
            return true;
        }
        uint64_t now = client_now_us();
        if (now >= deadline_us) {
            return false;
        }
        /* Without a pidfd (old kernels, strict sandboxes) look every 5 ms. */
        uint64_t left_ms = (deadline_us - now + 999u) / 1000u;
        struct pollfd p = {.fd = pidfd, .events = POLLIN};
        poll(&p, pidfd >= 0 ? 1 : 0, pidfd >= 0 || left_ms < 5 ? (int)left_ms : 5);
    }
}

void client_child_finish(struct client_child *child)
{
    close_end(&child->lifetime_fd);
    if (child->pid <= 0) {
        return;
    }
    int status;
    int pidfd = pidfd_open(child->pid, 0);
    if (!wait_child(child->pid, pidfd, CLIENT_CHILD_EOF_MS, &status)) {
        kill(child->pid, SIGTERM);
        if (!wait_child(child->pid, pidfd, CLIENT_CHILD_SIGTERM_MS, &status)) {
            kill(child->pid, SIGKILL);
            while (waitpid(child->pid, &status, 0) < 0 && errno == EINTR) {
            }
        }
    }
    child->pid = 0;
    close_end(&pidfd);
}

/* The daemon did not get as far as hello. Where it has died, that is the better story. */
static int explain(struct client_child *child, const char *program, int err,
                   struct gqa_error *ret_error)
{
    int status = 0;
    pid_t pid = child->pid;
    int pidfd = pidfd_open(pid, 0);
    bool gone = err == -ECONNRESET && wait_child(pid, pidfd, 1000, &status);
    close_end(&pidfd);
    if (!gone) {
        client_child_finish(child);
        return err;
    }
    child->pid = 0;
    client_child_finish(child);
    if (WIFSIGNALED(status)) {
        return client_fail(ret_error, -ECHILD, "%s: ended before it served, by signal %d", program,
                           WTERMSIG(status));
    }
    return client_fail(ret_error, -ECHILD, "%s: ended before it served, with status %d", program,
                       WIFEXITED(status) ? WEXITSTATUS(status) : 0);
}

int gqa_spawn(const struct gqa_spawn_options *options, struct gqa **ret,
              struct gqa_error *ret_error)
{
    struct gqa_spawn_options o = {0};
    if (options != NULL) {
        memcpy(&o, options, options->struct_size < sizeof(o) ? options->struct_size : sizeof(o));
    }
    char program[PATH_MAX];
    const char *args[ARGS_MAX + 1];
    struct ends e;
    int r = find_program(o.program, program);
    if (r == 0) {
        r = make_args(&o, program, args);
    }
    if (r == 0) {
        r = ends_init(&e);
    }
    if (r < 0) {
        return client_fail(ret_error, r, "gqad cannot be started: %s", strerror(-r));
    }
    struct client_child child = {.lifetime_fd = e.lifetime};
    r = start(program, args, &e, (o.flags & GQA_SPAWN_QUIET) != 0, &child.pid);
    if (r < 0) {
        ends_finish(&e);
        return client_fail(ret_error, r, "%s: %s", program, strerror(-r));
    }
    e.lifetime = -1; /* the child's record owns it from here on */
    close_end(&e.theirs);
    close_end(&e.watched);
    struct gqa_connect_options c = {
        .struct_size = sizeof(c),
        .client = o.client,
        .flags = GQA_CONNECT_FD | (o.flags & (GQA_F_SHM | GQA_F_SHM_AUTO)),
        .fd = e.ours,
        .timeout_ms = o.timeout_ms,
        .spin_us = o.spin_us,
        .ring_in_bytes = o.ring_in_bytes,
        .ring_out_bytes = o.ring_out_bytes,
    };
    struct gqa *g;
    r = gqa_connect(&c, &g, ret_error);
    if (r < 0) {
        ends_finish(&e);
        return explain(&child, program, r, ret_error);
    }
    g->child = child;
    *ret = g;
    return 0;
}

int gqa_spawned_pid(const struct gqa *g)
{
    return (int)g->child.pid;
}
