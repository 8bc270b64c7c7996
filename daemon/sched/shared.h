/* daemon/sched/shared.h - which neighbours in a batch begin with the same pages, so that a backend
 * may attend to these once for all of them (GQA_ATTN_CAP_SHARED). */
#ifndef DAEMON_SCHED_SHARED_H
#define DAEMON_SCHED_SHARED_H

#include <gqa/plugin.h>

/* Fewer common tokens than a segment of attention are not worth a word. */
#define SHARED_TOKENS_LEAST GQA_ATTN_SEGMENT_TOKENS

/* ret (n_seqs / 2): runs of two or more neighbouring sequences, in order and without overlap, whose
 * page tables of all n_classes layer classes begin with the same pages, all of which are past.
 * A sequence joins a run that has begun unless it shares less with it than the run does; the first
 * in a run decides what it is of. Returns their number. */
uint32_t shared_find(const struct gqa_attn_seq *seqs, uint32_t n_seqs, uint32_t n_classes,
                     struct gqa_attn_shared *ret);

#endif
