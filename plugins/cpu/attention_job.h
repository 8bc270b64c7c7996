/* plugins/cpu/attention_job.h - what the workers of one append() or attend() share. */
#ifndef PLUGINS_CPU_ATTENTION_JOB_H
#define PLUGINS_CPU_ATTENTION_JOB_H

#include "plugins/cpu/attention_plan.h"

struct cpu_attention {
    const struct gqa_host *host;
    const struct cpu_attn_kernels *kernels;
    struct cpu_attn_plan plan;
    void *scratch; /* (n_threads, worker_floats) */
    size_t scratch_bytes;
};

struct cpu_attn_job {
    struct cpu_attention *a;
    const struct gqa_attn_layer *layer;
    const struct gqa_attn_batch *batch;
    const struct gqa_attn_io *io;
    uint32_t group_size;
    uint32_t append_rows; /* per task of append() */
    size_t worker_floats;
};

/* One worker's memory, one after the other in a 64-byte aligned allocation. */
struct cpu_attn_worker {
    float *scores; /* (CPU_ATTN_PACK_MAX, GQA_ATTN_SEGMENT_TOKENS) */
    float *parts;  /* (CPU_ATTN_PACK_MAX, part) */
    float *q;      /* (queries of a piece, k_dim), pack by pack; append()'s row */
    float *states; /* (queries of a piece, part) */
};

/* Checks the layer and the batch, and makes the workers' memory large enough. 0, -ENOTSUP, -EINVAL
 * (rows out of order, pages missing) or -ENOMEM. */
int cpu_attn_job_init(struct cpu_attn_job *job, struct cpu_attention *a,
                      const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                      const struct gqa_attn_io *io);

struct cpu_attn_worker cpu_attn_worker_of(const struct cpu_attn_job *job, uint32_t index);

#endif
