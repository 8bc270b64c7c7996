/* client/cli/verb_bench.c - gqa bench: speed, beside what the machine could do at best.
 *
 * The options are llama-bench's. The machine's limits are measured in the same run and with as many
 * threads, while the daemon is idle: the unit's peak first, memory before and after each test. A
 * guest's memory may become twice as fast from one second to the next; the faster reading counts.
 */
#include "client/cli/bench.h"

#include "roofline/roofline.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* Room in the context beside prompt and generated tokens: streams start one after the other, and
 * early ones generate while the last ones read their prompt. */
#define CONTEXT_SLACK 64u

#define WARM_UP_TOKENS 16u

enum { KEY_NPL = 0x500, KEY_OPS, KEY_HEADS, KEY_TYPE, KEY_PLOT };

struct bench {
    struct cli_load load;
    uint32_t prompts[BENCH_LIST_MAX], gens[BENCH_LIST_MAX];
    uint32_t depths[BENCH_LIST_MAX], streams[BENCH_LIST_MAX];
    size_t n_prompts, n_gens, n_depths, n_streams;
    uint32_t n_repeats;
    enum bench_format format;
    bool has_format;
    bool ops;
    uint32_t heads[BENCH_LIST_MAX]; /* numbers of KV heads: the model is a shape's name then */
    size_t n_heads;
    const char *type; /* of their weights */
    const char *plot; /* path, or NULL */
    bool head_is_printed;
};

static const struct argp_option options[] = {
    {NULL, 0, NULL, 0, "Tests (lists are separated by commas):", 5},
    {"n-prompt", 'p', "LIST", 0, "Prompt lengths (512; 0: none)", 5},
    {"n-gen", 'n', "LIST", 0, "Numbers of generated tokens (128; 0: none)", 5},
    {"n-depth", 'd', "LIST", 0, "Tokens of context before the test (0)", 5},
    {"npl", KEY_NPL, "LIST", 0, "Streams at once (also -npl) (1)", 5},
    {"repetitions", 'r', "N", 0, "Times that each test is run (5)", 5},
    {"ops", KEY_OPS, NULL, 0, "Also the time of each kind of op, by the backend's own clocks", 5},
    {"kv-heads", KEY_HEADS, "LIST", 0,
     "-m is a shape of gqa-synth: measures models of it with so many KV heads", 5},
    {"type", KEY_TYPE, "TYPE", 0, "Type of these models' weights (q4_0)", 5},
    {"plot", KEY_PLOT, "FILE", 0, "Also draws the rows, as SVG", 5},
    {"output", 'o', "FORMAT", 0, "md, csv, json or jsonl", 5},
    {0},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    static const char *const formats[] = {"md", "csv", "json", "jsonl"};
    struct bench *b = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &b->load;
        return 0;
    case 'p':
        b->n_prompts = cli_numbers(state, "n-prompt", arg, 1u << 20, b->prompts, BENCH_LIST_MAX);
        return 0;
    case 'n':
        b->n_gens = cli_numbers(state, "n-gen", arg, 1u << 20, b->gens, BENCH_LIST_MAX);
        return 0;
    case 'd':
        b->n_depths = cli_numbers(state, "n-depth", arg, 1u << 20, b->depths, BENCH_LIST_MAX);
        return 0;
    case KEY_NPL:
        b->n_streams =
            cli_numbers(state, "npl", arg, BENCH_STREAMS_MAX, b->streams, BENCH_LIST_MAX);
        return 0;
    case 'r':
        b->n_repeats = (uint32_t)cli_number(state, "repetitions", arg, 1, BENCH_REPEATS_MAX);
        return 0;
    case KEY_HEADS:
        b->n_heads = cli_numbers(state, "kv-heads", arg, 4096, b->heads, BENCH_LIST_MAX);
        return 0;
    case KEY_TYPE:
        b->type = arg;
        return 0;
    case KEY_PLOT:
        b->plot = arg;
        return 0;
    case KEY_OPS:
        b->ops = true;
        return 0;
    case 'o':
        for (size_t i = 0; i < sizeof(formats) / sizeof(formats[0]); i++) {
            if (strcmp(arg, formats[i]) == 0) {
                b->format = (enum bench_format)i;
                b->has_format = true;
                return 0;
            }
        }
        cli_usage(state, "--output: '%s' is none of md, csv, json, jsonl", arg);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static uint32_t longest(const uint32_t *list, size_t n)
{
    uint32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        most = list[i] > most ? list[i] : most;
    }
    return most;
}

/* The context that the longest test needs. */
static uint32_t context_size(const struct bench *b)
{
    uint32_t p = longest(b->prompts, b->n_prompts), n = 2 * longest(b->gens, b->n_gens);
    return longest(b->depths, b->n_depths) + (p > n ? p : n) + CONTEXT_SLACK;
}

