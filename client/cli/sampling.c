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
enum {
    FIRST = 0x200,
    KEY_STOP = 0x300,
    KEY_LOGIT_BIAS,
    KEY_SAMPLERS,
    KEY_BREAKER,
    KEY_GRAMMAR,
    KEY_GRAMMAR_FILE
};

static const struct row rows[] = {
    {"temperature", REAL},
    {"top_k", WHOLE},
    {"top_p", REAL},
    {"min_p", REAL},
    {"min_keep", WHOLE},
    {"repeat_penalty", REAL},
    {"repeat_last_n", WHOLE},
    {"presence_penalty", REAL},
    {"frequency_penalty", REAL},
    {"seed", SEED},
    {"n_probs", WHOLE},
    {"t_max_predict_ms", WHOLE},
    {"ignore_eos", FLAG},
    {"dynatemp_range", REAL},
    {"dynatemp_exponent", REAL},
    {"typical_p", REAL},
    {"top_n_sigma", REAL},
    {"xtc_probability", REAL},
    {"xtc_threshold", REAL},
    {"dry_multiplier", REAL},
    {"dry_base", REAL},
    {"dry_allowed_length", WHOLE},
    {"dry_penalty_last_n", WHOLE},
    {"mirostat", WHOLE},
    {"mirostat_tau", REAL},
    {"mirostat_eta", REAL},
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
    {"samplers", KEY_SAMPLERS, "A;B;...", 0, "The samplers that are applied, in that order", 10},
    {"dynatemp-range", FIRST + 13, "X", 0, "The entropy moves the temperature by up to X; 0: off",
     10},
    {"dynatemp-exponent", FIRST + 14, "X", 0, "Power of the normalised entropy", 10},
    {"dynatemp-exp", FIRST + 14, NULL, OPTION_ALIAS, NULL, 10},
    {"typical-p", FIRST + 15, "P", 0, "Share of the locally typical tokens; 1: off", 10},
    {"typical", FIRST + 15, NULL, OPTION_ALIAS, NULL, 10},
    {"top-n-sigma", FIRST + 16, "X", 0, "Standard deviations below the best; 0: off", 10},
    {"top-nsigma", FIRST + 16, NULL, OPTION_ALIAS, NULL, 10},
    {"xtc-probability", FIRST + 17, "P", 0, "Of excluding the top choices; 0: off", 10},
    {"xtc-threshold", FIRST + 18, "P", 0, "Probability of a top choice; above 0.5: off", 10},
    {"dry-multiplier", FIRST + 19, "X", 0, "Penalty for going on with a repetition; 0: off", 10},
    {"dry-base", FIRST + 20, "X", 0, "Its growth per token", 10},
    {"dry-allowed-length", FIRST + 21, "N", 0, "Repeated tokens without a penalty", 10},
    {"dry-penalty-last-n", FIRST + 22, "N", 0, "Tokens looked back; -1: the context", 10},
    {"dry-sequence-breaker", KEY_BREAKER, "TEXT", 0,
     "Text that ends a repetition, in place of the usual ones (may be repeated); none: nothing "
     "does",
     10},
    {"mirostat", FIRST + 23, "N", 0, "1, 2: that version in the samplers' place; 0: off", 10},
    {"mirostat-tau", FIRST + 24, "X", 0, "Surprise that it aims at, in bits", 10},
    {"mirostat-ent", FIRST + 24, NULL, OPTION_ALIAS, NULL, 10},
    {"mirostat-eta", FIRST + 25, "X", 0, "Its learning rate", 10},
    {"mirostat-lr", FIRST + 25, NULL, OPTION_ALIAS, NULL, 10},
    {"grammar", KEY_GRAMMAR, "GBNF", 0, "The text follows this grammar", 10},
    {"grammar-file", KEY_GRAMMAR_FILE, "FILE", 0, "The same, from a file (- for standard input)",
     10},
    {"json-schema", 'j', "SCHEMA", 0, "The text is JSON that satisfies this JSON Schema", 10},
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

/* "top_k;temperature", as llama.cpp's; commas do too. */
static void set_samplers(struct argp_state *state, struct cli_sampling *s, char *list)
{
    const char *names[CLI_SAMPLERS_MAX];
    size_t n = 0;
    char *rest = NULL;
    for (char *name = strtok_r(list, ";,", &rest); name != NULL;
         name = strtok_r(NULL, ";,", &rest)) {
        if (n == CLI_SAMPLERS_MAX) {
            cli_usage(state, "--samplers: more than %u", CLI_SAMPLERS_MAX);
        }
        names[n++] = name;
    }
    gqa_params_strings(s->params, "samplers", names, n);
}

static void add_breaker(struct argp_state *state, struct cli_sampling *s, const char *arg)
{
    s->has_breakers = true;
    if (strcmp(arg, "none") == 0) {
        s->n_breakers = 0;
        return;
    }
    if (s->n_breakers == CLI_BREAKERS_MAX) {
        cli_usage(state, "--dry-sequence-breaker: more than %u", CLI_BREAKERS_MAX);
    }
    s->breakers[s->n_breakers++] = arg;
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
    case KEY_GRAMMAR:
        s->grammar = arg;
        return 0;
    case 'j':
        s->json_schema = arg;
        return 0;
    case KEY_GRAMMAR_FILE:
        s->grammar_file = arg;
        return 0;
    case KEY_SAMPLERS:
        set_samplers(state, s, arg);
        return 0;
    case KEY_BREAKER:
        add_breaker(state, s, arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

const struct argp cli_sampling_argp = {.options = options, .parser = parse};

/* At most one of the three. */
static int add_constraint(struct cli_sampling *s)
{
    char *data;
    size_t bytes;
    if ((s->grammar != NULL) + (s->grammar_file != NULL) + (s->json_schema != NULL) > 1) {
        return cli_error(EX_USAGE,
                         "grammar: give only one of --grammar, --grammar-file and --json-schema");
    }
    if (s->json_schema != NULL) {
        gqa_params_str(s->params, "json_schema", s->json_schema);
    }
    if (s->grammar != NULL) {
        gqa_params_str(s->params, "grammar", s->grammar);
    }
    if (s->grammar_file == NULL) {
        return CLI_OK;
    }
    int code = cli_read_file(s->grammar_file, &data, &bytes);
    if (code == CLI_OK) {
        gqa_params_text(s->params, "grammar", data, bytes);
        free(data);
    }
    return code;
}

int cli_sampling_finish(struct cli_sampling *s)
{
    if (s->n_stops > 0) {
        gqa_params_strings(s->params, "stop", s->stops, s->n_stops);
    }
    if (s->has_breakers) {
        gqa_params_strings(s->params, "dry_sequence_breakers", s->breakers, s->n_breakers);
    }
    if (s->n_biases > 0) {
        gqa_params_biases(s->params, "logit_bias", s->bias_ids, s->biases, s->n_biases);
    }
    return add_constraint(s);
}
