/* client/cli/verb_logits.c - gqa logits: the logits after every token, as raw float32. */
#include "client/cli/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { KEY_TOKENS = 0x500, KEY_NO_SPECIAL, KEY_NO_PARSE_SPECIAL, KEY_FIRST_ROW };

struct logits {
    struct cli_load load;
    struct cli_prompt prompt;
    struct gqa_params *params;
    const char *path;
    uint64_t first_row;
    FILE *out;
    uint64_t next_row; /* rows come in order */
    uint64_t n_vocab;
    char why[128]; /* the first thing that went wrong in an event */
};

static const struct argp_option options[] = {
    {"output", 'o', "FILE", 0, "Where float32 rows go: little-endian, (n_tokens, n_vocab)", 5},
    {"prompt-file", 'f', "FILE", 0, "Read the prompt from a file (- for standard input)", 5},
    {"tokens", KEY_TOKENS, "FILE", 0, "A JSON array of token ids as the prompt", 5},
    {"no-special", KEY_NO_SPECIAL, NULL, 0, "Do not add BOS or EOS to a text", 5},
    {"no-parse-special", KEY_NO_PARSE_SPECIAL, NULL, 0,
     "Control tokens written in a text are plain text", 5},
    {"first-row", KEY_FIRST_ROW, "N", 0, "First position that is written", 5},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct logits *l = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &l->load;
        return 0;
    case 'o':
        l->path = arg;
        return 0;
    case 'f':
        l->prompt.file = arg;
        return 0;
    case KEY_TOKENS:
        l->prompt.tokens_file = arg;
        return 0;
    case KEY_NO_SPECIAL:
        gqa_params_bool(l->params, "add_special", false);
        return 0;
    case KEY_NO_PARSE_SPECIAL:
        gqa_params_bool(l->params, "parse_special", false);
        return 0;
    case KEY_FIRST_ROW:
        l->first_row = cli_number(state, "first-row", arg, 0, UINT32_MAX);
        gqa_params_u64(l->params, "first_row", l->first_row);
        return 0;
    case ARGP_KEY_ARG:
        if (l->prompt.text != NULL) {
            cli_usage(state, "more than one prompt; quote it");
        }
        l->prompt.text = arg;
        return 0;
    case ARGP_KEY_END:
        if (l->path == NULL) {
            cli_usage(state, "no output was given (-o FILE)");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void on_rows(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct logits *l = arg;
    struct gqa_tensor_view t;
    uint64_t first;
    if (l->why[0] != '\0') {
        return;
    }
    if (gqa_value_u64(gqa_value_get(event, "first_row"), &first) < 0 ||
        gqa_value_tensor_f32(gqa_value_get(event, "logits"), &t) < 0 || t.n_dims != 2) {
        snprintf(l->why, sizeof(l->why), "an event holds no rows of logits");
    } else if (first != l->next_row || (l->n_vocab != 0 && l->n_vocab != t.shape[1])) {
        snprintf(l->why, sizeof(l->why), "rows from %llu came where %llu was due",
                 (unsigned long long)first, (unsigned long long)l->next_row);
    } else if (fwrite(t.data, 1, t.bytes, l->out) != t.bytes) {
        snprintf(l->why, sizeof(l->why), "%s", strerror(errno));
    } else {
        l->next_row += t.shape[0];
        l->n_vocab = t.shape[1];
    }
}

static int call(struct cli *c, struct logits *l)
{
    json_t *result = NULL;
    gqa_params_str(l->params, "model", l->load.model);
    int code = cli_call(c, "text.logits", l->params, on_rows, l, &result);
    l->params = NULL;
    if (code == CLI_OK && l->out == stdout && ferror(stdout)) {
        code = EX_IOERR; /* cli_flush() will tell */
    }
    if (code == CLI_OK && l->why[0] != '\0') {
        code = cli_error(ferror(l->out) ? EX_IOERR : CLI_FAILED, "%s: %s", l->path, l->why);
    }
    if (code == CLI_OK && l->next_row < (uint64_t)cli_num(result, "n_tokens", 0)) {
        code = cli_error(CLI_FAILED, "text.logits: only %llu rows came",
                         (unsigned long long)l->next_row);
    }
    if (code == CLI_OK && c->json) {
        json_object_set_new(result, "first_row", json_integer((json_int_t)l->first_row));
        json_object_set_new(result, "file", json_string(l->path));
        code = cli_print_json(json_incref(result));
    }
    json_decref(result);
    return code;
}

/* Runs the call into the output file; a file that was begun and failed is removed. */
static int call_into_file(struct cli *c, struct logits *l)
{
    bool is_stdout = strcmp(l->path, "-") == 0;
    l->out = is_stdout ? stdout : fopen(l->path, "wbe");
    if (l->out == NULL) {
        return cli_error(EX_CANTCREAT, "%s: %s", l->path, strerror(errno));
    }
    int code = call(c, l);
    if (is_stdout) {
        return code;
    }
    if (fclose(l->out) != 0 && code == CLI_OK) {
        code = cli_error(EX_IOERR, "%s: %s", l->path, strerror(errno));
    }
    if (code != CLI_OK) {
        cli_remove_output(l->path);
    }
    return code;
}

int cli_verb_logits(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&cli_load_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .args_doc = "[PROMPT]",
                                     .doc = "Writes the logits after every token of a prompt.",
                                     .children = children};
    struct logits l = {.params = cli_params()};
    cli_parse(c, &argp, argc, argv, &l);
    l.next_row = l.first_row;
    if (c->json && strcmp(l.path, "-") == 0) {
        return cli_error(EX_USAGE, "logits: --json and -o - both want standard output");
    }
    int code = cli_prompt_params(&l.prompt, l.params);
    if (code == CLI_OK) {
        code = cli_connect(c);
    }
    if (code == CLI_OK) {
        code = cli_load_if_asked(c, &l.load);
    }
    if (code == CLI_OK) {
        code = call_into_file(c, &l);
    }
    gqa_params_destroy(l.params);
    free(l.load.model);
    return code;
}
