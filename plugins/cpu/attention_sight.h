/* plugins/cpu/attention_sight.h - what a row sees: causal, mutual or by a mask, in a window or
 * view.
 *
 * struct gqa_attn_seq and gqa_page_table have the rules. Places are the slots of the page table:
 * the past, then the new rows. */
#ifndef PLUGINS_CPU_ATTENTION_SIGHT_H
#define PLUGINS_CPU_ATTENTION_SIGHT_H

#include "plugins/cpu/attention_kernels.h"

/* The sequence's table of the layer's blocks; one without pages where it has none. */
const struct gqa_page_table *cpu_attn_table(const struct gqa_attn_layer *layer,
                                            const struct gqa_attn_seq *seq);

/* Slots before the sequence's new rows. */
static inline uint32_t cpu_attn_past(const struct gqa_attn_layer *layer,
                                     const struct gqa_attn_seq *seq)
{
    return seq->n_past - cpu_attn_table(layer, seq)->n_dropped;
}

/* The first of the sequence's new rows that a view keeps from seeing everything: it sees the sinks
 * and, apart from them, the recent slots. n_rows where there is none. */
uint32_t cpu_attn_first_apart(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq);

/* No row from row on sees a place before this one; but for the sinks, if it is apart. */
uint32_t cpu_attn_first_seen(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                             uint32_t row);
/* No row up to row sees a place after this one. */
uint32_t cpu_attn_last_seen(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                            uint32_t row);

/* depths (n_rows): how many other new rows each row of a sequence with a mask sees. */
void cpu_attn_count_depths(const struct gqa_attn_seq *seq, uint32_t *depths);

/* What a row sees of a segment: its tokens [begin, end), and where masked, only those of them whose
 * bit is set in seen. begin == end: nothing. */
struct cpu_attn_sight {
    uint16_t begin, end;
    int masked;
    uint64_t seen[CPU_ATTN_SEGMENT_BLOCKS];
};

/* depths: of the sequence, wherever it has a mask. */
void cpu_attn_sight_of(struct cpu_attn_sight *ret, const struct gqa_attn_layer *layer,
                       const struct gqa_attn_seq *seq, const uint32_t *depths, uint32_t row,
                       uint32_t segment);
/* What a row that is apart sees of a segment's sinks. The one above has the rest. */
void cpu_attn_sight_of_sinks(struct cpu_attn_sight *ret, const struct gqa_attn_layer *layer,
                             const struct gqa_attn_seq *seq, uint32_t segment);

#endif
