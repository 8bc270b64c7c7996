/* client/cli/verb_run.c - gqa run: continues a prompt. */
#include "client/cli/cli.h"

#include <stdlib.h>
#include <string.h>

enum { KEY_TOKENS = 0x500, KEY_STREAM, KEY_NO_SPECIAL, KEY_NO_PARSE_SPECIAL, KEY_PARALLEL };

#define SAMPLES_MAX 64u /* the protocol's */

/* What has come of one continuation. */
struct sample {
    FILE *stream; /* into text */
    char *text;
    size_t bytes;
    json_t *tokens;
    json_t *logprobs; /* NULL until some come */
};

struct run {
    struct cli *c;
    struct cli_load load;
    struct cli_prompt prompt;
    struct cli_sampling sampling;
    struct cli_policy policy;
    const char *args[2];
    unsigned n_args;
    bool stream_json;
    bool stats;
    json_t *info; /* model.info, for the statistics; NULL without them */
    unsigned n_samples;
    struct sample samples[SAMPLES_MAX];
};

static const struct argp_option options[] = {
    {NULL, 0, NULL, 0, "Prompt and output:", 5},
    {"prompt-file", 'f', "FILE", 0, "Read the prompt from a file (- for standard input)", 5},
    {"tokens", KEY_TOKENS, "FILE", 0, "A JSON array of token ids as the prompt", 5},
    {"no-special", KEY_NO_SPECIAL, NULL, 0, "Do not add BOS or EOS to the prompt", 5},
    {"no-parse-special", KEY_NO_PARSE_SPECIAL, NULL, 0,
     "Control tokens written in the prompt are plain text", 5},
    {"parallel", KEY_PARALLEL, "N", 0, "So many samples of the prompt (also -np)", 5},
    {"stream", KEY_STREAM, "json", 0, "One JSON object per step, then the result", 5},
    {"stats", 'v', NULL, 0, "Tell on standard error what cache and backend did", 5},
    {"verbose", 'v', NULL, OPTION_ALIAS, NULL, 5},
    {0},
};

/* "MODEL [PROMPT]", or "[PROMPT]" where -m tells the model. */
static void take_arguments(struct run *run, struct argp_state *state)
{
    unsigned next = 0;
    if (run->load.model == NULL && run->n_args > 0) {
        run->load.model = cli_model_name(run->args[next++]);
    }
    if (run->load.model == NULL) {
        cli_usage(state, "no model was given (-m MODEL, or the first argument)");
    }
    if (run->n_args - next > 1) {
        cli_usage(state, "more than one prompt; quote it");
    }
    run->prompt.text = next < run->n_args ? run->args[next] : NULL;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct run *run = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &run->load;
        state->child_inputs[1] = &run->sampling;
        state->child_inputs[2] = &run->policy;
        return 0;
    case 'f':
        run->prompt.file = arg;
        return 0;
    case KEY_TOKENS:
        run->prompt.tokens_file = arg;
        return 0;
    case KEY_NO_SPECIAL:
        gqa_params_bool(run->sampling.params, "add_special", false);
        return 0;
    case KEY_NO_PARSE_SPECIAL:
        gqa_params_bool(run->sampling.params, "parse_special", false);
        return 0;
    case KEY_PARALLEL:
        run->n_samples = (unsigned)cli_number(state, "parallel", arg, 1, SAMPLES_MAX);
        return 0;
    case KEY_STREAM:
        if (strcmp(arg, "json") != 0) {
            cli_usage(state, "--stream: only 'json' is known");
        }
        run->stream_json = true;
        return 0;
    case 'v':
        run->stats = true;
        return 0;
    case ARGP_KEY_ARG:
        if (run->n_args == 2) {
            cli_usage(state, "more than one prompt; quote it");
        }
        run->args[run->n_args++] = arg;
        return 0;
    case ARGP_KEY_END: /* the options have been seen, those of the children too */
        take_arguments(run, state);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_child children[] = {{&cli_load_argp, 0, NULL, 0},
                                             {&cli_sampling_argp, 0, NULL, 0},
                                             {&cli_policy_argp, 0, NULL, 0},
                                             {0}};
static const struct argp argp = {
    .options = options,
    .parser = parse,
    .args_doc = "[MODEL] [PROMPT]",
    .doc = "Continues a prompt; without one, standard input's. MODEL where -m is absent.",
    .children = children,
};

/* ---- samples ----------------------------------------------------------------------------- */

static int open_samples(struct run *run)
{
    for (unsigned i = 0; i < run->n_samples; i++) {
        struct sample *s = &run->samples[i];
        s->stream = open_memstream(&s->text, &s->bytes);
        s->tokens = json_array();
        if (s->stream == NULL || s->tokens == NULL) {
            return cli_error(EX_OSERR, "run: no memory");
        }
    }
    return CLI_OK;
}

static void close_samples(struct run *run)
{
    for (unsigned i = 0; i < run->n_samples; i++) {
        struct sample *s = &run->samples[i];
        if (s->stream != NULL) {
            fclose(s->stream);
        }
        free(s->text);
        json_decref(s->tokens);
        json_decref(s->logprobs);
    }
}

static void on_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct run *run = arg;
    const char *text = "";
    size_t bytes = 0;
    uint64_t index = 0; /* absent where there is one sample */
    gqa_value_u64(gqa_value_get(event, "sample"), &index);
    if (index >= run->n_samples) {
        return;
    }
    struct sample *s = &run->samples[index];
    gqa_value_bytes(gqa_value_get(event, "text"), &text, &bytes);
    fwrite(text, 1, bytes, s->stream);
    json_t *step = cli_json(event);
    json_array_extend(s->tokens, json_object_get(step, "tokens"));
    json_t *logprobs = json_object_get(step, "logprobs");
    if (logprobs != NULL && s->logprobs == NULL) {
        s->logprobs = json_array();
    }
    json_array_extend(s->logprobs, logprobs);
    if (run->stream_json) {
        json_object_set_new(step, "text", cli_json_text(text, bytes));
        cli_print_json_line(json_incref(step));
        cli_show();
    } else if (!run->c->json && run->n_samples == 1) {
        fwrite(text, 1, bytes, stdout);
        cli_show();
    }
    json_decref(step);
}

