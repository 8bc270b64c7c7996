/* client/cli/bench_ops.c - gqa bench --ops: where the time of a step goes, by the backend's own
 * clocks.
 *
 * The daemon tells counters that only grow; what lies between two readings is a test's. */
#include "client/cli/bench.h"

#include <stdlib.h>
#include <string.h>

int bench_ops_read(struct cli *c, const char *model, json_t **ret)
{
    json_t *result = NULL;
    int code = cli_call(c, "model.ops", cli_model_params(model), NULL, NULL, &result);
    if (code != CLI_OK) {
        return code;
    }
    json_decref(*ret);
    *ret = json_incref(json_object_get(result, "ops"));
    json_decref(result);
    return CLI_OK;
}

static double value_of(const json_t *ops, const char *kind, const char *key)
{
    for (size_t i = 0; i < json_array_size(ops); i++) {
        const json_t *op = json_array_get(ops, i);
        if (strcmp(cli_str(op, "kind", ""), kind) == 0) {
            return cli_num(op, key, 0);
        }
    }
    return 0;
}

/* Puts a row in its place: the longest first. */
static void insert(json_t *rows, json_t *row)
{
    size_t i = 0;
    while (i < json_array_size(rows) &&
           cli_num(json_array_get(rows, i), "ms", 0) >= cli_num(row, "ms", 0)) {
        i++;
    }
    json_array_insert_new(rows, i, row);
}

json_t *bench_ops_between(const json_t *before, const json_t *after)
{
    json_t *rows = json_array();
    double total = 0;
    for (size_t i = 0; i < json_array_size(after); i++) {
        const char *kind = cli_str(json_array_get(after, i), "kind", "?");
        total += value_of(after, kind, "ns") - value_of(before, kind, "ns");
    }
    for (size_t i = 0; i < json_array_size(after); i++) {
        const char *kind = cli_str(json_array_get(after, i), "kind", "?");
        double calls = value_of(after, kind, "calls") - value_of(before, kind, "calls");
        double ns = value_of(after, kind, "ns") - value_of(before, kind, "ns");
        double bytes = value_of(after, kind, "bytes") - value_of(before, kind, "bytes");
        double n_rows = value_of(after, kind, "rows") - value_of(before, kind, "rows");
        if (calls > 0) {
            insert(rows,
                   json_pack("{s:s, s:I, s:I, s:f, s:f, s:f}", "kind", kind, "calls",
                             (json_int_t)calls, "rows", (json_int_t)n_rows, "ms", ns / 1e6, "share",
                             total > 0 ? ns / total : 0, "gb_per_s", ns > 0 ? bytes / ns : 0));
        }
    }
    return rows;
}

void bench_ops_print(const char *test, const json_t *ops, double bandwidth)
{
    printf("\n| %-24s | %8s | %10s | %7s | %8s | %12s |\n", test, "calls", "ms", "share", "GB/s",
           "of bandwidth");
    printf("| ------------------------ | -------: | ---------: | ------: | -------: | "
           "-----------: |\n");
    for (size_t i = 0; i < json_array_size(ops); i++) {
        const json_t *op = json_array_get(ops, i);
        double rate = cli_num(op, "gb_per_s", 0);
        char speed[32] = "", share[32] = "";
        if (rate > 0) {
            snprintf(speed, sizeof(speed), "%.1f", rate);
            snprintf(share, sizeof(share), "%.0f %%", bandwidth > 0 ? 1e11 * rate / bandwidth : 0);
        }
        printf("| %-24s | %8.0f | %10.2f | %5.1f %% | %8s | %12s |\n", cli_str(op, "kind", "?"),
               cli_num(op, "calls", 0), cli_num(op, "ms", 0), 100 * cli_num(op, "share", 0), speed,
               share);
    }
}