static void read_model(struct bench_model *m, const json_t *info, const char *threads)
{
    const json_t *backend = json_object_get(info, "backend");
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    m->info = info;
    m->n_vocab = (uint32_t)cli_num(info, "n_vocab", 0);
    m->weight_bytes_per_token = cli_num(info, "weight_bytes_per_token", 0);
    m->flops_per_token = cli_num(info, "flops_per_token", 0);
    m->n_threads = (uint32_t)cli_num(backend, "threads", 0);
    if (m->n_threads == 0) {
        m->n_threads = threads != NULL ? (uint32_t)strtoul(threads, NULL, 10)
                                       : (uint32_t)(online > 0 ? online : 1);
    }
    if (m->bandwidth == 0) { /* else of another model, on the same machine */
        m->bandwidth = roofline_bandwidth(m->n_threads);
        m->compute = roofline_compute(cli_str(backend, "unit", "f32"), m->n_threads);
    }
}

/* Measures, and with --ops tells of the last repetition where its time went. m->bandwidth was read
 * before; it is read again after. */
static int run_test(struct cli *c, struct bench *b, struct bench_model *m, struct bench_test *test,
                    uint64_t *seed, json_t *rows)
{
    double tps[BENCH_REPEATS_MAX], bandwidth = 0;
    json_t *before = NULL, *after = NULL;
    int code = CLI_OK;
    test->ops = b->ops ? &before : NULL;
    for (uint32_t i = 0; code == CLI_OK && i < b->n_repeats; i++) {
        code = bench_measure(c, b->load.model, m, test, seed, &tps[i]);
    }
    if (code == CLI_OK && b->ops) {
        code = bench_ops_read(c, b->load.model, &after);
    }
    /* A backend may begin to count with the reading before: only this one must tell something. */
    if (code == CLI_OK && b->ops && json_array_size(after) == 0) {
        code = cli_error(CLI_FAILED, "bench: the model's backend keeps no times of its ops");
    }
    if (code == CLI_OK) {
        bandwidth = roofline_bandwidth(m->n_threads);
        m->bandwidth = bandwidth > m->bandwidth ? bandwidth : m->bandwidth;
        json_t *row = bench_row(m, test, tps, b->n_repeats);
        if (b->ops) {
            json_object_set_new(row, "ops", bench_ops_between(before, after));
        }
        if (b->n_heads > 0) {
            json_object_set_new(row, "kv_heads",
                                json_integer((json_int_t)cli_num(m->info, "n_kv_heads", 0)));
        }
        json_array_append_new(rows, row);
        code = bench_print_row(b->format, m, row);
        m->bandwidth = bandwidth;
    }
    json_decref(before);
    json_decref(after);
    return code;
}

/* The first requests of a daemon touch memory for the first time; they do not count. */
static int warm_up(struct cli *c, const struct bench *b, const struct bench_model *m,
                   uint64_t *seed)
{
    const struct bench_test tests[] = {{.n_prompt = WARM_UP_TOKENS, .n_streams = 1},
                                       {.n_gen = WARM_UP_TOKENS, .n_streams = 1}};
    int code = CLI_OK;
    for (size_t i = 0; code == CLI_OK && i < sizeof(tests) / sizeof(tests[0]); i++) {
        double tps;
        code = bench_measure(c, b->load.model, m, &tests[i], seed, &tps);
    }
    return code;
}

