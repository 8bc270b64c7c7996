/* client/cli/bench_ipc.c - gqa bench ipc: what a call costs, and what bytes cost on their way.
 *
 * A ping's params may hold anything, since unknown keys are ignored: that makes it a carrier of
 * payload, of which the daemon only looks at the outside. */
#include "client/cli/cli.h"

#include <stdlib.h>
#include <string.h>

struct ipc_bench {
    size_t count;
};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    struct ipc_bench *b = state->input;
    if (key == 'n') {
        b->count = cli_number(state, "count", arg, 1, 10000000);
        return 0;
    }
    return ARGP_ERR_UNKNOWN;
}

/* n calls with a payload of that many bytes, each in us. */
static int measure(struct cli *c, const char *payload, size_t bytes, double *us, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct gqa_params *p = NULL;
        if (bytes > 0) {
            p = cli_params();
            gqa_params_text(p, "payload", payload, bytes);
        }
        double start = cli_now_us();
        int code = cli_call(c, "gqa.ping", p, NULL, NULL, NULL);
        us[i] = cli_now_us() - start;
        if (code != CLI_OK || cli_interrupted()) {
            return code != CLI_OK ? code : CLI_INTERRUPTED;
        }
    }
    return CLI_OK;
}

static int run(struct cli *c, size_t count, json_t *rows)
{
    static const size_t sizes[] = {0, 4096, 65536, 1u << 20, 8u << 20};
    const size_t largest = sizes[sizeof(sizes) / sizeof(sizes[0]) - 1];
    char *payload = malloc(largest);
    double *us = calloc(count, sizeof(*us));
    int code = CLI_OK;
    if (payload == NULL || us == NULL) {
        code = cli_error(EX_OSERR, "bench: no memory");
    } else {
        memset(payload, 'x', largest);
    }
    for (size_t i = 0; code == CLI_OK && i < sizeof(sizes) / sizeof(sizes[0]); i++) {
        /* Large ones fewer times: the time is then a matter of bandwidth, and steady. */
        size_t n = sizes[i] > 65536 && count > 100 ? count / 50 + 50 : count;
        code = measure(c, payload, sizes[i], us, n < 10 ? n : 10); /* warms up */
        if (code == CLI_OK) {
            code = measure(c, payload, sizes[i], us, n);
        }
        double p50 = cli_percentile(us, n, 50), p99 = cli_percentile(us, n, 99);
        json_array_append_new(rows, json_pack("{s:s, s:s, s:s, s:I, s:I, s:f, s:f, s:f}", "test",
                                              "ping", "transport", "socket", "wait", "", "bytes",
                                              (json_int_t)sizes[i], "n", (json_int_t)n, "p50_us",
                                              p50, "p99_us", p99, "gb_per_s",
                                              p50 > 0 ? (double)sizes[i] / p50 / 1e3 : 0.0));
    }
    free(payload);
    free(us);
    return code;
}

int cli_bench_ipc(struct cli *c, int argc, char **argv)
{
    static const struct argp_option options[] = {{"count", 'n', "N", 0, "Calls per row (2000)", 5},
                                                 {0}};
    static const struct argp argp = {
        .options = options, .parser = parse, .doc = "Measures calls to the daemon."};
    struct ipc_bench b = {.count = 2000};
    cli_parse(c, &argp, argc, argv, &b);
    int code = cli_connect(c);
    json_t *rows = json_array();
    if (code == CLI_OK) {
        code = run(c, b.count, rows);
    }
    if (code == CLI_OK && c->json) {
        code = cli_print_json(json_incref(rows));
    } else if (code == CLI_OK) {
        printf("%-6s %-10s %10s %8s %10s %10s %8s\n", "test", "transport", "bytes", "n", "p50 us",
               "p99 us", "GB/s");
        for (size_t i = 0; i < json_array_size(rows); i++) {
            const json_t *r = json_array_get(rows, i);
            printf("%-6s %-10s %10.0f %8.0f %10.1f %10.1f %8.2f\n", cli_str(r, "test", ""),
                   cli_str(r, "transport", ""), cli_num(r, "bytes", 0), cli_num(r, "n", 0),
                   cli_num(r, "p50_us", 0), cli_num(r, "p99_us", 0), cli_num(r, "gb_per_s", 0));
        }
    }
    json_decref(rows);
    return code;
}
