/* client/cli/bench_ipc.c - gqa bench ipc: what a call costs, and what bytes cost on their way, by
 * the socket and by rings in shared memory, beside what copying and waking cost here.
 *
 * A ping's params may hold anything, since unknown keys are ignored: that makes it a carrier of
 * payload, of which the daemon only looks at the outside. Tensors come the other way: with a model,
 * text.logits sends all logits of a prompt. The call takes what its steps took to compute them
 * (prefill_ms of its result), and what is left of its time is their delivery: by the engine, by the
 * way, and the program's looking at them. Steps and delivery overlap, unless one step computes all
 * rows: GQAD_PARALLEL and GQAD_BATCH_SIZE of at least so many see to that. */
#include "client/cli/cli.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

#define PAUSE_US      500u /* after which the daemon has stopped looking at its rings */
#define SPIN_US       100u
#define COPY_BYTES    (64u << 20)
#define LOGITS_REPEAT 9u

struct ipc_bench {
    size_t count;
    char *model; /* or NULL */
    uint32_t n_prompt;
};

/* How a connection is made, and how both ends wait. */
struct way {
    const char *transport, *wait;
    uint32_t flags, spin_us, pause_us; /* pause_us: between calls, so that the daemon sleeps */
    bool carries;                      /* payloads, too */
};

static const struct way ways[] = {
    {"socket", "", 0, 0, 0, true},
    {"socket", "asleep", 0, 0, PAUSE_US, false},
    {"ring", "polling", GQA_F_SHM, SPIN_US, 0, true},
    {"ring", "futex", GQA_F_SHM, 0, 0, false},
    {"ring", "asleep", GQA_F_SHM, 0, PAUSE_US, false},
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

static void pause_us(uint32_t us)
{
    const struct timespec t = {.tv_nsec = (long)us * 1000};
    nanosleep(&t, NULL);
}

/* ---- pings ------------------------------------------------------------------------------- */

/* n calls with a payload of that many bytes, each in us. */
static int ping(struct cli *c, const struct way *w, const char *payload, size_t bytes, double *us,
                size_t n)
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
            pause_us(w->pause_us);
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

static void add_row(json_t *rows, const char *test, const struct way *w, size_t bytes, double *us,
                    size_t n)
{
    double p50 = cli_percentile(us, n, 50), p99 = cli_percentile(us, n, 99);
    json_array_append_new(rows,
                          json_pack("{s:s, s:s, s:s, s:I, s:I, s:f, s:f, s:f}", "test", test,
                                    "transport", w->transport, "wait", w->wait, "bytes",
                                    (json_int_t)bytes, "n", (json_int_t)n, "p50_us", p50, "p99_us",
                                    p99, "gb_per_s", p50 > 0 ? (double)bytes / p50 / 1e3 : 0.0));
}

static int run_pings(struct cli *c, const struct way *w, size_t count, json_t *rows)
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
            add_row(rows, "ping", w, sizes[i], us, n);
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

static int run_logits(struct cli *c, const struct way *w, const struct ipc_bench *b, json_t *rows)
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
    add_row(rows, "logits", w, bytes, call, LOGITS_REPEAT);
    add_row(rows, "steps", w, bytes, computing, LOGITS_REPEAT);
    add_row(rows, "delivery", w, bytes, delivery, LOGITS_REPEAT);
    return CLI_OK;
}

/* ---- all of it --------------------------------------------------------------------------- */

/* What a copy of bytes that lie in no cache takes here: no transport can be faster. */
static int run_copy(json_t *rows)
{
    static const struct way none = {.transport = "none", .wait = ""};
    char *from = malloc(COPY_BYTES), *to = malloc(COPY_BYTES);
    double us[9];
    if (from == NULL || to == NULL) {
        free(from);
        free(to);
        return cli_error(EX_OSERR, "bench: no memory");
    }
    memset(from, 1, COPY_BYTES);
    memset(to, 2, COPY_BYTES);
    for (size_t i = 0; i < sizeof(us) / sizeof(us[0]); i++) {
        double start = cli_now_us();
        memcpy(to, from, COPY_BYTES);
        __asm__ volatile("" : : "r"(to) : "memory");
        us[i] = cli_now_us() - start;
    }
    add_row(rows, "memcpy", &none, COPY_BYTES, us, sizeof(us) / sizeof(us[0]));
    free(from);
    free(to);
    return CLI_OK;
}

