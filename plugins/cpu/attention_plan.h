/* plugins/cpu/attention_plan.h - how one attend() is cut into work.
 *
 *     batch  = pieces: neighbouring groups of one sequence over a range of rows
 *     piece  = items: runs of segments, one piece of work for one worker
 *     item   = packs x segments: calls of the level's kernels
 *
 * A piece of few queries has as many groups as leave every worker something to do: their K lie side
 * by side in a block, as do their V, and memory is fastest when it is read straight ahead.
 *
 * Most pieces are one item, and a worker merges its segments as it goes. Where there is too little
 * to share out (one long sequence, few groups), pieces are cut into several items: these leave one
 * part per segment and query in the plan's memory, and when all have run, each group's are merged
 * in ascending order: the same operations on the same values as without the cut.
 *
 * Sequences that begin with the same pages (struct gqa_attn_shared) are attended in two passes.
 * First the whole segments that they have in common, by pieces that hold the rows of all of them,
 * so that each K and V is read once; these leave each query's state in the plan's memory. Then
 * every sequence's own pieces take their states up from there: again the same operations.
 *
 * Rows that a view keeps from seeing everything go the same way: first the sinks, then the recent
 * slots, each from whole segments of its own, so that a row's bits depend on its slot only. */
#ifndef PLUGINS_CPU_ATTENTION_PLAN_H
#define PLUGINS_CPU_ATTENTION_PLAN_H

#include "plugins/cpu/attention_kernels.h"

/* Queries that a worker carries through the segments together: enough to pay for bringing a
 * segment's K and V to the second-level cache, few enough to stay there with them. */
#define CPU_ATTN_PIECE_QUERIES 96u
/* Items per worker that make the last one to finish late by little. */
#define CPU_ATTN_ITEMS_PER_WORKER 4u

struct cpu_attn_piece {
    uint32_t seq; /* the first sequence, whose pages are read */
    uint32_t group, n_groups;
    uint32_t first_row, n_rows; /* of the batch; of a shared piece, of several sequences */
    uint32_t first_segment, n_segments;
    int shared;  /* leaves states for its rows instead of outputs */
    int sinks;   /* shared, but of one sequence: a view's sinks, for rows that are apart */
    int resumes; /* begins with the states that a shared piece has left */
    uint32_t n_items;
    size_t parts; /* n_items > 1: floats from the plan's parts to (n_segments, queries) parts */
};

struct cpu_attn_item {
    uint32_t piece;
    uint32_t first_segment, n_segments; /* counted from position 0 */
};

/* One group of a piece that was cut. */
struct cpu_attn_merger {
    uint32_t piece, group;
};

/* Owned by the context; memory comes from the host and only ever grows. */
struct cpu_attn_plan {
    const struct gqa_host *host;
    uint32_t n_pieces, n_items;
    uint32_t n_shared_pieces, n_shared_items; /* of these, the first ones: before all others */
    uint32_t n_mergers, n_shared_mergers;
    size_t n_part_floats;
    struct cpu_attn_piece *pieces;
    struct cpu_attn_item *items;
    struct cpu_attn_merger *mergers;
    float *parts;
    float *states;      /* (n_rows, n_heads) parts, where a piece is shared */
    uint32_t *n_shared; /* (n_seqs) segments that each sequence's own pieces leave out */
    /* As allocated. */
    size_t pieces_bytes, items_bytes, mergers_bytes, parts_bytes, states_bytes, n_shared_bytes;
};

void cpu_attn_plan_init(struct cpu_attn_plan *plan, const struct gqa_host *host);
void cpu_attn_plan_finish(struct cpu_attn_plan *plan);

/* Cuts up a batch that was checked. 0 or -ENOMEM. */
int cpu_attn_plan_make(struct cpu_attn_plan *plan, const struct gqa_attn_layer *layer,
                       const struct gqa_attn_batch *batch);

/* Most queries that any piece of such a layer has. */
static inline uint32_t cpu_attn_piece_queries_max(uint32_t group_size)
{
    return group_size > CPU_ATTN_PIECE_QUERIES ? group_size : CPU_ATTN_PIECE_QUERIES;
}

/* *memory holds at least bytes (zeroed or stale) afterwards. 0 or -ENOMEM. */
int cpu_attn_grow(const struct gqa_host *host, void **memory, size_t *allocated, size_t bytes);

#endif
