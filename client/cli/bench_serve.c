/* client/cli/bench_serve.c - gqa bench serve: many programs of several users at one daemon.
 *
 * Processes send requests, each over a connection of its own and, where root asks for it, as a user
 * of its own: a fixed number at once (closed loop), or at the times of a Poisson process. Told are
 * the times to the first token and between tokens, the throughput, and Jain's fairness index of the
 * users' tokens: (sum x)^2 / (n * sum x^2), 1 when all have the same (R. Jain, D. Chiu, W. Hawe, "A
 * Quantitative Measure of Fairness", 1984). */
#include "client/cli/bench_serve.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    KEY_CONCURRENCY = 0x600,
    KEY_RATE,
    KEY_PROCESSES,
    KEY_UIDS,
    KEY_DURATION,
    KEY_PREFIX,
    KEY_STREAMS,
    KEY_LONG,
    KEY_SEED
};

static const struct argp_option options[] = {
    {NULL, 0, NULL, 0, "Load (MIN-MAX is drawn evenly):", 5},
    {"concurrency", KEY_CONCURRENCY, "N", 0, "Requests at once, over all processes (8)", 5},
    {"rate", KEY_RATE, "R", 0, "Requests per second, over all, at random (Poisson) times", 5},
    {"processes", KEY_PROCESSES, "N", 0, "Processes that send them (1)", 5},
    {"uids", KEY_UIDS, "LIST", 0, "Users that these are, in turns; for root", 5},
    {"duration", KEY_DURATION, "S", 0, "Seconds for which requests are sent (10)", 5},
    {"n-prompt", 'p', "MIN-MAX", 0, "Tokens of a prompt (256)", 5},
    {"n-gen", 'n', "MIN-MAX", 0, "Tokens that are generated (64)", 5},
    {"prefix", KEY_PREFIX, "N", 0, "Tokens with which all prompts begin (0)", 5},
    {"seed", KEY_SEED, "N", 0, "Of lengths, times and tokens (1)", 5},
    {NULL, 0, NULL, 0, "Instead of a load:", 6},
    {"streams", KEY_STREAMS, "N", 0,
     "Compare N streams (512 tokens of prompt, 64 generated) with one, and measure how a long "
     "prompt disturbs four that run",
     6},
    {"long", KEY_LONG, "N", 0, "Tokens of that prompt (4000)", 6},
    {0},
};

struct serve {
    struct cli_load load;
    struct serve_load each;
    uint32_t n_processes, n_streams, n_long;
    uint32_t uids[BENCH_LIST_MAX];
    size_t n_uids;
};

