/* client/cli/bench_kv.c - gqa bench kv: what the KV cache spares, and what it costs.
 *
 * Private daemons on a temporary folder are started, ended, killed and started again. Prompts are
 * random tokens, fresh in every repetition, so that a cold run is cold. The time to the first token
 * counts here, from the request's sending to its first event, with the model loaded and warm.
 *
 * What a prompt's first token must cost when all its whole blocks are cached is measured apart, in
 * a daemon without a store: the step over its last tokens (those that fill no block), at that
 * depth, and one step of decoding. The times of the cached runs are told as multiples of that. */
#include "client/cli/bench.h"

#include <errno.h>
#include <ftw.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define DECODE_TOKENS  33u /* the first belongs to the prompt */
#define WARM_UP_TOKENS 16u
#define SHARED_PREFIX  2000u
#define SHARED_STREAMS 8u
#define SHARED_REST    50u
#define SETTLE_MS_MAX  60000u

/* One figure per repetition. */
struct series {
    double x[BENCH_REPEATS_MAX];
    size_t n;
};

struct kv_bench {
    struct cli_load load; /* as asked for; what is loaded is a copy's */
    uint32_t n_prompt, n_repeats;
    uint64_t seed;
    uint32_t n_vocab;
    int32_t *ids; /* (n_prompt) of this repetition */
    char *name;   /* that the model is served under */
    char folder[4000], folder_on[4096], folder_off[4096];
    struct cli on, off; /* daemons with a store, and without */
    struct series cold, again, restart, kill, decode, tail, left;
    struct series prefill_on, prefill_off, decode_on, decode_off;
    double saved_bytes, written_bytes; /* by all daemons with a store */
    double shared_computed;
};

static void add(struct series *s, double x)
{
    s->x[s->n++] = x;
}

static double median(struct series *s)
{
    return cli_percentile(s->x, s->n, 50);
}

/* ---- daemons ----------------------------------------------------------------------------- */

static int warm_up(struct cli *d, const struct kv_bench *b);

/* Starts a daemon on the folder, loads the model and touches its memory. */
static int start(struct kv_bench *b, struct cli *d, bool store)
{
    static const char *const without[] = {"--no-kv-store", NULL};
    d->spawn = true;
    d->socket = NULL;
    d->cache_dir = store ? b->folder_on : b->folder_off;
    d->daemon_args = store ? NULL : without;
    struct cli_load load = b->load;
    load.model = strdup(b->load.model);
    uint32_t most =
        b->n_prompt > SHARED_PREFIX + SHARED_REST ? b->n_prompt : SHARED_PREFIX + SHARED_REST;
    load.n_ctx = load.n_ctx > 0 ? load.n_ctx : most + 128;
    json_t *info = NULL;
    int code = load.model != NULL ? cli_connect(d) : cli_error(EX_OSERR, "bench: no memory");
    code = code == CLI_OK ? cli_load(d, &load, &info) : code;
    if (code == CLI_OK) {
        b->n_vocab = (uint32_t)cli_num(info, "n_vocab", 0);
        free(b->name);
        b->name = load.model;
        load.model = NULL;
        code = b->n_vocab > 0 ? warm_up(d, b) : cli_error(CLI_FAILED, "model.info: no n_vocab");
    }
    json_decref(info);
    free(load.model);
    return code;
}

static double number_of(const json_t *stats, const char *key)
{
    return cli_num(stats, key, 0);
}

/* Waits until all blocks are saved: what is counted, or to be found after a kill. */
static int settle(struct cli *d)
{
    const struct timespec pause = {.tv_nsec = 5000000};
    double until = cli_now_us() + SETTLE_MS_MAX * 1e3;
    for (;;) {
        json_t *stats = NULL;
        int code = cli_call(d, "kv.stats", NULL, NULL, NULL, &stats);
        if (code != CLI_OK) {
            return code;
        }
        bool done = number_of(stats, "store_pending") == 0;
        bool ok = strcmp(cli_str(stats, "store_state", "ok"), "ok") == 0;
        if (!ok) {
            code = cli_error(CLI_FAILED, "bench: nothing is saved: %s",
                             cli_str(stats, "store_state", "?"));
        }
        json_decref(stats);
        if (code != CLI_OK || done) {
            return code;
        }
        if (cli_interrupted() || cli_now_us() > until) {
            return cli_interrupted()
                       ? CLI_INTERRUPTED
                       : cli_error(CLI_FAILED, "bench: blocks were not saved within %u s",
                                   SETTLE_MS_MAX / 1000);
        }
        nanosleep(&pause, NULL); /* the daemon has no event for it */
    }
}

