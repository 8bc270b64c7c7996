/* async_uv.c - libgqa inside a program's own loop, of libuv: a generation is printed as it comes; a
 * line that is typed meanwhile is a second call, which tells how many tokens it has; Ctrl-C cancels
 * the generation. The same program for other loops: async_poll.c, async_epoll.c.
 *
 *   cc async_uv.c $(pkg-config --cflags --libs libgqa libuv) -o async_uv
 *   ./async_uv MODEL "Once upon a time"
 */
#include <gqa/client.h>

#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>
#include <uv.h>

/* What both calls and the loop share. */
struct app {
    struct gqa *g;
    uint32_t id;      /* of the generation */
    int n_running;    /* calls that have not ended */
    int status;       /* the generation's */
    bool interrupted; /* cancel is sent once */
    const char *model;
    int error;
    uv_loop_t loop;
    uv_poll_t poll;
    uv_timer_t timer;
    uv_signal_t signal;
    uv_poll_t input;
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
        fprintf(stderr, "\nasync_uv: %s\n", error->message);
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
        fprintf(stderr, "\nasync_uv: %s\n", error->message);
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
        fprintf(stderr, "\nasync_uv: text.tokenize: %s\n", strerror(-r));
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

static void on_ready(uv_poll_t *poll, int status, int events);
static void on_due(uv_timer_t *timer);

/* Lets libgqa do what it can, then tells libuv what to wake it for. */
static void drive(struct app *app)
{
    int r;
    do {
        r = gqa_process(app->g);
    } while (r > 0);
    if (r < 0 || app->n_running == 0) {
        app->error = r; /* negative: all calls have ended and said why */
        uv_stop(&app->loop);
        return;
    }
    int events = (gqa_events(app->g) & POLLOUT) != 0 ? UV_READABLE | UV_WRITABLE : UV_READABLE;
    uv_poll_start(&app->poll, events, on_ready);
    int ms = timeout_ms(app->g);
    if (ms >= 0) {
        uv_timer_start(&app->timer, on_due, (uint64_t)ms, 0);
    } else {
        uv_timer_stop(&app->timer);
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
    on_interrupt(handle->data);
    drive(handle->data); /* there is something to send now */
}

static void on_input(uv_poll_t *input, int status, int events)
{
    char line[1024];
    if (status < 0 || fgets(line, sizeof(line), stdin) == NULL) {
        uv_poll_stop(input);
        return;
    }
    on_line(input->data, line);
    drive(input->data);
}

static void close_handle(uv_handle_t *handle, void *arg)
{
    uv_close(handle, NULL);
}

static int run(struct app *app)
{
    int r = uv_loop_init(&app->loop);
    if (r < 0) {
        return r;
    }
    app->poll.data = app->timer.data = app->signal.data = app->input.data = app;
    setvbuf(stdin, NULL, _IONBF, 0); /* what libuv cannot see is not read ahead */
    uv_poll_init(&app->loop, &app->poll, gqa_fd(app->g));
    uv_timer_init(&app->loop, &app->timer);
    uv_signal_init(&app->loop, &app->signal);
    uv_signal_start(&app->signal, on_signal, SIGINT);
    if (uv_poll_init(&app->loop, &app->input, STDIN_FILENO) == 0) { /* a plain file cannot be */
        uv_poll_start(&app->input, UV_READABLE, on_input);
    }
    drive(app);
    if (app->n_running > 0) {
        uv_run(&app->loop, UV_RUN_DEFAULT);
    }
    uv_walk(&app->loop, close_handle, NULL);
    uv_run(&app->loop, UV_RUN_DEFAULT); /* until they are closed: before gqa_close() */
    uv_loop_close(&app->loop);
    return app->error;
}

int main(int argc, char **argv)
{
    struct gqa_error error;
    struct app app = {0};
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: async_uv MODEL PROMPT [N_PREDICT]\n");
        return 64;
    }
    if (gqa_connect(NULL, &app.g, &error) < 0) {
        fprintf(stderr, "async_uv: %s\n", error.message);
        return 69;
    }
    app.model = argv[1];
    int r = generate(&app, argv[2], argc == 4 ? strtoul(argv[3], NULL, 10) : 1000);
    if (r == 0) {
        r = run(&app);
    }
    gqa_close(app.g);
    if (r < 0) {
        fprintf(stderr, "async_uv: %s\n", strerror(-r));
    }
    return r < 0 || app.status < 0 ? 1 : 0;
}
