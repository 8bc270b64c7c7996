/* client/cli/eval_needle.c - gqa eval needle: does a KV policy find what lies deep in a text?
 *
 * A sentence that names a number is put into a long text, at several depths, and asked for at the
 * end. The number has to be told from CHOICES - 1 others, which are as likely without the sentence:
 * a choice's score is the log-probability of its tokens. Asked with all tokens kept and with a
 * policy. Retrieval by depth as in "needle in a haystack" tests; choices make it work for base
 * models. Where a model is too small to tell, the policy can still be judged: of the sentence's
 * tokens, the share of layers and groups that keep them, beside that of all tokens. */
#include "client/cli/eval.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHOICES    8u
#define DEPTHS     5u /* 0, 25, 50, 75 and 100 % of the text */
#define CASES_MAX  1000u
#define TEXT_CHARS 96u

struct needle {
    struct eval_input in;
    uint32_t n_tokens, n_cases;
    int32_t *filler; /* (n_filler) */
    size_t n_filler;
};

/* Of one policy at one depth. */
struct found {
    uint32_t n_right;
    double margin; /* the right choice's score above the best other one, summed over cases */
    double kept;   /* of the sentence's tokens, likewise */
    double all;    /* of all tokens, likewise */
};

static const struct argp_option options[] = {
    {"depth", 'd', "N", 0, "Tokens of it (default 2048)", 5},
    {"cases", 'N', "N", 0, "Numbers asked for at each depth (default 8)", 5},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct needle *x = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &x->in;
        return 0;
    case 'd':
        x->n_tokens = (uint32_t)cli_number(state, "depth", arg, 1, 1u << 19);
        return 0;
    case 'N':
        x->n_cases = (uint32_t)cli_number(state, "cases", arg, 1, CASES_MAX);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---- a case ------------------------------------------------------------------------------ */

/* Numbers of four digits that differ; the first is the right one. */
static void draw_numbers(uint32_t seed, uint32_t numbers[CHOICES])
{
    uint32_t state = seed * 2654435761u + 12345;
    for (uint32_t i = 0; i < CHOICES; i++) {
        bool is_new = false;
        while (!is_new) {
            state = state * 1664525u + 1013904223u;
            numbers[i] = 1000 + (state >> 8) % 9000;
            is_new = true;
            for (uint32_t j = 0; j < i; j++) {
                is_new = is_new && numbers[j] != numbers[i];
            }
        }
    }
}

/* A prompt with a place for the choice behind it. */
struct prompt {
    int32_t *ids;
    size_t n, room;
    size_t first, n_sentence; /* where the sentence is */
};

static void add(struct prompt *p, const int32_t *ids, size_t n)
{
    if (n > 0) {
        memcpy(p->ids + p->n, ids, n * sizeof(*ids));
    }
    p->n += n;
}

static int add_text(struct cli *c, const struct needle *x, struct prompt *p, const char *text)
{
    int32_t *ids = NULL;
    size_t n = 0;
    int code = cli_tokenise(c, x->in.load.model, text, strlen(text), false, &ids, &n);
    if (code == CLI_OK && p->n + n > p->room) {
        code = cli_error(CLI_FAILED, "eval: '%s' has %zu tokens", text, n);
    }
    if (code == CLI_OK) {
        add(p, ids, n);
    }
    free(ids);
    return code;
}

/* The text up to the question, with the sentence at that depth. */
static int fill(struct cli *c, const struct needle *x, uint32_t depth, uint32_t number,
                struct prompt *p)
{
    char sentence[TEXT_CHARS];
    size_t before = (size_t)x->n_filler * depth / (DEPTHS - 1);
    snprintf(sentence, sizeof(sentence), "\nThe secret number is %u.\n", number);
    p->n = 0;
    add(p, x->filler, before);
    p->first = before;
    int code = add_text(c, x, p, sentence);
    p->n_sentence = p->n - before;
    if (code == CLI_OK) {
        add(p, x->filler + before, x->n_filler - before);
        code = add_text(c, x, p, "\nThe secret number is");
    }
    return code;
}

static int score(struct cli *c, const struct needle *x, const struct cli_policy *policy,
                 struct prompt *p, uint32_t number, double *ret)
{
    char text[TEXT_CHARS];
    size_t first = p->n;
    snprintf(text, sizeof(text), " %u", number);
    int code = add_text(c, x, p, text);
    if (code == CLI_OK) {
        struct eval_score sum = {0};
        code = eval_score(c, x->in.load.model, policy, p->ids, p->n, first, &sum);
        *ret = sum.logprob;
    }
    p->n = first;
    return code;
}

static int ask(struct cli *c, const struct needle *x, const struct cli_policy *policy,
               struct prompt *p, const uint32_t numbers[CHOICES], struct found *found)
{
    double right = 0, best = -HUGE_VAL;
    int code = score(c, x, policy, p, numbers[0], &right);
    for (uint32_t i = 1; i < CHOICES && code == CLI_OK; i++) {
        double other;
        code = score(c, x, policy, p, numbers[i], &other);
        best = code == CLI_OK && other > best ? other : best;
    }
    if (code == CLI_OK) {
        found->n_right += right > best;
        found->margin += right - best;
    }
    return code;
}

static double mean(const json_t *shares, size_t first, size_t n)
{
    double sum = 0;
    for (size_t i = first; i < first + n; i++) {
        sum += json_number_value(json_array_get(shares, i));
    }
    return n > 0 ? sum / (double)n : 0;
}

/* What the policy leaves of the sentence when the question has been read. */
static int see_kept(struct cli *c, const struct needle *x, const struct prompt *p,
                    struct found *found)
{
    struct gqa_params *params = cli_model_params(x->in.load.model);
    json_t *result = NULL;
    gqa_params_tokens(params, "tokens", p->ids, p->n);
    gqa_params_u64(params, "n_predict", 1);
    gqa_params_f64(params, "temperature", 0);
    gqa_params_bool(params, "kv_kept", true);
    cli_policy_params(&x->in.policy, params);
    int code = cli_call(c, "text.generate", params, NULL, NULL, &result);
    if (code != CLI_OK) {
        return code;
    }
    const json_t *kept = json_object_get(json_object_get(result, "kv"), "kept");
    const json_t *shares = json_object_get(kept, "data");
    if (json_array_size(shares) == p->n) {
        found->kept += mean(shares, p->first, p->n_sentence);
        found->all += mean(shares, 0, p->n);
    } else {
        code = cli_error(CLI_FAILED, "text.generate: it is not told which tokens are kept");
    }
    json_decref(result);
    return code;
}

/* ---- all of them ------------------------------------------------------------------------- */

static int report(const struct cli *c, const struct needle *x, const struct found *full,
                  const struct found *other)
{
    const char *name = cli_policy_name(&x->in.policy);
    double n = x->n_cases;
    json_t *rows = json_array();
    if (!c->json) {
        printf("%-8s %10s %10s %10s %10s %10s %10s   (of %u; by chance %.2f)\n", "depth", "full",
               "margin", name, "margin", "kept", "of all", x->n_cases, 1.0 / CHOICES);
    }
    for (uint32_t d = 0; d < DEPTHS; d++) {
        double depth = (double)d / (DEPTHS - 1);
        if (c->json) {
            json_array_append_new(
                rows, json_pack("{s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "depth", depth, "full",
                                full[d].n_right / n, "full_margin", full[d].margin / n, "accuracy",
                                other[d].n_right / n, "margin", other[d].margin / n, "kept",
                                other[d].kept / n, "kept_of_all", other[d].all / n));
        } else {
            printf("%6.0f %% %10.2f %10.3f %10.2f %10.3f %8.1f %% %8.1f %%\n", 100 * depth,
                   full[d].n_right / n, full[d].margin / n, other[d].n_right / n,
                   other[d].margin / n, 100 * other[d].kept / n, 100 * other[d].all / n);
        }
    }
    if (c->json) {
        return cli_print_json(json_pack("{s:s, s:I, s:I, s:f, s:o}", "policy", name, "n_tokens",
                                        (json_int_t)x->n_filler, "n_cases", (json_int_t)x->n_cases,
                                        "chance", 1.0 / CHOICES, "depths", rows));
    }
    json_decref(rows);
    return CLI_OK;
}

static int run(struct cli *c, const struct needle *x)
{
    static const struct cli_policy none;
    struct found full[DEPTHS] = {{0}}, other[DEPTHS] = {{0}};
    struct prompt p = {.room = x->n_filler + 4 * TEXT_CHARS};
    int code = CLI_OK;
    p.ids = calloc(p.room, sizeof(*p.ids));
    if (p.ids == NULL) {
        return cli_error(EX_OSERR, "eval: no memory");
    }
    for (uint32_t d = 0; d < DEPTHS && code == CLI_OK; d++) {
        for (uint32_t i = 0; i < x->n_cases && code == CLI_OK; i++) {
            uint32_t numbers[CHOICES];
            draw_numbers(d * CASES_MAX + i, numbers);
            code = fill(c, x, d, numbers[0], &p);
            code = code == CLI_OK ? ask(c, x, &none, &p, numbers, &full[d]) : code;
            code = code == CLI_OK ? ask(c, x, &x->in.policy, &p, numbers, &other[d]) : code;
            code = code == CLI_OK ? see_kept(c, x, &p, &other[d]) : code;
        }
    }
    free(p.ids);
    return code == CLI_OK ? report(c, x, full, other) : code;
}

int cli_eval_needle(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&eval_input_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .doc = "Hides numbers in a text and asks for them, with all "
                                            "tokens kept and with a KV policy.",
                                     .children = children};
    struct needle x = {.in.needed = "text", .n_tokens = 2048, .n_cases = 8};
    cli_parse(c, &argp, argc, argv, &x);
    int code = eval_open(c, &x.in, NULL);
    code = code == CLI_OK ? eval_read_tokens(c, &x.in, &x.filler, &x.n_filler) : code;
    if (code == CLI_OK && x.n_filler < x.n_tokens) {
        code = cli_error(EX_DATAERR, "%s: %zu tokens are less than the %u of -d", x.in.file,
                         x.n_filler, x.n_tokens);
    }
    x.n_filler = x.n_filler < x.n_tokens ? x.n_filler : x.n_tokens;
    code = code == CLI_OK ? run(c, &x) : code;
    free(x.filler);
    free(x.in.load.model);
    return code;
}
