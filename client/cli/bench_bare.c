/* client/cli/bench_bare.c - what copying memory and waking a process cost here, so that what calls
 * cost beside it is a ratio of the same run: two processes, one of which answers the other, and
 * nothing else. A call to the daemon is two wakings and the work between. */
#include "client/cli/bench_ipc.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define COPY_BYTES (64u << 20)

int bench_bare_copy(json_t *rows)
{
    static const struct bench_ipc_way none = {.transport = "none", .wait = ""};
    char *from = malloc(COPY_BYTES), *to = malloc(COPY_BYTES);
    double us[9];
    if (from == NULL || to == NULL) {
        free(from);
        free(to);
        return cli_error(EX_OSERR, "bench: no memory");
    }
    memset(from, 1, COPY_BYTES);
    memset(to, 2, COPY_BYTES);
    for (size_t i = 0; i < sizeof(us) / sizeof(us[0]); i++) {
        double start = cli_now_us();
        memcpy(to, from, COPY_BYTES);
        __asm__ volatile("" : : "r"(to) : "memory");
        us[i] = cli_now_us() - start;
    }
    bench_ipc_row(rows, "memcpy", &none, COPY_BYTES, us, sizeof(us) / sizeof(us[0]));
    free(from);
    free(to);
    return CLI_OK;
}

/* Two descriptors: what one writes to `there` the other reads, and answers by `back`. */
struct ends {
    int write_there, read_there, write_back, read_back;
};

static int make_ends(bool sockets, struct ends *ret)
{
    int pair[2];
    if (sockets) {
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
            return -errno;
        }
        *ret = (struct ends){pair[0], pair[1], pair[1], pair[0]};
        return 0;
    }
    pair[0] = eventfd(0, EFD_CLOEXEC);
    pair[1] = eventfd(0, EFD_CLOEXEC);
    *ret = (struct ends){pair[0], pair[0], pair[1], pair[1]};
    return pair[0] < 0 || pair[1] < 0 ? -errno : 0;
}

static void close_ends(const struct ends *e)
{
    close(e->write_there);
    close(e->read_back);
}

static bool put(int fd)
{
    const uint64_t one = 1;
    return write(fd, &one, sizeof(one)) == (ssize_t)sizeof(one);
}

static bool get(int fd)
{
    uint64_t n;
    return read(fd, &n, sizeof(n)) == (ssize_t)sizeof(n);
}

static bool wake(const struct ends *e, uint32_t pause_us, double *us, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (pause_us > 0) {
            bench_ipc_pause(pause_us);
        }
        double start = cli_now_us();
        if (!put(e->write_there) || !get(e->read_back)) {
            return false;
        }
        us[i] = cli_now_us() - start;
    }
    return true;
}

static int run_waking(const struct bench_ipc_way *w, double *us, size_t count, json_t *rows)
{
    struct ends e;
    if (make_ends(strcmp(w->transport, "socket") == 0, &e) < 0) {
        return cli_error(EX_OSERR, "bench: no descriptors to wake by");
    }
    pid_t child = fork();
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* or it would wait for itself: it holds all ends */
        while (get(e.read_there) && put(e.write_back)) {
        }
        _exit(0);
    }
    bool woken = child > 0 && wake(&e, w->pause_us, us, count);
    if (child > 0) {
        kill(child, SIGKILL);
        waitpid(child, NULL, 0);
    }
    close_ends(&e);
    if (!woken) {
        return cli_error(EX_OSERR, "bench: a process was not woken");
    }
    bench_ipc_row(rows, "waking", w, 0, us, count);
    return CLI_OK;
}

int bench_bare_wakings(size_t count, json_t *rows)
{
    static const struct bench_ipc_way wakings[] = {
        {.transport = "eventfd", .wait = ""},
        {.transport = "eventfd", .wait = "asleep", .pause_us = BENCH_IPC_PAUSE_US},
        {.transport = "socket", .wait = ""},
        {.transport = "socket", .wait = "asleep", .pause_us = BENCH_IPC_PAUSE_US},
    };
    double *us = calloc(count, sizeof(*us));
    int code = us != NULL ? CLI_OK : cli_error(EX_OSERR, "bench: no memory");
    for (size_t i = 0; code == CLI_OK && i < sizeof(wakings) / sizeof(wakings[0]); i++) {
        code = run_waking(&wakings[i], us, count, rows);
    }
    free(us);
    return code;
}

double bench_bare_of(const json_t *rows, const struct bench_ipc_way *w)
{
    const char *wait = w->pause_us > 0 ? "asleep" : "";
    for (size_t i = 0; w->bare != NULL && i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        if (strcmp(cli_str(r, "test", ""), "waking") == 0 &&
            strcmp(cli_str(r, "transport", ""), w->bare) == 0 &&
            strcmp(cli_str(r, "wait", ""), wait) == 0) {
            return cli_num(r, "p50_us", 0);
        }
    }
    return 0;
}
