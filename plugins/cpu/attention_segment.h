/* plugins/cpu/attention_segment.h - one pack over one segment, in the steps of a vector level.
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
    /* Turns a query's scores (GQA_ATTN_SEGMENT_TOKENS) of tokens [begin, end), with a mask (see
     * cpu_attn_sees()) of those in it, into weights. ret[0] = their maximum before, ret[1] = their
     * sum after. */
    void (*softmax)(const struct gqa_attn_layer *layer, const uint64_t *mask, float *scores,
                    uint32_t begin, uint32_t end, float *ret);
    /* parts += weights x V of tokens [from, to), which lie in one block, for queries
     * [query, query + n_queries), all of which see all of them. */
    void (*weigh)(const struct cpu_attn_pack *pack, uint32_t query, uint32_t n_queries,
                  uint32_t from, uint32_t to, const char *ahead);
};

void cpu_attn_segment_by_blocks(const struct cpu_attn_steps *steps,
                                const struct cpu_attn_pack *pack);

#endif
