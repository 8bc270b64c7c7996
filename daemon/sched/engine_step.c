/* daemon/sched/engine_step.c - which model steps next, and what becomes of the results. */
#include "daemon/sched/embed.h"
#include "daemon/sched/engine_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The sequence whose model has waited longest, or NULL when none can run. Models take turns, but
 * for those that wait for another backend. */
static struct sequence *choose_sequence(struct engine *e)
{
    struct sequence *chosen = NULL;
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        bool can_run = s->has_place && !s->finished && !s->barred && s->hold == SEQUENCE_READY &&
                       !request_is_paused(s->request) && !model_standby(s->request->model)->coming;
        if (can_run && (chosen == NULL || s->last_turn < chosen->last_turn)) {
            chosen = s;
        }
    }
    return chosen;
}

static bool is_alone(const struct engine *e)
{
    return e->running != NULL && e->running->next == NULL;
}

/* A batch of the model that has waited longest and can run. */
static bool form_some(struct engine *e)
{
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        s->hold = SEQUENCE_READY;
        s->barred = engine_is_barred(e, s->request);
    }
    for (struct sequence *s; (s = choose_sequence(e)) != NULL;) {
        struct batch_rules rules;
        engine_fill_rules(e, s->request->model, &rules);
        rules.alone = is_alone(e);
        if (batch_form(&e->batch, s->request->model, e->running, &rules) > 0) {
            return true;
        }
        s->hold = s->hold == SEQUENCE_READY ? SEQUENCE_WAITING : s->hold;
    }
    return false;
}

/* Forms the next batch. False when nothing can run; *ret_changed: somebody gave way or failed.
 * Where memory is short, others give way, so that the highest always gets on. */
static bool form(struct engine *e, bool *ret_changed)
{
    enum engine_relief relief;
    bool formed;
    engine_commit_growth(e);
    do {
        formed = form_some(e);
        relief = engine_relieve(e, formed);
        *ret_changed |= relief != ENGINE_RELIEF_NONE;
    } while (relief == ENGINE_RELIEF_AGAIN);
    return formed;
}

/* The model's next turn comes after every other's. */
static void count_turn(struct engine *e, const struct model *model)
{
    e->turn++;
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        s->last_turn = s->request->model == model ? e->turn : s->last_turn;
    }
}

/* What the cache has spared the prompt. */
static void count_cached(struct engine *e, struct sequence *s)
{
    struct request *r = s->request;
    sequence_note_spared(s);
    r->n_cached += s->spared.n_tokens; /* an EMBED has many prompts */
    r->hit_blocks += s->spared.n_blocks;
    r->store_blocks += s->spared.n_from_store;
    r->miss = s->kv.miss;
    kv_cache_count(e->cache, (uint32_t)s->n_prompt, s->spared.n_tokens);
}

/* A mapped file could not be read, and zeros may have stood in for its bytes: what was computed
 * does not count. Every sequence begins anew; what is sound it finds in the cache again, and the
 * tokens that it has generated stay. */
static void recover_from_faults(struct engine *e)
{
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        kv_sequence_reset(&s->kv);
    }
    kv_cache_drop_faulty(e->cache);
}

/* Zeros have stood in for the model's weights: nobody gets a result of it any more. */
static void fail_damaged(struct engine *e, const struct model *model)
{
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        if (s->request->model == model) {
            engine_request_fail(s->request, PROTO_E_IO,
                                "a file of the model was cut, or the disk cannot read it; the next "
                                "request loads it anew");
        }
    }
}

/* The next token of a generation. */
static int publish_generated(struct engine *e, struct sequence *s, const struct draw *draw,
                             uint64_t now)
{
    const struct request *r = s->request;
    uint64_t token_before_ns = s->last_token_ns;
    int rc = publish_token(&e->publisher, s, draw, now);
    atomic_fetch_add(&e->n_generated_tokens, rc == 0);
    engine_note_latency(e, token_before_ns == 0 ? &e->latency.first_token : &e->latency.inter_token,
                        token_before_ns == 0 ? r->submitted_ns : token_before_ns, now);
    return rc;
}

