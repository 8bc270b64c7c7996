/* client/cli/verb_server.c - gqa ping, info, stop, call: about the daemon itself. */
#include "client/cli/cli.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- ping -------------------------------------------------------------------------------- */

#define PINGS_MAX 10000000u

static error_t parse_ping(int key, char *arg, struct argp_state *state)
{
    size_t *count = state->input;
    if (key == 'c') {
        *count = cli_number(state, "count", arg, 1, PINGS_MAX);
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

int cli_verb_ping(struct cli *c, int argc, char **argv)
{
    static const struct argp_option options[] = {{"count", 'c', "N", 0, "So many times (10)", 5},
                                                 {0}};
    static const struct argp argp = {
        .options = options, .parser = parse_ping, .doc = "Measures the daemon's latency."};
    size_t count = 10;
    cli_parse(c, &argp, argc, argv, &count);
    int code = cli_connect(c);
    double *us = code == CLI_OK ? calloc(count, sizeof(*us)) : NULL;
    if (code == CLI_OK && us == NULL) {
        code = cli_error(EX_OSERR, "ping: no memory");
    }
    size_t n = 0;
    while (code == CLI_OK && n < count && !cli_interrupted()) {
        double start = cli_now_us();
        code = cli_call(c, "gqa.ping", NULL, NULL, NULL, NULL);
        us[n++] = cli_now_us() - start;
    }
    if (code == CLI_OK && n == 0) {
        code = CLI_INTERRUPTED; /* before the first of them */
    }
    if (code == CLI_OK) {
        double p50 = cli_percentile(us, n, 50), p99 = cli_percentile(us, n, 99);
        double mean = cli_mean(us, n);
        if (c->json) {
            code = cli_print_json(json_pack("{s:I, s:f, s:f, s:f, s:f, s:f}", "n", (json_int_t)n,
                                            "min_us", us[0], "mean_us", mean, "p50_us", p50,
                                            "p99_us", p99, "max_us", us[n - 1]));
        } else {
            printf("%zu pings: min %.1f us, mean %.1f us, p50 %.1f us, p99 %.1f us, max %.1f us\n",
                   n, us[0], mean, p50, p99, us[n - 1]);
        }
    }
    free(us);
    return code;
}

/* ---- info -------------------------------------------------------------------------------- */

struct info {
    double watch_s;  /* 0: once */
    uint64_t n_left; /* with watch_s; 0: without end */
};

static error_t parse_info(int key, char *arg, struct argp_state *state)
{
    struct info *info = state->input;
    char *end;
    switch (key) {
    case 'w':
        info->watch_s = arg != NULL ? strtod(arg, &end) : 1;
        if (arg != NULL &&
            (end == arg || *end != '\0' || !(info->watch_s >= 0.1) || info->watch_s > 3600)) {
            cli_usage(state, "--watch: '%s' is no number from 0.1 to 3600", arg);
        }
        return 0;
    case 'c':
        info->n_left = cli_number(state, "count", arg, 1, PINGS_MAX);
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int tell_info(struct cli *c, bool again)
{
    json_t *stats = NULL, *backends = NULL;
    int code = cli_call(c, "server.stats", NULL, NULL, NULL, &stats);
    if (code == CLI_OK) {
        code = cli_call(c, "backend.list", NULL, NULL, NULL, &backends);
    }
    if (code != CLI_OK) {
        json_decref(stats);
        return code;
    }
    json_t *info = json_object();
    json_object_set_new(info, "hello", cli_json(gqa_server_info(c->g)));
    json_object_set_new(info, "stats", stats);
    json_object_update_new(info, backends);
    if (c->json) {
        return again ? cli_print_json_line(info) : cli_print_json(info);
    }
    fputs(again && cli_fancy(stdout) ? "\033[H\033[2J" : "", stdout);
    cli_print_tree(info, 0);
    json_decref(info);
    return CLI_OK;
}

int cli_verb_info(struct cli *c, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"watch", 'w', "SECONDS", OPTION_ARG_OPTIONAL, "Again and again, every so often (1)", 5},
        {"count", 'c', "N", 0, "With --watch: so many times (endless)", 5},
        {0}};
    static const struct argp argp = {.options = options,
                                     .parser = parse_info,
                                     .doc = "Tells about the daemon: versions, limits, counters, "
                                            "backends."};
    struct info info = {0};
    cli_parse(c, &argp, argc, argv, &info);
    int code = cli_connect(c);
    while (code == CLI_OK) {
        code = tell_info(c, info.watch_s > 0);
        if (info.watch_s <= 0 || --info.n_left == 0 || code != CLI_OK) {
            break;
        }
        cli_show();
        cli_wait_input(-1, info.watch_s);
        if (cli_interrupted() || ferror(stdout)) {
            return CLI_INTERRUPTED;
        }
    }
    return code;
}

/* ---- stop -------------------------------------------------------------------------------- */

struct stop {
    uint32_t timeout_s;
    bool has_timeout;
};

static error_t parse_stop(int key, char *arg, struct argp_state *state)
{
    struct stop *stop = state->input;
    if (key == 'w') {
        stop->timeout_s = (uint32_t)cli_number(state, "wait", arg, 0, 1u << 20);
        stop->has_timeout = true;
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

/* The daemon's patience with running requests, and what is added to ours. */
#define DRAIN_DEFAULT_S 30u
#define DRAIN_SLACK_MS  30000u

int cli_verb_stop(struct cli *c, int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"wait", 'w', "SECONDS", 0, "Cut running requests after so long (30)", 5}, {0}};
    static const struct argp argp = {.options = options,
                                     .parser = parse_stop,
                                     .doc = "Drains the daemon: new work is refused, running work "
                                            "ends, then it exits."};
    struct stop stop = {.timeout_s = DRAIN_DEFAULT_S};
    json_t *result;
    cli_parse(c, &argp, argc, argv, &stop);
    int code = cli_connect(c);
    if (code != CLI_OK) {
        return code;
    }
    struct gqa_params *p = cli_params();
    if (stop.has_timeout) {
        gqa_params_u64(p, "timeout_ms", (uint64_t)stop.timeout_s * 1000u);
    }
    c->timeout_ms = stop.timeout_s * 1000u + DRAIN_SLACK_MS;
    code = cli_call(c, "server.drain", p, NULL, NULL, &result);
    if (code != CLI_OK) {
        return code;
    }
    if (c->json) {
        return cli_print_json(result);
    }
    json_decref(result);
    return CLI_OK;
}

/* ---- call -------------------------------------------------------------------------------- */

struct call {
    const char *method;
    const char *params;
};

static error_t parse_call(int key, char *arg, struct argp_state *state)
{
    struct call *call = state->input;
    switch (key) {
    case ARGP_KEY_ARG:
        if (state->arg_num > 1) {
            cli_usage(state, "more than a method and its params");
        }
        *(state->arg_num == 0 ? &call->method : &call->params) = arg;
        return 0;
    case ARGP_KEY_NO_ARGS:
        cli_usage(state, "no method was given; gqa call gqa.api_info lists them");
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void print_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    cli_print_json_line(cli_json(event));
    cli_show();
}

int cli_verb_call(struct cli *c, int argc, char **argv)
{
    static const struct argp argp = {.parser = parse_call,
                                     .args_doc = "METHOD [JSON]",
                                     .doc = "Calls any method. Events are printed as lines of "
                                            "JSON, then the result."};
    struct call call = {.params = "{}"};
    json_error_t e;
    json_t *result = NULL;
    cli_parse(c, &argp, argc, argv, &call);
    json_t *object = json_loads(call.params, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &e);
    if (!json_is_object(object)) {
        json_decref(object);
        return cli_error(EX_DATAERR, "params: %s", object == NULL ? e.text : "not a JSON object");
    }
    struct gqa_params *p = cli_params();
    int code = cli_json_params(object, p);
    json_decref(object);
    if (code == CLI_OK) {
        code = cli_connect(c);
    }
    if (code == CLI_OK) {
        code = cli_call(c, call.method, p, print_event, NULL, &result);
        p = NULL;
    }
    gqa_params_destroy(p);
    return code == CLI_OK ? cli_print_json(result) : code;
}
