/* client/cli/bench_serve_streams.c - gqa bench serve --streams: many streams against one, and what
 * a long prompt does to those that run.
 *
 * Decoding alone is measured on prompts that were computed before, so that all streams begin at
 * once; its pace is that of the time between the last stream's first token and the first one's
 * last. The whole is measured on fresh prompts, from the first request sent to the last token come.
 */
#include "client/cli/bench_serve.h"

#include <stdlib.h>
#include <string.h>

#define PROMPT      512u
#define GEN         64u
#define RUNNING     4u /* streams that a long prompt is to disturb */
#define RUNNING_GEN 1000u
#define SETTLED     16u /* tokens of each, before it comes */

struct stream {
    double at_us[RUNNING_GEN];
    uint32_t n;
};

struct streams_bench {
    struct cli *c;
    const char *model;
    uint32_t n_vocab, n_streams, n_long;
    uint64_t seed;
    struct stream *streams; /* (n_streams + RUNNING + 1) */
    struct cli_call *calls; /* likewise */
    int32_t *ids;           /* (n_streams, PROMPT) */
    int32_t *long_ids;      /* (n_long) */
    double *gaps;           /* (n_streams * GEN + RUNNING * RUNNING_GEN) */
};

/* What n streams did. */
struct pace {
    double whole_tps, decode_tps; /* all streams together */
    double gap_p50_ms, gap_p99_ms;
};

static void on_step(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct stream *s = arg;
    size_t n = gqa_value_count(gqa_value_get(event, "tokens"));
    if (n > 0 && s->n < RUNNING_GEN) {
        s->at_us[s->n++] = cli_now_us();
    }
}

static void start(struct streams_bench *b, uint32_t index, const int32_t *ids, uint32_t n_ids,
                  uint32_t n_predict)
{
    struct gqa_params *p = cli_model_params(b->model);
    gqa_params_tokens(p, "tokens", ids, n_ids);
    gqa_params_u64(p, "n_predict", n_predict);
    gqa_params_f64(p, "temperature", 0);
    gqa_params_bool(p, "ignore_eos", true);
    b->streams[index].n = 0;
    b->calls[index] = (struct cli_call){.event = on_step, .arg = &b->streams[index]};
    cli_start(b->c, &b->calls[index], "text.generate", p);
}

static int finish(struct streams_bench *b, uint32_t n)
{
    cli_finish(b->c, b->calls, n);
    int code = cli_interrupted() ? CLI_INTERRUPTED : CLI_OK;
    for (uint32_t i = 0; i < n; i++) {
        code = code == CLI_OK ? cli_report(&b->calls[i]) : code;
        json_decref(b->calls[i].result);
    }
    return code;
}

/* ---- many against one -------------------------------------------------------------------- */

static size_t collect_gaps(struct streams_bench *b, uint32_t n, double after, double until)
{
    size_t n_gaps = 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct stream *s = &b->streams[i];
        for (uint32_t k = 1; k < s->n; k++) {
            if (s->at_us[k] > after && s->at_us[k] <= until) {
                b->gaps[n_gaps++] = (s->at_us[k] - s->at_us[k - 1]) / 1e3;
            }
        }
    }
    return n_gaps;
}

static void measure_pace(struct streams_bench *b, uint32_t n, double sent_us, struct pace *ret)
{
    double open = 0, close = 0, last = 0;
    for (uint32_t i = 0; i < n; i++) {
        const struct stream *s = &b->streams[i];
        double begin = s->n > 0 ? s->at_us[0] : 0, end = s->n > 0 ? s->at_us[s->n - 1] : 0;
        open = begin > open ? begin : open;
        close = i == 0 || end < close ? end : close;
        last = end > last ? end : last;
    }
    ret->whole_tps = last > sent_us ? n * GEN / (last - sent_us) * 1e6 : 0;
    size_t n_gaps = collect_gaps(b, n, open, close);
    ret->decode_tps = close > open ? (double)n_gaps / (close - open) * 1e6 : 0;
    ret->gap_p50_ms = n_gaps > 0 ? cli_percentile(b->gaps, n_gaps, 50) : 0;
    ret->gap_p99_ms = n_gaps > 0 ? cli_percentile(b->gaps, n_gaps, 99) : 0;
}