/* What two wakings cost here, there and back, between threads that sleep: no call to a daemon that
 * sleeps can be quicker, and how much of its time is the machine's shows beside it. */
struct wakers {
    int there, back; /* eventfds */
};

static void *answer(void *arg)
{
    const struct wakers *w = arg;
    uint64_t n;
    while (read(w->there, &n, sizeof(n)) == (ssize_t)sizeof(n) && n == 1 &&
           write(w->back, &n, sizeof(n)) == (ssize_t)sizeof(n)) {
    }
    return NULL;
}

static bool wake(const struct wakers *w, double *us, size_t n)
{
    uint64_t one = 1;
    for (size_t i = 0; i < n; i++) {
        pause_us(PAUSE_US);
        double start = cli_now_us();
        if (write(w->there, &one, sizeof(one)) < 0 || read(w->back, &one, sizeof(one)) < 0) {
            return false;
        }
        us[i] = cli_now_us() - start;
    }
    one = 2; /* the end */
    return write(w->there, &one, sizeof(one)) > 0;
}

static int run_wakings(size_t count, json_t *rows)
{
    static const struct way bare = {.transport = "eventfd", .wait = "asleep"};
    const struct wakers w = {eventfd(0, EFD_CLOEXEC), eventfd(0, EFD_CLOEXEC)};
    double *us = calloc(count, sizeof(*us));
    pthread_t thread;
    int code = CLI_OK;
    if (w.there < 0 || w.back < 0 || us == NULL ||
        pthread_create(&thread, NULL, answer, (void *)&w) != 0) {
        code = cli_error(EX_OSERR, "bench: no thread or descriptor to wake");
    } else if (!wake(&w, us, count)) {
        code = cli_error(EX_OSERR, "bench: a thread was not woken");
    } else {
        pthread_join(thread, NULL);
        add_row(rows, "waking", &bare, 0, us, count);
    }
    close(w.there);
    close(w.back);
    free(us);
    return code;
}

static int run_way(struct cli *c, const struct way *w, const struct ipc_bench *b, json_t *rows)
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
    printf("%-8s %-9s %-8s %10s %8s %10s %10s %8s\n", "test", "transport", "wait", "bytes", "n",
           "p50 us", "p99 us", "GB/s");
    for (size_t i = 0; i < json_array_size(rows); i++) {
        const json_t *r = json_array_get(rows, i);
        printf("%-8s %-9s %-8s %10.0f %8.0f %10.1f %10.1f %8.2f\n", cli_str(r, "test", ""),
               cli_str(r, "transport", ""), cli_str(r, "wait", ""), cli_num(r, "bytes", 0),
               cli_num(r, "n", 0), cli_num(r, "p50_us", 0), cli_num(r, "p99_us", 0),
               cli_num(r, "gb_per_s", 0));
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
               "the daemon does."};
    struct ipc_bench b = {.count = 2000, .n_prompt = 512};
    cli_parse(c, &argp, argc, argv, &b);
    json_t *rows = json_array();
    int code = run_copy(rows);
    code = code == CLI_OK ? run_wakings(b.count, rows) : code;
    for (size_t i = 0; code == CLI_OK && i < sizeof(ways) / sizeof(ways[0]); i++) {
        code = run_way(c, &ways[i], &b, rows);
    }
    code = code == CLI_OK ? print_rows(c, rows) : code;
    json_decref(rows);
    free(b.model);
    return code;
}
