/* client/cli/session.c - the connection, calls, and Ctrl-C.
 *
 * Calls run on libgqa's asynchronous interface, so that a signal can cancel them: SIGINT and
 * SIGTERM are blocked except inside ppoll(), where nothing can be missed. */
#include "client/cli/cli.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t interrupts; /* a signal handler has no other way to speak */
static sigset_t mask_outside;            /* the mask that ppoll() waits with */

static void on_signal(int signal_number)
{
    if (++interrupts > 1) {
        _exit(CLI_INTERRUPTED);
    }
}

bool cli_interrupted(void)
{
    return interrupts > 0;
}

static void set_signals(void)
{
    struct sigaction action = {.sa_handler = on_signal};
    sigset_t ours;
    sigemptyset(&ours);
    sigaddset(&ours, SIGINT);
    sigaddset(&ours, SIGTERM);
    sigprocmask(SIG_BLOCK, &ours, &mask_outside);
    sigdelset(&mask_outside, SIGINT);
    sigdelset(&mask_outside, SIGTERM);
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    signal(SIGPIPE, SIG_IGN); /* a closed pipe is a failed write */
}

double cli_now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

int cli_error(int code, const char *format, ...)
{
    va_list args;
    fflush(stdout);
    fputs("gqa: ", stderr);
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputc('\n', stderr);
    return code;
}

struct gqa_params *cli_params(void)
{
    struct gqa_params *p = NULL;
    if (gqa_params_create(&p) < 0) {
        exit(cli_error(EX_OSERR, "params: no memory"));
    }
    return p;
}

struct gqa_params *cli_model_params(const char *model)
{
    struct gqa_params *p = cli_params();
    gqa_params_str(p, "model", model);
    return p;
}

/* What helps who could not connect. */
static const char *way_out(const struct cli *c, int r)
{
    if (c->spawn) {
        return "";
    }
    switch (r) {
    case -ENOENT:
    case -ECONNREFUSED:
        return " ('gqad --user' is a daemon of one's own, --spawn one for this command)";
    case -EACCES:
        return " (the socket's group, as 'ls -l' shows it, may use it)";
    default:
        return "";
    }
}

int cli_connect(struct cli *c)
{
    struct gqa_error e;
    int r;
    if (c->spawn) {
        /* The daemon's everyday messages are no part of this command's output. */
        const char *args[9] = {"--log-level", "error"};
        size_t n = getenv("GQAD_LOG_LEVEL") == NULL ? 2 : 0;
        for (size_t i = 0; c->daemon_args != NULL && c->daemon_args[i] != NULL && i < 4; i++) {
            args[n++] = c->daemon_args[i];
        }
        args[n++] = c->threads != NULL ? "-t" : NULL;
        args[n] = c->threads;
        struct gqa_spawn_options o = {
            .struct_size = sizeof(o),
            .cache_dir = c->cache_dir,
            .models_dir = c->models_dir,
            .args = args,
            .client = "gqa/" GQA_VERSION,
            .flags = c->flags,
            .timeout_ms = c->timeout_ms,
            .spin_us = c->spin_us,
            .ring_out_bytes = c->ring_out_bytes,
        };
        r = gqa_spawn(&o, &c->g, &e);
    } else {
        struct gqa_connect_options o = {
            .struct_size = sizeof(o),
            .socket = c->socket,
            .client = "gqa/" GQA_VERSION,
            .flags = c->flags,
            .timeout_ms = c->timeout_ms,
            .spin_us = c->spin_us,
            .ring_out_bytes = c->ring_out_bytes,
        };
        r = gqa_connect(&o, &c->g, &e);
    }
    if (r < 0) {
        return cli_error(EX_UNAVAILABLE, "connect: %s%s", e.message, way_out(c, r));
    }
    set_signals();
    return CLI_OK;
}

static void on_done(void *arg, uint32_t id, int status, const struct gqa_value *result,
                    const struct gqa_error *error)
{
    struct cli_call *call = arg;
    call->done = true;
    call->status = status;
    if (status < 0) {
        call->error = *error;
        return;
    }
    if (call->raw != NULL) {
        call->raw(call->arg, id, result);
    }
    call->result = cli_json(result);
}

