/* tests/cuda/bench.h - what the files of bench-cuda share. */
#ifndef TESTS_CUDA_BENCH_H
#define TESTS_CUDA_BENCH_H

#include "plugins/cuda/context.h"

#include <stdio.h>

#define BENCH_POOL_BYTES (1ull << 30)

struct bench {
    struct cuda_context *c;
    double copy_bytes_per_s, half_flops_per_s, int8_flops_per_s;
    CUdeviceptr pool; /* BENCH_POOL_BYTES of zeros */
    FILE *json;
    int n_lines;
};

/* Seconds that fn takes, of many in a row. fn starts the i-th and gives 0 or -errno, which ends the
 * process. */
double bench_seconds(struct bench *b, int (*fn)(struct bench *b, void *arg, int i), void *arg);

/* A line: the time beside the floor of so many bytes and operations. */
void bench_report(struct bench *b, const char *name, double seconds, double bytes, double flops,
                  double peak);

/* Mixtures of experts, whole ops. */
void bench_experts(struct bench *b);

#endif
