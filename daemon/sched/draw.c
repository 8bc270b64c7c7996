#include "daemon/sched/draw.h"

#include "daemon/sched/engine_internal.h"

void draw_token(const struct sequence *s, const float *logits, struct draw *ret)
{
    uint64_t start_ns = engine_now_ns();
    int rc = sampler_sample(s->sampler, logits, &ret->token);
    ret->rc = rc < 0 ? rc : sampler_accept(s->sampler, ret->token.token);
    ret->ns = engine_now_ns() - start_ns;
}

struct draws {
    const struct batch *batch;
    const float *logits; /* (n_outs, n_vocab) */
    uint32_t n_vocab;
};

/* Any worker. */
static void draw_member(void *arg, uint32_t index, uint32_t worker)
{
    const struct draws *d = arg;
    const struct sequence *s = d->batch->members[index];
    if (sequence_generates(s)) {
        draw_token(s, d->logits + (size_t)s->step_first_out * d->n_vocab, &d->batch->draws[index]);
    }
}

void draw_members(struct pool *pool, const struct batch *b, const struct model_outputs *outputs)
{
    struct draws d = {b, outputs->logits, model_shape(b->model)->n_vocab};
    pool_parallel(pool, draw_member, &d, b->n_seqs);
}
