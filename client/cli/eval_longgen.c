/* client/cli/eval_longgen.c - gqa eval longgen: what a KV policy costs and spares, far into a text.
 *
 * A prompt of the given depth is continued greedily with all of its tokens kept, then with the
 * policy of the options. Beside memory and speed it tells the loss: the mean negative
 * log-likelihood that each gives to the very continuation that the whole prompt led to (the policy
 * sees its tokens as text, so that one early difference does not decide), and how many of its own
 * tokens are the same. */
#include "client/cli/cli.h"

#include <stdlib.h>
#include <string.h>

struct longgen {
    struct cli_load load;
    struct cli_policy policy;
    const char *file;
    uint32_t depth, n_predict;
    uint32_t n_vocab;
    double token_bytes; /* of KV, all layers */
    int32_t *ids;       /* (depth + n_predict) the prompt, then what full went on with */
};

/* What one policy has given. */
struct outcome {
    int32_t *tokens; /* (n_predict) */
    size_t n_tokens;
    double n_kept, n_dropped, tps, prompt_ms, nll;
    size_t n_scored;
};

static const struct argp_option options[] = {
    {"depth", 'd', "N", 0, "Tokens of the prompt (default 4096)", 5},
    {"n-predict", 'n', "N", 0, "Tokens generated behind it (default 64)", 5},
    {"file", 'f', "FILE", 0, "The prompt's text (- for standard input); absent: random tokens", 5},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct longgen *x = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &x->load;
        state->child_inputs[1] = &x->policy;
        return 0;
    case 'd':
        x->depth = (uint32_t)cli_number(state, "depth", arg, 1, 1u << 19);
        return 0;
    case 'n':
        x->n_predict = (uint32_t)cli_number(state, "n-predict", arg, 2, 1u << 16);
        return 0;
    case 'f':
        x->file = arg;
        return 0;
    case ARGP_KEY_END:
        if (x->policy.given[0] == NULL) {
            cli_usage(state, "no policy to compare with full was given (--kv-policy)");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---- the prompt -------------------------------------------------------------------------- */

static void fill_random(struct longgen *x)
{
    uint64_t state = 0x9e3779b97f4a7c15u;
    for (uint32_t i = 0; i < x->depth; i++) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        x->ids[i] = (int32_t)(state % x->n_vocab);
    }
}

static int fill_text(struct cli *c, struct longgen *x)
{
    char *text;
    size_t bytes, n = 0;
    int32_t *ids = NULL;
    int code = cli_read_file(x->file, &text, &bytes);
    if (code != CLI_OK) {
        return code;
    }
    code = cli_tokenise(c, x->load.model, text, bytes, true, &ids, &n);
    free(text);
    if (code == CLI_OK && n < x->depth) {
        code = cli_error(EX_DATAERR, "%s: %zu tokens are less than the depth of %u (-d)", x->file,
                         n, x->depth);
    }
    if (code == CLI_OK) {
        memcpy(x->ids, ids, x->depth * sizeof(*ids));
    }
    free(ids);
    return code;
}

/* ---- one policy -------------------------------------------------------------------------- */

static int generate(struct cli *c, const struct longgen *x, const struct cli_policy *policy,
                    struct outcome *ret)
{
    struct gqa_params *p = cli_model_params(x->load.model);
    json_t *result = NULL;
    gqa_params_tokens(p, "tokens", x->ids, x->depth);
    gqa_params_u64(p, "n_predict", x->n_predict);
    gqa_params_f64(p, "temperature", 0);
    gqa_params_bool(p, "ignore_eos", true);
    gqa_params_bool(p, "stream", false);
    cli_policy_params(policy, p);
    int code = cli_call(c, "text.generate", p, NULL, NULL, &result);
    if (code != CLI_OK) {
        return code;
    }
    const json_t *kv = json_object_get(result, "kv"), *t = json_object_get(result, "timings");
    const json_t *tokens = json_object_get(result, "tokens");
    ret->n_kept = cli_num(kv, "n_kept", 0);
    ret->n_dropped = cli_num(kv, "n_dropped", 0);
    ret->tps = cli_num(t, "predicted_per_second", 0);
    ret->prompt_ms = cli_num(t, "prompt_ms", 0);
    ret->n_tokens = json_array_size(tokens);
    ret->tokens = calloc(ret->n_tokens + 1, sizeof(*ret->tokens));
    for (size_t i = 0; ret->tokens != NULL && i < ret->n_tokens; i++) {
        ret->tokens[i] = (int32_t)json_integer_value(json_array_get(tokens, i));
    }
    json_decref(result);
    if (ret->tokens == NULL || ret->n_tokens != x->n_predict) {
        return cli_error(CLI_FAILED, "text.generate: %zu tokens came, not %u", ret->n_tokens,
                         x->n_predict);
    }
    return CLI_OK;
}

static void on_rows(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct outcome *o = arg;
    struct gqa_tensor_view t;
    if (gqa_value_tensor_f32(gqa_value_get(event, "logprobs"), &t) < 0) {
        return;
    }
    for (size_t i = 0; i < t.bytes / sizeof(float); i++) {
        float logprob;
        memcpy(&logprob, (const char *)t.data + i * sizeof(logprob), sizeof(logprob));
        o->nll -= (double)logprob;
        o->n_scored++;
    }
}

/* The continuation that full gave, after its first token. */
static int score(struct cli *c, const struct longgen *x, const struct cli_policy *policy,
                 struct outcome *o)
{
    struct gqa_params *p = cli_model_params(x->load.model);
    gqa_params_tokens(p, "tokens", x->ids, x->depth + x->n_predict);
    gqa_params_u64(p, "first_row", x->depth);
    gqa_params_bool(p, "logprobs", true);
    cli_policy_params(policy, p);
    int code = cli_call(c, "text.logits", p, on_rows, o, NULL);
    if (code == CLI_OK && o->n_scored == 0) {
        code = cli_error(CLI_FAILED, "text.logits: no log-probabilities came");
    }
    o->nll /= o->n_scored > 0 ? (double)o->n_scored : 1;
    return code;
}

/* ---- the figures ------------------------------------------------------------------------- */

static double share_equal(const struct outcome *a, const struct outcome *b)
{
    size_t n = 0;
    for (size_t i = 0; i < a->n_tokens; i++) {
        n += a->tokens[i] == b->tokens[i];
    }
    return (double)n / (double)a->n_tokens;
}

static json_t *as_json(const struct longgen *x, const char *name, const struct outcome *o)
{
    return json_pack("{s:s, s:I, s:f, s:f, s:f, s:f, s:f, s:f}", "policy", name, "depth",
                     (json_int_t)x->depth, "n_kept", o->n_kept, "n_dropped", o->n_dropped,
                     "kv_bytes", o->n_kept * x->token_bytes, "prompt_ms", o->prompt_ms,
                     "tokens_per_second", o->tps, "nll", o->nll);
}

static void print(const struct longgen *x, const char *name, const struct outcome *o)
{
    char bytes[CLI_SIZE_CHARS];
    printf("%-12s %8u %10.0f %12s %12.2f %10.4f\n", name, x->depth, o->n_kept,
           cli_bytes(o->n_kept * x->token_bytes, bytes), o->tps, o->nll);
}

static int report(const struct cli *c, const struct longgen *x, const struct outcome *full,
                  const struct outcome *other)
{
    const char *name = cli_policy_name(&x->policy);
    double equal = share_equal(full, other);
    if (c->json) {
        json_t *runs = json_array();
        json_array_append_new(runs, as_json(x, "full", full));
        json_array_append_new(runs, as_json(x, name, other));
        return cli_print_json(json_pack("{s:o, s:f, s:f, s:f, s:f}", "runs", runs, "share_equal",
                                        equal, "speedup", other->tps / full->tps, "kv_ratio",
                                        full->n_kept / other->n_kept, "nll_loss",
                                        other->nll - full->nll));
    }
    printf("%-12s %8s %10s %12s %12s %10s\n", "policy", "depth", "kept", "KV", "tokens/s", "NLL");
    print(x, "full", full);
    print(x, name, other);
    printf("%.2fx the speed with 1/%.2f of the KV; the continuation of full: %+.4f nats a token, "
           "%.1f %% of the own tokens are its\n",
           other->tps / full->tps, full->n_kept / other->n_kept, other->nll - full->nll,
           100 * equal);
    return CLI_OK;
}

static int compare(struct cli *c, struct longgen *x)
{
    const struct cli_policy none = {{NULL}, {0}};
    struct outcome full = {NULL}, other = {NULL};
    int code = generate(c, x, &none, &full);
    if (code == CLI_OK) {
        memcpy(x->ids + x->depth, full.tokens, x->n_predict * sizeof(*x->ids));
        code = score(c, x, &none, &full);
    }
    code = code == CLI_OK ? generate(c, x, &x->policy, &other) : code;
    code = code == CLI_OK ? score(c, x, &x->policy, &other) : code;
    code = code == CLI_OK ? report(c, x, &full, &other) : code;
    free(full.tokens);
    free(other.tokens);
    return code;
}

int cli_eval_longgen(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {
        {&cli_load_argp, 0, NULL, 0}, {&cli_policy_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .doc =
                                         "Compares a KV policy with keeping everything, far into "
                                         "a text: memory, speed, loss.",
                                     .children = children};
    struct longgen x = {.depth = 4096, .n_predict = 64};
    json_t *info = NULL;
    cli_parse(c, &argp, argc, argv, &x);
    int code = cli_connect(c);
    code = code == CLI_OK ? cli_load_if_asked(c, &x.load) : code;
    code = code == CLI_OK ? cli_model_info(c, &x.load, &info) : code;
    if (code == CLI_OK) {
        x.n_vocab = (uint32_t)cli_num(info, "n_vocab", 1);
        x.token_bytes = cli_num(json_object_get(info, "cache"), "bytes_per_token", 0);
        x.ids = calloc((size_t)x.depth + x.n_predict, sizeof(*x.ids));
        code = x.ids != NULL ? CLI_OK : cli_error(EX_OSERR, "eval: no memory");
    }
    if (code == CLI_OK && x.file == NULL) {
        fill_random(&x);
    } else if (code == CLI_OK) {
        code = fill_text(c, &x);
    }
    code = code == CLI_OK ? compare(c, &x) : code;
    free(x.ids);
    json_decref(info);
    free(x.load.model);
    return code;
}
