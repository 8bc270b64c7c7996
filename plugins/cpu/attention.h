/* plugins/cpu/attention.h - grouped attention over paged KV on the processor.
 *
 * attention.c plans the work and lends it to the host's workers; the levels provide the kernels
 * (attention_c.c is the truth). A piece of work is some groups of one sequence over a few rows: all
 * queries of a group, packed as rows, read each K and V once.
 *
 * Source of the split into segments and their merge: log-sum-exp merging as in FlashDecoding. */
#ifndef PLUGINS_CPU_ATTENTION_H
#define PLUGINS_CPU_ATTENTION_H

#include "plugins/cpu/isa.h"

#include <gqa/plugin.h>

struct cpu_attention;

/* Scratch and tables for one context; host outlives it. 0 or -errno. */
int cpu_attention_create(const struct gqa_host *host, enum cpu_isa isa, struct cpu_attention **ret);
void cpu_attention_destroy(struct cpu_attention *a); /* NULL is legal */

/* The bodies of struct gqa_attention's functions. */
int cpu_attention_supports(const struct gqa_attn_layer *layer, struct gqa_reason *reason);
int cpu_attention_append(struct cpu_attention *a, const struct gqa_attn_layer *layer,
                         const struct gqa_attn_batch *batch, const struct gqa_attn_io *io);
int cpu_attention_attend(struct cpu_attention *a, const struct gqa_attn_layer *layer,
                         const struct gqa_attn_batch *batch, const struct gqa_attn_io *io);

int cpu_attention_observe(struct cpu_attention *a, const struct gqa_attn_layer *layer,
                          const struct gqa_attn_batch *batch, const struct gqa_attn_io *io,
                          uint32_t seq, uint32_t n_observed, uint32_t n_votes, float *votes);

#define CPU_ATTENTION_NUMERICS 2u
#define CPU_ATTENTION_CAPS                                                                    \
    (GQA_ATTN_CAP_SHARED | GQA_ATTN_CAP_SPARSE | GQA_ATTN_CAP_TREE | GQA_ATTN_CAP_NO_COMMIT | \
     GQA_ATTN_CAP_OBSERVE | GQA_ATTN_CAP_MUTUAL)

#endif
