/* daemon/sched/engine_preempt.c - sequences that give way, and what memory is short of.
 *
 * A sequence that gives way lets go of all its blocks and its place. Its full blocks stay in the
 * tree, and leave memory only when others need it; its tokens, sampler and text stay with it. When
 * it has a place again it adopts what is still there and computes the rest, as rows of the classes
 * that they had: its next token is the one that it would have been. */
#include "daemon/sched/engine_internal.h"

#define STARVED_STEPS_MAX 8u /* that the cache's io may take to give memory back */

static struct preempt_rank rank_of(const struct sequence *s)
{
    return (struct preempt_rank){request_is_paused(s->request), s->level, s->request->submitted_ns,
                                 s->number};
}

static bool is_lower(const struct sequence *a, const struct sequence *b)
{
    const struct preempt_rank x = rank_of(a), y = rank_of(b);
    return preempt_is_lower(&x, &y);
}

void engine_preempt(struct engine *e, struct sequence *s)
{
    kv_sequence_checkpoint(&s->kv);
    sequence_yield(s);
    engine_leave_place(e, s);
    s->request->n_preempted++;
    atomic_fetch_add(&e->n_preemptions, 1);
    atomic_store_explicit(&s->request->seen.state, REQUEST_STATE_PREEMPTED, memory_order_relaxed);
}

/* ---- places ------------------------------------------------------------------------------ */

/* The lowest of a user (NULL: of all) with a place, or NULL. */
static struct sequence *lowest_of(const struct engine *e, const struct fair_user *user)
{
    struct sequence *lowest = NULL;
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        bool counts = s->has_place && (user == NULL || s->request->user == user);
        if (counts && (lowest == NULL || is_lower(s, lowest))) {
            lowest = s;
        }
    }
    return lowest;
}

/* Somebody who owes the request's user a place, or NULL. */
static struct sequence *find_debtor(const struct engine *e, const struct request *r, int32_t level)
{
    const struct preempt_share asks = {r->user->n_running, r->user->weight};
    for (const struct sequence *s = e->running; s != NULL; s = s->next) {
        const struct fair_user *user = s->request->user;
        const struct preempt_share holds = {user->n_running, user->weight};
        if (s->has_place && user != r->user && preempt_is_owed(&asks, &holds)) {
            struct sequence *lowest = lowest_of(e, user);
            if (lowest->level <= level) {
                return lowest;
            }
        }
    }
    return NULL;
}

bool engine_make_room(struct engine *e, const struct request *r, int32_t level)
{
    struct sequence *lowest = lowest_of(e, NULL);
    if (lowest == NULL) {
        return false;
    }
    bool yields = lowest->level < level || request_is_paused(lowest->request);
    struct sequence *victim = yields ? lowest : find_debtor(e, r, level);
    if (victim != NULL) {
        engine_preempt(e, victim);
    }
    return victim != NULL;
}

/* ---- memory ------------------------------------------------------------------------------ */

static bool holds_memory(const struct sequence *s)
{
    return s->has_place && (s->kv.lists[0].n > 0 || s->kv.view.votes_bytes > 0);
}

/* The highest of those for whose rows there was no memory, or NULL. */
static struct sequence *find_starved(struct engine *e)
{
    struct sequence *highest = NULL;
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        bool starved = s->has_place && s->hold == SEQUENCE_STARVED;
        s->n_starved = starved ? s->n_starved + 1 : 0;
        if (starved && (highest == NULL || is_lower(highest, s))) {
            highest = s;
        }
    }
    return highest;
}

/* The lowest that holds some and is below s; where nobody steps, the lowest of all others. */
static struct sequence *find_victim(const struct engine *e, const struct sequence *s, bool any)
{
    struct sequence *victim = NULL;
    for (struct sequence *other = e->running; other != NULL; other = other->next) {
        bool may = other != s && holds_memory(other) && (any || is_lower(other, s));
        if (may && (victim == NULL || is_lower(other, victim))) {
            victim = other;
        }
    }
    return victim;
}

enum engine_relief engine_relieve(struct engine *e, bool formed)
{
    struct sequence *s = find_starved(e);
    if (s == NULL) {
        return ENGINE_RELIEF_NONE;
    }
    if (kv_cache_is_busy(e->cache) && (!formed || s->n_starved < STARVED_STEPS_MAX)) {
        return ENGINE_RELIEF_NONE; /* it will give memory back, or blocks */
    }
    struct sequence *victim = find_victim(e, s, !formed);
    if (victim != NULL) {
        engine_preempt(e, victim);
        return ENGINE_RELIEF_AGAIN;
    }
    if (formed) {
        return ENGINE_RELIEF_NONE; /* those before it will end */
    }
    engine_request_fail(s->request, PROTO_E_NO_MEMORY, "no memory for a block of the KV cache");
    return ENGINE_RELIEF_FAILED;
}