static int count_store(struct kv_bench *b, struct cli *d)
{
    json_t *stats = NULL;
    int code = cli_call(d, "kv.stats", NULL, NULL, NULL, &stats);
    if (code == CLI_OK) {
        b->saved_bytes += number_of(stats, "store_bytes_saved");
        b->written_bytes += number_of(stats, "store_bytes_written");
        json_decref(stats);
    }
    return code;
}

/* Ends a daemon with a store when all is saved: as usual, or by SIGKILL. */
static int end(struct kv_bench *b, struct cli *d, bool by_kill)
{
    int code = settle(d);
    code = code == CLI_OK ? count_store(b, d) : code;
    if (code == CLI_OK && by_kill) {
        kill(gqa_spawned_pid(d->g), SIGKILL);
    }
    d->g = gqa_close(d->g);
    return code;
}

/* ---- one request ------------------------------------------------------------------------- */

struct first {
    double at_us; /* of the first event; 0: none has come */
};

static void on_first(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct first *f = arg;
    f->at_us = f->at_us == 0 ? cli_now_us() : f->at_us;
}

static struct gqa_params *request(const struct kv_bench *b, const int32_t *ids, size_t n_ids,
                                  uint32_t n_predict, bool cached)
{
    struct gqa_params *p = cli_model_params(b->name);
    gqa_params_tokens(p, "tokens", ids, n_ids);
    gqa_params_u64(p, "n_predict", n_predict);
    gqa_params_f64(p, "temperature", 0);
    gqa_params_bool(p, "ignore_eos", true);
    gqa_params_bool(p, "cache_prompt", cached);
    return p;
}

/* *ret_ms: until the first token. *ret (may be NULL): the result. */
static int run(const struct kv_bench *b, struct cli *d, const int32_t *ids, uint32_t n_predict,
               bool cached, double *ret_ms, json_t **ret)
{
    struct first first = {0};
    struct gqa_params *p = request(b, ids, b->n_prompt, n_predict, cached);
    json_t *result = NULL;
    double start_us = cli_now_us();
    int code = cli_call(d, "text.generate", p, on_first, &first, &result);
    if (code == CLI_OK && cli_interrupted()) {
        code = CLI_INTERRUPTED;
    }
    if (code == CLI_OK && ret != NULL) {
        *ret = result;
    } else {
        json_decref(result);
    }
    *ret_ms = (first.at_us - start_us) / 1e3;
    return code;
}

/* The same, of a run that must find as much in the cache as it can, or (cold) nothing. */
static int run_for(struct kv_bench *b, struct cli *d, struct series *s, bool cold, const char *what)
{
    json_t *result = NULL;
    double ms;
    int code = run(b, d, b->ids, 1, true, &ms, &result);
    if (code != CLI_OK) {
        return code;
    }
    double n_cached = cli_num(result, "n_cached", 0);
    double least = cold ? 0 : (b->n_prompt - 1) / 64 * 64;
    if (cold ? n_cached > 0 : n_cached < least) {
        code = cli_error(CLI_FAILED, "bench: %s: %.0f of %u tokens were cached: %s", what, n_cached,
                         b->n_prompt, cli_str(json_object_get(result, "cache"), "miss_reason", ""));
    } else {
        add(s, ms);
    }
    if (code == CLI_OK && s == &b->again) {
        add(&b->left, b->n_prompt - n_cached);
    }
    json_decref(result);
    return code;
}

static int warm_up(struct cli *d, const struct kv_bench *b)
{
    int32_t ids[WARM_UP_TOKENS];
    uint64_t seed = b->seed;
    bench_random_tokens(ids, WARM_UP_TOKENS, b->n_vocab, &seed);
    struct gqa_params *p = request(b, ids, WARM_UP_TOKENS, WARM_UP_TOKENS, false);
    return cli_call(d, "text.generate", p, NULL, NULL, NULL);
}

/* ---- what a cached prompt must cost ------------------------------------------------------ */

/* Milliseconds that the engine has spent in steps so far. */
static int step_ms(struct cli *d, double *ret)
{
    json_t *stats = NULL;
    int code = cli_call(d, "server.stats", NULL, NULL, NULL, &stats);
    if (code == CLI_OK) {
        *ret = number_of(stats, "step_ms_mean") * number_of(stats, "steps_total");
        json_decref(stats);
    }
    return code;
}

/* In the daemon without a store: the prompt cold, with tokens generated behind it; then the steps
 * that its whole blocks with another ending take. */
