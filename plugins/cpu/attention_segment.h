/* plugins/cpu/attention_segment.h - packs over one segment, in the steps of a vector level.
 *
 * The walk over blocks, and who sees what, is the same for every vector level; the arithmetic is
 * the level's. */
#ifndef PLUGINS_CPU_ATTENTION_SEGMENT_H
#define PLUGINS_CPU_ATTENTION_SEGMENT_H

#include "plugins/cpu/attention_kernels.h"

/* ahead: memory of the block that is wanted next, to be fetched while this one is worked on. */
struct cpu_attn_steps {
    /* pack->scores of all queries with all 64 tokens of a block. Those that a query does not see
     * may come out as anything. */
    void (*score)(const struct cpu_attn_pack *pack, uint32_t block, const char *ahead);
    /* Turns the scores (n_queries, GQA_ATTN_SEGMENT_TOKENS) of queries that see the same, tokens
     * [begin, end), with a mask (see cpu_attn_sees()) of those in it or NULL, into weights. ends
     * (n_queries, end_stride): their maximum before, then their sum after. */
    void (*softmax)(const struct gqa_attn_layer *layer, const uint64_t *mask, uint32_t n_queries,
                    float *scores, uint32_t begin, uint32_t end, float *ends, size_t end_stride);
    /* parts += weights x V of tokens [from, to), which lie in one block, for queries
     * [query, query + n_queries), all of which see all of them. */
    void (*weigh)(const struct cpu_attn_pack *pack, uint32_t query, uint32_t n_queries,
                  uint32_t from, uint32_t to, const char *ahead);
};

/* The body of a level's segment(). */
void cpu_attn_segment_by_blocks(const struct cpu_attn_steps *steps,
                                const struct cpu_attn_pack *packs, uint32_t n_packs);

#endif
