/* daemon/sched/embed.h - what a step's hidden states become: rows, or the vector of a text.
 *
 * A text's vector is complete with its last token. The mean is summed in float64 in the order of
 * positions, so that it does not depend on the chunks in which they came. What a sequence computes
 * again, since a fault of the cache made it begin anew, is not taken twice. Engine thread only. */
#ifndef DAEMON_SCHED_EMBED_H
#define DAEMON_SCHED_EMBED_H

#include "daemon/sched/publish.h"

/* Whether the hidden state of the sequence's token at that index is needed. */
bool embed_wants_row(const struct sequence *s, size_t index);
/* enum model_wants of a REQUEST_EMBED. */
uint32_t embed_wants(const struct sequence *s);

/* Takes the member's part of a step's outputs, which are committed. Sets s->finished with the
 * text's last token. -EDOM: the outputs are not numbers; -ENOMEM. */
int embed_take(const struct publisher *p, struct sequence *s, const struct model_outputs *out);

#endif