static struct serve_range range_of(const struct argp_state *state, const char *option, char *arg)
{
    struct serve_range r;
    char *dash = strchr(arg, '-');
    if (dash != NULL) {
        *dash = '\0';
    }
    r.least = (uint32_t)cli_number(state, option, arg, 1, 1u << 20);
    r.most =
        dash != NULL ? (uint32_t)cli_number(state, option, dash + 1, r.least, 1u << 20) : r.least;
    return r;
}

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct serve *s = state->input;
    char *end;
    switch (key) {
    case ARGP_KEY_INIT:
        state->child_inputs[0] = &s->load;
        return 0;
    case KEY_CONCURRENCY:
        s->each.concurrency = (uint32_t)cli_number(state, "concurrency", arg, 1, 4096);
        return 0;
    case KEY_RATE:
        s->each.rate = strtod(arg, &end);
        if (*end != '\0' || !(s->each.rate > 0 && s->each.rate <= 1e6)) {
            cli_usage(state, "--rate: '%s' is not a number above 0, up to 1000000", arg);
        }
        return 0;
    case KEY_PROCESSES:
        s->n_processes = (uint32_t)cli_number(state, "processes", arg, 1, SERVE_PROCESSES_MAX);
        return 0;
    case KEY_UIDS:
        s->n_uids = cli_numbers(state, "uids", arg, UINT32_MAX - 1, s->uids, BENCH_LIST_MAX);
        return 0;
    case KEY_DURATION:
        s->each.duration_us = (double)cli_number(state, "duration", arg, 1, 3600) * 1e6;
        return 0;
    case 'p':
        s->each.prompt = range_of(state, "n-prompt", arg);
        return 0;
    case 'n':
        s->each.gen = range_of(state, "n-gen", arg);
        return 0;
    case KEY_PREFIX:
        s->each.n_prefix = (uint32_t)cli_number(state, "prefix", arg, 0, 1u << 20);
        return 0;
    case KEY_STREAMS:
        s->n_streams = (uint32_t)cli_number(state, "streams", arg, 2, BENCH_STREAMS_MAX);
        return 0;
    case KEY_LONG:
        s->n_long = (uint32_t)cli_number(state, "long", arg, 1, 1u << 20);
        return 0;
    case KEY_SEED:
        s->each.seed = cli_number(state, "seed", arg, 0, UINT64_MAX);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---- processes --------------------------------------------------------------------------- */

static uid_t uid_of(const struct serve *s, uint32_t process)
{
    return s->n_uids > 0 ? s->uids[process % s->n_uids] : geteuid();
}

/* The child: as that user, from the connection on. */
static int run_child(const struct cli *parent, const struct serve *s, uint32_t process,
                     struct serve_outcome *o)
{
    struct cli c = *parent;
    struct serve_load load = s->each;
    c.g = NULL;
    load.uid = uid_of(s, process);
    load.seed += process * 1000003u;
    load.rate /= s->n_processes;
    load.concurrency = (load.concurrency + s->n_processes - 1) / s->n_processes;
    /* The groups stay: one of them may open the socket. */
    if (load.uid != geteuid() && setuid(load.uid) < 0) {
        return cli_error(EX_NOPERM, "bench: uid %u: %s", (unsigned)load.uid, strerror(errno));
    }
    int code = cli_connect(&c);
    code = code == CLI_OK ? serve_run(&c, &load, o) : code;
    gqa_close(c.g);
    return code;
}

static int run_processes(struct cli *c, const struct serve *s, struct serve_outcome *outcomes[])
{
    pid_t pids[SERVE_PROCESSES_MAX];
    uint32_t n = 0;
    int code = CLI_OK;
    fflush(NULL);
    for (; code == CLI_OK && n < s->n_processes; n++) {
        pids[n] = fork();
        if (pids[n] == 0) {
            outcomes[n]->code = run_child(c, s, n, outcomes[n]);
            _exit(outcomes[n]->code);
        }
        if (pids[n] < 0) {
            code = cli_error(EX_OSERR, "bench: no process: %s", strerror(errno));
            break;
        }
    }
    for (uint32_t i = 0; i < n; i++) {
        int status = 0;
        while (waitpid(pids[i], &status, 0) < 0 && errno == EINTR) {
        }
        if (code == CLI_OK && status != 0) {
            code = WIFEXITED(status) ? WEXITSTATUS(status) : CLI_FAILED;
        }
    }
    return code;
}

/* ---- the report -------------------------------------------------------------------------- */

struct samples {
    double *x;
    size_t n;
};

static json_t *quantiles(struct samples *s)
{
    return json_pack("{s:I, s:f, s:f, s:f}", "count", (json_int_t)s->n, "p50",
                     s->n > 0 ? cli_percentile(s->x, s->n, 50) : 0.0, "p90",
                     s->n > 0 ? cli_percentile(s->x, s->n, 90) : 0.0, "p99",
                     s->n > 0 ? cli_percentile(s->x, s->n, 99) : 0.0);
}

struct totals {
    double sent, failed, late, prompt, generated, begin_us, end_us;
};

static void add_outcome(const struct serve_outcome *o, struct totals *t, struct samples *first,
                        struct samples *gaps)
{
    for (uint32_t i = 0; i < o->n_records; i++) {
        const struct serve_record *r = &o->records[i];
        t->sent++;
        t->failed += r->status < 0;
        t->prompt += r->n_tokens > 0 ? r->n_prompt : 0;
        t->generated += r->n_tokens;
        if (r->first_us > 0) {
            first->x[first->n++] = (r->first_us - r->sent_us) / 1e3;
        }
    }
    for (uint32_t i = 0; i < o->n_gaps; i++) {
        gaps->x[gaps->n++] = (double)o->gaps_ms[i];
    }
    t->late += o->n_late;
    t->begin_us = t->begin_us == 0 || o->begin_us < t->begin_us ? o->begin_us : t->begin_us;
    t->end_us = o->end_us > t->end_us ? o->end_us : t->end_us;
}

/* Tokens that a user had, prompts of answered requests and generated ones, until the load ended:
 * afterwards there is room for everybody. */
static double tokens_of(const struct serve_outcome *o, double until_us)
{
    double n = 0;
    for (uint32_t i = 0; i < o->n_records; i++) {
        const struct serve_record *r = &o->records[i];
        if (r->end_us <= until_us) {
            n += r->n_prompt + r->n_tokens;
        }
    }
    return n;
}

static json_t *report_users(const struct serve *s, struct serve_outcome *const outcomes[],
                            double *ret_jain)
{
    json_t *users = json_array();
    size_t n_users = s->n_uids > 0 ? s->n_uids : 1;
    double sum = 0, squares = 0;
    for (size_t u = 0; u < n_users; u++) {
        double tokens = 0;
        for (uint32_t i = 0; i < s->n_processes; i++) {
            const struct serve_outcome *o = outcomes[i];
            tokens += i % n_users == u ? tokens_of(o, o->begin_us + s->each.duration_us) : 0;
        }
        sum += tokens;
        squares += tokens * tokens;
        json_array_append_new(users,
                              json_pack("{s:I, s:I}", "uid", (json_int_t)uid_of(s, (uint32_t)u),
                                        "tokens", (json_int_t)tokens));
    }
    *ret_jain = squares > 0 ? sum * sum / ((double)n_users * squares) : 1;
    return users;
}

static json_t *report(const struct serve *s, struct serve_outcome *const outcomes[])
{
    struct totals t = {0};
    size_t n_first = 0, n_gaps = 0;
    for (uint32_t i = 0; i < s->n_processes; i++) {
        n_first += outcomes[i]->n_records;
        n_gaps += outcomes[i]->n_gaps;
    }
    struct samples first = {malloc((n_first + 1) * sizeof(double)), 0};
    struct samples gaps = {malloc((n_gaps + 1) * sizeof(double)), 0};
    json_t *j = NULL;
    if (first.x != NULL && gaps.x != NULL) {
        double jain;
        for (uint32_t i = 0; i < s->n_processes; i++) {
            add_outcome(outcomes[i], &t, &first, &gaps);
        }
        double seconds = (t.end_us - t.begin_us) / 1e6;
        json_t *users = report_users(s, outcomes, &jain);
        j = json_pack("{s:f, s:I, s:I, s:I, s:o, s:o, s:f, s:f, s:f, s:o}", "seconds", seconds,
                      "requests", (json_int_t)t.sent, "failed", (json_int_t)t.failed, "late",
                      (json_int_t)t.late, "ttft_ms", quantiles(&first), "inter_token_ms",
                      quantiles(&gaps), "prompt_tokens_per_second",
                      seconds > 0 ? t.prompt / seconds : 0, "generated_tokens_per_second",
                      seconds > 0 ? t.generated / seconds : 0, "jain", jain, "users", users);
    }
    free(first.x);
    free(gaps.x);
    return j;
}

static int print(const struct cli *c, json_t *j)
{
    if (j == NULL) {
        return cli_error(EX_OSERR, "bench: no memory");
    }
    if (c->json) {
        return cli_print_json(j);
    }
    cli_print_tree(j, 0);
    json_decref(j);
    return cli_flush();
}

/* ---- the whole --------------------------------------------------------------------------- */

static int run_load(struct cli *c, struct serve *s)
{
    struct serve_outcome *outcomes[SERVE_PROCESSES_MAX] = {NULL};
    int32_t *prefix = malloc((s->each.n_prefix + 1) * sizeof(*prefix));
    size_t bytes = sizeof(*outcomes[0]);
    int code = prefix != NULL ? CLI_OK : cli_error(EX_OSERR, "bench: no memory");
    for (uint32_t i = 0; code == CLI_OK && i < s->n_processes; i++) {
        void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                            MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        code = memory != MAP_FAILED ? CLI_OK : cli_error(EX_OSERR, "bench: no memory");
        outcomes[i] = code == CLI_OK ? memory : NULL;
    }
    if (code == CLI_OK) {
        uint64_t seed = s->each.seed + 7;
        bench_random_tokens(prefix, s->each.n_prefix, s->each.n_vocab, &seed);
        s->each.prefix = prefix;
        if (c->spawn) {
            code = serve_run(c, &s->each, outcomes[0]); /* nobody else can reach that daemon */
        } else {
            code = run_processes(c, s, outcomes);
        }
    }
    code = code == CLI_OK ? print(c, report(s, outcomes)) : code;
    for (uint32_t i = 0; i < s->n_processes; i++) {
        if (outcomes[i] != NULL) {
            munmap(outcomes[i], bytes);
        }
    }
    free(prefix);
    return code;
}

static int check(const struct cli *c, const struct serve *s)
{
    uint32_t each = (s->each.concurrency + s->n_processes - 1) / s->n_processes;
    if (c->spawn && (s->n_processes > 1 || s->n_uids > 0)) {
        return cli_error(EX_USAGE, "bench: a daemon of --spawn serves this process alone: start "
                                   "gqad for more, or leave --processes and --uids out");
    }
    if (s->n_uids > s->n_processes) {
        return cli_error(EX_USAGE, "bench: --uids has %zu users for %u processes", s->n_uids,
                         s->n_processes);
    }
    if (s->n_uids > 0 && geteuid() != 0) {
        return cli_error(EX_NOPERM, "bench: --uids is for root");
    }
    if (each > SERVE_PENDING_MAX) {
        return cli_error(EX_USAGE,
                         "bench: --concurrency is %u for a process; at most %u: use --processes",
                         each, SERVE_PENDING_MAX);
    }
    return CLI_OK;
}

int cli_bench_serve(struct cli *c, int argc, char **argv)
{
    static const struct argp_child children[] = {{&cli_load_argp, 0, NULL, 0}, {0}};
    static const struct argp argp = {
        .options = options,
        .parser = parse,
        .doc = "Measures a daemon that many use at once: times to the first token and between "
               "tokens, throughput, fairness between users.",
        .children = children};
    struct serve s = {.n_processes = 1,
                      .n_long = 4000,
                      .each = {.prompt = {256, 256},
                               .gen = {64, 64},
                               .concurrency = 8,
                               .duration_us = 10e6,
                               .seed = 1}};
    json_t *info = NULL;
    cli_parse(c, &argp, argc, argv, &s);
    int code = check(c, &s);
    code = code == CLI_OK ? cli_connect(c) : code;
    code = code == CLI_OK ? cli_load_if_asked(c, &s.load) : code;
    code = code == CLI_OK ? cli_model_info(c, &s.load, &info) : code;
    if (code == CLI_OK) {
        s.each.model = s.load.model;
        s.each.n_vocab = (uint32_t)cli_num(info, "n_vocab", 0);
        code = s.each.n_vocab > 0 ? CLI_OK : cli_error(CLI_FAILED, "model.info: no n_vocab");
    }
    if (code == CLI_OK) {
        code = s.n_streams > 0
                   ? serve_streams(c, s.load.model, s.each.n_vocab, s.n_streams, s.n_long)
                   : run_load(c, &s);
    }
    json_decref(info);
    free(s.load.model);
    return code;
}
