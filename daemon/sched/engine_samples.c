/* daemon/sched/engine_samples.c - many continuations of one prompt.
 *
 * The prompt is computed by one sequence, the request's first sample. At its end the others begin,
 * between two steps as many as a step draws at most: so what others wait for is bounded, and the
 * first sample keeps the logits until all have begun. Each draws its first token from these, side
 * by side, and joins the running as one that gave way, so that it gets a place in its turn. With
 * the place it takes the prompt's blocks from a sample that has one: whole blocks are shared, the
 * last one's beginning is copied. Where none is left that has one, it goes on as all do that gave
 * way: it adopts what the tree has and computes the rest. So do those with a KV policy: views are
 * private.
 *
 * The arena's bound is charged once for shared blocks: to the sample that the others took them
 * from, or to one of these when that leaves. */
#include "daemon/sched/draw.h"
#include "daemon/sched/engine_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int engine_note_beginnings(struct sequence *s, const float *logits)
{
    size_t bytes = model_shape(s->request->model)->n_vocab * sizeof(*logits);
    if (s->request->n_samples < 2) {
        return 0;
    }
    s->begins.logits = malloc(bytes);
    if (s->begins.logits == NULL) {
        return -ENOMEM;
    }
    memcpy(s->begins.logits, logits, bytes);
    s->begins.next = 1;
    return 0;
}

struct beginnings {
    struct sequence **samples;
    struct draw *draws;
    const float *logits;
};

/* Any worker. */
static void draw_first(void *arg, uint32_t index, uint32_t worker)
{
    const struct beginnings *b = arg;
    draw_token(b->samples[index], b->logits, &b->draws[index]);
}

static int begin_some(struct engine *e, struct sequence *s)
{
    /* No step is under way: its lists are free. */
    const struct beginnings b = {e->batch.members, e->batch.draws, s->begins.logits};
    uint32_t n = 0, left = s->request->n_samples - s->begins.next;
    uint32_t n_max = left < e->batch.max_seqs ? left : e->batch.max_seqs;
    int rc = 0;
    while (n < n_max &&
           (rc = sequence_create_sample(s, s->begins.next, &e->batch.members[n])) == 0) {
        engine_add_sequence(e, b.samples[n++]);
        s->begins.next++;
    }
    pool_parallel(e->options.pool, draw_first, (void *)&b, n);
    uint64_t now = engine_now_ns();
    for (uint32_t i = 0; i < n && rc == 0; i++) {
        rc = publish_token(&e->publisher, b.samples[i], &b.draws[i], now);
        atomic_fetch_add(&e->n_generated_tokens, rc == 0);
    }
    return rc;
}

bool engine_begin_samples(struct engine *e)
{
    struct sequence *s = e->running;
    while (s != NULL && (s->begins.logits == NULL || s->request->finish != FINISH_NONE)) {
        s = s->next;
    }
    if (s == NULL) {
        return false;
    }
    int rc = begin_some(e, s);
    if (rc < 0 || s->begins.next == s->request->n_samples) {
        free(s->begins.logits);
        s->begins.logits = NULL;
    }
    engine_generation_fail(s->request, rc);
    return true;
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
