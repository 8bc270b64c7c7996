/* client/cli/bench_report.c - rows of gqa bench, and their place under the roofline.
 *
 * The roofline: a step that reads B bytes and computes F operations takes at least B / bandwidth
 * and at least F / peak. The larger of the two is the limit that counts, and its share of the
 * measured time is how close the engine comes to the machine. */
#include "client/cli/bench.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Bytes that must be read per token. Prompt: weights once for all its tokens, its own K and V on
 * average half. Generation: weights once per step, which serves all streams. */
static double bytes_per_token(const struct bench_model *m, const struct bench_test *test)
{
    bool prompt = test->n_prompt > 0;
    double n = prompt ? test->n_prompt : test->n_gen;
    double shared = prompt ? (double)test->n_prompt * test->n_streams : test->n_streams;
    double kv = cli_kv_bytes(m->info, test->depth + n / 2);
    /* A prompt's rows read K and V together, a block at a time. */
    return m->weight_bytes_per_token / shared + (prompt ? kv / n : kv);
}

json_t *bench_row(const struct bench_model *m, const struct bench_test *test, const double *tps,
                  size_t n_repeats)
{
    const json_t *backend = json_object_get(m->info, "backend");
    double mean = cli_mean(tps, n_repeats);
    double bytes = bytes_per_token(m, test);
    double by_bytes = m->bandwidth > 0 ? mean * bytes / m->bandwidth : 0;
    double by_flops = m->compute > 0 ? mean * m->flops_per_token / m->compute : 0;
    bool compute = by_flops > by_bytes;
    char name[32];
    snprintf(name, sizeof(name), "%s%u", test->n_prompt > 0 ? "pp" : "tg",
             test->n_prompt + test->n_gen);
    json_t *row = json_pack(
        "{s:s, s:s, s:s, s:I, s:s, s:I, s:I, s:f, s:f, s:f, s:f, s:{s:s, s:f, s:f, s:f}}", "model",
        cli_str(m->info, "name", "?"), "backend", cli_str(backend, "program", "?"), "isa",
        cli_str(backend, "isa", "?"), "threads", (json_int_t)m->n_threads, "test", name, "depth",
        (json_int_t)test->depth, "streams", (json_int_t)test->n_streams, "tps_mean", mean, "tps_sd",
        cli_stddev(tps, n_repeats), "bytes_per_token", bytes, "flops_per_token", m->flops_per_token,
        "roofline", "kind", compute ? "compute" : "bandwidth", "limit",
        compute ? m->compute : m->bandwidth / 1e9, "share", compute ? by_flops : by_bytes,
        "bandwidth", m->bandwidth / 1e9);
    if (row == NULL) {
        exit(cli_error(EX_OSERR, "bench: no memory"));
    }
    return row;
}

int bench_print_head(enum bench_format format, const struct bench_model *m)
{
    if (format == BENCH_MD) {
        printf("| %-24s | %10s | %10s | %-14s | %7s | %16s | %20s | %-20s |\n", "model", "size",
               "params", "backend", "threads", "test", "t/s", "roofline");
        printf("| ------------------------ | ---------: | ---------: | -------------- | ------: | "
               "---------------: | -------------------: | -------------------- |\n");
    } else if (format == BENCH_CSV) {
        printf("model,size,params,backend,isa,threads,test,depth,streams,tps_mean,tps_sd,"
               "bytes_per_token,flops_per_token,roofline_kind,roofline_limit,roofline_share,kv_"
               "heads\n");
    }
    return cli_flush();
}

/* "tg64 x 8 @ d4096" */
static void test_name(const json_t *row, char *ret, size_t bytes)
{
    double streams = cli_num(row, "streams", 1), depth = cli_num(row, "depth", 0);
    double heads = cli_num(row, "kv_heads", 0);
    char many[24] = "", deep[24] = "", of[24] = "";
    if (streams > 1) {
        snprintf(many, sizeof(many), " x %.0f", streams);
    }
    if (depth > 0) {
        snprintf(deep, sizeof(deep), " @ d%.0f", depth);
    }
    if (heads > 0) {
        snprintf(of, sizeof(of), " kv%.0f", heads);
    }
    snprintf(ret, bytes, "%s%s%s%s", cli_str(row, "test", ""), many, deep, of);
}

