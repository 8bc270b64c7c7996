/* plugins/cpu/attention_turn.h - a view's queries, turned back to meet its sinks.
 *
 * A rotated key at position t and a query at p know of each other's distance p - t alone. So a
 * query that is to meet a key D places nearer is turned back by D, and keys stay as they are:
 * exactly what rotating every key anew would give, at the cost of one query.
 *
 * Source: positions in the cache as in StreamingLLM (Xiao et al., 2023); turning the query is ours.
 */
#ifndef PLUGINS_CPU_ATTENTION_TURN_H
#define PLUGINS_CPU_ATTENTION_TURN_H

#include <gqa/plugin.h>

/* Turns one head's query (k_dim) by what plugin_find_turn() has found. */
void cpu_attn_turn(const struct gqa_attn_layer *layer, const float *turn, float *q);

#endif
