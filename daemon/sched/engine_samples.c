/* daemon/sched/engine_samples.c - many continuations of one prompt.
 *
 * The prompt is computed by one sequence, the request's first sample. At its end the others begin:
 * each draws its first token from the same logits and joins the running as one that gave way, so
 * that it gets a place in its turn. With the place it takes the prompt's blocks from a sample that
 * has one: whole blocks are shared, the last one's beginning is copied. Where none is left that has
 * one, it goes on as all do that gave way: it adopts what the tree has and computes the rest. So do
 * those with a KV policy: views are private.
 *
 * The arena's bound is charged once for shared blocks: to the sample that the others took them
 * from, or to one of these when that leaves. */
#include "daemon/sched/engine_internal.h"

static int begin_sample(struct engine *e, const struct sequence *first, uint32_t sample,
                        const float *logits, uint64_t now)
{
    struct sequence *s;
    int rc = sequence_create_sample(first, sample, &s);
    if (rc < 0) {
        return rc;
    }
    engine_add_sequence(e, s);
    struct draw draw;
    draw_token(s, logits, &draw);
    rc = publish_token(&e->publisher, s, &draw, now);
    atomic_fetch_add(&e->n_generated_tokens, rc == 0);
    return rc;
}

int engine_begin_samples(struct engine *e, struct sequence *s, const float *logits, uint64_t now)
{
    int rc = 0;
    for (uint32_t i = 1; rc == 0 && i < s->request->n_samples; i++) {
        rc = begin_sample(e, s, i, logits, now);
    }
    return rc;
}

/* Whether the tree has more of it than the prompt: a sample that gave way has left its blocks. */
static bool is_better_known(const struct sequence *s)
{
    const struct kv_text text = sequence_text(s);
    return s->kv.space != NULL && !s->kv.detached &&
           kv_space_known_tokens(s->kv.space, &text, s->kv.exact) > s->n_prompt;
}

struct sequence *engine_find_source(const struct engine *e, const struct sequence *s)
{
    if (s->request->n_samples < 2 || s->has_place || s->n_tokens == s->n_prompt ||
        s->request->kv_policy.kind != KV_POLICY_FULL || is_better_known(s)) {
        return NULL;
    }
    for (struct sequence *other = e->running; other != NULL; other = other->next) {
        if (other->request == s->request && other->has_place &&
            kv_sequence_can_fork(&s->kv, &other->kv, (uint32_t)s->n_prompt)) {
            return other;
        }
    }
    return NULL;
}

void engine_share_prompt(struct sequence *s, const struct sequence *source)
{
    if (kv_sequence_fork(&s->kv, &source->kv, (uint32_t)s->n_prompt) == 0) {
        s->charged_tokens = sequence_shared_tokens(s);
    }
}

void engine_pass_prompt_on(struct engine *e, const struct sequence *s)
{
    for (struct sequence *other = e->running; s->charged_tokens == 0 && other != NULL;
         other = other->next) {
        if (other->request == s->request && other->has_place && other->charged_tokens > 0) {
            other->charged_tokens = 0;
            engine_charge(e, other);
            return;
        }
    }
}
