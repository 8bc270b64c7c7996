/* plugins/cpu/linear_job.h - one call of cpu_linear_run_groups(), shared by linear.c, which cuts
 * and runs products, and linear_quantise.c, which makes the activations for them. */
#ifndef PLUGINS_CPU_LINEAR_JOB_H
#define PLUGINS_CPU_LINEAR_JOB_H

#include "plugins/cpu/linear.h"

/* What all tasks of the call read. */
struct cpu_linear_job {
    const struct cpu_linear *lin;
    const float *x;
    size_t x_stride;
    const uint32_t *first_rows; /* (n_groups + 1) */
    uint32_t n_groups, n_rows;  /* n_rows: of all groups */
    const struct cpu_product *products;
    uint32_t n_products;
    uint32_t n_blocks; /* of a row of activations; 0: all matrices are of float types */
    int by_each;       /* every worker quantises all rows for itself */
};

static inline uint32_t cpu_group_first(const struct cpu_linear_job *job, uint32_t group)
{
    return job->first_rows[group] - job->first_rows[0];
}

static inline uint32_t cpu_group_rows(const struct cpu_linear_job *job, uint32_t group)
{
    return cpu_group_first(job, group + 1) - cpu_group_first(job, group);
}

/* The quantised activations that a worker reads, of all groups. Those of a job by_each are the
 * worker's own, and are made by cpu_quantise_by_one(). */
struct cpu_acts cpu_acts_of_worker(const struct cpu_linear_job *job, uint32_t worker);
/* A group's part of them: tiles of its own, whatever rows lie before it. */
struct cpu_acts cpu_acts_of_group(const struct cpu_linear_job *job, const struct cpu_acts *acts,
                                  uint32_t group);

/* Decides by_each. n_outs: of all quantised matrices. */
void cpu_quantise_plan(struct cpu_linear_job *job, uint64_t n_outs);
/* The activations of all rows, by all workers together. Runs on the calling thread. */
void cpu_quantise_by_all(const struct cpu_linear_job *job);
/* The activations of all rows, by one worker for itself. */
void cpu_quantise_by_one(const struct cpu_linear_job *job, uint32_t worker);

/* Memory for activations: of max_rows rows, and of each worker. 0 or -ENOMEM. */
int cpu_acts_init(struct cpu_linear *lin);
void cpu_acts_finish(struct cpu_linear *lin);

#endif