/* n streams over fresh prompts, or one fresh prompt of all. */
static int run_streams(struct streams_bench *b, uint32_t n, bool shared, bool again,
                       struct pace *ret)
{
    if (!again) {
        bench_random_tokens(b->ids, (size_t)n * PROMPT, b->n_vocab, &b->seed);
    }
    double sent_us = cli_now_us();
    for (uint32_t i = 0; i < n; i++) {
        start(b, i, b->ids + (shared ? 0 : (size_t)i * PROMPT), PROMPT, GEN);
    }
    int code = finish(b, n);
    measure_pace(b, n, sent_us, ret);
    return code;
}

/* Cold for the whole, then again for decoding alone. */
static int measure_streams(struct streams_bench *b, uint32_t n, bool shared, struct pace *ret)
{
    struct pace cold, warm = {0};
    int code = run_streams(b, n, shared, false, &cold);
    code = code == CLI_OK ? run_streams(b, n, shared, true, &warm) : code;
    *ret = warm;
    ret->whole_tps = cold.whole_tps;
    return code;
}

/* ---- a long prompt beside four ----------------------------------------------------------- */

struct disturbance {
    double before_p50_ms, during_p50_ms, worst_ms, prompt_ms, prompt_alone_ms;
};

static bool have_settled(const struct streams_bench *b)
{
    for (uint32_t i = 0; i < RUNNING; i++) {
        if (b->streams[i].n < SETTLED && !b->calls[i].done) {
            return false;
        }
    }
    return true;
}

static int disturb(struct streams_bench *b, struct disturbance *ret)
{
    bench_random_tokens(b->ids, (size_t)RUNNING * PROMPT, b->n_vocab, &b->seed);
    for (uint32_t i = 0; i < RUNNING; i++) {
        start(b, i, b->ids + (size_t)i * PROMPT, PROMPT, RUNNING_GEN);
    }
    while (!have_settled(b) && !cli_interrupted()) {
        if (gqa_process(b->c->g) == 0) {
            gqa_wait(b->c->g, 100000);
        }
    }
    double sent_us = cli_now_us();
    size_t n = collect_gaps(b, RUNNING, b->streams[0].at_us[0], sent_us);
    ret->before_p50_ms = n > 0 ? cli_percentile(b->gaps, n, 50) : 0;
    start(b, RUNNING, b->long_ids, b->n_long, 1);
    while (!b->calls[RUNNING].done && !cli_interrupted()) {
        if (gqa_process(b->c->g) == 0) {
            gqa_wait(b->c->g, 100000);
        }
    }
    double done_us = cli_now_us();
    for (uint32_t i = 0; i < RUNNING; i++) {
        gqa_cancel(b->c->g, b->calls[i].id);
    }
    int code = finish(b, RUNNING + 1);
    n = collect_gaps(b, RUNNING, sent_us, done_us);
    ret->during_p50_ms = n > 0 ? cli_percentile(b->gaps, n, 50) : 0;
    ret->worst_ms = n > 0 ? cli_percentile(b->gaps, n, 100) : 0;
    ret->prompt_ms = (done_us - sent_us) / 1e3;
    return code;
}

static int measure_disturbance(struct streams_bench *b, struct disturbance *ret)
{
    bench_random_tokens(b->long_ids, b->n_long, b->n_vocab, &b->seed);
    double sent_us = cli_now_us();
    start(b, 0, b->long_ids, b->n_long, 1);
    int code = finish(b, 1);
    ret->prompt_alone_ms = (cli_now_us() - sent_us) / 1e3;
    bench_random_tokens(b->long_ids, b->n_long, b->n_vocab, &b->seed);
    return code == CLI_OK ? disturb(b, ret) : code;
}

