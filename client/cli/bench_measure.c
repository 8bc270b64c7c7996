/* client/cli/bench_measure.c - tokens per second of prompts and of generation.
 *
 * Prompts are random tokens, different in every repeat, so that no cache makes them cheap; greedy,
 * and never ended by the model. Context before a test (its depth) is computed by a request of its
 * own: where the daemon keeps it, the test's own request reuses it, and where it does not, that
 * request's time is subtracted.
 *
 * Generation of one stream is timed by the daemon, from the first token to the last. Several
 * streams are timed from outside, while all of them decode (streams.c). */
#include "client/cli/bench.h"

#include <stdlib.h>

static uint64_t next_random(uint64_t *state)
{
    /* splitmix64 */
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void bench_random_tokens(int32_t *ids, size_t n, uint32_t n_vocab, uint64_t *seed)
{
    for (size_t i = 0; i < n; i++) {
        ids[i] = (int32_t)(next_random(seed) % n_vocab);
    }
}

static void on_step(void *arg, uint32_t id, const struct gqa_value *event)
{
    cli_stream_take(arg, gqa_value_count(gqa_value_get(event, "tokens")));
}

static int start(struct cli *c, struct cli_call *call, const char *model, const int32_t *ids,
                 size_t n_ids, uint32_t n_predict)
{
    struct gqa_params *p = cli_model_params(model);
    gqa_params_tokens(p, "tokens", ids, n_ids);
    gqa_params_u64(p, "n_predict", n_predict);
    gqa_params_f64(p, "temperature", 0);
    gqa_params_bool(p, "ignore_eos", true);
    return cli_start(c, call, "text.generate", p);
}

/* The calls' first failure, told; CLI_INTERRUPTED after Ctrl-C. */
static int check(struct cli_call *calls, size_t n)
{
    int code = CLI_OK;
    for (size_t i = 0; i < n && code == CLI_OK; i++) {
        code = cli_report(&calls[i]);
    }
    return code == CLI_OK && cli_interrupted() ? CLI_INTERRUPTED : code;
}

static void drop(struct cli_call *calls, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        json_decref(calls[i].result);
        calls[i] = (struct cli_call){0};
    }
}

/* All streams at once, each a request of n_ids of its ids. The results stay in calls. */
static int run_streams(struct cli *c, const char *model, struct cli_call *calls,
                       int32_t *const *ids, size_t n_streams, size_t n_ids, uint32_t n_predict)
{
    for (size_t i = 0; i < n_streams; i++) {
        start(c, &calls[i], model, ids[i], n_ids, n_predict);
    }
    cli_finish(c, calls, n_streams);
    return check(calls, n_streams);
}

/* ---- prompts ----------------------------------------------------------------------------- */

/* Milliseconds of prompt work of a batch of calls and how many tokens that covered. One stream:
 * the daemon's own timing, without queues; several: the slowest, since they share the machine. */
static double prompt_ms(const struct cli_call *calls, size_t n, double *ret_tokens)
{
    double ms = 0, tokens = 0;
    for (size_t i = 0; i < n; i++) {
        const json_t *t = json_object_get(calls[i].result, "timings");
        double one = cli_num(t, "prompt_ms", 0) + (n > 1 ? cli_num(t, "queue_ms", 0) : 0);
        ms = one > ms ? one : ms;
        tokens += cli_num(calls[i].result, "n_prompt", 0) - cli_num(calls[i].result, "n_cached", 0);
    }
    *ret_tokens = tokens;
    return ms;
}

static int measure_prompt(struct cli *c, const char *model, const struct bench_test *test,
                          struct cli_call *calls, int32_t *const *ids, double *ret_tps)
{
    double before_ms = 0, before_tokens = 0, tokens = 0;
    size_t n = test->n_streams;
    int code = CLI_OK;
    if (test->depth > 0) {
        code = run_streams(c, model, calls, ids, n, test->depth, 1);
        before_ms = prompt_ms(calls, n, &before_tokens);
        drop(calls, n);
    }
    if (code == CLI_OK && test->ops != NULL) {
        code = bench_ops_read(c, model, test->ops);
    }
    if (code == CLI_OK) {
        code = run_streams(c, model, calls, ids, n, test->depth + test->n_prompt, 1);
    }
    if (code != CLI_OK) {
        return code;
    }
    double ms = prompt_ms(calls, n, &tokens);
    double wanted = (double)test->n_prompt * (double)n;
    if (tokens > wanted + (double)n * test->depth / 2 && ms > before_ms) {
        /* The context was computed again: take its time off. */
        ms -= before_ms;
        tokens -= before_tokens;
    }
    if (ms <= 0 || tokens <= 0) {
        return cli_error(CLI_FAILED, "text.generate: the timings tell nothing about the prompt");
    }
    *ret_tps = tokens / ms * 1e3;
    return CLI_OK;
}

