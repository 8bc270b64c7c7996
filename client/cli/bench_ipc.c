/* client/cli/bench_ipc.c - gqa bench ipc: what a call costs, and what bytes cost on their way, by
 * the socket and by rings in shared memory, beside what copying and waking cost here.
 *
 * A ping's params may hold anything, since unknown keys are ignored: that makes it a carrier of
 * payload, of which the daemon only looks at the outside. Tensors come the other way: with a model,
 * text.logits sends all logits of a prompt. The call takes what its steps took to compute them
 * (prefill_ms of its result), and what is left of its time is their delivery: by the engine, by the
 * way, and the program's looking at them. Steps and delivery overlap, unless one step computes all
 * rows: GQAD_PARALLEL and GQAD_BATCH_SIZE of at least so many see to that. */
#include "client/cli/bench_ipc.h"

#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SPIN_US       100u
#define LOGITS_REPEAT 9u

struct ipc_bench {
    size_t count;
    char *model; /* or NULL */
    uint32_t n_prompt;
};

static const struct bench_ipc_way ways[] = {
    {"socket", "", "socket", .carries = true},
    {"socket", "asleep", "socket", .pause_us = BENCH_IPC_PAUSE_US},
    {"ring", "polling", NULL, GQA_F_SHM, SPIN_US, .carries = true},
    {"ring", "futex", "eventfd", GQA_F_SHM, GQA_SPIN_NEVER},
    {"ring", "", "eventfd", GQA_F_SHM},
    {"ring", "asleep", "eventfd", GQA_F_SHM, .pause_us = BENCH_IPC_PAUSE_US},
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct ipc_bench *b = state->input;
    switch (key) {
    case 'n':
        b->count = cli_number(state, "count", arg, 1, 10000000);
        return 0;
    case 'm':
        b->model = cli_model_name(arg);
        return 0;
    case 'p':
        b->n_prompt = (uint32_t)cli_number(state, "n-prompt", arg, 1, 1u << 20);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

void bench_ipc_pause(uint32_t us)
{
    const struct timespec t = {.tv_nsec = (long)us * 1000};
    nanosleep(&t, NULL);
}

/* ---- pings ------------------------------------------------------------------------------- */

/* n calls with a payload of that many bytes, each in us. */
static int ping(struct cli *c, const struct bench_ipc_way *w, const char *payload, size_t bytes,
                double *us, size_t n)
{
    struct gqa_params *p = NULL;
    struct gqa_error e;
    int r = 0;
    if (bytes > 0) {
        p = cli_params();
        gqa_params_text(p, "payload", payload, bytes);
    }
    for (size_t i = 0; i < n && r == 0 && !cli_interrupted(); i++) {
        if (w->pause_us > 0) {
            bench_ipc_pause(w->pause_us);
        }
        double start = cli_now_us();
        r = gqa_call(c->g, "gqa.ping", p, NULL, NULL, &e);
        us[i] = cli_now_us() - start;
    }
    gqa_params_destroy(p);
    if (r < 0) {
        return cli_error(CLI_FAILED, "gqa.ping: %s", e.message);
    }
    return cli_interrupted() ? CLI_INTERRUPTED : CLI_OK;
}

void bench_ipc_row(json_t *rows, const char *test, const struct bench_ipc_way *w, size_t bytes,
                   double *us, size_t n)
{
    double p50 = cli_percentile(us, n, 50), p99 = cli_percentile(us, n, 99);
    double bare = bytes == 0 ? bench_bare_of(rows, w) : 0;
    json_t *row = json_pack("{s:s, s:s, s:s, s:I, s:I, s:f, s:f, s:f}", "test", test, "transport",
                            w->transport, "wait", w->wait, "bytes", (json_int_t)bytes, "n",
                            (json_int_t)n, "p50_us", p50, "p99_us", p99, "gb_per_s",
                            p50 > 0 ? (double)bytes / p50 / 1e3 : 0.0);
    if (bare > 0) {
        json_object_set_new(row, "of_bare", json_real(p50 / bare));
    }
    json_array_append_new(rows, row);
}

static int run_pings(struct cli *c, const struct bench_ipc_way *w, size_t count, json_t *rows)
{
    static const size_t sizes[] = {0, 4096, 65536, 1u << 20, 8u << 20};
    const size_t n_sizes = w->carries ? sizeof(sizes) / sizeof(sizes[0]) : 1;
    char *payload = malloc(sizes[n_sizes - 1] + 1);
    double *us = calloc(count, sizeof(*us));
    int code = CLI_OK;
    if (payload == NULL || us == NULL) {
        code = cli_error(EX_OSERR, "bench: no memory");
    } else {
        memset(payload, 'x', sizes[n_sizes - 1]);
    }
    for (size_t i = 0; code == CLI_OK && i < n_sizes; i++) {
        /* Large ones fewer times: the time is then a matter of bandwidth, and steady. */
        size_t n = sizes[i] > 65536 && count > 100 ? count / 50 + 50 : count;
        code = ping(c, w, payload, sizes[i], us, n < 10 ? n : 10); /* warms up */
        code = code == CLI_OK ? ping(c, w, payload, sizes[i], us, n) : code;
        if (code == CLI_OK) {
            bench_ipc_row(rows, "ping", w, sizes[i], us, n);
        }
    }
    free(payload);
    free(us);
    return code;
}

/* ---- logits ------------------------------------------------------------------------------ */

struct logits {
    size_t bytes;
    uint64_t sum; /* every byte is looked at once, as whoever asks for them would */
};

/* What one text.logits took, in us. */
struct logits_time {
    double call, computing;
};

static void on_rows(void *arg, uint32_t id, const struct gqa_value *event)
{
    struct logits *l = arg;
    struct gqa_tensor_view t;
    const struct gqa_value *v = gqa_value_get(event, "logits");
    if (gqa_value_tensor_f32(v, &t) < 0) {
        return;
    }
    /* As words, in any order: at the pace of memory, which a chain of additions would not keep. */
    uint64_t sum = 0;
    for (size_t i = 0; i + sizeof(sum) <= t.bytes; i += sizeof(sum)) {
        uint64_t word;
        memcpy(&word, (const char *)t.data + i, sizeof(word));
        sum += word;
    }
    l->sum += sum;
    l->bytes += t.bytes;
}

/* One text.logits of n_prompt tokens; every time others, so that the cache has none of them. */
static int logits_once(struct cli *c, const struct ipc_bench *b, uint32_t seed,
                       struct logits_time *ret, size_t *ret_bytes)
{
    struct logits l = {0};
    struct gqa_error e;
    struct gqa_reply *reply = NULL;
    double prefill_ms = 0;
    int32_t *ids = malloc(b->n_prompt * sizeof(*ids));
    struct gqa_params *p = cli_model_params(b->model);
    if (ids == NULL) {
        gqa_params_destroy(p);
        return cli_error(EX_OSERR, "bench: no memory");
    }
    for (uint32_t i = 0; i < b->n_prompt; i++) {
        ids[i] = (int32_t)(3 + (i * 7u + seed * 13u) % 200u);
    }
    gqa_params_tokens(p, "tokens", ids, b->n_prompt);
    gqa_params_bool(p, "cache_prompt", false);
    const struct gqa_call_options o = {.struct_size = sizeof(o), .event = on_rows, .arg = &l};
    double start = cli_now_us();
    int r = gqa_call(c->g, "text.logits", p, &o, &reply, &e);
    ret->call = cli_now_us() - start;
    gqa_params_destroy(p);
    free(ids);
    if (r < 0) {
        return cli_error(CLI_FAILED, "text.logits: %s", e.message);
    }
    r = gqa_value_f64(gqa_value_get(gqa_value_get(gqa_reply_value(reply), "timings"), "prefill_ms"),
                      &prefill_ms);
    gqa_reply_destroy(reply);
    if (r < 0) {
        return cli_error(CLI_FAILED, "text.logits: this daemon does not tell what its steps took");
    }
    ret->computing = prefill_ms * 1e3;
    *ret_bytes = l.bytes;
    return CLI_OK;
}

static int run_logits(struct cli *c, const struct bench_ipc_way *w, const struct ipc_bench *b,
                      json_t *rows)
{
    double call[LOGITS_REPEAT], computing[LOGITS_REPEAT], delivery[LOGITS_REPEAT];
    size_t bytes = 0;
    for (uint32_t i = 0; i <= LOGITS_REPEAT; i++) { /* the first one warms up */
        struct logits_time t = {0, 0};
        uint32_t n = i > 0 ? i - 1 : 0;
        int code = logits_once(c, b, i, &t, &bytes);
        if (code != CLI_OK || cli_interrupted()) {
            return code != CLI_OK ? code : CLI_INTERRUPTED;
        }
        call[n] = t.call;
        computing[n] = t.computing;
        delivery[n] = t.call - t.computing;
    }
    bench_ipc_row(rows, "logits", w, bytes, call, LOGITS_REPEAT);
    bench_ipc_row(rows, "steps", w, bytes, computing, LOGITS_REPEAT);
    bench_ipc_row(rows, "delivery", w, bytes, delivery, LOGITS_REPEAT);
    return CLI_OK;
}

/* ---- all of it --------------------------------------------------------------------------- */

static int run_way(struct cli *c, const struct bench_ipc_way *w, const struct ipc_bench *b,
                   json_t *rows)
{
    c->flags = w->flags;
    c->spin_us = w->spin_us;
    c->ring_out_bytes = 64u << 20;
    int code = cli_connect(c);
    code = code == CLI_OK ? run_pings(c, w, b->count, rows) : code;
    if (code == CLI_OK && b->model != NULL && w->carries) {
        code = run_logits(c, w, b, rows);
    }
    c->g = gqa_close(c->g);
    return code;
}

static int print_rows(struct cli *c, json_t *rows)
{
    if (c->json) {
        return cli_print_json(json_incref(rows));
    }
    printf("%-8s %-9s %-8s %10s %8s %10s %10s %8s %8s\n", "test", "transport", "wait", "bytes", "n",
           "p50 us", "p99 us", "GB/s", "of bare");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        printf("%-8s %-9s %-8s %10.0f %8.0f %10.1f %10.1f %8.2f", cli_str(r, "test", ""),
               cli_str(r, "transport", ""), cli_str(r, "wait", ""), cli_num(r, "bytes", 0),
               cli_num(r, "n", 0), cli_num(r, "p50_us", 0), cli_num(r, "p99_us", 0),
               cli_num(r, "gb_per_s", 0));
        double of_bare = cli_num(r, "of_bare", 0);
        if (of_bare > 0) {
            printf(" %8.2f", of_bare);
        }
        printf("\n");
    }
    return CLI_OK;
}

int cli_bench_ipc(struct cli *c, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"count", 'n', "N", 0, "Calls per row (2000)", 5},
        {"model", 'm', "MODEL", 0, "Also text.logits of this model", 5},
        {"n-prompt", 'p', "N", 0, "Rows of logits (512)", 5},
        {0}};
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .doc = "Measures calls to the daemon, and bytes on their way: by the socket, and by rings "
               "in shared memory while both ends look at them, while the client sleeps, and while "
               "the daemon does; beside what waking a process costs here."};
    struct ipc_bench b = {.count = 2000, .n_prompt = 512};
    cli_parse(c, &argp, argc, argv, &b);
    json_t *rows = json_array();
    int code = bench_bare_copy(rows);
    code = code == CLI_OK ? bench_bare_wakings(b.count, rows) : code;
    for (size_t i = 0; code == CLI_OK && i < sizeof(ways) / sizeof(ways[0]); i++) {
        code = run_way(c, &ways[i], &b, rows);
    }
    code = code == CLI_OK ? print_rows(c, rows) : code;
    json_decref(rows);
    free(b.model);
    return code;
}
