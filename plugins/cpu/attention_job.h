/* plugins/cpu/attention_job.h - what the workers of one append() or attend() share. */
#ifndef PLUGINS_CPU_ATTENTION_JOB_H
#define PLUGINS_CPU_ATTENTION_JOB_H

#include "plugins/cpu/attention_plan.h"

/* Blocks for the new rows of a batch that is not to be committed: of one layer, n_kv_heads times K
 * and V as in a page. A sequence's lie together, in order. */
struct cpu_attn_fresh {
    char *memory; /* (n_blocks, n_kv_heads) of k_bytes and v_bytes */
    size_t memory_bytes;
    uint32_t *first; /* (n_seqs + 1) each sequence's first one */
    size_t first_bytes;
    size_t k_bytes, v_bytes; /* of one group */
};

struct cpu_attention {
    const struct gqa_host *host;
    const struct cpu_attn_kernels *kernels;
    struct cpu_attn_plan plan;
    void *scratch; /* (n_threads, worker_floats) */
    size_t scratch_bytes;
    uint32_t *depths; /* (n_rows) see plugin_count_depths() */
    size_t depths_bytes;
    struct cpu_attn_fresh fresh;
    void *wholes; /* of attention_observe.c */
    size_t wholes_bytes;
};

struct cpu_attn_job {
    struct cpu_attention *a;
    const struct gqa_attn_layer *layer;
    const struct gqa_attn_batch *batch;
    const struct gqa_attn_io *io;
    uint32_t group_size;
    uint32_t append_rows; /* per task of append() */
    size_t worker_floats;
    size_t width;           /* the wider of k_dim and v_dim, in whole quants */
    const uint32_t *depths; /* NULL: no sequence of the batch has a mask */
};

#define CPU_ATTN_NOT_PACKED UINT32_MAX

/* One worker's memory, one after the other in a 64-byte aligned allocation. */
struct cpu_attn_worker {
    /* The piece whose queries are in q, so that its next item need not pack them again.
     * CPU_ATTN_NOT_PACKED: no piece's. */
    uint32_t *packed;
    float *scores; /* (CPU_ATTN_PIECE_QUERIES, GQA_ATTN_SEGMENT_TOKENS) */
    float *parts;  /* (CPU_ATTN_PIECE_QUERIES, part) */
    float *q;      /* (queries of a piece, k_dim), pack by pack */
    float *row;    /* (width) one token's K or V, or one query; */
    float *stored; /* (width) the same as its type has it */
    float *states; /* (queries of a piece, part) */
};

/* Checks the layer and the batch, and makes the workers' memory large enough. 0, -ENOTSUP, -EINVAL
 * (rows out of order, pages missing) or -ENOMEM. */
int cpu_attn_job_init(struct cpu_attn_job *job, struct cpu_attention *a,
                      const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                      const struct gqa_attn_io *io);

struct cpu_attn_worker cpu_attn_worker_of(const struct cpu_attn_job *job, uint32_t index);

/* Where the K and V of one group and one block of a sequence are: in its page, or with commit = 0
 * among the fresh blocks. NULLs for a block that is not there. */
struct cpu_attn_home {
    char *k, *v;
};
struct cpu_attn_home cpu_attn_home_of(const struct cpu_attn_job *job, uint32_t seq, uint32_t block,
                                      uint32_t group);

/* Stores the new rows [first, end) of a sequence, one group's, all of which lie in one block,
 * there. scratch: worker's. */
void cpu_attn_store_rows(const struct cpu_attn_job *job, uint32_t seq, uint32_t group,
                         uint32_t first, uint32_t end, const struct cpu_attn_worker *w);

/* Fills the fresh blocks with the batch's rows and the past tokens that share a block with them. 0
 * or -ENOMEM. */
int cpu_attn_fresh_make(struct cpu_attn_job *job);
void cpu_attn_fresh_finish(struct cpu_attn_fresh *fresh, const struct gqa_host *host);

#endif