/* ---- the whole --------------------------------------------------------------------------- */

static double ratio(double a, double b)
{
    return b > 0 ? a / b : 0;
}

static json_t *pace_row(const struct pace *p, const struct pace *one)
{
    return json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "whole_tps", p->whole_tps,
                     "whole_ratio", ratio(p->whole_tps, one->whole_tps), "decode_tps",
                     p->decode_tps, "decode_ratio", ratio(p->decode_tps, one->decode_tps),
                     "inter_token_p50_ms", p->gap_p50_ms, "inter_token_p99_ms", p->gap_p99_ms,
                     "p99_over_p50", ratio(p->gap_p99_ms, p->gap_p50_ms));
}

static int report(const struct streams_bench *b, const struct pace *one, const struct pace *many,
                  const struct pace *shared, const struct disturbance *d)
{
    json_t *j =
        json_pack("{s:I, s:o, s:o, s:o, s:o}", "n_streams", (json_int_t)b->n_streams, "one",
                  pace_row(one, one), "streams", pace_row(many, one), "streams_shared",
                  pace_row(shared, one), "long_prompt",
                  json_pack("{s:I, s:f, s:f, s:f, s:f, s:f, s:f}", "n_prompt",
                            (json_int_t)b->n_long, "inter_token_before_ms", d->before_p50_ms,
                            "inter_token_during_ms", d->during_p50_ms, "during_over_before",
                            ratio(d->during_p50_ms, d->before_p50_ms), "worst_gap_ms", d->worst_ms,
                            "ttft_ms", d->prompt_ms, "ttft_alone_ms", d->prompt_alone_ms));
    if (b->c->json) {
        return cli_print_json(j);
    }
    cli_print_tree(j, 0);
    json_decref(j);
    return cli_flush();
}

static int run(struct streams_bench *b)
{
    struct pace one = {0}, many = {0}, shared = {0}, ignored;
    struct disturbance d = {0};
    int code = run_streams(b, 1, false, false, &ignored); /* touches memory for the first time */
    code = code == CLI_OK ? measure_streams(b, 1, false, &one) : code;
    code = code == CLI_OK ? measure_streams(b, b->n_streams, false, &many) : code;
    code = code == CLI_OK ? measure_streams(b, b->n_streams, true, &shared) : code;
    code = code == CLI_OK && b->n_long > 0 ? measure_disturbance(b, &d) : code;
    return code == CLI_OK ? report(b, &one, &many, &shared, &d) : code;
}

int serve_streams(struct cli *c, const char *model, uint32_t n_vocab, uint32_t n_streams,
                  uint32_t n_long)
{
    size_t n = (size_t)n_streams + RUNNING + 1;
    struct streams_bench b = {.c = c,
                              .model = model,
                              .n_vocab = n_vocab,
                              .n_streams = n_streams,
                              .n_long = n_long,
                              .seed = (uint64_t)cli_now_us(),
                              .streams = calloc(n, sizeof(*b.streams)),
                              .calls = calloc(n, sizeof(*b.calls)),
                              .ids = calloc(n * PROMPT, sizeof(*b.ids)),
                              .long_ids = calloc(n_long, sizeof(*b.long_ids)),
                              .gaps = calloc(n * RUNNING_GEN, sizeof(*b.gaps))};
    int code = b.streams == NULL || b.calls == NULL || b.ids == NULL || b.long_ids == NULL ||
                       b.gaps == NULL
                   ? cli_error(EX_OSERR, "bench: no memory for %u streams", n_streams)
                   : run(&b);
    free(b.streams);
    free(b.calls);
    free(b.ids);
    free(b.long_ids);
    free(b.gaps);
    return code;
}
