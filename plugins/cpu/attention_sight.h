/* plugins/cpu/attention_sight.h - what a row sees: causal, mutual or by a mask, in a window.
 *
 * struct gqa_attn_seq has the rules. Places are those of the page table: the past, then the new
 * rows. */
#ifndef PLUGINS_CPU_ATTENTION_SIGHT_H
#define PLUGINS_CPU_ATTENTION_SIGHT_H

#include "plugins/cpu/attention_kernels.h"

/* No row from row on sees a place before this one. */
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

#endif
