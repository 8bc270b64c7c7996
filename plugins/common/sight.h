/* plugins/common/sight.h - what the rows of a sequence see: causal, mutual or by a mask, in a
 * window or view.
 *
 * struct gqa_attn_seq and gqa_page_table have the rules. Places are the slots of the page table:
 * the past, then the new rows. Rows are the sequence's, from 0. */
#ifndef PLUGINS_COMMON_SIGHT_H
#define PLUGINS_COMMON_SIGHT_H

#include <gqa/plugin.h>

/* The sequence's table of the layer's blocks; one without pages where it has none. */
const struct gqa_page_table *plugin_table(const struct gqa_attn_layer *layer,
                                          const struct gqa_attn_seq *seq);

/* Slots before the sequence's new rows. */
static inline uint32_t plugin_past(const struct gqa_attn_layer *layer,
                                   const struct gqa_attn_seq *seq)
{
    return seq->n_past - plugin_table(layer, seq)->n_dropped;
}

/* Whether its table is a view that leaves something out. */
static inline int plugin_is_view(const struct gqa_page_table *table)
{
    return table->n_dropped > 0 || table->recent > 0;
}

/* 0, or what is wrong with a sequence's view: -EINVAL for one that contradicts itself, -ENOTSUP for
 * one that the ABI has not. */
int plugin_check_sight(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq);

/* The same for gqa_attention.observe's arguments. */
int plugin_check_observed(const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                          uint32_t seq, uint32_t n_observed, uint32_t n_votes);

/* The first of the sequence's new rows that a view keeps from seeing everything: it sees the sinks
 * and, apart from them, the recent slots. n_rows where there is none. */
uint32_t plugin_first_apart(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq);

/* The first place in the window of a place. */
uint32_t plugin_first_in_window(const struct gqa_attn_layer *layer, uint32_t place);

/* No row from row on sees a place before this one; but for the sinks, if it is apart. */
uint32_t plugin_first_seen(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                           uint32_t row);
/* No row up to row sees a place after this one. */
uint32_t plugin_last_seen(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                          uint32_t row);

/* depths (n_rows): how many other new rows each row of a sequence with a mask sees. */
void plugin_count_depths(const struct gqa_attn_seq *seq, uint32_t *depths);

/* Whether rows that are apart meet the sinks turned back. */
static inline int plugin_turns(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq)
{
    return layer->rope != NULL && plugin_table(layer, seq)->turned != 0;
}

/* turn (2 n_freqs): cosines and sines of the angles by which a row that is apart is turned back. */
void plugin_find_turn(const struct gqa_attn_layer *layer, const struct gqa_attn_seq *seq,
                      uint32_t row, float *turn);

#endif
