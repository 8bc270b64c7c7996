/* poll.c - libgqa inside a program's own loop, of poll(2). What it calls is in calls.c; the same
 * program for other loops: epoll.c, uv.c.
 *
 *   cc poll.c calls.c $(pkg-config --cflags --libs libgqa) -o async_poll
 *   ./async_poll MODEL "Once upon a time"
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* ppoll() */
#endif
#include "calls.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t interrupts;

static void on_sigint(int signal_number)
{
    interrupts = 1;
}

/* SIGINT is blocked but inside ppoll(), so that none is missed between looking and waiting. */
static void catch_sigint(sigset_t *ret_open)
{
    struct sigaction action = {.sa_handler = on_sigint};
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGINT);
    sigprocmask(SIG_BLOCK, &blocked, ret_open);
    sigaction(SIGINT, &action, NULL);
}

static int wait_for_more(struct calls *calls, bool *has_input, const sigset_t *open)
{
    struct pollfd fds[2] = {
        {.fd = gqa_fd(calls->g), .events = (short)gqa_events(calls->g)},
        {.fd = *has_input ? STDIN_FILENO : -1, .events = POLLIN}, /* -1: ppoll() skips it */
    };
    int ms = calls_timeout_ms(calls);
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    int n = ppoll(fds, 2, ms < 0 ? NULL : &t, open);
    if (n < 0 && errno != EINTR) {
        return -errno;
    }
    char line[1024];
    if (n > 0 && fds[1].revents != 0) {
        *has_input = fgets(line, sizeof(line), stdin) != NULL;
        if (*has_input) {
            calls_on_line(calls, line);
        }
    }
    return 0;
}

static int run(struct calls *calls)
{
    sigset_t open;
    bool has_input = true;
    catch_sigint(&open);
    setvbuf(stdin, NULL, _IONBF, 0); /* what poll() cannot see is not read ahead */
    while (calls->n_running > 0) {
        int r = gqa_process(calls->g);
        if (r < 0) {
            return r; /* all calls have ended and said why */
        }
        if (interrupts) {
            calls_on_interrupt(calls);
        }
        if (r == 0 && (r = wait_for_more(calls, &has_input, &open)) < 0) {
            return r;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    return calls_main(argc, argv, "async_poll", run);
}
