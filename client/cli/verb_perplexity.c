/* client/cli/verb_perplexity.c - gqa perplexity: how well a model predicts a text.
 *
 * As llama.cpp counts it, so that figures compare: the text is cut into chunks of n_ctx tokens that
 * do not overlap; each is evaluated alone, its first token replaced by BOS where the model wants
 * one, and the second half's tokens are scored, which have at least half a context before them.
 * The error is that of the mean of the negative log-likelihoods, carried through exp(). */
#include "client/cli/cli.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_TOKENS 512u

struct perplexity {
    struct cli_load load;
    struct cli_policy policy;
    const char *file;
    uint32_t n_ctx;
    uint32_t n_chunks_max; /* 0: all */
    /* Sums over scored tokens. */
    double nll, nll2;
    uint64_t n_scored;
    uint64_t n_rows; /* of the chunk, seen so far */
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct perplexity *x = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &x->load;
        state->child_inputs[1] = &x->policy;
        return 0;
    case 'f':
        x->file = arg;
        return 0;
    case 'N':
        x->n_chunks_max = (uint32_t)cli_number(state, "chunks", arg, 1, UINT32_MAX);
        return 0;
    case ARGP_KEY_END:
        if (x->file == NULL) {
            cli_usage(state, "no text was given (-f FILE)");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option options[] = {
    {"file", 'f', "FILE", 0, "The text (- for standard input)", 5},
    {"chunks", 'N', "N", 0, "Only the first N chunks", 5},
    {0},
};

/* Row i of logprobs is the log-probability of token i + 1 after tokens 0..i. */
static void on_rows(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct perplexity *x = arg;
    struct gqa_tensor_view t;
    uint64_t row;
    if (gqa_value_u64(gqa_value_get(event, "first_row"), &row) < 0 ||
        gqa_value_tensor_f32(gqa_value_get(event, "logprobs"), &t) < 0) {
        return;
    }
    for (size_t i = 0; i < t.bytes / sizeof(float); i++, row++) {
        float logprob;
        memcpy(&logprob, (const char *)t.data + i * sizeof(logprob), sizeof(logprob));
        x->n_rows++;
        if (row >= x->n_ctx / 2 && row + 1 < x->n_ctx) {
            x->nll -= logprob;
            x->nll2 += (double)logprob * logprob;
            x->n_scored++;
        }
    }
}

static double perplexity_of(const struct perplexity *x)
{
    return x->n_scored > 0 ? exp(x->nll / (double)x->n_scored) : 0;
}

static double error_of(const struct perplexity *x)
{
    if (x->n_scored < 2) {
        return 0;
    }
    double n = (double)x->n_scored, mean = x->nll / n;
    double variance = x->nll2 / n - mean * mean;
    return variance > 0 ? sqrt(variance / (n - 1)) * perplexity_of(x) : 0;
}

static int score_chunk(struct cli *c, struct perplexity *x, const int32_t *ids)
{
    struct gqa_params *p = cli_model_params(x->load.model);
    gqa_params_tokens(p, "tokens", ids, x->n_ctx);
    gqa_params_bool(p, "logprobs", true);
    cli_policy_params(&x->policy, p);
    x->n_rows = 0;
    int code = cli_call(c, "text.logits", p, on_rows, x, NULL);
    if (code == CLI_OK && x->n_rows + 1 < x->n_ctx) {
        code = cli_error(CLI_FAILED, "text.logits: %llu log-probabilities came for %u tokens",
                         (unsigned long long)x->n_rows, x->n_ctx);
    }
    return code;
}

static int score(struct cli *c, struct perplexity *x, int32_t *ids, size_t n_ids, int32_t bos)
{
    size_t n_chunks = n_ids / x->n_ctx;
    bool fancy = cli_fancy(stderr);
    if (n_chunks == 0) {
        return cli_error(EX_DATAERR, "%s: %zu tokens are less than one chunk of %u (-c)", x->file,
                         n_ids, x->n_ctx);
    }
    n_chunks = x->n_chunks_max != 0 && x->n_chunks_max < n_chunks ? x->n_chunks_max : n_chunks;
    int code = CLI_OK;
    for (size_t i = 0; i < n_chunks && code == CLI_OK; i++) {
        int32_t *chunk = ids + i * x->n_ctx;
        chunk[0] = bos >= 0 ? bos : chunk[0];
        code = score_chunk(c, x, chunk);
        if (fancy && code == CLI_OK) {
            fprintf(stderr, "\r\033[K%zu/%zu chunks, %.4f", i + 1, n_chunks, perplexity_of(x));
        }
    }
    if (fancy) {
        fputs("\r\033[K", stderr);
    }
    if (code != CLI_OK) {
        return code;
    }
    if (c->json) {
        return cli_print_json(json_pack("{s:f, s:f, s:I, s:I, s:I}", "perplexity", perplexity_of(x),
                                        "error", error_of(x), "n_scored", (json_int_t)x->n_scored,
                                        "n_chunks", (json_int_t)n_chunks, "n_ctx",
                                        (json_int_t)x->n_ctx));
    }
    printf("PPL = %.4f +/- %.5f (%llu tokens scored in %zu chunks of %u)\n", perplexity_of(x),
           error_of(x), (unsigned long long)x->n_scored, n_chunks, x->n_ctx);
    return CLI_OK;
}

/* Tokenises the file; *ret_ids is the caller's (free). */
static int read_text(struct cli *c, struct perplexity *x, int32_t **ret_ids, size_t *ret_count)
{
    char *text;
    size_t bytes;
    int code = cli_read_file(x->file, &text, &bytes);
    if (code != CLI_OK) {
        return code;
    }
    code = cli_tokenise(c, x->load.model, text, bytes, true, ret_ids, ret_count);
    free(text);
    return code;
}

int cli_verb_perplexity(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {
        {&cli_load_argp, 0, NULL, 0}, {&cli_policy_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .doc = "Tells how well a model predicts a text.",
                                     .children = children};
    struct perplexity x = {0};
    int32_t *ids = NULL;
    size_t n_ids = 0;
    json_t *info = NULL;
    cli_parse(c, &argp, argc, argv, &x);
    x.n_ctx = x.load.n_ctx != 0 ? x.load.n_ctx : CHUNK_TOKENS;
    x.load.n_ctx = 0; /* of a chunk, not of the model */
    int code = cli_connect(c);
    if (code == CLI_OK) {
        code = cli_load_if_asked(c, &x.load);
    }
    if (code == CLI_OK) {
        code = cli_model_info(c, &x.load, &info);
    }
    if (code == CLI_OK) {
        code = read_text(c, &x, &ids, &n_ids);
    }
    if (code == CLI_OK) {
        const json_t *tokenizer = json_object_get(info, "tokenizer");
        bool adds = json_is_true(json_object_get(tokenizer, "add_bos"));
        code = score(c, &x, ids, n_ids, adds ? (int32_t)cli_num(tokenizer, "bos", -1) : -1);
    }
    free(ids);
    json_decref(info);
    free(x.load.model);
    return code;
}
