/* epoll.c - libgqa inside a program's own loop, of epoll(7). What it calls is in calls.c; the same
 * program for other loops: poll.c, uv.c.
 *
 *   cc epoll.c calls.c $(pkg-config --cflags --libs libgqa) -o async_epoll
 *   ./async_epoll MODEL "Once upon a time"
 */
#include "calls.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

struct loop {
    struct calls *calls;
    int set;     /* of epoll */
    int signals; /* a signalfd */
};

/* What the set watches. The number in its data tells the descriptors apart. */
enum source { SOURCE_GQA, SOURCE_STDIN, SOURCE_SIGNAL };

static int watch(struct loop *loop, int op, int fd, uint32_t events, enum source source)
{
    struct epoll_event e = {.events = events, .data.u32 = source};
    return epoll_ctl(loop->set, op, fd, &e) < 0 ? -errno : 0;
}

/* SIGINT becomes readable instead of interrupting. */
static int open_sources(struct loop *loop)
{
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGINT);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    loop->set = epoll_create1(EPOLL_CLOEXEC);
    loop->signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    if (loop->set < 0 || loop->signals < 0) {
        return -errno;
    }
    setvbuf(stdin, NULL, _IONBF, 0); /* what epoll cannot see is not read ahead */
    watch(loop, EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, SOURCE_STDIN); /* a plain file cannot be */
    int r = watch(loop, EPOLL_CTL_ADD, loop->signals, EPOLLIN, SOURCE_SIGNAL);
    return r < 0 ? r : watch(loop, EPOLL_CTL_ADD, gqa_fd(loop->calls->g), EPOLLIN, SOURCE_GQA);
}

static void on_ready(struct loop *loop, enum source source)
{
    char line[1024];
    struct signalfd_siginfo info;
    switch (source) {
    case SOURCE_GQA:
        break; /* gqa_process() comes anyway */
    case SOURCE_STDIN:
        if (fgets(line, sizeof(line), stdin) != NULL) {
            calls_on_line(loop->calls, line);
        } else {
            epoll_ctl(loop->set, EPOLL_CTL_DEL, STDIN_FILENO, NULL);
        }
        break;
    case SOURCE_SIGNAL:
        if (read(loop->signals, &info, sizeof(info)) == sizeof(info)) {
            calls_on_interrupt(loop->calls);
        }
        break;
    }
}

static int wait_for_more(struct loop *loop)
{
    struct gqa *g = loop->calls->g;
    struct epoll_event events[3];
    uint32_t wanted = (gqa_events(g) & POLLOUT) != 0 ? EPOLLIN | EPOLLOUT : EPOLLIN;
    int r = watch(loop, EPOLL_CTL_MOD, gqa_fd(g), wanted, SOURCE_GQA);
    if (r < 0) {
        return r;
    }
    int n = epoll_wait(loop->set, events, 3, calls_timeout_ms(loop->calls));
    if (n < 0 && errno != EINTR) {
        return -errno;
    }
    for (int i = 0; i < n; i++) {
        on_ready(loop, (enum source)events[i].data.u32);
    }
    return 0;
}

static int run(struct calls *calls)
{
    struct loop loop = {.calls = calls};
    int r = open_sources(&loop);
    while (r >= 0 && calls->n_running > 0) {
        r = gqa_process(calls->g); /* negative: all calls have ended and said why */
        if (r == 0) {
            r = wait_for_more(&loop);
        }
    }
    return r < 0 ? r : 0;
}

int main(int argc, char **argv)
{
    return calls_main(argc, argv, "async_epoll", run);
}
