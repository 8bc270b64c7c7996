/* client/cli/cli.h - what the verbs of the gqa tool share.
 *
 * A verb parses its arguments with argp (cli_parse adds the common options), connects, makes calls
 * and prints. Results are turned into JSON values (jansson) as they arrive, and printed from those.
 * Functions that can fail print one line `gqa: what: why` themselves and return an exit code. */
#ifndef CLI_CLI_H
#define CLI_CLI_H

#include <gqa/client.h>

#include <argp.h>
#include <jansson.h>
#include <stdio.h>
#include <sysexits.h>

#define CLI_OK          0
#define CLI_FAILED      1
#define CLI_INTERRUPTED 130

struct cli {
    const char *socket;
    const char *cache_dir;
    const char *models_dir;
    const char *threads;            /* of a spawned daemon */
    const char *const *daemon_args; /* more of a spawned daemon's, at most 4, or NULL */
    bool spawn;
    bool json;
    uint32_t timeout_ms; /* 0: libgqa's defaults */
    uint32_t flags;      /* of the connection: GQA_F_SHM or none */
    uint32_t spin_us;
    uint64_t ring_out_bytes;
    struct gqa *g; /* NULL until cli_connect() */
};

struct cli_verb {
    const char *name;
    int (*run)(struct cli *c, int argc, char **argv); /* the exit code; argv[0] is the verb */
    const char *doc;
};

/* ---- verb_*.c -------------------------------------------------------------------------------- */

int cli_verb_run(struct cli *c, int argc, char **argv);
int cli_verb_ps(struct cli *c, int argc, char **argv);
int cli_verb_list(struct cli *c, int argc, char **argv);
int cli_verb_show(struct cli *c, int argc, char **argv);
int cli_verb_load(struct cli *c, int argc, char **argv);
int cli_verb_unload(struct cli *c, int argc, char **argv);
int cli_verb_stop(struct cli *c, int argc, char **argv);
int cli_verb_tokenize(struct cli *c, int argc, char **argv);
int cli_verb_detokenize(struct cli *c, int argc, char **argv);
int cli_verb_embed(struct cli *c, int argc, char **argv);
int cli_verb_eval(struct cli *c, int argc, char **argv);
int cli_verb_logits(struct cli *c, int argc, char **argv);
int cli_verb_perplexity(struct cli *c, int argc, char **argv);
int cli_verb_ping(struct cli *c, int argc, char **argv);
int cli_verb_top(struct cli *c, int argc, char **argv);
int cli_verb_info(struct cli *c, int argc, char **argv);
int cli_verb_kv(struct cli *c, int argc, char **argv);
int cli_verb_backend(struct cli *c, int argc, char **argv);
int cli_verb_call(struct cli *c, int argc, char **argv);
int cli_verb_bench(struct cli *c, int argc, char **argv);
int cli_bench_ipc(struct cli *c, int argc, char **argv);
int cli_bench_kv(struct cli *c, int argc, char **argv);
int cli_bench_serve(struct cli *c, int argc, char **argv);
int cli_bench_start(struct cli *c, int argc, char **argv);

/* ---- options.c ------------------------------------------------------------------------------- */

/* Parses a verb's arguments with the common options added; input is what the parser finds in
 * state->input. Wrong usage prints and exits with 64, as --help exits with 0. */
void cli_parse(struct cli *c, const struct argp *argp, int argc, char **argv, void *input);

/* The common options alone, up to the verb; returns its index in argv. */
int cli_parse_common(struct cli *c, const char *doc, int argc, char **argv);

/* Spellings that getopt does not know: --top_k for --top-k, -npl for --npl and the like. In place;
 * the replacements are static or stay until exit. */
void cli_normalise(int argc, char **argv);

/* Prints "gqa: VERB: why" and exits with 64. */
void cli_usage(const struct argp_state *state, const char *format, ...)
    __attribute__((format(printf, 2, 3), noreturn));

/* Numbers of options: whole, in range, or wrong usage (exits with 64 naming the option, or the
 * argument, whose name is in capitals). */
uint64_t cli_number(const struct argp_state *state, const char *option, const char *text,
                    uint64_t min, uint64_t max);
/* "512" or "0,4096": at most room numbers; returns how many. */
size_t cli_numbers(const struct argp_state *state, const char *option, const char *text,
                   uint64_t max, uint32_t *ret, size_t room);