static int measure_bound(struct kv_bench *b)
{
    json_t *result = NULL;
    double ms, before, after;
    uint32_t whole = (b->n_prompt - 1) / 64 * 64;
    int32_t *other = malloc(b->n_prompt * sizeof(*other));
    if (other == NULL) {
        return cli_error(EX_OSERR, "bench: no memory");
    }
    memcpy(other, b->ids, b->n_prompt * sizeof(*other));
    bench_random_tokens(other + whole, b->n_prompt - whole, b->n_vocab, &b->seed);
    if (other[whole] == b->ids[whole]) { /* else a part of that block would be copied */
        other[whole] = (other[whole] + 1) % (int32_t)b->n_vocab;
    }
    int code = run(b, &b->off, b->ids, DECODE_TOKENS, true, &ms, &result);
    if (code == CLI_OK) {
        const json_t *t = json_object_get(result, "timings");
        add(&b->decode, cli_num(t, "predict_ms", 0) / (cli_num(result, "n_generated", 2) - 1));
        add(&b->prefill_off, cli_num(t, "prompt_per_second", 0));
        add(&b->decode_off, cli_num(t, "predicted_per_second", 0));
        json_decref(result);
    }
    code = code == CLI_OK ? step_ms(&b->off, &before) : code;
    code = code == CLI_OK ? run(b, &b->off, other, 1, true, &ms, NULL) : code;
    code = code == CLI_OK ? step_ms(&b->off, &after) : code;
    if (code == CLI_OK) {
        add(&b->tail, after - before);
    }
    free(other);
    return code;
}

/* The same work beside it in the daemon with a store, for its cost. */
static int measure_on(struct kv_bench *b)
{
    json_t *result = NULL;
    double ms;
    int code = run(b, &b->on, b->ids, DECODE_TOKENS, true, &ms, &result);
    if (code == CLI_OK) {
        const json_t *t = json_object_get(result, "timings");
        add(&b->prefill_on, cli_num(t, "prompt_per_second", 0));
        add(&b->decode_on, cli_num(t, "predicted_per_second", 0));
        json_decref(result);
    }
    return code == CLI_OK ? settle(&b->on) : code;
}

/* ---- a prefix that requests share -------------------------------------------------------- */

static int prompt_tokens_so_far(struct cli *d, double *ret)
{
    json_t *stats = NULL;
    int code = cli_call(d, "server.stats", NULL, NULL, NULL, &stats);
    if (code == CLI_OK) {
        *ret = number_of(stats, "tokens_prompt_total");
        json_decref(stats);
    }
    return code;
}

static int measure_shared(struct kv_bench *b)
{
    struct cli_call calls[SHARED_STREAMS] = {0};
    int32_t ids[SHARED_PREFIX + SHARED_REST];
    double before, after;
    int code = prompt_tokens_so_far(&b->on, &before);
    bench_random_tokens(ids, SHARED_PREFIX, b->n_vocab, &b->seed);
    for (uint32_t i = 0; code == CLI_OK && i < SHARED_STREAMS; i++) {
        bench_random_tokens(ids + SHARED_PREFIX, SHARED_REST, b->n_vocab, &b->seed);
        /* By chance two might begin alike, and share that too. */
        ids[SHARED_PREFIX] = (int32_t)(i % b->n_vocab);
        cli_start(&b->on, &calls[i], "text.generate",
                  request(b, ids, SHARED_PREFIX + SHARED_REST, 1, true));
    }
    if (code == CLI_OK) {
        cli_finish(&b->on, calls, SHARED_STREAMS);
    }
    for (uint32_t i = 0; i < SHARED_STREAMS; i++) {
        code = code == CLI_OK ? cli_report(&calls[i]) : code;
        json_decref(calls[i].result);
    }
    code = code == CLI_OK ? prompt_tokens_so_far(&b->on, &after) : code;
    b->shared_computed = code == CLI_OK ? after - before : 0;
    return code;
}

/* ---- the whole --------------------------------------------------------------------------- */

/* One fresh prompt through all that can become of it. */
static int repeat(struct kv_bench *b)
{
    bench_random_tokens(b->ids, b->n_prompt, b->n_vocab, &b->seed);
    int code = run_for(b, &b->on, &b->cold, true, "cold");
    code = code == CLI_OK ? run_for(b, &b->on, &b->again, false, "again") : code;
    code = code == CLI_OK ? end(b, &b->on, false) : code;
    code = code == CLI_OK ? start(b, &b->on, true) : code;
    code = code == CLI_OK ? run_for(b, &b->on, &b->restart, false, "after a restart") : code;
    code = code == CLI_OK ? end(b, &b->on, true) : code;
    code = code == CLI_OK ? start(b, &b->on, true) : code;
    code = code == CLI_OK ? run_for(b, &b->on, &b->kill, false, "after kill -9") : code;
    if (code == CLI_OK) { /* a prompt that neither daemon knows */
        bench_random_tokens(b->ids, b->n_prompt, b->n_vocab, &b->seed);
        code = measure_bound(b);
    }
    return code == CLI_OK ? measure_on(b) : code;
}

