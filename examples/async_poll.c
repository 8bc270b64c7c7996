/* async_poll.c - libgqa inside a program's own poll(2) loop: two generations at once, the second of
 * which is cancelled after a few steps, while the loop goes on reading standard input.
 *
 *   cc async_poll.c $(pkg-config --cflags --libs libgqa) -o async_poll
 *   ./async_poll MODEL
 */
#include <gqa/client.h>

#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

struct story {
    const char *title;
    struct gqa *g;
    int cancel_after; /* steps; 0: never */
    int n_steps;
    int *n_running;
};

static void on_step(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct story *story = arg;
    const char *text = "";
    size_t bytes = 0;
    gqa_value_bytes(gqa_value_get(event, "text"), &text, &bytes);
    printf("[%s] %.*s\n", story->title, (int)bytes, text);
    if (++story->n_steps == story->cancel_after) {
        gqa_cancel(story->g, id); /* on_end still comes, once */
    }
}

static void on_end(void *arg, uint32_t id, int status, const struct gqa_value *result,
                   const struct gqa_error *error)
{
    struct story *story = arg;
    const char *finish = "?";
    size_t bytes = 1;
    (*story->n_running)--;
    if (status < 0) {
        printf("[%s] failed: %s\n", story->title, error->message);
        return;
    }
    gqa_value_bytes(gqa_value_get(result, "finish"), &finish, &bytes);
    printf("[%s] ended after %d steps: %.*s\n", story->title, story->n_steps, (int)bytes, finish);
}

static int start(struct story *story, const char *model, const char *prompt)
{
    struct gqa_call_options options = {
        .struct_size = sizeof(options),
        .timeout_ms = 60000,
        .event = on_step,
        .done = on_end,
        .arg = story,
    };
    struct gqa_params *params;
    int r = gqa_params_create(&params);
    if (r < 0) {
        return r;
    }
    gqa_params_str(params, "model", model);
    gqa_params_str(params, "prompt", prompt);
    gqa_params_u64(params, "n_predict", 24);
    r = gqa_call_async(story->g, "text.generate", params, &options, NULL);
    gqa_params_destroy(params);
    if (r == 0) {
        (*story->n_running)++;
    }
    return r;
}

/* poll() wants milliseconds from now; libgqa tells microseconds on CLOCK_MONOTONIC. Rounded up:
 * waking too early only to find nothing due would be a busy loop. */
static int timeout_ms(const struct gqa *g)
{
    struct timespec t;
    uint64_t due = gqa_timeout_usec(g);
    clock_gettime(CLOCK_MONOTONIC, &t);
    uint64_t now = (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
    if (due == UINT64_MAX) {
        return -1;
    }
    return due <= now ? 0 : (int)((due - now + 999) / 1000);
}

static int loop(struct gqa *g, const int *n_running)
{
    struct pollfd fds[2] = {{.fd = gqa_fd(g)}, {.fd = STDIN_FILENO, .events = POLLIN}};
    while (*n_running > 0) {
        int r = gqa_process(g);
        if (r < 0) {
            return r;
        }
        if (r > 0) {
            continue;
        }
        fds[0].events = (short)gqa_events(g);
        if (poll(fds, 2, timeout_ms(g)) > 0 && fds[1].revents != 0) {
            char line[256];
            ssize_t n = read(STDIN_FILENO, line, sizeof(line));
            if (n <= 0) {
                fds[1].fd = -1; /* poll() skips it from here on */
            } else {
                printf("(meanwhile, you typed %zd bytes)\n", n);
            }
        }
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct gqa_error error = {0};
    struct gqa *g;
    int n_running = 0;
    if (argc != 2) {
        fprintf(stderr, "usage: async_poll MODEL\n");
        return 64;
    }
    if (gqa_connect(NULL, &g, &error) < 0) {
        fprintf(stderr, "async_poll: %s\n", error.message);
        return 69;
    }
    struct story dragon = {.title = "dragon", .g = g, .n_running = &n_running};
    struct story robot = {.title = "robot", .g = g, .cancel_after = 5, .n_running = &n_running};
    int r = start(&dragon, argv[1], "The dragon looked at the knight and");
    if (r == 0) {
        r = start(&robot, argv[1], "The robot opened its eyes and");
    }
    if (r == 0) {
        r = loop(g, &n_running);
    }
    gqa_close(g);
    if (r < 0) {
        fprintf(stderr, "async_poll: %s\n", strerror(-r));
        return 1;
    }
    return 0;
}
