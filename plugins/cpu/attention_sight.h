/* plugins/cpu/attention_sight.h - what a row sees: causal, mutual or by a mask, in a window or
 * view.
 *
 * plugins/common/sight.h has the rules; this is about one segment. */
#ifndef PLUGINS_CPU_ATTENTION_SIGHT_H
#define PLUGINS_CPU_ATTENTION_SIGHT_H

#include "plugins/common/sight.h"
#include "plugins/cpu/attention_kernels.h"

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