static void print_md(const struct bench_model *m, const json_t *row)
{
    const json_t *roofline = json_object_get(row, "roofline");
    bool compute = strcmp(cli_str(roofline, "kind", ""), "compute") == 0;
    char size[CLI_SIZE_CHARS], params[CLI_SIZE_CHARS], name[80], test[80], speed[48], limit[48];
    char backend[32];
    test_name(row, test, sizeof(test));
    snprintf(speed, sizeof(speed), "%.2f ± %.2f", cli_num(row, "tps_mean", 0),
             cli_num(row, "tps_sd", 0));
    snprintf(limit, sizeof(limit), compute ? "%.0f %% of %.2f TFLOP/s" : "%.0f %% of %.1f GB/s",
             100 * cli_num(roofline, "share", 0),
             cli_num(roofline, "limit", 0) / (compute ? 1e12 : 1));
    snprintf(backend, sizeof(backend), "%s %s", cli_str(row, "backend", ""),
             cli_str(row, "isa", ""));
    snprintf(name, sizeof(name), "%s %s", cli_str(m->info, "arch", ""),
             cli_str(m->info, "type", ""));
    /* The sign ± has two bytes in one column. */
    printf("| %-24s | %10s | %10s | %-14s | %7.0f | %16s | %21s | %-20s |\n", name,
           cli_bytes(cli_num(m->info, "bytes", 0), size),
           cli_count(cli_num(m->info, "params", 0), params), backend, cli_num(row, "threads", 0),
           test, speed, limit);
}

static void print_csv(const struct bench_model *m, const json_t *row)
{
    const json_t *roofline = json_object_get(row, "roofline");
    printf(
        "\"%s\",%.0f,%.0f,\"%s\",\"%s\",%.0f,%s,%.0f,%.0f,%.4f,%.4f,%.1f,%.1f,%s,%.6g,%.6f,%.0f\n",
        cli_str(row, "model", ""), cli_num(m->info, "bytes", 0), cli_num(m->info, "params", 0),
        cli_str(row, "backend", ""), cli_str(row, "isa", ""), cli_num(row, "threads", 0),
        cli_str(row, "test", ""), cli_num(row, "depth", 0), cli_num(row, "streams", 0),
        cli_num(row, "tps_mean", 0), cli_num(row, "tps_sd", 0), cli_num(row, "bytes_per_token", 0),
        cli_num(row, "flops_per_token", 0), cli_str(roofline, "kind", ""),
        cli_num(roofline, "limit", 0), cli_num(roofline, "share", 0),
        cli_num(m->info, "n_kv_heads", 0));
}

int bench_print_row(enum bench_format format, const struct bench_model *m, const json_t *row)
{
    if (format == BENCH_MD) {
        print_md(m, row);
    } else if (format == BENCH_CSV) {
        print_csv(m, row);
    } else if (format == BENCH_JSONL) {
        return cli_print_json_line(json_incref((json_t *)row));
    }
    return cli_flush();
}

int bench_print_all(enum bench_format format, json_t *rows)
{
    if (format == BENCH_JSON) {
        return cli_print_json(rows);
    }
    for (size_t i = 0; format == BENCH_MD && i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i), *ops = json_object_get(row, "ops");
        char test[80];
        test_name(row, test, sizeof(test));
        if (ops != NULL) {
            const json_t *roofline = json_object_get(row, "roofline");
            bench_ops_print(test, ops, 1e9 * cli_num(roofline, "bandwidth", 0));
        }
    }
    json_decref(rows);
    return cli_flush();
}
