#include "client/cli/eval.h"

#include <stdlib.h>
#include <string.h>

/* ---- options ----------------------------------------------------------------------------- */

static const struct argp_option options[] = {
    {"file", 'f', "FILE", 0, "What is read (- for standard input)", 5},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct eval_input *in = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &in->load;
        state->child_inputs[1] = &in->policy;
        return 0;
    case 'f':
        in->file = arg;
        return 0;
    case ARGP_KEY_END:
        if (in->needed != NULL && in->file == NULL) {
            cli_usage(state, "no %s was given (-f FILE)", in->needed);
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child children[] = {
    {&cli_load_argp, 0, NULL, 0}, {&cli_policy_argp, 0, NULL, 0}, {0}};

const struct argp eval_input_argp = {.options = options, .parser = parse, .children = children};

/* ---- the model and the text -------------------------------------------------------------- */

int eval_open(struct cli *c, struct eval_input *in, json_t **ret_info)
{
    int code = cli_connect(c);
    code = code == CLI_OK ? cli_load_if_asked(c, &in->load) : code;
    return code == CLI_OK && ret_info != NULL ? cli_model_info(c, &in->load, ret_info) : code;
}

int eval_read_tokens(struct cli *c, const struct eval_input *in, int32_t **ret_ids,
                     size_t *ret_count)
{
    char *text;
    size_t bytes;
    int code = cli_read_file(in->file, &text, &bytes);
    if (code != CLI_OK) {
        return code;
    }
    code = cli_tokenise(c, in->load.model, text, bytes, true, ret_ids, ret_count);
    free(text);
    return code;
}

/* ---- scores ------------------------------------------------------------------------------ */

static void on_rows(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct eval_score *sum = arg;
    struct gqa_tensor_view t;
    if (gqa_value_tensor_f32(gqa_value_get(event, "logprobs"), &t) < 0) {
        return;
    }
    for (size_t i = 0; i < t.bytes / sizeof(float); i++) {
        float logprob;
        memcpy(&logprob, (const char *)t.data + i * sizeof(logprob), sizeof(logprob));
        sum->logprob += (double)logprob;
        sum->squares += (double)logprob * (double)logprob;
        sum->n_tokens++;
    }
}

int eval_score(struct cli *c, const char *model, const struct cli_policy *policy,
               const int32_t *ids, size_t n, size_t first, struct eval_score *sum)
{
    struct eval_score s = {0};
    if (first >= n) {
        return CLI_OK;
    }
    struct gqa_params *p = cli_model_params(model);
    gqa_params_tokens(p, "tokens", ids, n);
    gqa_params_bool(p, "logprobs", true);
    gqa_params_u64(p, "first_row", first - 1); /* row i tells of token i + 1 */
    if (policy != NULL) {
        cli_policy_params(policy, p);
    }
    int code = cli_call(c, "text.logits", p, on_rows, &s, NULL);
    if (code == CLI_OK && s.n_tokens != n - first) {
        code = cli_error(CLI_FAILED, "text.logits: %llu log-probabilities came for %zu tokens",
                         (unsigned long long)s.n_tokens, n - first);
    }
    sum->logprob += s.logprob;
    sum->squares += s.squares;
    sum->n_tokens += s.n_tokens;
    return code;
}
