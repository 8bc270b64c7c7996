/* tests/unit/engine/feed.h - feeding a model by hand, without the engine. */
#ifndef TESTS_UNIT_ENGINE_FEED_H
#define TESTS_UNIT_ENGINE_FEED_H

#include "daemon/kv/sequence.h"
#include "daemon/model/model.h"

#define FEED_ROWS 128u /* most rows of a step: load the model with as many */

/* Runs tokens [kv->n_tokens, n) of one sequence in steps of chunk rows. ret_logits (n, n_vocab):
 * the rows that were run are filled. 0 or -errno. */
int feed_tokens(struct model *m, struct kv_sequence *kv, const int32_t *tokens, uint32_t n,
                uint32_t chunk, float *ret_logits);

/* The same for a sequence from its start, in a cache of its own. */
int feed_all(struct model *m, const int32_t *tokens, uint32_t n, uint32_t chunk, float *ret_logits);

#endif
