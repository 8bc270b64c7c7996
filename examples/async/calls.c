#include "calls.h"

#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

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
    struct calls *calls = arg;
    const char *finish = "?";
    size_t bytes = 1;
    calls->n_running--;
    calls->status = status;
    if (status < 0) {
        fprintf(stderr, "\n%s: %s\n", calls->program, error->message);
        return;
    }
    gqa_value_bytes(gqa_value_get(result, "finish"), &finish, &bytes);
    printf("\n[ended: %.*s]\n", (int)bytes, finish);
}

static void on_tokens(void *arg, uint32_t id, int status, const struct gqa_value *result,
                      const struct gqa_error *error)
{
    struct calls *calls = arg;
    calls->n_running--;
    if (status < 0) {
        fprintf(stderr, "\n%s: %s\n", calls->program, error->message);
        return;
    }
    printf("\n[that line is %zu tokens]\n", gqa_value_count(gqa_value_get(result, "tokens")));
}

/* Starts a call with a model and one text among its parameters. It never blocks; its callbacks run
 * inside gqa_process(). */
static int start(struct calls *calls, const char *method, struct gqa_params *params,
                 const char *key, const char *text, const struct gqa_call_options *options,
                 uint32_t *ret_id)
{
    gqa_params_str(params, "model", calls->model);
    gqa_params_str(params, key, text); /* failures of these stick, and the call returns them */
    int r = gqa_call_async(calls->g, method, params, options, ret_id);
    if (r == 0) {
        calls->n_running++;
    }
    return r;
}

static int generate(struct calls *calls, const char *prompt, uint64_t n_predict)
{
    struct gqa_call_options options = {
        .struct_size = sizeof(options), .event = on_text, .done = on_end, .arg = calls};
    struct gqa_params *params;
    int r = gqa_params_create(&params);
    if (r == 0) {
        gqa_params_u64(params, "n_predict", n_predict);
        gqa_params_f64(params, "temperature", 0); /* greedy: the same story every time */
        r = start(calls, "text.generate", params, "prompt", prompt, &options, &calls->id);
        gqa_params_destroy(params);
    }
    return r;
}

/* A line was typed: how many tokens is it? The generation goes on meanwhile. */
void calls_on_line(struct calls *calls, const char *line)
{
    struct gqa_call_options options = {
        .struct_size = sizeof(options), .done = on_tokens, .arg = calls};
    struct gqa_params *params;
    int r = gqa_params_create(&params);
    if (r == 0) {
        r = start(calls, "text.tokenize", params, "text", line, &options, NULL);
        gqa_params_destroy(params);
    }
    if (r < 0) {
        fprintf(stderr, "\n%s: text.tokenize: %s\n", calls->program, strerror(-r));
    }
}

/* Ctrl-C: the generation stops within a step, and on_end() tells. */
void calls_on_interrupt(struct calls *calls)
{
    if (!calls->interrupted) {
        calls->interrupted = true;
        gqa_cancel(calls->g, calls->id);
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
int calls_timeout_ms(const struct calls *calls)
{
    uint64_t due = gqa_timeout_usec(calls->g), now = now_usec();
    if (due == UINT64_MAX) {
        return -1;
    }
    uint64_t ms = due <= now ? 0 : (due - now + 999) / 1000;
    return ms < INT_MAX ? (int)ms : INT_MAX;
}

int calls_main(int argc, char **argv, const char *program, int (*run)(struct calls *calls))
{
    struct gqa_error error;
    struct calls calls = {.program = program};
    if (argc != 3 && argc != 4) {
        fprintf(stderr, "usage: %s MODEL PROMPT [N_PREDICT]\n", program);
        return 64;
    }
    if (gqa_connect(NULL, &calls.g, &error) < 0) {
        fprintf(stderr, "%s: %s\n", program, error.message);
        return 69;
    }
    calls.model = argv[1];
    int r = generate(&calls, argv[2], argc == 4 ? strtoul(argv[3], NULL, 10) : 1000);
    if (r == 0) {
        r = run(&calls);
    }
    gqa_close(calls.g);
    if (r < 0) {
        fprintf(stderr, "%s: %s\n", program, strerror(-r));
    }
    return r < 0 || calls.status < 0 ? 1 : 0;
}
