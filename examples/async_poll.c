/* async_poll.c - libgqa inside a program's own loop, of poll(2): a generation is printed as it
 * comes; a line that is typed meanwhile is a second call, which tells how many tokens it has;
 * Ctrl-C cancels the generation. The same program for other loops: async_epoll.c, async_uv.c.
 *
 *   cc async_poll.c $(pkg-config --cflags --libs libgqa) -o async_poll
 *   ./async_poll MODEL "Once upon a time"
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE /* ppoll() */
#endif
#include <gqa/client.h>

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* What both calls and the loop share. */
struct app {
    struct gqa *g;
    uint32_t id;      /* of the generation */
    int n_running;    /* calls that have not ended */
    int status;       /* the generation's */
    bool interrupted; /* cancel is sent once */
    const char *model;
    bool has_input;
};

static void on_text(void *arg, uint32_t id, const struct gqa_value *event)
{
    const char *text = "";
    size_t bytes = 0;
    gqa_value_bytes(gqa_value_get(event, "text"), &text, &bytes);
    fwrite(text, 1, bytes, stdout);
    fflush(stdout);
}

static void on_end(void *arg, uint32_t id, int status, const struct gqa_value *result,
                   const struct gqa_error *error)
{
    struct app *app = arg;
    const char *finish = "?";
    size_t bytes = 1;
    app->n_running--;
    app->status = status;
    if (status < 0) {
        fprintf(stderr, "\nasync_poll: %s\n", error->message);
        return;
    }
    gqa_value_bytes(gqa_value_get(result, "finish"), &finish, &bytes);
    printf("\n[ended: %.*s]\n", (int)bytes, finish);
}

static void on_tokens(void *arg, uint32_t id, int status, const struct gqa_value *result,
                      const struct gqa_error *error)
{
    struct app *app = arg;
    app->n_running--;
    if (status < 0) {
        fprintf(stderr, "\nasync_poll: %s\n", error->message);
        return;
    }
    printf("\n[that line is %zu tokens]\n", gqa_value_count(gqa_value_get(result, "tokens")));
}

/* Starts a call with a model and one text among its parameters. It never blocks; its callbacks run
 * inside gqa_process(). */
static int start(struct app *app, const char *method, struct gqa_params *params, const char *key,
                 const char *text, const struct gqa_call_options *options, uint32_t *ret_id)
{
    gqa_params_str(params, "model", app->model);
    gqa_params_str(params, key, text); /* failures of these stick, and the call returns them */
    int r = gqa_call_async(app->g, method, params, options, ret_id);
    if (r == 0) {
        app->n_running++;
    }
    return r;
}

static int generate(struct app *app, const char *prompt, uint64_t n_predict)
{
    struct gqa_call_options options = {
        .struct_size = sizeof(options), .event = on_text, .done = on_end, .arg = app};
    struct gqa_params *params;
    int r = gqa_params_create(&params);
    if (r == 0) {
        gqa_params_u64(params, "n_predict", n_predict);
        gqa_params_f64(params, "temperature", 0); /* greedy: the same story every time */
        r = start(app, "text.generate", params, "prompt", prompt, &options, &app->id);
        gqa_params_destroy(params);
    }
    return r;
}

/* A line was typed: how many tokens is it? The generation goes on meanwhile. */
static void on_line(struct app *app, const char *line)
{
    struct gqa_call_options options = {
        .struct_size = sizeof(options), .done = on_tokens, .arg = app};
    struct gqa_params *params;
    int r = gqa_params_create(&params);
    if (r == 0) {
        r = start(app, "text.tokenize", params, "text", line, &options, NULL);
        gqa_params_destroy(params);
    }
    if (r < 0) {
        fprintf(stderr, "\nasync_poll: text.tokenize: %s\n", strerror(-r));
    }
}

/* Ctrl-C: the generation stops within a step, and on_end() tells. */
static void on_interrupt(struct app *app)
{
    if (!app->interrupted) {
        app->interrupted = true;
        gqa_cancel(app->g, app->id);
    }
}

static uint64_t now_usec(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

/* Loops want milliseconds from now; libgqa tells microseconds on CLOCK_MONOTONIC. Rounded up:
 * waking too early only to find nothing due would be a busy loop. */
static int timeout_ms(const struct gqa *g)
{
    uint64_t due = gqa_timeout_usec(g), now = now_usec();
    if (due == UINT64_MAX) {
        return -1;
    }
    uint64_t ms = due <= now ? 0 : (due - now + 999) / 1000;
    return ms < INT_MAX ? (int)ms : INT_MAX;
}

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

static int wait_for_more(struct app *app, const sigset_t *open)
{
    struct pollfd fds[2] = {
        {.fd = gqa_fd(app->g), .events = (short)gqa_events(app->g)},
        {.fd = app->has_input ? STDIN_FILENO : -1, .events = POLLIN}, /* -1: ppoll() skips it */
    };
    int ms = timeout_ms(app->g);
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    int n = ppoll(fds, 2, ms < 0 ? NULL : &t, open);
    if (n < 0 && errno != EINTR) {
        return -errno;
    }
    char line[1024];
    if (n > 0 && fds[1].revents != 0) {
        app->has_input = fgets(line, sizeof(line), stdin) != NULL;
        if (app->has_input) {
            on_line(app, line);
        }
    }
    return 0;
}

static int run(struct app *app)
{
    sigset_t open;
    catch_sigint(&open);
    setvbuf(stdin, NULL, _IONBF, 0); /* what poll() cannot see is not read ahead */
    app->has_input = true;
    while (app->n_running > 0) {
        int r = gqa_process(app->g);
        if (r < 0) {
            return r; /* all calls have ended and said why */
        }
        if (interrupts) {
            on_interrupt(app);
        }
        if (r == 0 && (r = wait_for_more(app, &open)) < 0) {
            return r;
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct gqa_error error;
    struct app app = {0};
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: async_poll MODEL PROMPT [N_PREDICT]\n");
        return 64;
    }
    if (gqa_connect(NULL, &app.g, &error) < 0) {
        fprintf(stderr, "async_poll: %s\n", error.message);
        return 69;
    }
    app.model = argv[1];
    int r = generate(&app, argv[2], argc == 4 ? strtoul(argv[3], NULL, 10) : 1000);
    if (r == 0) {
        r = run(&app);
    }
    gqa_close(app.g);
    if (r < 0) {
        fprintf(stderr, "async_poll: %s\n", strerror(-r));
    }
    return r < 0 || app.status < 0 ? 1 : 0;
}