/* ---- sampling.c ------------------------------------------------------------------------------ */

/* argp children for the sampling options; their input is a struct cli_sampling. */
extern const struct argp cli_sampling_argp;

#define CLI_STOPS_MAX    16u
#define CLI_BREAKERS_MAX 32u
#define CLI_SAMPLERS_MAX 16u
#define CLI_BIASES_MAX   1024u

struct cli_sampling {
    struct gqa_params *params; /* the verb's, filled as options come */
    const char *stops[CLI_STOPS_MAX];
    size_t n_stops;
    const char *breakers[CLI_BREAKERS_MAX];
    size_t n_breakers;
    bool has_breakers; /* also without any: "none" */
    const char *grammar, *grammar_file, *json_schema;
    int32_t bias_ids[CLI_BIASES_MAX];
    float biases[CLI_BIASES_MAX];
    size_t n_biases;
};
/* Adds what takes several options or a file to the params. Prints and returns an exit code. */
int cli_sampling_finish(struct cli_sampling *s);

/* ---- policy.c -------------------------------------------------------------------------------- */

/* argp children for what is kept of the KV cache; their input is a struct cli_policy. */
extern const struct argp cli_policy_argp;

#define CLI_POLICY_FIELDS 9
struct cli_policy {
    const char *given[CLI_POLICY_FIELDS]; /* as they were given; NULL: not */
    uint64_t numbers[CLI_POLICY_FIELDS];
};
void cli_policy_params(const struct cli_policy *p, struct gqa_params *params);
const char *cli_policy_name(const struct cli_policy *p); /* "full" where none is given */

/* ---- loading.c ------------------------------------------------------------------------------- */

/* How a model is to be loaded: options shared by the verbs that use one. */
struct cli_load {
    char *model; /* never NULL once parsed; from cli_model_name() */
    const char *name;
    uint32_t n_ctx;
    const char *cache_type_k, *cache_type_v;
    const char *backend, *attention;
    bool model_is_argument; /* the verb takes the model from its arguments where -m is absent */
};
extern const struct argp cli_load_argp; /* its input is a struct cli_load */

/* Loads the model with progress on a terminal. *ret (may be NULL): what model.info tells. */
int cli_load(struct cli *c, struct cli_load *load, json_t **ret);
/* Loads it only if options ask for more than its name; the daemon loads the others on first use.
 * load->model becomes the name that it is served under. */
int cli_load_if_asked(struct cli *c, struct cli_load *load);
/* model.info of a model, which is loaded first where it is not. */
int cli_model_info(struct cli *c, struct cli_load *load, json_t **ret);
/* Bytes of K and V that a token at that context length attends to, by model.info; windowed layers
 * see less. */
double cli_kv_bytes(const json_t *info, double n_context);

/* ---- session.c ------------------------------------------------------------------------------- */

/* Connects or spawns, as the options say. */
int cli_connect(struct cli *c);

/* A call in flight. Zeroed but for event, raw and arg before cli_start(). */
struct cli_call {
    gqa_event_fn event; /* or NULL */
    gqa_event_fn raw;   /* sees the result as it came, bytes and all; or NULL */
    void *arg;          /* first argument of both */
    const char *method;
    uint32_t id;
    bool done;
    int status;
    json_t *result; /* the owner's, to be given to json_decref() */
    struct gqa_error error;
};

/* Starts a call; params (may be NULL) are destroyed in every case. */
int cli_start(struct cli *c, struct cli_call *call, const char *method, struct gqa_params *params);

/* Runs the loop until all calls are done. The first Ctrl-C (or SIGTERM) cancels them, as does
 * standard output that cannot be written; the second ends the process. */
void cli_finish(struct cli *c, struct cli_call *calls, size_t n_calls);
bool cli_interrupted(void);
/* Sleeps for so long, or until fd (-1: none) can be read or a signal comes. */
void cli_wait_input(int fd, double seconds);

/* Prints a failed call's reason and returns its exit code; CLI_OK for one that succeeded. */
int cli_report(const struct cli_call *call);

/* Start, finish and report in one. *ret may be NULL. */
int cli_call(struct cli *c, const char *method, struct gqa_params *params, gqa_event_fn event,
             void *arg, json_t **ret);

struct gqa_params *cli_params(void); /* never NULL: exits with 71 when there is no memory */
struct gqa_params *cli_model_params(const char *model);
double cli_now_us(void);