/* ---- generation -------------------------------------------------------------------------- */

/* The daemon's own figure; the first token belongs to the prompt. */
static double timed_tps(const json_t *result)
{
    double ms = cli_num(json_object_get(result, "timings"), "predict_ms", 0);
    return ms > 0 ? (cli_num(result, "n_generated", 0) - 1) / ms * 1e3 : 0;
}

static int measure_generation(struct cli *c, const char *model, const struct bench_test *test,
                              struct cli_call *calls, struct cli_stream *streams,
                              int32_t *const *ids, double *ret_tps)
{
    size_t n = test->n_streams;
    size_t n_ids = test->depth > 0 ? test->depth : 1;
    int code = CLI_OK;
    if ((n > 1 || test->ops != NULL) && test->depth > 0) {
        /* Streams whose context is kept start together afterwards; and it is no part of the ops. */
        code = run_streams(c, model, calls, ids, n, n_ids, 1);
        drop(calls, n);
    }
    if (code == CLI_OK && test->ops != NULL) {
        code = bench_ops_read(c, model, test->ops);
    }
    if (code != CLI_OK) {
        return code;
    }
    for (size_t i = 0; i < n; i++) {
        calls[i] = (struct cli_call){.event = on_step, .arg = &streams[i]};
    }
    double start_us = cli_now_us();
    code = run_streams(c, model, calls, ids, n, n_ids, streams[0].n_max);
    if (code != CLI_OK) {
        return code;
    }
    *ret_tps = n == 1 ? timed_tps(calls[0].result) : cli_streams_tps(streams, n, start_us);
    return *ret_tps > 0
               ? CLI_OK
               : cli_error(CLI_FAILED, "bench: %zu streams gave too few tokens to be timed", n);
}

/* ---- one repeat of one test -------------------------------------------------------------- */

struct room {
    struct cli_call calls[BENCH_STREAMS_MAX];
    struct cli_stream streams[BENCH_STREAMS_MAX];
    int32_t *ids[BENCH_STREAMS_MAX];
};

static void room_destroy(struct room *r)
{
    if (r == NULL) {
        return;
    }
    drop(r->calls, BENCH_STREAMS_MAX);
    for (size_t i = 0; i < BENCH_STREAMS_MAX; i++) {
        free(r->ids[i]);
        free(r->streams[i].at_us);
    }
    free(r);
}

/* Several streams generate more than asked, so that there is a window of n_gen tokens however their
 * beginnings are spread; the first token of each only opens it. */
static struct room *room_create(const struct bench_test *test)
{
    struct room *r = calloc(1, sizeof(*r));
    size_t n_ids = (size_t)test->depth + test->n_prompt + 1;
    uint32_t n_tokens = (test->n_streams > 1 ? 2 * test->n_gen : test->n_gen) + 1;
    for (size_t i = 0; r != NULL && i < test->n_streams; i++) {
        r->ids[i] = malloc(n_ids * sizeof(int32_t));
        r->streams[i].at_us = malloc(n_tokens * sizeof(double));
        r->streams[i].n_max = n_tokens;
        if (r->ids[i] == NULL || r->streams[i].at_us == NULL) {
            room_destroy(r);
            return NULL;
        }
    }
    return r;
}

int bench_measure(struct cli *c, const char *model, const struct bench_model *m,
                  const struct bench_test *test, uint64_t *seed, double *ret_tps)
{
    struct room *r = room_create(test);
    if (r == NULL) {
        return cli_error(EX_OSERR, "bench: no memory for %u streams", test->n_streams);
    }
    for (size_t i = 0; i < test->n_streams; i++) {
        bench_random_tokens(r->ids[i], (size_t)test->depth + test->n_prompt + 1, m->n_vocab, seed);
    }
    int code = test->n_prompt > 0
                   ? measure_prompt(c, model, test, r->calls, r->ids, ret_tps)
                   : measure_generation(c, model, test, r->calls, r->streams, r->ids, ret_tps);
    room_destroy(r);
    return code;
}
