/* client/cli/eval_longgen.c - gqa eval longgen: what a KV policy costs and spares, far into a text.
 *
 * Prompts of the given depth are continued greedily with all of their tokens kept, then with the
 * policy of the options. Beside memory and speed it tells the loss: the mean negative
 * log-likelihood that each gives to the very continuations that the whole prompts led to (the
 * policy sees their tokens as text, so that one early difference does not decide), and how many of
 * its own tokens are the same.
 *
 * Speed is that of a step in the middle of the generation: the median time between two tokens of a
 * stream. What happens once, right after the prompt, is told apart: the longest of these times. A
 * step reads the weights once and each stream's K and V: by these bytes the policy could be so much
 * faster, if memory were all. */
#include "client/cli/eval.h"

#include <stdlib.h>
#include <string.h>

#define STREAMS_MAX 64u
/* Tokens that follow each other faster come bunched: a step is then the mean of all. */
#define STEP_MS_MIN 1.0

struct longgen {
    struct eval_input in;
    uint32_t depth, n_predict, n_streams;
    json_t *info;
    int32_t *ids[STREAMS_MAX]; /* (depth + n_predict) a prompt, then what full went on with */
};

/* One stream's generation. */
struct generation {
    struct cli_stream clock;
    int32_t *tokens; /* (n_predict) */
    size_t n_tokens, n_max;
};

/* What one policy has given; sums over streams are means, but for tps. */
struct outcome {
    struct generation streams[STREAMS_MAX];
    double n_kept, n_dropped, tps, step_ms, worst_ms, prompt_ms, nll;
    double kv_bytes, step_bytes;
};

