/* uv.c - libgqa inside a program's own loop, of libuv. What it calls is in calls.c; the same
 * program for other loops: poll.c, epoll.c.
 *
 *   cc uv.c calls.c $(pkg-config --cflags --libs libgqa libuv) -o async_uv
 *   ./async_uv MODEL "Once upon a time"
 */
#include "calls.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>
#include <uv.h>

struct loop {
    struct calls *calls;
    int error;
    uv_loop_t uv;
    uv_poll_t poll;
    uv_timer_t timer;
    uv_signal_t signal;
    uv_poll_t input;
};

static void on_ready(uv_poll_t *poll, int status, int events);
static void on_due(uv_timer_t *timer);

/* Lets libgqa do what it can, then tells libuv what to wake it for. */
static void drive(struct loop *loop)
{
    struct gqa *g = loop->calls->g;
    int r;
    do {
        r = gqa_process(g);
    } while (r > 0);
    if (r < 0 || loop->calls->n_running == 0) {
        loop->error = r; /* negative: all calls have ended and said why */
        uv_stop(&loop->uv);
        return;
    }
    int events = (gqa_events(g) & POLLOUT) != 0 ? UV_READABLE | UV_WRITABLE : UV_READABLE;
    uv_poll_start(&loop->poll, events, on_ready);
    int ms = calls_timeout_ms(loop->calls);
    if (ms >= 0) {
        uv_timer_start(&loop->timer, on_due, (uint64_t)ms, 0);
    } else {
        uv_timer_stop(&loop->timer);
    }
}

static void on_ready(uv_poll_t *poll, int status, int events)
{
    drive(poll->data);
}

static void on_due(uv_timer_t *timer)
{
    drive(timer->data);
}

static void on_signal(uv_signal_t *handle, int signal_number)
{
    struct loop *loop = handle->data;
    calls_on_interrupt(loop->calls);
    drive(loop); /* there is something to send now */
}

static void on_input(uv_poll_t *input, int status, int events)
{
    struct loop *loop = input->data;
    char line[1024];
    if (status < 0 || fgets(line, sizeof(line), stdin) == NULL) {
        uv_poll_stop(input);
        return;
    }
    calls_on_line(loop->calls, line);
    drive(loop);
}

static void close_handle(uv_handle_t *handle, void *arg)
{
    uv_close(handle, NULL);
}

static int run(struct calls *calls)
{
    struct loop loop = {.calls = calls};
    int r = uv_loop_init(&loop.uv);
    if (r < 0) {
        return r;
    }
    loop.poll.data = loop.timer.data = loop.signal.data = loop.input.data = &loop;
    setvbuf(stdin, NULL, _IONBF, 0); /* what libuv cannot see is not read ahead */
    uv_poll_init(&loop.uv, &loop.poll, gqa_fd(calls->g));
    uv_timer_init(&loop.uv, &loop.timer);
    uv_signal_init(&loop.uv, &loop.signal);
    uv_signal_start(&loop.signal, on_signal, SIGINT);
    if (uv_poll_init(&loop.uv, &loop.input, STDIN_FILENO) == 0) { /* a plain file cannot be */
        uv_poll_start(&loop.input, UV_READABLE, on_input);
    }
    drive(&loop);
    if (calls->n_running > 0) {
        uv_run(&loop.uv, UV_RUN_DEFAULT);
    }
    uv_walk(&loop.uv, close_handle, NULL);
    uv_run(&loop.uv, UV_RUN_DEFAULT); /* until they are closed: before gqa_close() */
    uv_loop_close(&loop.uv);
    return loop.error;
}

int main(int argc, char **argv)
{
    return calls_main(argc, argv, "async_uv", run);
}
