/* tests/cuda/bench.h - what the files of bench-cuda share. */
#ifndef TESTS_CUDA_BENCH_H
#define TESTS_CUDA_BENCH_H

#include "plugins/cuda/context.h"

#include <stdio.h>

struct bench {
    const struct gqa_host *host;
    struct cuda_context *c;
    double copy_bytes_per_s, half_flops_per_s, int8_flops_per_s;
    bool tiny;           /* nothing is large: whether it runs at all, for tests */
    int runs, launches;  /* of what bench_seconds() measures */
    uint64_t pool_bytes; /* of pool */
    CUdeviceptr pool;    /* zeros */
    FILE *json;          /* or NULL */
    int n_lines, n_missed;
};

/* What took a time, beside what it could not do without. */
struct bench_line {
    double seconds;
    double bytes, flops, peak; /* peak: of these flops a second */
    double wanted;             /* the share of the floor that is asked for; 0: none is */
};

/* Seconds that fn takes, of many in a row. fn starts the i-th and gives 0 or -errno, which ends the
 * process. */
double bench_seconds(struct bench *b, int (*fn)(struct bench *b, void *arg, int i), void *arg);

/* -1..1, the same ones in every run. */
float bench_random(void);

/* Prints it, and adds it to the JSON file, which is whole after each line. */
void bench_report(struct bench *b, const char *name, const struct bench_line *line);

/* Ends the process with a message where r is below zero. */
void bench_check(int r, const char *what);

/* The parts. Each prints its lines as it goes. */
void bench_floors(struct bench *b);    /* what is asked for, and no more */
void bench_products(struct bench *b);  /* matrices of every type, by numbers of rows */
void bench_attention(struct bench *b); /* and votes */
void bench_experts(struct bench *b);   /* mixtures, whole ops */
void bench_models(struct bench *b);    /* whole models: steps as the daemon runs them */

/* Attention of batch 1 at 64k and 64 at 8k; models of which shares are asked. */
void bench_attention_floors(struct bench *b);
void bench_model_floors(struct bench *b);

#endif