/* Which of the prompt's tokens the policy keeps, where that was asked for. */
static int tell_kept(struct sequence *s)
{
    struct request *r = s->request;
    if (!r->wants_kept || r->kept != NULL) {
        return 0;
    }
    float *kept = calloc(s->n_prompt + 1, sizeof(*kept));
    int rc = kept != NULL ? kv_view_shares(&s->kv, kept) : -ENOMEM;
    if (rc == 0) {
        r->kept = kept;
        return 0;
    }
    free(kept);
    return rc == -ENODATA ? 0 : rc; /* a step was repeated: nobody knows */
}

/* What one member makes of its part of the step's outputs. */
static void publish_member(struct engine *e, uint32_t member, const struct model_outputs *out,
                           uint64_t now)
{
    struct sequence *s = e->batch.members[member];
    struct request *r = s->request;
    uint32_t n_vocab = model_shape(r->model)->n_vocab;
    bool prompt_ended = s->prompt_done_ns == 0 && s->kv.n_tokens >= s->n_prompt;
    const float *rows =
        out->logits != NULL ? out->logits + (size_t)s->step_first_out * n_vocab : NULL;
    int rc = 0;
    if (prompt_ended) {
        s->prompt_done_ns = now;
        count_cached(e, s);
        if (r->pin != 0) {
            r->n_pinned = kv_sequence_pin(&s->kv, (uint32_t)r->n_tokens, r->pin > 0);
        }
        kv_sequence_checkpoint(&s->kv);
        rc = tell_kept(s);
    }
    if (rc < 0) {
        engine_request_fail(r, PROTO_E_NO_MEMORY, "no memory to tell what is kept");
        return;
    }
    if (r->kind == REQUEST_EMBED) {
        rc = embed_take(&e->publisher, s, out);
    } else if (r->kind == REQUEST_LOGITS) {
        rc = s->step_outs > 0 ? publish_rows(&e->publisher, s, rows) : 0;
        if (rc == 0 && prompt_ended) {
            r->finish = FINISH_LENGTH;
        }
    } else if (s->step_outs > 0 && r->n_predict == 0) {
        r->finish = FINISH_LENGTH;
    } else if (s->step_outs > 0) {
        rc = publish_generated(e, s, &e->batch.draws[member], now);
        rc = rc == 0 && prompt_ended ? engine_note_beginnings(s, rows) : rc;
    }
    r->n_kept = kv_view_n_kept(&s->kv);
    r->n_dropped = s->kv.n_tokens - r->n_kept;
    engine_note_state(s);
    engine_generation_fail(r, rc);
}

bool engine_step(struct engine *e)
{
    bool changed = false;
    if (!form(e, &changed)) {
        return changed; /* blocks have come free, which may do for another */
    }
    struct batch *b = &e->batch;
    count_turn(e, b->model);
    uint64_t start = engine_now_ns();
    atomic_store(&e->step_started_ns, start);
    struct model_outputs out = {NULL};
    int rc = engine_run_step(e, &out);
    uint64_t end = engine_now_ns();
    atomic_store(&e->step_started_ns, 0);
    if (rc == ENGINE_STEP_PUT_OFF) {
        return true;
    }
    atomic_fetch_add(&e->n_steps, 1);
    atomic_fetch_add(&e->step_ns_total, end - start);
    bool damaged = model_is_damaged(b->model);
    if (damaged) {
        fail_damaged(e, b->model);
    }
    bool has_faults = kv_cache_has_faults(e->cache); /* those of models are among them */
    if (has_faults) {
        recover_from_faults(e);
    }
    if (damaged || has_faults) {
        return true;
    }
    if (rc == 0) {
        engine_shadow_step(e, &out, end - start);
        batch_commit(b);
        engine_learn_cost(e, end - start);
        engine_note_step(e, end - start);
        draw_members(e->options.pool, b, &out);
    }
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        struct sequence *s = b->members[i];
        if (rc < 0) {
            char message[96];
            snprintf(message, sizeof(message), "the backend failed: %s", strerror(-rc));
            engine_request_fail(s->request, PROTO_E_BACKEND, message);
            continue;
        }
        if (s->prompt_done_ns == 0) {
            atomic_fetch_add(&e->n_prompt_tokens, s->step_rows);
        }
        publish_member(e, i, &out, end);
    }
    return true;
}