static const struct argp_option options[] = {
    {"depth", 'd', "N", 0, "Tokens of the prompt (default 4096)", 5},
    {"n-predict", 'n', "N", 0, "Tokens generated behind it (default 64)", 5},
    {"streams", 's', "N", 0, "So many prompts at once, each of its own tokens (default 1)", 5},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct longgen *x = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &x->in;
        return 0;
    case 'd':
        x->depth = (uint32_t)cli_number(state, "depth", arg, 1, 1u << 19);
        return 0;
    case 'n':
        x->n_predict = (uint32_t)cli_number(state, "n-predict", arg, 2, 1u << 16);
        return 0;
    case 's':
        x->n_streams = (uint32_t)cli_number(state, "streams", arg, 1, STREAMS_MAX);
        return 0;
    case ARGP_KEY_END:
        if (x->in.policy.given[0] == NULL) {
            cli_usage(state, "no policy to compare with full was given (--kv-policy)");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---- prompts ----------------------------------------------------------------------------- */

static void fill_random(struct longgen *x)
{
    uint64_t state = 0x9e3779b97f4a7c15u;
    uint32_t n_vocab = (uint32_t)cli_num(x->info, "n_vocab", 1);
    for (uint32_t s = 0; s < x->n_streams; s++) {
        for (uint32_t i = 0; i < x->depth; i++) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            x->ids[s][i] = (int32_t)(state % n_vocab);
        }
    }
}

/* The text's first tokens, the next stream's behind them. */
static int fill_text(struct cli *c, struct longgen *x)
{
    size_t n = 0, wanted = (size_t)x->depth * x->n_streams;
    int32_t *ids = NULL;
    int code = eval_read_tokens(c, &x->in, &ids, &n);
    if (code == CLI_OK && n < wanted) {
        code = cli_error(EX_DATAERR, "%s: %zu tokens are less than the %u of -d, %u times",
                         x->in.file, n, x->depth, x->n_streams);
    }
    for (uint32_t s = 0; code == CLI_OK && s < x->n_streams; s++) {
        memcpy(x->ids[s], ids + (size_t)s * x->depth, x->depth * sizeof(*ids));
    }
    free(ids);
    return code;
}

static int fill(struct cli *c, struct longgen *x)
{
    for (uint32_t s = 0; s < x->n_streams; s++) {
        x->ids[s] = calloc((size_t)x->depth + x->n_predict, sizeof(*x->ids[s]));
        if (x->ids[s] == NULL) {
            return cli_error(EX_OSERR, "eval: no memory");
        }
    }
    if (x->in.file != NULL) {
        return fill_text(c, x);
    }
    fill_random(x);
    return CLI_OK;
}

/* ---- one policy -------------------------------------------------------------------------- */

static void on_tokens(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct generation *g = arg;
    const struct gqa_value *tokens = gqa_value_get(event, "tokens");
    size_t n = gqa_value_count(tokens);
    for (size_t i = 0; i < n && g->n_tokens < g->n_max; i++) {
        int64_t token = 0;
        gqa_value_i64(gqa_value_at(tokens, i), &token);
        g->tokens[g->n_tokens++] = (int32_t)token;
    }
    cli_stream_take(&g->clock, n);
}

static int outcome_init(const struct longgen *x, struct outcome *o)
{
    *o = (struct outcome){.n_kept = 0};
    for (uint32_t s = 0; s < x->n_streams; s++) {
        struct generation *g = &o->streams[s];
        g->n_max = g->clock.n_max = x->n_predict;
        g->tokens = calloc(x->n_predict, sizeof(*g->tokens));
        g->clock.at_us = calloc(x->n_predict, sizeof(*g->clock.at_us));
        if (g->tokens == NULL || g->clock.at_us == NULL) {
            return cli_error(EX_OSERR, "eval: no memory");
        }
    }
    return CLI_OK;
}

static void outcome_finish(struct outcome *o)
{
    for (uint32_t s = 0; s < STREAMS_MAX; s++) {
        free(o->streams[s].tokens);
        free(o->streams[s].clock.at_us);
    }
}

/* All streams at once; o NULL: one token of each, so that the prompts are computed. */
static int run(struct cli *c, const struct longgen *x, const struct cli_policy *policy,
               struct cli_call *calls, struct outcome *o)
{
    int code = CLI_OK;
    for (uint32_t s = 0; s < x->n_streams; s++) {
        struct gqa_params *p = cli_model_params(x->in.load.model);
        gqa_params_tokens(p, "tokens", x->ids[s], x->depth);
        gqa_params_u64(p, "n_predict", o != NULL ? x->n_predict : 1);
        gqa_params_f64(p, "temperature", 0);
        gqa_params_bool(p, "ignore_eos", true);
        cli_policy_params(policy, p);
        calls[s] = (struct cli_call){.event = o != NULL ? on_tokens : NULL,
                                     .arg = o != NULL ? &o->streams[s] : NULL};
        cli_start(c, &calls[s], "text.generate", p);
    }
    cli_finish(c, calls, x->n_streams);
    for (uint32_t s = 0; s < x->n_streams && code == CLI_OK; s++) {
        code = cli_report(&calls[s]);
    }
    return code;
}

static void drop(struct cli_call *calls, uint32_t n)
{
    for (uint32_t s = 0; s < n; s++) {
        json_decref(calls[s].result);
    }
}

static int check(const struct longgen *x, const struct outcome *o)
{
    for (uint32_t s = 0; s < x->n_streams; s++) {
        if (o->streams[s].n_tokens != x->n_predict) {
            return cli_error(CLI_FAILED, "text.generate: %zu tokens came, not %u",
                             o->streams[s].n_tokens, x->n_predict);
        }
    }
    return CLI_OK;
}

static void take_figures(const struct longgen *x, const struct cli_call *calls, double start_us,
                         struct outcome *o)
{
    struct cli_stream clocks[STREAMS_MAX];
    double n = x->n_streams;
    for (uint32_t s = 0; s < x->n_streams; s++) {
        const json_t *kv = json_object_get(calls[s].result, "kv");
        const json_t *t = json_object_get(calls[s].result, "timings");
        o->n_kept += cli_num(kv, "n_kept", 0) / n;
        o->n_dropped += cli_num(kv, "n_dropped", 0) / n;
        o->prompt_ms += cli_num(t, "prompt_ms", 0) / n;
        o->tps = cli_num(t, "predicted_per_second", 0); /* of one stream; of several: */
        clocks[s] = o->streams[s].clock;
    }
    if (x->n_streams > 1) {
        o->tps = cli_streams_tps(clocks, x->n_streams, start_us);
    }
    o->step_ms = cli_streams_gap_ms(clocks, x->n_streams, 50);
    if (o->step_ms < STEP_MS_MIN && o->tps > 0) {
        o->step_ms = n * 1e3 / o->tps;
    }
    o->worst_ms = cli_streams_gap_ms(clocks, x->n_streams, 100);
    o->kv_bytes = n * cli_kv_bytes(x->info, o->n_kept);
    o->step_bytes = cli_num(x->info, "weight_bytes_per_token", 0) + o->kv_bytes;
}

static int generate(struct cli *c, const struct longgen *x, const struct cli_policy *policy,
                    struct outcome *o)
{
    struct cli_call calls[STREAMS_MAX];
    int code = CLI_OK;
    if (x->n_streams > 1) { /* they start together afterwards */
        code = run(c, x, policy, calls, NULL);
        drop(calls, x->n_streams);
    }
    if (code != CLI_OK) {
        return code;
    }
    double start_us = cli_now_us();
    code = run(c, x, policy, calls, o);
    code = code == CLI_OK ? check(x, o) : code;
    if (code == CLI_OK) {
        take_figures(x, calls, start_us, o);
    }
    drop(calls, x->n_streams);
    return code;
}

/* The continuations that full gave, after their first tokens. */
static int score(struct cli *c, const struct longgen *x, const struct cli_policy *policy,
                 struct outcome *o)
{
    struct eval_score sum = {0};
    int code = CLI_OK;
    for (uint32_t s = 0; code == CLI_OK && s < x->n_streams; s++) {
        code = eval_score(c, x->in.load.model, policy, x->ids[s], x->depth + x->n_predict,
                          x->depth + 1, &sum);
    }
    o->nll = sum.n_tokens > 0 ? -sum.logprob / (double)sum.n_tokens : 0;
    return code;
}

/* ---- the figures ------------------------------------------------------------------------- */

static double share_equal(const struct longgen *x, const struct outcome *a, const struct outcome *b)
{
    size_t n = 0;
    for (uint32_t s = 0; s < x->n_streams; s++) {
        for (size_t i = 0; i < x->n_predict; i++) {
            n += a->streams[s].tokens[i] == b->streams[s].tokens[i];
        }
    }
    return (double)n / (double)x->n_predict / x->n_streams;
}

static json_t *as_json(const struct longgen *x, const char *name, const struct outcome *o)
{
    return json_pack("{s:s, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "policy", name,
                     "depth", (json_int_t)x->depth, "streams", (json_int_t)x->n_streams, "n_kept",
                     o->n_kept, "n_dropped", o->n_dropped, "kv_bytes", o->kv_bytes, "step_bytes",
                     o->step_bytes, "prompt_ms", o->prompt_ms, "tokens_per_second", o->tps,
                     "step_ms", o->step_ms, "worst_step_ms", o->worst_ms, "nll", o->nll);
}

static void print(const struct longgen *x, const char *name, const struct outcome *o)
{
    char kv[CLI_SIZE_CHARS];
    printf("%-12s %8u %10.0f %12s %10.2f %10.2f %10.2f %8.1f %10.4f\n", name, x->depth, o->n_kept,
           cli_bytes(o->kv_bytes, kv), o->tps, o->step_ms, o->worst_ms,
           o->step_ms > 0 ? o->step_bytes / o->step_ms / 1e6 : 0, o->nll);
}

static int report(const struct cli *c, const struct longgen *x, const struct outcome *full,
                  const struct outcome *other)
{
    const char *name = cli_policy_name(&x->in.policy);
    double equal = share_equal(x, full, other);
    double faster = other->step_ms > 0 ? full->step_ms / other->step_ms : 0;
    double allowed = full->step_bytes / other->step_bytes;
    if (c->json) {
        json_t *runs = json_array();
        json_array_append_new(runs, as_json(x, "full", full));
        json_array_append_new(runs, as_json(x, name, other));
        return cli_print_json(json_pack(
            "{s:o, s:f, s:f, s:f, s:f, s:f, s:f}", "runs", runs, "share_equal", equal, "speedup",
            other->tps / full->tps, "step_speedup", faster, "bytes_allow", allowed, "kv_ratio",
            full->n_kept / other->n_kept, "nll_loss", other->nll - full->nll));
    }
    printf("%-12s %8s %10s %12s %10s %10s %10s %8s %10s\n", "policy", "depth", "kept", "KV",
           "tokens/s", "step ms", "worst", "GB/s", "NLL");
    print(x, "full", full);
    print(x, name, other);
    printf("1/%.2f of the KV; a step is %.2f times as fast, %.2f times by the bytes it reads; the "
           "continuation of full: %+.4f nats a token, %.1f %% of the own tokens are its\n",
           full->n_kept / other->n_kept, faster, allowed, other->nll - full->nll, 100 * equal);
    return CLI_OK;
}

static int compare(struct cli *c, const struct longgen *x, struct outcome *full,
                   struct outcome *other)
{
    const struct cli_policy none = {{NULL}, {0}};
    int code = generate(c, x, &none, full);
    for (uint32_t s = 0; s < x->n_streams && code == CLI_OK; s++) {
        memcpy(x->ids[s] + x->depth, full->streams[s].tokens, x->n_predict * sizeof(int32_t));
    }
    code = code == CLI_OK ? score(c, x, &none, full) : code;
    code = code == CLI_OK ? generate(c, x, &x->in.policy, other) : code;
    code = code == CLI_OK ? score(c, x, &x->in.policy, other) : code;
    return code == CLI_OK ? report(c, x, full, other) : code;
}

int cli_eval_longgen(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&eval_input_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .doc =
                                         "Compares a KV policy with keeping everything, far into "
                                         "a text (-f; else random tokens): memory, speed, loss.",
                                     .children = children};
    struct longgen x = {.depth = 4096, .n_predict = 64, .n_streams = 1};
    struct outcome full, other;
    cli_parse(c, &argp, argc, argv, &x);
    int code = eval_open(c, &x.in, &x.info);
    code = code == CLI_OK ? fill(c, &x) : code;
    int has_full = outcome_init(&x, &full), has_other = outcome_init(&x, &other);
    code = code == CLI_OK ? (has_full != CLI_OK ? has_full : has_other) : code;
    code = code == CLI_OK ? compare(c, &x, &full, &other) : code;
    outcome_finish(&full);
    outcome_finish(&other);
    for (uint32_t s = 0; s < x.n_streams; s++) {
        free(x.ids[s]);
    }
    json_decref(x.info);
    free(x.in.load.model);
    return code;
}
