/* client/cli/verb_eval.c - gqa eval: how well a model answers questions and predicts texts.
 *
 * The questions are a file of JSON lines, {context, choices, answer} or {text}. A choice's score is
 * the log-probability of its tokens after the context, as the evaluation harness of EleutherAI
 * counts it: context and choice are tokenised together, and what differs from the context's own
 * tokens is scored. Accuracy takes the best sum, length-normalised accuracy the best sum per byte
 * of the choice. A text's tokens are scored after its first (a BOS, where the model wants one). */
#include "client/cli/eval.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CHOICES_MAX 64u

enum { KEY_DETAILS = 0x500 };

struct eval {
    struct eval_input in;
    uint64_t n_items_max; /* 0: all */
    bool details;
    size_t line; /* of the file, from 1, for messages */
    /* Questions. */
    uint64_t n_questions, n_right, n_right_norm;
    /* Sums over the texts' scored tokens, and their bytes. */
    uint64_t n_texts, n_scored;
    double nll, nll2, bytes;
};

static const struct argp_option options[] = {
    {"items", 'N', "N", 0, "Only the first N lines", 5},
    {"details", KEY_DETAILS, NULL, 0, "Print a JSON object per line of the file first", 5},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct eval *e = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &e->in;
        return 0;
    case 'N':
        e->n_items_max = cli_number(state, "items", arg, 1, UINT32_MAX);
        return 0;
    case KEY_DETAILS:
        e->details = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int bad_line(const struct eval *e, const char *why)
{
    return cli_error(EX_DATAERR, "%s: line %zu: %s", e->in.file, e->line, why);
}

/* ---- scores ------------------------------------------------------------------------------ */

/* The score of a choice after its context, whose own tokens are given. */
static int score_choice(struct cli *c, const struct eval *e, const json_t *context,
                        const int32_t *of_context, size_t n_context, const json_t *choice,
                        struct eval_score *ret)
{
    size_t head = json_string_length(context), tail = json_string_length(choice);
    char *text = malloc(head + tail + 1);
    int32_t *ids = NULL;
    size_t n = 0;
    if (text == NULL) {
        return cli_error(EX_OSERR, "eval: no memory");
    }
    memcpy(text, json_string_value(context), head);
    memcpy(text + head, json_string_value(choice), tail + 1);
    int code = cli_tokenise(c, e->in.load.model, text, head + tail, true, &ids, &n);
    free(text);
    if (code != CLI_OK) {
        return code;
    }
    size_t same = 0;
    while (same < n && same < n_context && ids[same] == of_context[same]) {
        same++;
    }
    *ret = (struct eval_score){0};
    code = eval_score(c, e->in.load.model, &e->in.policy, ids, n, same > 0 ? same : 1, ret);
    free(ids);
    return code;
}

/* ---- lines ------------------------------------------------------------------------------- */

/* The right choice: its index, or its words. */
static int find_answer(const struct eval *e, const json_t *choices, const json_t *answer,
                       size_t *ret)
{
    size_t n = json_array_size(choices);
    if (json_is_integer(answer)) {
        json_int_t i = json_integer_value(answer);
        if (i >= 0 && (size_t)i < n) {
            *ret = (size_t)i;
            return CLI_OK;
        }
    }
    for (size_t i = 0; json_is_string(answer) && i < n; i++) {
        if (json_equal(answer, json_array_get(choices, i))) {
            *ret = i;
            return CLI_OK;
        }
    }
    return bad_line(e, "'answer' is neither the index of a choice nor one of the choices");
}

static int check_question(const struct eval *e, const json_t *context, const json_t *choices)
{
    size_t n = json_array_size(choices);
    if (!json_is_string(context)) {
        return bad_line(e, "'context' is not a string");
    }
    if (n < 2 || n > CHOICES_MAX) {
        return bad_line(e, "'choices' is not an array of 2 to 64 strings");
    }
    for (size_t i = 0; i < n; i++) {
        if (json_string_length(json_array_get(choices, i)) == 0) {
            return bad_line(e, "a choice is not a string, or empty");
        }
    }
    return CLI_OK;
}

static void print_question(const struct eval *e, const struct eval_score *scores, size_t n,
                           size_t answer, size_t best, size_t best_norm)
{
    json_t *logprobs = json_array(), *n_tokens = json_array();
    for (size_t i = 0; i < n; i++) {
        json_array_append_new(logprobs, json_real(scores[i].logprob));
        json_array_append_new(n_tokens, json_integer((json_int_t)scores[i].n_tokens));
    }
    cli_print_json_line(json_pack("{s:I, s:o, s:o, s:I, s:I, s:I}", "line", (json_int_t)e->line,
                                  "logprobs", logprobs, "n_tokens", n_tokens, "answer",
                                  (json_int_t)answer, "chosen", (json_int_t)best, "chosen_norm",
                                  (json_int_t)best_norm));
}

static int ask(struct cli *c, struct eval *e, const json_t *object)
{
    const json_t *context = json_object_get(object, "context");
    const json_t *choices = json_object_get(object, "choices");
    struct eval_score scores[CHOICES_MAX];
    int32_t *ids = NULL;
    size_t n_ids = 0, answer = 0, best = 0, best_norm = 0, n = json_array_size(choices);
    double norms[CHOICES_MAX];
    int code = check_question(e, context, choices);
    code =
        code == CLI_OK ? find_answer(e, choices, json_object_get(object, "answer"), &answer) : code;
    if (code == CLI_OK) {
        code = cli_tokenise(c, e->in.load.model, json_string_value(context),
                            json_string_length(context), true, &ids, &n_ids);
    }
    for (size_t i = 0; i < n && code == CLI_OK; i++) {
        const json_t *choice = json_array_get(choices, i);
        code = score_choice(c, e, context, ids, n_ids, choice, &scores[i]);
        if (code == CLI_OK) {
            norms[i] = scores[i].logprob / (double)json_string_length(choice);
            best = scores[i].logprob > scores[best].logprob ? i : best;
            best_norm = norms[i] > norms[best_norm] ? i : best_norm;
        }
    }
    free(ids);
    if (code != CLI_OK) {
        return code;
    }
    e->n_questions++;
    e->n_right += best == answer;
    e->n_right_norm += best_norm == answer;
    if (e->details) {
        print_question(e, scores, n, answer, best, best_norm);
    }
    return CLI_OK;
}

static int read_text(struct cli *c, struct eval *e, const json_t *text)
{
    struct eval_score s = {0};
    int32_t *ids = NULL;
    size_t n = 0;
    if (!json_is_string(text)) {
        return bad_line(e, "'text' is not a string");
    }
    int code = cli_tokenise(c, e->in.load.model, json_string_value(text), json_string_length(text),
                            true, &ids, &n);
    code = code == CLI_OK ? eval_score(c, e->in.load.model, &e->in.policy, ids, n, 1, &s) : code;
    free(ids);
    if (code != CLI_OK) {
        return code;
    }
    e->n_texts++;
    e->n_scored += s.n_tokens;
    e->nll -= s.logprob;
    e->nll2 += s.squares;
    e->bytes += (double)json_string_length(text);
    if (e->details) {
        cli_print_json_line(json_pack("{s:I, s:f, s:I}", "line", (json_int_t)e->line, "logprob",
                                      s.logprob, "n_tokens", (json_int_t)s.n_tokens));
    }
    return CLI_OK;
}

static int take_line(struct cli *c, struct eval *e, const char *line, size_t bytes)
{
    json_error_t why;
    json_t *object = json_loadb(line, bytes, JSON_REJECT_DUPLICATES, &why);
    int code;
    if (object == NULL) {
        return bad_line(e, why.text);
    }
    const json_t *text = json_object_get(object, "text");
    if (text != NULL) {
        code = read_text(c, e, text);
    } else if (json_object_get(object, "choices") != NULL) {
        code = ask(c, e, object);
    } else {
        code = bad_line(e, "an object needs 'text', or 'context', 'choices' and 'answer'");
    }
    json_decref(object);
    return code;
}

static int take_lines(struct cli *c, struct eval *e, const char *data, size_t bytes)
{
    const char *end = data + bytes;
    bool fancy = cli_fancy(stderr);
    int code = CLI_OK;
    for (const char *line = data; line < end && code == CLI_OK;) {
        const char *stop = memchr(line, '\n', (size_t)(end - line));
        stop = stop != NULL ? stop : end;
        e->line++;
        bool empty = strspn(line, " \t\r") >= (size_t)(stop - line);
        if (!empty && e->n_items_max > 0 && e->n_questions + e->n_texts == e->n_items_max) {
            break;
        }
        code = empty ? CLI_OK : take_line(c, e, line, (size_t)(stop - line));
        if (fancy && code == CLI_OK) {
            fprintf(stderr, "\r\033[K%llu questions, %llu texts",
                    (unsigned long long)e->n_questions, (unsigned long long)e->n_texts);
        }
        line = stop + 1;
    }
    if (fancy) {
        fputs("\r\033[K", stderr);
    }
    if (code == CLI_OK && e->n_questions + e->n_texts == 0) {
        code = cli_error(EX_DATAERR, "%s: no question and no text", e->in.file);
    }
    return code;
}

/* ---- the figures ------------------------------------------------------------------------- */

/* Of a share of n. */
static double share_error(double share, uint64_t n)
{
    return n > 1 ? sqrt(share * (1 - share) / (double)(n - 1)) : 0;
}

static double perplexity_of(const struct eval *e, double *ret_error)
{
    double n = (double)e->n_scored, mean = e->nll / n;
    double variance = e->nll2 / n - mean * mean;
    *ret_error = n > 1 && variance > 0 ? sqrt(variance / (n - 1)) * exp(mean) : 0;
    return exp(mean);
}

static int report(const struct cli *c, const struct eval *e)
{
    double n = (double)(e->n_questions > 0 ? e->n_questions : 1), error = 0;
    double right = (double)e->n_right / n, right_norm = (double)e->n_right_norm / n;
    double perplexity = e->n_scored > 0 ? perplexity_of(e, &error) : 0;
    double bits = e->n_scored > 0 ? e->nll / log(2) / e->bytes : 0;
    if (c->json) {
        json_t *object = json_pack("{s:I, s:I}", "n_questions", (json_int_t)e->n_questions,
                                   "n_texts", (json_int_t)e->n_texts);
        if (e->n_questions > 0) {
            json_object_set_new(object, "accuracy", json_real(right));
            json_object_set_new(object, "accuracy_error",
                                json_real(share_error(right, e->n_questions)));
            json_object_set_new(object, "accuracy_norm", json_real(right_norm));
            json_object_set_new(object, "accuracy_norm_error",
                                json_real(share_error(right_norm, e->n_questions)));
        }
        if (e->n_scored > 0) {
            json_object_set_new(object, "perplexity", json_real(perplexity));
            json_object_set_new(object, "perplexity_error", json_real(error));
            json_object_set_new(object, "bits_per_byte", json_real(bits));
            json_object_set_new(object, "n_scored", json_integer((json_int_t)e->n_scored));
        }
        return e->details ? cli_print_json_line(object) : cli_print_json(object);
    }
    if (e->n_questions > 0) {
        printf("accuracy = %.4f +/- %.4f, by length %.4f +/- %.4f (%llu questions)\n", right,
               share_error(right, e->n_questions), right_norm,
               share_error(right_norm, e->n_questions), (unsigned long long)e->n_questions);
    }
    if (e->n_texts > 0) {
        printf("PPL = %.4f +/- %.5f, %.4f bits per byte (%llu tokens scored in %llu texts)\n",
               perplexity, error, bits, (unsigned long long)e->n_scored,
               (unsigned long long)e->n_texts);
    }
    return CLI_OK;
}

int cli_verb_eval(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&eval_input_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .doc = "Tells how well a model answers multiple-choice questions and predicts texts, a "
               "JSON object per line. 'gqa eval longgen' and 'gqa eval needle' tell what a KV "
               "policy spares and loses.",
        .children = children};
    struct eval e = {.in.needed = "file of questions and texts"};
    char *data = NULL;
    size_t bytes = 0;
    if (argc > 1 && strcmp(argv[1], "needle") == 0) {
        argv[1] = argv[0];
        return cli_eval_needle(c, argc - 1, argv + 1);
    }
    if (argc > 1 && strcmp(argv[1], "longgen") == 0) {
        argv[1] = argv[0];
        return cli_eval_longgen(c, argc - 1, argv + 1);
    }
    cli_parse(c, &argp, argc, argv, &e);
    int code = cli_read_file(e.in.file, &data, &bytes);
    code = code == CLI_OK ? eval_open(c, &e.in, NULL) : code;
    code = code == CLI_OK ? take_lines(c, &e, data, bytes) : code;
    code = code == CLI_OK ? report(c, &e) : code;
    free(data);
    free(e.in.load.model);
    return code;
}