/* All tests in llama-bench's order: per depth and number of streams, prompts, then generation. */
static int run_tests(struct cli *c, struct bench *b, struct bench_model *m, json_t *rows)
{
    uint64_t seed = (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    int code = warm_up(c, b, m, &seed);
    if (code == CLI_OK && !b->head_is_printed) {
        code = bench_print_head(b->format, m);
        b->head_is_printed = true;
    }
    for (size_t d = 0; d < b->n_depths; d++) {
        for (size_t s = 0; s < b->n_streams; s++) {
            struct bench_test test = {.depth = b->depths[d], .n_streams = b->streams[s]};
            for (size_t i = 0; code == CLI_OK && i < b->n_prompts + b->n_gens; i++) {
                bool prompt = i < b->n_prompts;
                test.n_prompt = prompt ? b->prompts[i] : 0;
                test.n_gen = prompt ? 0 : b->gens[i - b->n_prompts];
                if (test.n_streams > 0 && test.n_prompt + test.n_gen > 0) {
                    code = run_test(c, b, m, &test, &seed, rows);
                }
            }
        }
    }
    return code;
}

/* All tests of the model that load names. */
static int run_model(struct cli *c, struct bench *b, struct bench_model *m, json_t *rows)
{
    json_t *info = NULL;
    int code = cli_load_if_asked(c, &b->load);
    if (code == CLI_OK) {
        b->load.n_ctx = context_size(b); /* of a model that is not loaded yet */
        code = cli_model_info(c, &b->load, &info);
    }
    if (code == CLI_OK) {
        read_model(m, info, c->threads);
        code = m->n_vocab > 0 ? run_tests(c, b, m, rows)
                              : cli_error(CLI_FAILED, "model.info: no n_vocab");
    }
    m->info = NULL;
    json_decref(info);
    return code;
}

/* A model for each number of KV heads, one at a time on the disk and in memory. */
static int run_heads(struct cli *c, struct bench *b, struct bench_model *m, json_t *rows)
{
    char folder[PATH_MAX], path[PATH_MAX];
    char *shape = b->load.model;
    int code = bench_heads_folder(c, folder);
    if (code != CLI_OK) {
        return code;
    }
    for (size_t i = 0; code == CLI_OK && i < b->n_heads; i++) {
        code = bench_heads_model(shape, b->type, b->heads[i], folder, path);
        if (code != CLI_OK) {
            break;
        }
        b->load.model = cli_model_name(path);
        b->load.n_ctx = context_size(b);
        code = run_model(c, b, m, rows);
        if (code == CLI_OK) {
            code = cli_call(c, "model.unload", cli_model_params(b->load.model), NULL, NULL, NULL);
        }
        unlink(path);
        free(b->load.model);
    }
    b->load.model = shape;
    rmdir(folder);
    return code;
}

/* What a spawned daemon is told: to keep no models that nobody will ask for again, and that all
 * streams get a place, or they would run one batch after the other. ret (4) */
static void daemon_arguments(const struct bench *b, const char *n_parallel, const char **ret)
{
    size_t n = 0;
    if (b->n_heads > 0) {
        ret[n++] = "--no-weights-cache";
    }
    if (longest(b->streams, b->n_streams) > 1) {
        ret[n++] = "-np";
        ret[n++] = n_parallel;
    }
    ret[n] = NULL;
}

int cli_verb_bench(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&cli_load_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {.options = options,
                                     .parser = parse,
                                     .doc = "Measures a model's speed, beside the machine's own "
                                            "limits. 'gqa bench ipc' measures calls, "
                                            "'gqa bench kv' the KV cache, 'gqa bench serve' many "
                                            "users at once, 'gqa bench start' starts.",
                                     .children = children};
    if (argc > 1 && strcmp(argv[1], "ipc") == 0) {
        argv[1] = argv[0];
        return cli_bench_ipc(c, argc - 1, argv + 1);
    }
    if (argc > 1 && strcmp(argv[1], "kv") == 0) {
        argv[1] = argv[0];
        return cli_bench_kv(c, argc - 1, argv + 1);
    }
    if (argc > 1 && strcmp(argv[1], "serve") == 0) {
        argv[1] = argv[0];
        return cli_bench_serve(c, argc - 1, argv + 1);
    }
    if (argc > 1 && strcmp(argv[1], "start") == 0) {
        argv[1] = argv[0];
        return cli_bench_start(c, argc - 1, argv + 1);
    }
    struct bench b = {.prompts = {512},
                      .gens = {128},
                      .streams = {1},
                      .n_prompts = 1,
                      .n_gens = 1,
                      .n_depths = 1,
                      .n_streams = 1,
                      .n_repeats = 5,
                      .type = "q4_0"};
    char n_parallel[16];
    const char *daemon_args[4];
    struct bench_model m = {0};
    json_t *rows = json_array();
    cli_parse(c, &argp, argc, argv, &b);
    b.format = !b.has_format && c->json ? BENCH_JSON : b.format;
    snprintf(n_parallel, sizeof(n_parallel), "%u", longest(b.streams, b.n_streams));
    daemon_arguments(&b, n_parallel, daemon_args);
    c->daemon_args = daemon_args;
    FILE *plot = b.plot != NULL ? fopen(b.plot, "we") : NULL; /* before the time is spent */
    int code = b.plot != NULL && plot == NULL
                   ? cli_error(EX_CANTCREAT, "%s: %s", b.plot, strerror(errno))
                   : cli_connect(c);
    if (code == CLI_OK) {
        code = b.n_heads > 0 ? run_heads(c, &b, &m, rows) : run_model(c, &b, &m, rows);
    }
    if (code == CLI_OK) {
        code = bench_print_all(b.format, json_incref(rows));
    }
    if (code == CLI_OK && plot != NULL && json_array_size(rows) > 0) {
        code = bench_plot(plot, b.plot, rows);
    } else if (plot != NULL) {
        fclose(plot);
        cli_remove_output(b.plot);
    }
    json_decref(rows);
    free(b.load.model);
    return code;
}