/* Prints "gqa: what: why" and returns code. */
int cli_error(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* ---- json.c ---------------------------------------------------------------------------------- */

/* Never NULL. Binary that is not UTF-8 becomes {"base64": ...}; a tensor's data an array. */
json_t *cli_json(const struct gqa_value *v);
/* Text for people and documents: what is not UTF-8 is replaced by U+FFFD. Never NULL. */
json_t *cli_json_text(const char *data, size_t bytes);
/* One line on standard output, indented when that is a terminal. Takes the reference. */
int cli_print_json(json_t *j);
/* One compact line on standard output, for streams. Takes the reference. */
int cli_print_json_line(json_t *j);
/* A JSON object as params: types follow the JSON's. Prints and returns an exit code. */
int cli_json_params(json_t *object, struct gqa_params *params);

/* Reading results; absent or of another type: the fallback. Strings live as long as the object. */
const char *cli_str(const json_t *object, const char *key, const char *fallback);
double cli_num(const json_t *object, const char *key, double fallback);

/* ---- input.c --------------------------------------------------------------------------------- */

/* A whole file, or standard input for "-"; *ret_data is the caller's (free) and terminated. */
int cli_read_file(const char *path, char **ret_data, size_t *ret_bytes);
/* An array of ids in JSON, or ids separated by white space. *ret_ids is the caller's (free). */
int cli_read_tokens(const char *path, int32_t **ret_ids, size_t *ret_count);
/* A model's name; a path that exists becomes absolute, so that the daemon finds it. The caller's
 * (free); never NULL. */
char *cli_model_name(const char *given);
/* What a prompt is made of: at most one of the three is given. */
struct cli_prompt {
    const char *text;
    const char *file;
    const char *tokens_file;
};
/* Adds "prompt" or "tokens" to params. With nothing given, reads standard input unless that is a
 * terminal. Prints and returns an exit code. */
int cli_prompt_params(const struct cli_prompt *prompt, struct gqa_params *params);

/* ---- tokenise.c ------------------------------------------------------------------------------ */

/* A text's ids; control tokens written in it are plain text. *ret_ids is the caller's (free). */
int cli_tokenise(struct cli *c, const char *model, const char *text, size_t bytes, bool add_special,
                 int32_t **ret_ids, size_t *ret_count);

/* ---- format.c -------------------------------------------------------------------------------- */

/* "1.10 GiB", "1.1 B" (parameters) into a buffer that is returned. */
#define CLI_SIZE_CHARS 32
char *cli_bytes(double bytes, char buffer[CLI_SIZE_CHARS]);
char *cli_count(double count, char buffer[CLI_SIZE_CHARS]);
/* An object as aligned "key  value" lines, nested ones indented. */
void cli_print_tree(const json_t *object, int indent);
/* Whether to colour or move the cursor: a terminal, and NO_COLOR is not set. */
bool cli_fancy(FILE *f);
/* Lets out what was printed so far. Why that fails cli_flush() tells at the end. */
void cli_show(void);
/* Flushes standard output; a full disk is told, a closed pipe only ends with a status. */
int cli_flush(void);
/* Removes a file that was begun and failed. What else the path may be, a device or a link, was not
 * made by this program and stays. */
void cli_remove_output(const char *path);

/* ---- stats.c --------------------------------------------------------------------------------- */

double cli_mean(const double *x, size_t n);
double cli_stddev(const double *x, size_t n);               /* of a sample */
double cli_percentile(double *x, size_t n, double percent); /* sorts x */

/* ---- streams.c ------------------------------------------------------------------------------- */

/* When a generation's tokens came. */
struct cli_stream {
    double *at_us; /* (n_max) */
    uint32_t n, n_max;
};
void cli_stream_take(struct cli_stream *s, size_t n_tokens); /* so many have come now */
/* Tokens per second while all streams decode. Streams so fast that one ends before another begins,
 * or soon after, have no such time: then all tokens, by the time from the requests' start, which is
 * less than the daemon's speed and never more. 0: too few. */
double cli_streams_tps(const struct cli_stream *streams, size_t n, double start_us);
/* A percentile of the times between two tokens of a stream; 0: there are none. */
double cli_streams_gap_ms(const struct cli_stream *streams, size_t n, double percent);

#endif
