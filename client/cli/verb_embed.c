/* client/cli/verb_embed.c - gqa embed: texts as vectors. */
#include "client/cli/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Of one call: what stays below a message, both ways, for any model. */
#define CALL_TEXTS_MAX 256u
#define CALL_BYTES_MAX (4u << 20)

enum {
    KEY_TOKENS = 0x500,
    KEY_NO_SPECIAL,
    KEY_NO_PARSE_SPECIAL,
    KEY_POOLING,
    KEY_NO_NORMALIZE,
    KEY_EMBD_NORMALIZE,
    KEY_N_DIMS,
    KEY_QUERY,
    KEY_LINES
};

struct embed {
    struct cli_load load;
    const char *file, *lines_file, *tokens_file;
    const char *pooling, *query, *path;
    bool no_special, no_parse_special, no_normalize;
    int64_t norm; /* INT64_MIN: not given */
    uint64_t n_dims;
    /* The texts, and where they lie: arguments of the process, or data. */
    const char **texts;
    size_t n_texts, room;
    char *data;
    size_t data_bytes;
    /* What came back: (n_rows, n_dims) numbers. */
    float *values;
    size_t n_values, capacity, n_rows, width;
    json_t *n_tokens;
    double n_prompt;
    char pooled[16];
    char why[96]; /* the first thing that went wrong in a message */
};

static const struct argp_option options[] = {
    {NULL, 0, NULL, 0, "Texts and vectors:", 5},
    {"file", 'f', "FILE", 0, "The text is a file's (- for standard input)", 5},
    {"lines", KEY_LINES, "FILE", 0, "Every line of a file is a text", 5},
    {"tokens", KEY_TOKENS, "FILE", 0, "A JSON array of token ids is the text", 5},
    {"pooling", KEY_POOLING, "KIND", 0, "none, mean, cls, last or rank; else the model's own", 5},
    {"query", KEY_QUERY, "TEXT", 0, "With rank: what the texts are to answer", 5},
    {"no-normalize", KEY_NO_NORMALIZE, NULL, 0, "Leave vectors as the model made them", 5},
    {"embd-normalize", KEY_EMBD_NORMALIZE, "NORM", 0,
     "-1 none, 0 largest value to 32760, 1 taxicab, 2 euclidean, or another p", 5},
    {"n-dims", KEY_N_DIMS, "N", 0, "Only the first N dimensions", 5},
    {"no-special", KEY_NO_SPECIAL, NULL, 0, "Add no BOS, EOS, CLS or SEP to the texts", 5},
    {"no-parse-special", KEY_NO_PARSE_SPECIAL, NULL, 0,
     "Control tokens written in a text are plain text", 5},
    {"output", 'o', "FILE", 0, "Write float32, little-endian, (rows, dimensions)", 5},
    {0},
};

static void add_text(struct embed *e, const char *text)
{
    if (e->n_texts == e->room) {
        e->room = e->room > 0 ? 2 * e->room : 16;
        e->texts = realloc(e->texts, e->room * sizeof(*e->texts));
        if (e->texts == NULL) {
            exit(cli_error(EX_OSERR, "embed: no memory"));
        }
    }
    e->texts[e->n_texts++] = text;
}

