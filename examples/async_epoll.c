/* async_epoll.c - libgqa inside a program's own loop, of epoll(7): a generation is printed as it
 * comes; a line that is typed meanwhile is a second call, which tells how many tokens it has;
 * Ctrl-C cancels the generation. The same program for other loops: async_poll.c, async_uv.c.
 *
 *   cc async_epoll.c $(pkg-config --cflags --libs libgqa) -o async_epoll
 *   ./async_epoll MODEL "Once upon a time"
 */
#include <gqa/client.h>

#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
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
    int set;     /* of epoll */
    int signals; /* a signalfd */
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
        fprintf(stderr, "\nasync_epoll: %s\n", error->message);
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
        fprintf(stderr, "\nasync_epoll: %s\n", error->message);
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
        fprintf(stderr, "\nasync_epoll: text.tokenize: %s\n", strerror(-r));
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

/* What the set watches. The number in its data tells the descriptors apart. */
enum source { SOURCE_GQA, SOURCE_STDIN, SOURCE_SIGNAL };

static int watch(struct app *app, int op, int fd, uint32_t events, enum source source)
{
    struct epoll_event e = {.events = events, .data.u32 = source};
    return epoll_ctl(app->set, op, fd, &e) < 0 ? -errno : 0;
}

/* SIGINT becomes readable instead of interrupting. */
static int open_sources(struct app *app)
{
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGINT);
    sigprocmask(SIG_BLOCK, &mask, NULL);
    app->set = epoll_create1(EPOLL_CLOEXEC);
    app->signals = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
    if (app->set < 0 || app->signals < 0) {
        return -errno;
    }
    setvbuf(stdin, NULL, _IONBF, 0); /* what epoll cannot see is not read ahead */
    watch(app, EPOLL_CTL_ADD, STDIN_FILENO, EPOLLIN, SOURCE_STDIN); /* a plain file cannot be */
    int r = watch(app, EPOLL_CTL_ADD, app->signals, EPOLLIN, SOURCE_SIGNAL);
    return r < 0 ? r : watch(app, EPOLL_CTL_ADD, gqa_fd(app->g), EPOLLIN, SOURCE_GQA);
}

static void on_ready(struct app *app, enum source source)
{
    char line[1024];
    struct signalfd_siginfo info;
    switch (source) {
    case SOURCE_GQA:
        break; /* gqa_process() comes anyway */
    case SOURCE_STDIN:
        if (fgets(line, sizeof(line), stdin) != NULL) {
            on_line(app, line);
        } else {
            epoll_ctl(app->set, EPOLL_CTL_DEL, STDIN_FILENO, NULL);
        }
        break;
    case SOURCE_SIGNAL:
        if (read(app->signals, &info, sizeof(info)) == sizeof(info)) {
            on_interrupt(app);
        }
        break;
    }
}

static int wait_for_more(struct app *app)
{
    struct epoll_event events[3];
    uint32_t wanted = (gqa_events(app->g) & POLLOUT) != 0 ? EPOLLIN | EPOLLOUT : EPOLLIN;
    int r = watch(app, EPOLL_CTL_MOD, gqa_fd(app->g), wanted, SOURCE_GQA);
    if (r < 0) {
        return r;
    }
    int n = epoll_wait(app->set, events, 3, timeout_ms(app->g));
    if (n < 0 && errno != EINTR) {
        return -errno;
    }
    for (int i = 0; i < n; i++) {
        on_ready(app, (enum source)events[i].data.u32);
    }
    return 0;
}

static int run(struct app *app)
{
    int r = open_sources(app);
    while (r >= 0 && app->n_running > 0) {
        r = gqa_process(app->g); /* negative: all calls have ended and said why */
        if (r == 0) {
            r = wait_for_more(app);
        }
    }
    return r < 0 ? r : 0;
}

int main(int argc, char **argv)
{
    struct gqa_error error;
    struct app app = {0};
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: async_epoll MODEL PROMPT [N_PREDICT]\n");
        return 64;
    }
    if (gqa_connect(NULL, &app.g, &error) < 0) {
        fprintf(stderr, "async_epoll: %s\n", error.message);
        return 69;
    }
    app.model = argv[1];
    int r = generate(&app, argv[2], argc == 4 ? strtoul(argv[3], NULL, 10) : 1000);
    if (r == 0) {
        r = run(&app);
    }
    gqa_close(app.g);
    if (r < 0) {
        fprintf(stderr, "async_epoll: %s\n", strerror(-r));
    }
    return r < 0 || app.status < 0 ? 1 : 0;
}