/* For people, one after the other: mixed as they come nobody could read them. */
static void print_samples(const struct run *run, const json_t *result)
{
    const json_t *samples = json_object_get(result, "samples");
    for (unsigned i = 0; i < run->n_samples; i++) {
        const struct sample *s = &run->samples[i];
        const json_t *of = json_array_get(samples, i);
        bool open_line = s->bytes > 0 && s->text[s->bytes - 1] != '\n';
        printf("%s[%u] seed %.0f, %.0f tokens, %s\n", i > 0 ? "\n" : "", i, cli_num(of, "seed", 0),
               cli_num(of, "n_generated", 0), cli_str(of, "finish", "?"));
        fwrite(s->text, 1, s->bytes, stdout);
        fputs(open_line ? "\n" : "", stdout);
    }
}

/* ---- what is told afterwards ------------------------------------------------------------- */

static void tell_cache(const json_t *result, const json_t *info)
{
    const json_t *of_call = json_object_get(result, "cache");
    const json_t *of_model = json_object_get(info, "cache");
    double n_prompt = cli_num(result, "n_prompt", 0), n_cached = cli_num(result, "n_cached", 0);
    const char *why = cli_str(of_call, "miss_reason", "");
    fprintf(stderr, "prompt:  %.0f tokens, %.0f of them from the cache (%.0f blocks%s%s)\n",
            n_prompt, n_cached, cli_num(of_call, "hit_blocks", 0),
            n_cached < n_prompt && why[0] != '\0' ? "; " : "", n_cached < n_prompt ? why : "");
    /* The last generated token was never evaluated: its K and V are not there. */
    double n_generated = cli_num(result, "n_generated", 0);
    double n_kept = n_prompt + (n_generated > 0 ? n_generated - 1 : 0);
    double per_token = cli_num(of_model, "bytes_per_token", 0);
    char size[CLI_SIZE_CHARS];
    fprintf(stderr, "cache:   K %s, V %s: %.0f bytes a token, %s for %.0f; blocks of %.0f tokens\n",
            cli_str(of_model, "type_k", "?"), cli_str(of_model, "type_v", "?"), per_token,
            cli_bytes(per_token * n_kept, size), n_kept, cli_num(of_model, "block_tokens", 0));
}

