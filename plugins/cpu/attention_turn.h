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

#include "plugins/cpu/attention_job.h"

/* Whether rows of the sequence that are apart meet the sinks with turned queries. */
int cpu_attn_turns(const struct cpu_attn_job *job, uint32_t seq);

/* The turn of that row of the batch, which is apart: turn (2 n_freqs), cosines, then sines. */
void cpu_attn_find_turn(const struct cpu_attn_job *job, uint32_t seq, uint32_t row, float *turn);

/* Turns one head's query (k_dim). */
void cpu_attn_turn(const struct gqa_attn_layer *layer, const float *turn, float *q);

#endif
