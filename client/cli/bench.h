/* client/cli/bench.h - gqa bench in three parts: what to measure, measuring, reporting. */
#ifndef CLI_BENCH_H
#define CLI_BENCH_H

#include "client/cli/cli.h"

#include <limits.h>

#define BENCH_LIST_MAX    16u
#define BENCH_STREAMS_MAX 256u
#define BENCH_REPEATS_MAX 100u

/* What the machine and the model say; the same for all rows. */
struct bench_model {
    const json_t *info; /* model.info */
    uint32_t n_vocab;
    uint32_t n_threads;
    double weight_bytes_per_token; /* weights that one decode step of one stream reads */
    double flops_per_token;        /* 2 x active parameters */
    double bandwidth;              /* bytes per second, measured around the row's test */
    double compute;                /* operations per second of the backend's unit, measured; or 0 */
};

/* One test: n_prompt tokens of prompt, or n_gen generated tokens, after depth tokens of context, in
 * n_streams requests at once. One of n_prompt and n_gen is 0. */
struct bench_test {
    uint32_t n_prompt, n_gen, depth, n_streams;
    json_t **ops; /* what bench_ops_read() gave right before what is measured; or NULL: unwanted */
};

/* Tokens per second of all streams together, once per repeat. Prints and returns an exit code. */
int bench_measure(struct cli *c, const char *model, const struct bench_model *m,
                  const struct bench_test *test, uint64_t *seed, double *ret_tps);

/* ids (n) below n_vocab; moves the seed on. */
void bench_random_tokens(int32_t *ids, size_t n, uint32_t n_vocab, uint64_t *seed);

/* ---- bench_ops.c: time per kind of op ------------------------------------------------------- */

/* What the model's ops took so far. Prints and returns an exit code; *ret is replaced. */
int bench_ops_read(struct cli *c, const char *model, json_t **ret);
/* [{kind, calls, rows, ms, share, gb_per_s}] of what lay between, the longest first. */
json_t *bench_ops_between(const json_t *before, const json_t *after);
/* bandwidth: bytes per second, of the row that they belong to. */
void bench_ops_print(const char *test, const json_t *ops, double bandwidth);

/* ---- bench_heads.c, bench_plot.c --------------------------------------------------------------
 */

/* A temporary folder for models. Prints and returns an exit code, as the next one. */
int bench_heads_folder(const struct cli *c, char ret[PATH_MAX]);
/* Writes a model of that shape (gqa-synth's --shape), type and number of KV heads. */
int bench_heads_model(const char *shape, const char *type, uint32_t n_kv_heads, const char *folder,
                      char ret[PATH_MAX]);

/* Draws the rows (at least one) as an SVG into f, which it closes; path is its name, for messages.
 * Prints and returns an exit code. */
int bench_plot(FILE *f, const char *path, const json_t *rows);

enum bench_format { BENCH_MD, BENCH_CSV, BENCH_JSON, BENCH_JSONL };

/* A row, with its place under the roofline. The caller's reference. */
json_t *bench_row(const struct bench_model *m, const struct bench_test *test, const double *tps,
                  size_t n_repeats);
/* Before the rows, per row as it is ready, and after them. */
int bench_print_head(enum bench_format format, const struct bench_model *m);
int bench_print_row(enum bench_format format, const struct bench_model *m, const json_t *row);
int bench_print_all(enum bench_format format, json_t *rows);

#endif
