/* daemon/sched/engine_admit.c - who gets a place among the running, and who has to leave one.
 *
 * Requests of the queue and sequences that gave way compete in one order (order.h). Whoever is
 * first gets a place when there is one and memory for what it needs soon: its tokens so far and
 * ADMIT_AHEAD more. What it needs later is found when it comes to that (engine_preempt.c). Nobody
 * is passed by for want of room, or large requests would starve; but for one whose store is still
 * being read. */
#include "daemon/sched/engine_internal.h"

#include <errno.h>
#include <stdio.h>
#include <time.h>

#define ADMIT_AHEAD 256u /* tokens */

uint64_t engine_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t engine_bytes_free(const struct engine *e)
{
    uint64_t max = e->options.kv.arena_bytes_max;
    return max > e->bytes_committed ? max - e->bytes_committed : 0;
}

/* ---- places ------------------------------------------------------------------------------ */

/* Bytes that a sequence needs soon, without the blocks that others account for. */
static uint64_t bytes_soon(const struct engine *e, const struct request *r,
                           const struct sequence *s, uint32_t charged_tokens)
{
    const struct kv_layout *layout = model_kv_layout(r->model);
    uint64_t total = sequence_tokens_most(r, s);
    uint64_t soon = (s != NULL ? s->n_tokens : sequence_tokens_first(r)) + ADMIT_AHEAD;
    const struct kv_extent extent =
        sequence_extent(r, s, soon < total ? soon : total, e->options.n_batch);
    const struct kv_extent charged = sequence_extent(r, s, charged_tokens, e->options.n_batch);
    return kv_sequence_block_bytes(layout, &extent) + kv_sequence_aside_bytes(layout, &extent) -
           (charged_tokens > 0 ? kv_sequence_block_bytes(layout, &charged) : 0);
}

void engine_charge(struct engine *e, struct sequence *s)
{
    e->bytes_committed -= s->bytes_committed;
    s->bytes_committed = bytes_soon(e, s->request, s, s->charged_tokens);
    s->covered_tokens = s->n_tokens + ADMIT_AHEAD;
    s->covered_view = s->kv.view.begun;
    e->bytes_committed += s->bytes_committed;
}

static void take_place(struct engine *e, struct sequence *s, int32_t level)
{
    s->level = s->has_had_place && s->level > level ? s->level : level;
    struct sequence *source = engine_find_source(e, s);
    if (source != NULL) {
        engine_share_prompt(s, source);
    }
    s->has_place = s->has_had_place = true;
    engine_charge(e, s);
    s->last_turn = e->turn;
    s->n_starved = 0;
    pthread_mutex_lock(&e->lock);
    e->n_running++;
    s->request->user->n_running++;
    pthread_mutex_unlock(&e->lock);
    engine_note_state(s);
}

void engine_leave_place(struct engine *e, struct sequence *s)
{
    if (!s->has_place) {
        return;
    }
    s->has_place = false;
    e->bytes_committed -= s->bytes_committed;
    s->bytes_committed = 0;
    engine_pass_prompt_on(e, s);
    s->charged_tokens = 0;
    pthread_mutex_lock(&e->lock);
    e->n_running--;
    s->request->user->n_running--;
    pthread_mutex_unlock(&e->lock);
}

void engine_commit_growth(struct engine *e)
{
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        bool outgrown = s->n_tokens >= s->covered_tokens || s->covered_view != s->kv.view.begun;
        if (s->has_place && outgrown) {
            engine_charge(e, s);
        }
    }
}

/* ---- the order --------------------------------------------------------------------------- */

/* A request of the queue, or a sequence (and its request) that gave way. */
struct candidate {
    struct request *request;
    struct sequence *sequence;
    int32_t level;
};

static struct order_key key_of(const struct request *r)
{
    return (struct order_key){r->priority, r->submitted_ns, r->user->served, r->turn_ns};
}

/* Whether this round may give it a place. */
static bool is_eligible(const struct engine *e, const struct request *r)
{
    return r->skipped != e->round && !request_is_paused(r) && !engine_is_barred(e, r);
}

static bool can_resume(const struct engine *e, const struct sequence *s)
{
    return !s->has_place && !s->finished && s->request->finish == FINISH_NONE &&
           is_eligible(e, s->request);
}

static void consider(struct candidate *best, struct request *r, struct sequence *s, int32_t highest,
                     uint64_t now_ns)
{
    const struct order_key key = key_of(r);
    if (best->request != NULL) {
        const struct order_key others = key_of(best->request);
        if (!order_before(&key, &others, highest, now_ns)) {
            return;
        }
    }
    *best = (struct candidate){r, s, order_level(r->priority, r->submitted_ns, highest, now_ns)};
}

/* The first of those that this round has not passed by; its request is NULL where there is none.
 * Under the lock. */
static struct candidate pick(const struct engine *e, uint64_t now_ns)
{
    struct candidate best = {NULL};
    int32_t highest = INT32_MIN;
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        highest =
            can_resume(e, s) && s->request->priority > highest ? s->request->priority : highest;
    }
    for (struct request *r = e->queue; r != NULL; r = r->next) {
        highest = is_eligible(e, r) && r->priority > highest ? r->priority : highest;
    }
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        if (can_resume(e, s)) {
            consider(&best, s->request, s, highest, now_ns);
        }
    }
    for (struct request *r = e->queue; r != NULL; r = r->next) {
        if (is_eligible(e, r)) {
            consider(&best, r, NULL, highest, now_ns);
        }
    }
    return best;
}

