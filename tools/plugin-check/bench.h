/* tools/plugin-check/bench.h - how fast a plugin is, as a share of what this machine can do.
 *
 * Bandwidth and the units' peaks are measured in the same run, by as many threads. K, V and
 * matrices are spread over more memory than any cache holds, as those of a model's layers are. A
 * backend on a device has memory and units of its own: its rates are told without a limit. */
#ifndef TOOLS_PLUGIN_CHECK_BENCH_H
#define TOOLS_PLUGIN_CHECK_BENCH_H

#include "tools/plugin-check/results.h"

#include <gqa/plugin.h>
#include <stdbool.h>

struct bench {
    const struct gqa_attention *attention;
    const struct gqa_program *program; /* or NULL */
    void *context;
    uint32_t n_threads;
    bool on_device;
    struct results *results;
};

/* Per second; 0: not known. */
struct bench_limits {
    double bytes, f32_flops, int8_ops;
};

int bench_run(const struct bench *b, struct gqa_reason *reason);

/* Of a program's matrices. */
int bench_program_run(const struct bench *b, const struct bench_limits *l,
                      struct gqa_reason *reason);

/* Calls fn again and again for a while, and tells the time of one call in seconds: the median. A
 * negative result of fn ends it, and is returned; -ENOTSUP skips. */
typedef int (*bench_fn)(void *arg);
int bench_time(bench_fn fn, void *arg, double *ret_seconds);

#define BENCH_SPREAD_BYTES (192ull << 20)

#endif
