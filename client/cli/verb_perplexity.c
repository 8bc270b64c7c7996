/* client/cli/verb_perplexity.c - gqa perplexity: how well a model predicts a text.
 *
 * As llama.cpp counts it, so that figures compare: the text is cut into chunks of n_ctx tokens that
 * do not overlap; each is evaluated alone, its first token replaced by BOS where the model wants
 * one, and the second half's tokens are scored, which have at least half a context before them: to
 * a KV policy the first half is the prompt.
 * The error is that of the mean of the negative log-likelihoods, carried through exp(). */
#include "client/cli/eval.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_TOKENS 512u

struct perplexity {
    struct eval_input in;
    uint32_t n_ctx;
    uint32_t n_chunks_max; /* 0: all */
    struct eval_score sum;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct perplexity *x = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &x->in;
        return 0;
    case 'N':
        x->n_chunks_max = (uint32_t)cli_number(state, "chunks", arg, 1, UINT32_MAX);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option options[] = {
    {"chunks", 'N', "N", 0, "Only the first N chunks", 5},
    {0},
};

static double perplexity_of(const struct eval_score *s)
{
    return s->n_tokens > 0 ? exp(-s->logprob / (double)s->n_tokens) : 0;
}

static double error_of(const struct eval_score *s)
{
    if (s->n_tokens < 2) {
        return 0;
    }
    double n = (double)s->n_tokens, mean = s->logprob / n;
    double variance = s->squares / n - mean * mean;
    return variance > 0 ? sqrt(variance / (n - 1)) * perplexity_of(s) : 0;
}

static int score(struct cli *c, struct perplexity *x, int32_t *ids, size_t n_ids, int32_t bos)
{
    size_t n_chunks = n_ids / x->n_ctx;
    bool fancy = cli_fancy(stderr);
    if (n_chunks == 0) {
        return cli_error(EX_DATAERR, "%s: %zu tokens are less than one chunk of %u (-c)",
                         x->in.file, n_ids, x->n_ctx);
    }
    n_chunks = x->n_chunks_max != 0 && x->n_chunks_max < n_chunks ? x->n_chunks_max : n_chunks;
    int code = CLI_OK;
    for (size_t i = 0; i < n_chunks && code == CLI_OK; i++) {
        int32_t *chunk = ids + i * x->n_ctx;
        chunk[0] = bos >= 0 ? bos : chunk[0];
        code = eval_score(c, x->in.load.model, &x->in.policy, chunk, x->n_ctx, x->n_ctx / 2 + 1,
                          &x->sum);
        if (fancy && code == CLI_OK) {
            fprintf(stderr, "\r\033[K%zu/%zu chunks, %.4f", i + 1, n_chunks,
                    perplexity_of(&x->sum));
        }
    }
    if (fancy) {
        fputs("\r\033[K", stderr);
    }
    if (code != CLI_OK) {
        return code;
    }
    if (c->json) {
        return cli_print_json(json_pack("{s:f, s:f, s:I, s:I, s:I}", "perplexity",
                                        perplexity_of(&x->sum), "error", error_of(&x->sum),
                                        "n_scored", (json_int_t)x->sum.n_tokens, "n_chunks",
                                        (json_int_t)n_chunks, "n_ctx", (json_int_t)x->n_ctx));
    }
    printf("PPL = %.4f +/- %.5f (%llu tokens scored in %zu chunks of %u)\n", perplexity_of(&x->sum),
           error_of(&x->sum), (unsigned long long)x->sum.n_tokens, n_chunks, x->n_ctx);
    return CLI_OK;
}

int cli_verb_perplexity(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&eval_input_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .doc = "Tells how well a model predicts a text.",
                                     .children = children};
    struct perplexity x = {.in.needed = "text"};
    int32_t *ids = NULL;
    size_t n_ids = 0;
    json_t *info = NULL;
    cli_parse(c, &argp, argc, argv, &x);
    x.n_ctx = x.in.load.n_ctx != 0 ? x.in.load.n_ctx : CHUNK_TOKENS;
    x.in.load.n_ctx = 0; /* of a chunk, not of the model */
    int code = eval_open(c, &x.in, &info);
    code = code == CLI_OK ? eval_read_tokens(c, &x.in, &ids, &n_ids) : code;
    if (code == CLI_OK) {
        const json_t *tokenizer = json_object_get(info, "tokenizer");
        bool adds = json_is_true(json_object_get(tokenizer, "add_bos"));
        code = score(c, &x, ids, n_ids, adds ? (int32_t)cli_num(tokenizer, "bos", -1) : -1);
    }
    free(ids);
    json_decref(info);
    free(x.in.load.model);
    return code;
}
