/* daemon/sched/draw.h - the next tokens of a step's sequences, drawn from its logits.
 *
 * A sampler belongs to one sequence, so that which worker draws for which sequence changes no
 * token: all that a step generates are drawn side by side. Engine thread only. */
#ifndef DAEMON_SCHED_DRAW_H
#define DAEMON_SCHED_DRAW_H

#include "daemon/backend/pool.h"
#include "daemon/model/plan.h"
#include "daemon/model/sampler.h"
#include "daemon/sched/batch.h"

struct draw {
    int rc; /* as sampler_sample() and sampler_accept() */
    uint64_t ns;
    struct sampled_token token; /* accepted by the sampler; valid where rc is 0 */
};

/* logits: (n_vocab) of the sequence's last token. */
void draw_token(const struct sequence *s, const float *logits, struct draw *ret);

/* Of each member that generates a token in this step, at its place in the batch's draws. outputs:
 * of the step, which is committed. */
void draw_members(struct pool *pool, const struct batch *b, const struct model_outputs *outputs);

#endif