/* ---- beginning --------------------------------------------------------------------------- */

bool engine_find_space(struct engine *e, const struct request *r, struct kv_space **ret)
{
    *ret = r->realm[0] == '\0' ? NULL
                               : kv_cache_space(e->cache, r->realm, model_kv_identity(r->model),
                                                model_kv_layout(r->model));
    return *ret == NULL || kv_space_is_ready(*ret);
}

/* Takes a request off the queue, unless more sequences of it are to begin: then it goes to the end
 * of its user's line, so that a request of many does not hold up the others. */
static void take_off(struct engine *e, struct request *r, bool ended)
{
    pthread_mutex_lock(&e->lock);
    if (!ended && r->next_input < sequence_count_of(r)) {
        r->turn_ns = engine_now_ns();
    } else {
        struct request **link = &e->queue;
        while (*link != r) {
            link = &(*link)->next;
        }
        *link = r->next;
        e->queue_end = r->next == NULL ? link : e->queue_end;
        r->is_queued = false;
        e->n_waiting--;
        r->user->n_waiting--;
        order_pace_note(&e->pace, engine_now_ns());
    }
    pthread_mutex_unlock(&e->lock);
}

void engine_add_sequence(struct engine *e, struct sequence *s)
{
    s->number = ++e->n_started;
    s->request->n_sequences++;
    pthread_mutex_lock(&e->lock);
    struct sequence **end = &e->running;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    *end = s;
    pthread_mutex_unlock(&e->lock);
}

static int start_sequence(struct engine *e, struct request *r, struct kv_space *space,
                          int32_t level)
{
    struct sequence *s;
    int rc = sequence_create(r, e->cache, space, &s);
    if (rc < 0) {
        return rc;
    }
    s->started_ns = engine_now_ns();
    if (r->n_prompt == 0) {
        engine_note_latency(e, &e->latency.queue, r->submitted_ns, s->started_ns);
    }
    r->n_prompt += (uint32_t)s->n_prompt;
    r->next_input++;
    engine_add_sequence(e, s);
    take_place(e, s, level);
    return 0;
}

static void begin(struct engine *e, struct request *r, struct kv_space *space, int32_t level)
{
    bool able = plan_has(model_plan_now(r->model), kv_policy_caps(&r->kv_policy));
    int rc = able ? start_sequence(e, r, space, level) : -ENOTSUP;
    if (rc == -ENOTSUP) {
        engine_request_fail(r, PROTO_E_BACKEND,
                            "the backend of the model's attention lacks what 'kv_policy' needs");
    } else if (rc == -EINVAL) {
        engine_request_fail(r, PROTO_E_INVALID_PARAMS, "sampling parameters do not fit together");
    } else if (rc == -E2BIG) {
        engine_request_fail(r, PROTO_E_INVALID_PARAMS, GRAMMAR_PLACES_MESSAGE);
    } else if (rc < 0) {
        engine_request_fail(r, PROTO_E_NO_MEMORY, "no memory for the sequence");
    }
    take_off(e, r, rc < 0);
    if (rc < 0) {
        engine_settle(e, r);
    }
}

/* False, and the request has ended: it would not fit even if it were alone. */
static bool can_ever_fit(struct engine *e, struct request *r)
{
    const struct kv_extent extent =
        sequence_extent(r, NULL, sequence_tokens_most(r, NULL), e->options.n_batch);
    uint64_t bytes = kv_sequence_bytes_for(model_kv_layout(r->model), &extent);
    if (bytes <= e->options.kv.arena_bytes_max) {
        return true;
    }
    char message[160];
    snprintf(message, sizeof(message),
             "the request can need %llu bytes of KV cache, the bound is %llu",
             (unsigned long long)bytes, (unsigned long long)e->options.kv.arena_bytes_max);
    engine_request_fail(r, PROTO_E_NO_MEMORY, message);
    take_off(e, r, true);
    engine_settle(e, r);
    return false;
}

static bool fits(const struct engine *e, const struct candidate *c)
{
    const struct sequence *s = c->sequence;
    if (e->n_running >= e->options.n_parallel) {
        return false;
    }
    bool shares = s != NULL && engine_find_source(e, s) != NULL;
    return bytes_soon(e, c->request, s, shares ? sequence_shared_tokens(s) : 0) <=
           engine_bytes_free(e);
}

/* Tries to give a place to the first in the order. False: nobody can get one now. */
static bool admit_one(struct engine *e)
{
    struct kv_space *space = NULL;
    pthread_mutex_lock(&e->lock);
    struct candidate c = pick(e, engine_now_ns());
    pthread_mutex_unlock(&e->lock);
    if (c.request == NULL) {
        return false;
    }
    if (c.sequence == NULL && !can_ever_fit(e, c.request)) {
        return true;
    }
    if (c.sequence == NULL && !engine_find_space(e, c.request, &space)) {
        c.request->skipped = e->round;
        return true;
    }
    while (!fits(e, &c)) {
        if (!engine_make_room(e, c.request, c.level)) {
            return false;
        }
    }
    if (c.sequence != NULL) {
        take_place(e, c.sequence, c.level);
    } else {
        begin(e, c.request, space, c.level);
    }
    return true;
}

void engine_admit(struct engine *e)
{
    e->round++;
    while (!atomic_load(&e->stop) && admit_one(e)) {
    }
}
