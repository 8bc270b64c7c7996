/* client/cli/verb_tokens.c - gqa tokenize and its inverse, detokenize. */
#include "client/cli/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

enum { KEY_FILE = 'f', KEY_NO_SPECIAL = 0x500, KEY_NO_PARSE_SPECIAL };

struct tokens {
    struct cli_load load;
    const char *file;
    bool no_special;
    bool no_parse_special;
    const char *text; /* tokenize */
    int32_t *ids;     /* detokenize */
    size_t n_ids;
    int write_error;
};

static const struct argp_option tokenize_options[] = {
    {"file", KEY_FILE, "FILE", 0, "Read the text from a file (- for standard input)", 5},
    {"no-special", KEY_NO_SPECIAL, NULL, 0, "Do not add BOS or EOS", 5},
    {"no-parse-special", KEY_NO_PARSE_SPECIAL, NULL, 0,
     "Control tokens written in the text are plain text", 5},
    {0},
};

static error_t parse_options(int key, char *arg, struct argp_state *state)
{
    struct tokens *t = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &t->load;
        return 0;
    case KEY_FILE:
        t->file = arg;
        return 0;
    case KEY_NO_SPECIAL:
        t->no_special = true;
        return 0;
    case KEY_NO_PARSE_SPECIAL:
        t->no_parse_special = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static error_t parse_tokenize(int key, char *arg, struct argp_state *state)
{
    struct tokens *t = state->input;
    switch (key) {
    case ARGP_KEY_ARG:
        if (t->text != NULL || t->file != NULL) {
            cli_usage(state, "more than one text; quote it");
        }
        t->text = arg;
        return 0;
    case ARGP_KEY_END:
        if (t->text == NULL && t->file == NULL) {
            t->file = "-";
        }
        return 0;
    default:
        return parse_options(key, arg, state);
    }
}

static const struct argp_child children[] = {{&cli_load_argp, 0, NULL, 0}, {0}};

static int print_ids(struct cli *c, json_t *result)
{
    json_t *ids = json_object_get(result, "tokens");
    int code = CLI_OK;
    if (!json_is_array(ids)) {
        code = cli_error(CLI_FAILED, "text.tokenize: the result holds no tokens");
    } else if (c->json) {
        code = cli_print_json_line(json_incref(ids));
    } else {
        for (size_t i = 0; i < json_array_size(ids); i++) {
            printf("%s%lld", i > 0 ? " " : "",
                   (long long)json_integer_value(json_array_get(ids, i)));
        }
        putchar('\n');
    }
    json_decref(result);
    return code;
}

int cli_verb_tokenize(struct cli *c, int argc, char **argv)
{
    static const struct argp argp = {.options = tokenize_options,
                                     .parser = parse_tokenize,
                                     .args_doc = "[TEXT]",
                                     .doc = "Prints the token ids of a text; without one, of "
                                            "standard input.",
                                     .children = children};
    struct tokens t = {0};
    char *data = NULL;
    size_t bytes = 0;
    json_t *result;
    cli_parse(c, &argp, argc, argv, &t);
    int code = t.file != NULL ? cli_read_file(t.file, &data, &bytes) : CLI_OK;
    if (code == CLI_OK) {
        code = cli_connect(c);
    }
    if (code == CLI_OK) {
        code = cli_load_if_asked(c, &t.load);
    }
    if (code == CLI_OK) {
        struct gqa_params *p = cli_model_params(t.load.model);
        gqa_params_text(p, "text", data != NULL ? data : t.text,
                        data != NULL ? bytes : strlen(t.text));
        gqa_params_bool(p, "add_special", !t.no_special);
        gqa_params_bool(p, "parse_special", !t.no_parse_special);
        code = cli_call(c, "text.tokenize", p, NULL, NULL, &result);
    }
    free(data);
    free(t.load.model);
    return code == CLI_OK ? print_ids(c, result) : code;
}

/* ---- detokenize -------------------------------------------------------------------------- */

static const struct argp_option detokenize_options[] = {
    {"file", KEY_FILE, "FILE", 0, "Read the ids from a file, JSON or plain (- for standard input)",
     5},
    {"no-special", KEY_NO_SPECIAL, NULL, 0, "The ids were made without added BOS: keep all", 5},
    {0},
};

static error_t parse_detokenize(int key, char *arg, struct argp_state *state)
{
    struct tokens *t = state->input;
    switch (key) {
    case ARGP_KEY_ARGS: {
        size_t n = (size_t)(state->argc - state->next);
        t->ids = calloc(n, sizeof(*t->ids));
        for (size_t i = 0; t->ids != NULL && i < n; i++) {
            t->ids[i] = (int32_t)cli_number(state, "ID", state->argv[(size_t)state->next + i], 0,
                                            INT32_MAX);
        }
        t->n_ids = n;
        return t->ids != NULL ? 0 : ENOMEM;
    }
    case ARGP_KEY_END:
        if (t->ids == NULL && t->file == NULL) {
            t->file = "-";
        }
        return 0;
    default:
        return parse_options(key, arg, state);
    }
}

/* Skips the BOS that tokenize put before the text, so that what comes out is what went in. */
static int skip_added(struct cli *c, struct tokens *t, size_t *ret_skip)
{
    json_t *info;
    int code = cli_model_info(c, &t->load, &info);
    if (code != CLI_OK) {
        return code;
    }
    const json_t *tokenizer = json_object_get(info, "tokenizer");
    bool adds = json_is_true(json_object_get(tokenizer, "add_bos"));
    bool is_there = t->n_ids > 0 && t->ids[0] == (int32_t)cli_num(tokenizer, "bos", -1);
    *ret_skip = adds && is_there ? 1 : 0;
    json_decref(info);
    return CLI_OK;
}

static void write_text(void *arg, uint32_t id, const struct gqa_value *result)
{
    struct tokens *t = arg;
    const char *data;
    size_t bytes;
    if (gqa_value_bytes(gqa_value_get(result, "text"), &data, &bytes) < 0) {
        t->write_error = cli_error(CLI_FAILED, "text.detokenize: the result holds no text");
    } else {
        fwrite(data, 1, bytes, stdout);
    }
}

int cli_verb_detokenize(struct cli *c, int argc, char **argv)
{
    static const struct argp argp = {.options = detokenize_options,
                                     .parser = parse_detokenize,
                                     .args_doc = "[ID...]",
                                     .doc = "Writes the text of token ids, byte for byte, without "
                                            "a line break of its own.",
                                     .children = children};
    struct tokens t = {0};
    size_t skip = 0;
    cli_parse(c, &argp, argc, argv, &t);
    int code = t.file != NULL ? cli_read_tokens(t.file, &t.ids, &t.n_ids) : CLI_OK;
    if (code == CLI_OK) {
        code = cli_connect(c);
    }
    if (code == CLI_OK) {
        code = cli_load_if_asked(c, &t.load);
    }
    if (code == CLI_OK && !t.no_special) {
        code = skip_added(c, &t, &skip);
    }
    if (code == CLI_OK) {
        struct gqa_params *p = cli_model_params(t.load.model);
        gqa_params_tokens(p, "tokens", t.ids + skip, t.n_ids - skip);
        gqa_params_bool(p, "special", true);
        struct cli_call call = {.raw = c->json ? NULL : write_text, .arg = &t};
        cli_start(c, &call, "text.detokenize", p);
        cli_finish(c, &call, 1);
        code = cli_report(&call);
        if (code == CLI_OK) {
            code = c->json ? cli_print_json(json_incref(call.result)) : t.write_error;
        }
        json_decref(call.result);
    }
    free(t.ids);
    free(t.load.model);
    return code;
}