static error_t parse_switch(int key, struct embed *e)
{
    switch (key) {
    case KEY_NO_SPECIAL:
        e->no_special = true;
        return 0;
    case KEY_NO_PARSE_SPECIAL:
        e->no_parse_special = true;
        return 0;
    case KEY_NO_NORMALIZE:
        e->no_normalize = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void check_sources(const struct embed *e, struct argp_state *state)
{
    unsigned n =
        (e->n_texts > 0) + (e->file != NULL) + (e->lines_file != NULL) + (e->tokens_file != NULL);
    if (n > 1) {
        cli_usage(state, "give only one of TEXT, --file, --lines and --tokens");
    }
    if (n == 0 && isatty(STDIN_FILENO)) {
        cli_usage(state, "no text was given");
    }
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct embed *e = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &e->load;
        return 0;
    case 'f':
        e->file = arg;
        return 0;
    case KEY_LINES:
        e->lines_file = arg;
        return 0;
    case KEY_TOKENS:
        e->tokens_file = arg;
        return 0;
    case KEY_POOLING:
        e->pooling = arg;
        return 0;
    case KEY_QUERY:
        e->query = arg;
        return 0;
    case KEY_EMBD_NORMALIZE:
        e->norm = strcmp(arg, "-1") == 0
                      ? -1
                      : (int64_t)cli_number(state, "embd-normalize", arg, 0, INT32_MAX);
        return 0;
    case KEY_N_DIMS:
        e->n_dims = cli_number(state, "n-dims", arg, 0, UINT32_MAX);
        return 0;
    case 'o':
        e->path = arg;
        return 0;
    case ARGP_KEY_ARG:
        add_text(e, arg);
        return 0;
    case ARGP_KEY_END:
        check_sources(e, state);
        return 0;
    default:
        return parse_switch(key, e);
    }
}

/* ---- what comes back --------------------------------------------------------------------- */

static void take_tensor(struct embed *e, const struct gqa_value *v)
{
    struct gqa_tensor_view t;
    if (e->why[0] != '\0') {
        return;
    }
    if (gqa_value_tensor_f32(v, &t) < 0 || t.n_dims != 2 ||
        (e->n_rows > 0 && t.shape[1] != e->width)) {
        snprintf(e->why, sizeof(e->why), "a message holds no vectors");
        return;
    }
    size_t n = t.bytes / sizeof(float);
    if (e->n_values + n > e->capacity) {
        size_t capacity = 2 * e->capacity > e->n_values + n ? 2 * e->capacity : e->n_values + n;
        float *values = realloc(e->values, capacity * sizeof(*values));
        if (values == NULL) {
            snprintf(e->why, sizeof(e->why), "no memory for the vectors");
            return;
        }
        e->values = values;
        e->capacity = capacity;
    }
    if (n > 0) {
        memcpy(e->values + e->n_values, t.data, n * sizeof(float));
    }
    e->n_values += n;
    e->n_rows += t.shape[0];
    e->width = t.shape[1];
}

static void on_rows(void *arg, uint32_t id, const struct gqa_value *event)
{
    take_tensor(arg, gqa_value_get(event, "embeddings"));
}

static void on_result(void *arg, uint32_t id, const struct gqa_value *result)
{
    const struct gqa_value *tensor = gqa_value_get(result, "embeddings");
    if (tensor != NULL) {
        take_tensor(arg, tensor);
    }
}

/* ---- calls ------------------------------------------------------------------------------- */

static struct gqa_params *make_params(const struct embed *e)
{
    struct gqa_params *p = cli_model_params(e->load.model);
    gqa_params_bool(p, "add_special", !e->no_special);
    gqa_params_bool(p, "parse_special", !e->no_parse_special);
    if (e->pooling != NULL) {
        gqa_params_str(p, "pooling", e->pooling);
    }
    if (e->query != NULL) {
        gqa_params_str(p, "query", e->query);
    }
    if (e->no_normalize) {
        gqa_params_bool(p, "normalize", false);
    }
    if (e->norm != INT64_MIN) {
        gqa_params_i64(p, "embd_normalize", e->norm);
    }
    gqa_params_u64(p, "n_dims", e->n_dims);
    return p;
}

/* Runs a call; params are destroyed. */
static int call(struct cli *c, struct embed *e, struct gqa_params *params)
{
    struct cli_call call = {.event = on_rows, .raw = on_result, .arg = e};
    cli_start(c, &call, "text.embed", params);
    cli_finish(c, &call, 1);
    int code = cli_report(&call);
    if (code == CLI_OK && e->why[0] != '\0') {
        code = cli_error(CLI_FAILED, "text.embed: %s", e->why);
    }
    if (code == CLI_OK) {
        json_array_extend(e->n_tokens, json_object_get(call.result, "n_tokens"));
        e->n_prompt += cli_num(call.result, "n_prompt", 0);
        snprintf(e->pooled, sizeof(e->pooled), "%s", cli_str(call.result, "pooling", ""));
    }
    json_decref(call.result);
    return code;
}

/* Whether rows come instead of vectors: the caller's wish, or else the model's. */
static int find_whether_rows(struct cli *c, struct embed *e, bool *ret)
{
    json_t *info = NULL;
    const char *pooling = e->pooling;
    int code = CLI_OK;
    if (pooling == NULL && e->n_texts > 1) {
        code = cli_model_info(c, &e->load, &info);
        pooling = cli_str(info, "pooling", "");
    }
    *ret = pooling != NULL && strcmp(pooling, "none") == 0;
    json_decref(info);
    return code;
}

/* Texts in as few calls as may be; without pooling each has its own, so that rows keep their order.
 */
static int call_for_texts(struct cli *c, struct embed *e)
{
    bool alone = false;
    int code = find_whether_rows(c, e, &alone);
    for (size_t done = 0; done < e->n_texts && code == CLI_OK;) {
        size_t n = 0, bytes = 0;
        while (done + n < e->n_texts && n < (alone ? 1 : CALL_TEXTS_MAX) &&
               (n == 0 || bytes + strlen(e->texts[done + n]) <= CALL_BYTES_MAX)) {
            bytes += strlen(e->texts[done + n++]);
        }
        struct gqa_params *p = make_params(e);
        gqa_params_strings(p, "inputs", e->texts + done, n);
        code = call(c, e, p);
        done += n;
    }
    return code;
}

static int split_lines(struct embed *e)
{
    if (memchr(e->data, '\0', e->data_bytes) != NULL) {
        return cli_error(EX_DATAERR, "%s: a NUL in a line", e->lines_file);
    }
    for (char *line = e->data, *end; line < e->data + e->data_bytes; line = end + 1) {
        end = strchrnul(line, '\n');
        *end = '\0';
        add_text(e, line);
    }
    return e->n_texts > 0 ? CLI_OK : cli_error(EX_DATAERR, "%s: no line", e->lines_file);
}

static int call_for_tokens(struct cli *c, struct embed *e)
{
    int32_t *ids;
    size_t n;
    int code = cli_read_tokens(e->tokens_file, &ids, &n);
    if (code != CLI_OK) {
        return code;
    }
    struct gqa_params *p = make_params(e);
    gqa_params_tokens(p, "tokens", ids, n);
    free(ids);
    return call(c, e, p);
}

static int read_and_call(struct cli *c, struct embed *e)
{
    if (e->tokens_file != NULL) {
        return call_for_tokens(c, e);
    }
    if (e->n_texts > 0) {
        return call_for_texts(c, e);
    }
    const char *path = e->lines_file != NULL ? e->lines_file : e->file != NULL ? e->file : "-";
    int code = cli_read_file(path, &e->data, &e->data_bytes);
    if (code != CLI_OK) {
        return code;
    }
    if (e->lines_file != NULL) {
        code = split_lines(e);
        return code == CLI_OK ? call_for_texts(c, e) : code;
    }
    struct gqa_params *p = make_params(e);
    gqa_params_text(p, "prompt", e->data, e->data_bytes);
    return call(c, e, p);
}

/* ---- output ------------------------------------------------------------------------------ */

static int write_file(const struct embed *e)
{
    bool is_stdout = strcmp(e->path, "-") == 0;
    FILE *f = is_stdout ? stdout : fopen(e->path, "wbe");
    if (f == NULL) {
        return cli_error(EX_CANTCREAT, "%s: %s", e->path, strerror(errno));
    }
    bool failed = fwrite(e->values, sizeof(float), e->n_values, f) != e->n_values;
    if (is_stdout) {
        return failed ? EX_IOERR : CLI_OK; /* cli_flush() will tell */
    }
    failed |= fclose(f) != 0;
    if (failed) {
        int code = cli_error(EX_IOERR, "%s: %s", e->path, strerror(errno));
        cli_remove_output(e->path);
        return code;
    }
    return CLI_OK;
}

static int print_object(const struct embed *e)
{
    json_t *object =
        json_pack("{s:s, s:I, s:I, s:O}", "pooling", e->pooled, "n_dims", (json_int_t)e->width,
                  "n_prompt", (json_int_t)e->n_prompt, "n_tokens", e->n_tokens);
    json_t *rows = json_array();
    for (size_t i = 0; e->path == NULL && i < e->n_rows; i++) {
        json_t *row = json_array();
        for (size_t k = 0; k < e->width; k++) {
            json_array_append_new(row, json_real((double)e->values[i * e->width + k]));
        }
        json_array_append_new(rows, row);
    }
    if (e->path == NULL) {
        json_object_set(object, "embeddings", rows);
    } else {
        json_object_set_new(object, "file", json_string(e->path));
    }
    json_decref(rows);
    return cli_print_json(object);
}

static int print_rows(const struct embed *e)
{
    for (size_t i = 0; i < e->n_rows; i++) {
        for (size_t k = 0; k < e->width; k++) {
            printf("%s%.9g", k > 0 ? " " : "", (double)e->values[i * e->width + k]);
        }
        putchar('\n');
    }
    return CLI_OK;
}

int cli_verb_embed(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&cli_load_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .args_doc = "[TEXT...]",
        .doc = "Turns texts into vectors, one per line. Without one, standard input is the text.",
        .children = children};
    struct embed e = {.norm = INT64_MIN, .n_tokens = json_array()};
    cli_parse(c, &argp, argc, argv, &e);
    if (c->json && e.path != NULL && strcmp(e.path, "-") == 0) {
        return cli_error(EX_USAGE, "embed: --json and -o - both want standard output");
    }
    int code = cli_connect(c);
    if (code == CLI_OK) {
        code = cli_load_if_asked(c, &e.load);
    }
    if (code == CLI_OK) {
        code = read_and_call(c, &e);
    }
    if (code == CLI_OK && e.path != NULL) {
        code = write_file(&e);
    }
    if (code == CLI_OK && c->json) {
        code = print_object(&e);
    } else if (code == CLI_OK && e.path == NULL) {
        code = print_rows(&e);
    }
    free(e.texts);
    free(e.data);
    free(e.values);
    json_decref(e.n_tokens);
    free(e.load.model);
    return code;
}
