/* client/cli/bench_start.c - gqa bench start: how soon a daemon is ready.
 *
 * Private daemons are started, load the model, give one token, and end. First without the cache of
 * packed weights, so that each load packs; then with it, after one start that fills it and does not
 * count. The model's file is in the page cache: what is measured is the daemon. */
#include "client/cli/bench.h"

#include <stdlib.h>
#include <string.h>

struct start_bench {
    struct cli_load load;
    uint32_t n_repeats;
};

static const struct argp_option options[] = {
    {"repetitions", 'r', "N", 0, "Starts of each kind (5)", 5},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct start_bench *b = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &b->load;
        return 0;
    case 'r':
        b->n_repeats = (uint32_t)cli_number(state, "repetitions", arg, 1, BENCH_REPEATS_MAX);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

struct times {
    double serves_ms, ready_ms, token_ms; /* since the start of the process */
    double load_ms;                       /* by the daemon's own clock */
    char source[16];
    bool in_file;
};

static int first_token(struct cli *d, const char *model)
{
    const int32_t id = 1;
    struct gqa_params *p = cli_model_params(model);
    gqa_params_tokens(p, "tokens", &id, 1);
    gqa_params_u64(p, "n_predict", 1);
    gqa_params_f64(p, "temperature", 0);
    gqa_params_bool(p, "ignore_eos", true);
    return cli_call(d, "text.generate", p, NULL, NULL, NULL);
}

/* A daemon's life. The handle's end waits for the daemon's, and with that for the file. */
static int start_once(const struct cli *c, const struct start_bench *b, const char *const *args,
                      struct times *ret)
{
    struct cli d = *c;
    struct cli_load load = b->load;
    json_t *info = NULL;
    d.spawn = true;
    d.socket = NULL;
    d.daemon_args = args;
    d.g = NULL;
    load.model = strdup(b->load.model);
    if (load.model == NULL) {
        return cli_error(EX_OSERR, "bench: no memory");
    }
    double start = cli_now_us();
    int code = cli_connect(&d);
    ret->serves_ms = (cli_now_us() - start) / 1e3;
    code = code == CLI_OK ? cli_load(&d, &load, &info) : code;
    ret->ready_ms = (cli_now_us() - start) / 1e3;
    code = code == CLI_OK ? first_token(&d, load.model) : code;
    ret->token_ms = (cli_now_us() - start) / 1e3;
    ret->load_ms = cli_num(info, "load_ms", 0);
    snprintf(ret->source, sizeof(ret->source), "%s", cli_str(info, "packed_source", "none"));
    json_decref(info);
    free(load.model);
    gqa_close(d.g);
    return code;
}

static int run_kind(const struct cli *c, const struct start_bench *b, const char *const *args,
                    json_t *rows)
{
    double serves[BENCH_REPEATS_MAX], ready[BENCH_REPEATS_MAX], token[BENCH_REPEATS_MAX];
    double load[BENCH_REPEATS_MAX];
    struct times t = {.source = ""};
    for (uint32_t i = 0; i < b->n_repeats; i++) {
        int code = start_once(c, b, args, &t);
        if (code != CLI_OK) {
            return code;
        }
        serves[i] = t.serves_ms;
        ready[i] = t.ready_ms;
        token[i] = t.token_ms;
        load[i] = t.load_ms;
    }
    size_t n = b->n_repeats;
    json_array_append_new(
        rows, json_pack("{s:s, s:I, s:f, s:f, s:f, s:f, s:f}", "weights", t.source, "n",
                        (json_int_t)n, "serves_ms", cli_percentile(serves, n, 50), "load_ms",
                        cli_percentile(load, n, 50), "ready_ms", cli_percentile(ready, n, 50),
                        "ready_ms_max", cli_percentile(ready, n, 100), "first_token_ms",
                        cli_percentile(token, n, 50)));
    return CLI_OK;
}

static int print(const struct cli *c, json_t *rows)
{
    if (c->json) {
        return cli_print_json(rows);
    }
    printf("%-8s %10s %10s %10s %10s %15s\n", "WEIGHTS", "serves ms", "load ms", "ready ms",
           "at most", "first token ms");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        printf("%-8s %10.1f %10.1f %10.1f %10.1f %15.1f\n", cli_str(r, "weights", ""),
               cli_num(r, "serves_ms", 0), cli_num(r, "load_ms", 0), cli_num(r, "ready_ms", 0),
               cli_num(r, "ready_ms_max", 0), cli_num(r, "first_token_ms", 0));
    }
    json_decref(rows);
    return cli_flush();
}

int cli_bench_start(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&cli_load_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .doc = "Measures how soon a private daemon serves, has loaded the "
               "model, and gives a token: without packed weights in "
               "the cache, and with them.",
        .children = children};
    static const char *const without[] = {"--no-weights-cache", NULL};
    struct start_bench b = {.n_repeats = 5};
    struct times ignored;
    cli_parse(c, &argp, argc, argv, &b);
    json_t *rows = json_array();
    int code = run_kind(c, &b, without, rows);
    code = code == CLI_OK ? start_once(c, &b, NULL, &ignored) : code;
    code = code == CLI_OK ? run_kind(c, &b, NULL, rows) : code;
    code = code == CLI_OK ? print(c, json_incref(rows)) : code;
    json_decref(rows);
    free(b.load.model);
    return code;
}
