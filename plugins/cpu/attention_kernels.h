/* plugins/cpu/attention_kernels.h - what a level's attention kernels promise to the planner.
 *
 * A *pack* is up to CPU_ATTN_PACK_MAX queries of one group: the group's heads, times some rows of
 * one sequence. A *segment* is GQA_ATTN_SEGMENT_TOKENS positions, aligned to position 0. segment()
 * reduces packs over a segment to one partial result per query; merge() folds a row's partials in
 * ascending order; finish() adds the sink and divides. A query's bits depend on nothing but its
 * own values, what it sees and the K and V of that: not on the pack it came in, nor on the packs
 * beside it.
 *
 * One partial result ("part"), 64-byte aligned:
 *
 *     0            v_dim      v_pad     +1        +2
 *     | sum p * v  | padding  | maximum | sum p   | padding to 16 floats
 *
 * where p = exp(score - maximum). A query that sees nothing has maximum -INFINITY and zeros. */
#ifndef PLUGINS_CPU_ATTENTION_KERNELS_H
#define PLUGINS_CPU_ATTENTION_KERNELS_H

#include "plugins/cpu/isa.h"

#include <gqa/plugin.h>

#define CPU_ATTN_SEGMENT_BLOCKS (GQA_ATTN_SEGMENT_TOKENS / GQA_KV_BLOCK_TOKENS)
#define CPU_ATTN_DIM_MAX        1024u /* of K or V */
#define CPU_ATTN_PACK_MAX       12u   /* queries; what fits 32 vector registers twice over */
#define CPU_ATTN_PACKS_MAX      32u   /* that go through a segment together */

/* Floats before a part's maximum, and of the whole part. */
static inline uint32_t cpu_attn_v_pad(uint32_t v_dim)
{
    return (v_dim + 15u) & ~15u;
}

static inline uint32_t cpu_attn_part_floats(uint32_t v_dim)
{
    return cpu_attn_v_pad(v_dim) + 16u;
}

/* Whether a query of a mask (CPU_ATTN_SEGMENT_BLOCKS words) sees token t of the segment. */
static inline int cpu_attn_sees(const uint64_t *seen, uint32_t t)
{
    return seen[t / GQA_KV_BLOCK_TOKENS] >> t % GQA_KV_BLOCK_TOKENS & 1;
}

struct cpu_attn_pack {
    const struct gqa_attn_layer *layer;
    /* The group's K and V in the segment's blocks: entry i has its tokens [64 i, 64 i + 64). An
     * entry is read only if some query of the pack sees a token of it. */
    const char *k[CPU_ATTN_SEGMENT_BLOCKS], *v[CPU_ATTN_SEGMENT_BLOCKS];
    /* What the planner goes to after this segment, of the last pack: K of its first block, which
     * kernels may fetch ahead. Never NULL; where nothing comes next it is some memory at hand. */
    const char *next_k;
    uint32_t n_queries;
    const float *q; /* (k_dim, n_queries) */
    /* (n_queries) a query sees the segment's tokens [begin, end); begin == end: none. The others'
     * K and V may hold anything, NaN included, and never reach the result. */
    const uint16_t *begin, *end;
    /* (n_queries, CPU_ATTN_SEGMENT_BLOCKS) a bit per token: a query sees only those of [begin, end)
     * whose bit is set; no other bit is. NULL: all of them. */
    const uint64_t *seen;
    /* (n_queries, GQA_ATTN_SEGMENT_TOKENS), 64-byte aligned: scratch; afterwards p of those tokens
     * that a query sees. */
    float *scores;
    /* out (n_queries, cpu_attn_part_floats(v_dim)). A layer of v_dim 0: V is not read, and a part
     * is its maximum and sum. */
    float *parts;
};

struct cpu_attn_kernels {
    enum cpu_isa isa;
    /* Of 1 to CPU_ATTN_PACKS_MAX packs over the same segment, whose groups ascend: a block's K and
     * V of all of them are read in the order in which they lie. */
    void (*segment)(const struct cpu_attn_pack *packs, uint32_t n_packs);
    /* state = state + part for n of them, one after the other; a state starts as the part of a
     * query that sees nothing. */
    void (*merge)(float *states, const float *parts, uint32_t n, uint32_t v_dim);
    /* out (v_dim) = the state divided by its sum; sink joins the sum unless NULL. */
    void (*finish)(const float *state, const float *sink, uint32_t v_dim, float *out);
    /* dst (n values of type F32, F16 or BF16) = src, rounded to nearest even. */
    void (*store)(uint32_t type, const float *src, void *dst, size_t n);
};

extern const struct cpu_attn_kernels cpu_attn_kernels_c;
extern const struct cpu_attn_kernels cpu_attn_kernels_avx2;
extern const struct cpu_attn_kernels cpu_attn_kernels_avx512;

#endif