static void tell_stats(const json_t *result, const json_t *info)
{
    const json_t *t = json_object_get(result, "timings");
    const json_t *backend = json_object_get(info, "backend");
    tell_cache(result, info);
    fprintf(stderr, "backend: %s, attention by %s, %s, %.0f threads\n",
            cli_str(backend, "program", "?"), cli_str(backend, "attention", "?"),
            cli_str(backend, "isa", "?"), cli_num(backend, "threads", 0));
    fprintf(stderr,
            "speed:   prompt %.1f t/s, generation %.1f t/s (%.0f tokens), the first after %.1f ms; "
            "finish: %s\n",
            cli_num(t, "prompt_per_second", 0), cli_num(t, "predicted_per_second", 0),
            cli_num(result, "n_generated", 0), cli_num(t, "first_token_ms", 0),
            cli_str(result, "finish", "?"));
}

/* Text and tokens go first, then what the daemon told. New; result stays the caller's. */
static json_t *with_text(const struct sample *s, json_t *result)
{
    json_t *object = json_object();
    json_object_set_new(object, "text", cli_json_text(s->text, s->bytes));
    json_object_set(object, "tokens", s->tokens);
    if (s->logprobs != NULL) {
        json_object_set(object, "logprobs", s->logprobs);
    }
    json_object_update_missing(object, result);
    return object;
}

/* The object that scripts rely on: that of the first sample; with more of them, all in samples. */
static int print_result(struct run *run, json_t *result)
{
    json_t *samples = json_object_get(result, "samples");
    for (size_t i = 0; i < json_array_size(samples) && i < run->n_samples; i++) {
        json_array_set_new(samples, i, with_text(&run->samples[i], json_array_get(samples, i)));
    }
    json_t *object = with_text(&run->samples[0], result);
    return run->stream_json ? cli_print_json_line(object) : cli_print_json(object);
}

static int finish(struct run *run, struct cli_call *call)
{
    const struct sample *first = &run->samples[0];
    int code = cli_report(call);
    if (code == CLI_OK && cli_interrupted()) {
        code = CLI_INTERRUPTED;
    }
    bool json = run->c->json || run->stream_json;
    bool open_line =
        run->n_samples == 1 && first->bytes > 0 && first->text[first->bytes - 1] != '\n';
    if (json && call->result != NULL) {
        int printed = print_result(run, call->result);
        code = code != CLI_OK ? code : printed;
    } else if (!json && run->n_samples > 1 && call->result != NULL) {
        print_samples(run, call->result);
    } else if (!json && cli_fancy(stdout) && open_line) {
        putchar('\n');
    }
    if (call->result != NULL && run->info != NULL) {
        cli_show();
        /* On a log that takes both streams the text must not run into the figures. */
        fputs(!json && open_line && !cli_fancy(stdout) ? "\n" : "", stderr);
        tell_stats(call->result, run->info);
    }
    return code;
}

static int generate(struct run *run, struct gqa_params *p)
{
    struct cli_call call = {.event = on_event, .arg = run};
    gqa_params_str(p, "model", run->load.model);
    if (run->n_samples > 1) {
        gqa_params_u64(p, "n", run->n_samples);
    }
    cli_start(run->c, &call, "text.generate", p);
    cli_finish(run->c, &call, 1);
    for (unsigned i = 0; i < run->n_samples; i++) {
        fflush(run->samples[i].stream);
    }
    int code = finish(run, &call);
    json_decref(call.result);
    return code;
}

int cli_verb_run(struct cli *c, int argc, char **argv)
{
    struct run run = {
        .c = c, .sampling.params = cli_params(), .load.model_is_argument = true, .n_samples = 1};
    cli_parse(c, &argp, argc, argv, &run);
    struct gqa_params *p = run.sampling.params;
    cli_policy_params(&run.policy, p);
    int code = cli_sampling_finish(&run.sampling);
    if (code == CLI_OK) {
        code = cli_prompt_params(&run.prompt, p);
    }
    if (code == CLI_OK) {
        code = cli_connect(c);
    }
    if (code == CLI_OK) {
        code = cli_load_if_asked(c, &run.load);
    }
    if (code == CLI_OK && run.stats) {
        code = cli_model_info(c, &run.load, &run.info);
    }
    code = code == CLI_OK ? open_samples(&run) : code;
    if (code == CLI_OK) {
        code = generate(&run, p);
        p = NULL;
    }
    close_samples(&run);
    json_decref(run.info);
    gqa_params_destroy(p);
    free(run.load.model);
    return code;
}
