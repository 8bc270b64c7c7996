/* client/cli/sampling.c - sampling parameters as options: one table, named as the protocol does. */
#include "client/cli/cli.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum kind { REAL, WHOLE, SEED, FLAG };

struct row {
    const char *param; /* the protocol's name */
    enum kind kind;
};

/* Keys of options: FIRST + index of the row. */
enum { FIRST = 0x200, KEY_STOP = 0x300, KEY_LOGIT_BIAS };

static const struct row rows[] = {
    {"temperature", REAL},    {"top_k", WHOLE},           {"top_p", REAL},
    {"min_p", REAL},          {"min_keep", WHOLE},        {"repeat_penalty", REAL},
    {"repeat_last_n", WHOLE}, {"presence_penalty", REAL}, {"frequency_penalty", REAL},
    {"seed", SEED},           {"n_probs", WHOLE},         {"t_max_predict_ms", WHOLE},
    {"ignore_eos", FLAG},
};

static const struct argp_option options[] = {
    {NULL, 0, NULL, 0, "Sampling:", 10},
    {"n-predict", 'n', "N", 0, "Most tokens to generate", 10},
    {"max-tokens", 'n', NULL, OPTION_ALIAS, NULL, 10},
    {"temperature", FIRST + 0, "T", 0, "0: always the likeliest token", 10},
    {"temp", FIRST + 0, NULL, OPTION_ALIAS, NULL, 10},
    {"top-k", FIRST + 1, "N", 0, "Keep the best N; 0: all", 10},
    {"top-p", FIRST + 2, "P", 0, "Nucleus; 1: off", 10},
    {"min-p", FIRST + 3, "P", 0, "Least share of the best one's probability; 0: off", 10},
    {"min-keep", FIRST + 4, "N", 0, "Candidates that every sampler leaves", 10},
    {"repeat-penalty", FIRST + 5, "X", 0, "1: off", 10},
    {"repeat-last-n", FIRST + 6, "N", 0, "Tokens looked back; -1: the context", 10},
    {"presence-penalty", FIRST + 7, "X", 0, "0: off", 10},
    {"frequency-penalty", FIRST + 8, "X", 0, "0: off", 10},
    {"seed", FIRST + 9, "N", 0, "Of the draws; without it a random one", 10},
    {"n-probs", FIRST + 10, "N", 0, "Report the log-probabilities of the N best", 10},
    {"t-max-predict-ms", FIRST + 11, "MS", 0, "Stop generating after so long", 10},
    {"ignore-eos", FIRST + 12, NULL, 0, "Go on where the model would end", 10},
    {"stop", KEY_STOP, "TEXT", 0, "Text that ends the generation (may be repeated)", 10},
    {"logit-bias", KEY_LOGIT_BIAS, "ID:BIAS", 0,
     "Add to a token's logit; -inf forbids it (may be repeated)", 10},
    {0},
};

static void set(struct argp_state *state, struct gqa_params *p, const struct row *row,
                const char *arg)
{
    char *end = NULL;
    errno = 0;
    switch (row->kind) {
    case REAL: {
        double x = strtod(arg, &end);
        if (end != arg && *end == '\0' && isfinite(x)) {
            gqa_params_f64(p, row->param, x);
            return;
        }
        break;
    }
    case WHOLE: {
        long long n = strtoll(arg, &end, 10);
        if (end != arg && *end == '\0' && errno == 0) {
            gqa_params_i64(p, row->param, n);
            return;
        }
        break;
    }
    case SEED: {
        gqa_params_u64(p, row->param, cli_number(state, row->param, arg, 0, UINT64_MAX));
        return;
    }
    case FLAG:
        gqa_params_bool(p, row->param, true);
        return;
    }
    cli_usage(state, "--%s: '%s' is no number", row->param, arg);
}

static void add_bias(struct argp_state *state, struct cli_sampling *s, const char *arg)
{
    char *colon, *end;
    errno = 0;
    long id = strtol(arg, &colon, 10);
    if (s->n_biases == CLI_BIASES_MAX) {
        cli_usage(state, "--logit-bias: more than %u", CLI_BIASES_MAX);
    }
    if (colon == arg || *colon != ':' || errno != 0 || id < 0 || id > INT32_MAX) {
        cli_usage(state, "--logit-bias: '%s' is not ID:BIAS", arg);
    }
    float bias = strtof(colon + 1, &end);
    if (end == colon + 1 || *end != '\0' || isnan(bias)) {
        cli_usage(state, "--logit-bias: '%s' is not ID:BIAS", arg);
    }
    s->bias_ids[s->n_biases] = (int32_t)id;
    s->biases[s->n_biases++] = bias;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct cli_sampling *s = state->input;
    if (key >= FIRST && key < FIRST + (int)(sizeof(rows) / sizeof(rows[0]))) {
        set(state, s->params, &rows[key - FIRST], arg);
        return 0;
    }
    switch (key) {
    case 'n':
        gqa_params_u64(s->params, "n_predict", cli_number(state, "n-predict", arg, 0, UINT32_MAX));
        return 0;
    case KEY_STOP:
        if (s->n_stops == CLI_STOPS_MAX) {
            cli_usage(state, "--stop: more than %u", CLI_STOPS_MAX);
        }
        s->stops[s->n_stops++] = arg;
        return 0;
    case KEY_LOGIT_BIAS:
        add_bias(state, s, arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

const struct argp cli_sampling_argp = {.options = options, .parser = parse};

void cli_sampling_finish(struct cli_sampling *s)
{
    if (s->n_stops > 0) {
        gqa_params_strings(s->params, "stop", s->stops, s->n_stops);
    }
    if (s->n_biases > 0) {
        gqa_params_biases(s->params, "logit_bias", s->bias_ids, s->biases, s->n_biases);
    }
}