static void on_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct cli_call *call = arg;
    if (call->event != NULL) {
        call->event(call->arg, id, event);
    }
}

int cli_start(struct cli *c, struct cli_call *call, const char *method, struct gqa_params *params)
{
    struct gqa_call_options o = {
        .struct_size = sizeof(o),
        .timeout_ms = c->timeout_ms,
        .event = on_event,
        .done = on_done,
        .arg = call,
    };
    call->method = method;
    int r = gqa_call_async(c->g, method, params, &o, &call->id);
    gqa_params_destroy(params);
    if (r < 0) {
        call->done = true;
        call->status = r;
        call->error = (struct gqa_error){0};
        snprintf(call->error.message, sizeof(call->error.message), "cannot be sent: %s",
                 strerror(-r));
    }
    return r;
}

static bool all_done(const struct cli_call *calls, size_t n_calls)
{
    for (size_t i = 0; i < n_calls; i++) {
        if (!calls[i].done) {
            return false;
        }
    }
    return true;
}

/* Waits as gqa_wait() does, but with the signals let in. */
static void wait_open_to_signals(struct cli *c)
{
    double now = cli_now_us();
    uint64_t due = gqa_timeout_usec(c->g);
    double left = due == UINT64_MAX ? 1e6 : (double)due - now;
    left = left < 0 ? 0 : left > 60e6 ? 60e6 : left;
    struct timespec t = {.tv_sec = (time_t)(left / 1e6)};
    t.tv_nsec = (long)((left - (double)t.tv_sec * 1e6) * 1e3);
    struct pollfd p = {.fd = gqa_fd(c->g), .events = (short)gqa_events(c->g)};
    ppoll(&p, 1, &t, &mask_outside);
}

void cli_wait_input(int fd, double seconds)
{
    struct pollfd p = {.fd = fd, .events = POLLIN};
    struct timespec t = {.tv_sec = seconds > 0 ? (time_t)seconds : 0};
    t.tv_nsec = seconds > 0 ? (long)((seconds - (double)t.tv_sec) * 1e9) : 0;
    ppoll(&p, 1, &t, &mask_outside);
}

void cli_finish(struct cli *c, struct cli_call *calls, size_t n_calls)
{
    bool cancelled = false;
    while (!all_done(calls, n_calls)) {
        /* Errors end all calls; the loop then ends by itself. */
        if (gqa_process(c->g) == 0) {
            wait_open_to_signals(c);
        }
        /* What failed to be written nobody reads: a closed pipe, a full disk. */
        if ((cli_interrupted() || ferror(stdout)) && !cancelled) {
            cancelled = true;
            for (size_t i = 0; i < n_calls; i++) {
                if (!calls[i].done) {
                    gqa_cancel(c->g, calls[i].id);
                }
            }
        }
    }
}

int cli_report(const struct cli_call *call)
{
    if (call->status == 0) {
        return CLI_OK;
    }
    if (cli_interrupted() && call->status == -ECANCELED) {
        return CLI_INTERRUPTED;
    }
    if (ferror(stdout) && call->status == -ECANCELED) {
        return EX_IOERR; /* cli_flush() will tell */
    }
    const struct gqa_error *e = &call->error;
    if (e->retry_after_ms > 0) {
        return cli_error(CLI_FAILED, "%s: %s (try again in %u ms)", call->method, e->message,
                         e->retry_after_ms);
    }
    /* libgqa's own messages name the method themselves. */
    size_t n = strlen(call->method);
    bool named = e->code == 0 && strncmp(e->message, call->method, n) == 0;
    bool unreachable = call->status == -ECONNRESET || call->status == -ENOTCONN;
    return cli_error(unreachable ? EX_UNAVAILABLE : CLI_FAILED, "%s%s%s", named ? "" : call->method,
                     named ? "" : ": ", e->message);
}

int cli_call(struct cli *c, const char *method, struct gqa_params *params, gqa_event_fn event,
             void *arg, json_t **ret)
{
    struct cli_call call = {.event = event, .arg = arg};
    cli_start(c, &call, method, params);
    cli_finish(c, &call, 1);
    int code = cli_report(&call);
    if (code == CLI_OK && ret != NULL) {
        *ret = call.result;
    } else {
        json_decref(call.result);
    }
    return code;
}