static int run_all(struct kv_bench *b)
{
    int code = start(b, &b->off, false);
    code = code == CLI_OK ? start(b, &b->on, true) : code;
    for (uint32_t i = 0; code == CLI_OK && i < b->n_repeats; i++) {
        code = repeat(b);
    }
    code = code == CLI_OK ? measure_shared(b) : code;
    code = code == CLI_OK ? end(b, &b->on, false) : code;
    b->on.g = gqa_close(b->on.g);
    b->off.g = gqa_close(b->off.g);
    return code;
}

static double ratio(double a, double b)
{
    return b > 0 ? a / b : 0;
}

static json_t *report(struct kv_bench *b)
{
    double cold = median(&b->cold), again = median(&b->again), restart = median(&b->restart);
    double killed = median(&b->kill), decode = median(&b->decode), tail = median(&b->tail);
    double bound = decode + tail;
    double separate = (double)SHARED_STREAMS * (SHARED_PREFIX + SHARED_REST);
    json_t *j = json_pack("{s:f, s:f, s:f, s:f, s:f, s:I, s:I, s:f}", "ttft_cold_ms", cold,
                          "ttft_again_ms", again, "ttft_restart_ms", restart, "ttft_kill_ms",
                          killed, "decode_step_ms", decode, "n_prompt", (json_int_t)b->n_prompt,
                          "n_left", (json_int_t)median(&b->left), "tail_ms", tail);
    json_object_update_new(j, json_pack("{s:f, s:f, s:f, s:f}", "ratio_again", ratio(again, bound),
                                        "ratio_restart", ratio(restart, bound), "ratio_kill",
                                        ratio(killed, bound), "speedup", ratio(cold, again)));
    json_object_set_new(j, "prefix_shared",
                        json_pack("{s:I, s:I, s:I, s:I}", "n_requests", (json_int_t)SHARED_STREAMS,
                                  "n_prefix", (json_int_t)SHARED_PREFIX, "tokens_computed",
                                  (json_int_t)b->shared_computed, "tokens_if_separate",
                                  (json_int_t)separate));
    json_object_set_new(j, "store",
                        json_pack("{s:I, s:I, s:f}", "bytes_saved", (json_int_t)b->saved_bytes,
                                  "bytes_written", (json_int_t)b->written_bytes, "ratio",
                                  ratio(b->written_bytes, b->saved_bytes)));
    json_object_set_new(j, "store_overhead",
                        json_pack("{s:f, s:f}", "prefill",
                                  ratio(median(&b->prefill_on), median(&b->prefill_off)), "decode",
                                  ratio(median(&b->decode_on), median(&b->decode_off))));
    return j;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    return remove(path);
}

static int make_folder(const struct cli *c, struct kv_bench *b)
{
    const char *in = c->cache_dir != NULL ? c->cache_dir : getenv("TMPDIR");
    snprintf(b->folder, sizeof(b->folder), "%s/gqa-bench-kv-XXXXXX", in != NULL ? in : "/tmp");
    if (mkdtemp(b->folder) == NULL) {
        return cli_error(EX_CANTCREAT, "%s: %s", b->folder, strerror(errno));
    }
    snprintf(b->folder_on, sizeof(b->folder_on), "%s/on", b->folder);
    snprintf(b->folder_off, sizeof(b->folder_off), "%s/off", b->folder);
    return CLI_OK;
}

static const struct argp_option options[] = {
    {"n-prompt", 'p', "N", 0, "Tokens of the prompt (3000)", 5},
    {"repetitions", 'r', "N", 0, "Times that everything is run (3)", 5},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct kv_bench *b = state->input;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &b->load;
        return 0;
    case 'p':
        b->n_prompt = (uint32_t)cli_number(state, "n-prompt", arg, 65, 1u << 20);
        return 0;
    case 'r':
        b->n_repeats = (uint32_t)cli_number(state, "repetitions", arg, 1, BENCH_REPEATS_MAX);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

int cli_bench_kv(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&cli_load_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .doc = "Measures what the KV cache spares and costs, with private daemons on a temporary "
               "folder (in --cache-dir's, where that is given).",
        .children = children};
    static struct kv_bench b = {.n_prompt = 3000, .n_repeats = 3};
    cli_parse(c, &argp, argc, argv, &b);
    b.seed = (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    b.on = b.off = *c;
    b.ids = malloc(b.n_prompt * sizeof(*b.ids));
    int code = b.ids != NULL ? make_folder(c, &b) : cli_error(EX_OSERR, "bench: no memory");
    if (code == CLI_OK) {
        code = run_all(&b);
        nftw(b.folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    }
    if (code == CLI_OK) {
        json_t *j = report(&b);
        if (c->json) {
            code = cli_print_json(j);
        } else {
            cli_print_tree(j, 0);
            json_decref(j);
        }
    }
    free(b.ids);
    free(b.name);
    free(b.load.model);
    return code;
}
