/* daemon/sched/engine_end.c - how requests end: done, failed, cancelled, out of time. */
#include "daemon/sched/engine_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

static double ms_between(uint64_t from_ns, uint64_t to_ns)
{
    return from_ns == 0 || to_ns < from_ns ? 0 : (double)(to_ns - from_ns) / 1e6;
}

void engine_request_fail(struct request *r, enum proto_error_code code, const char *message)
{
    if (r->finish == FINISH_NONE) {
        r->finish = FINISH_ERROR;
        r->error = code;
        snprintf(r->error_message, sizeof(r->error_message), "%s", message);
    }
}

void engine_generation_fail(struct request *r, int rc)
{
    if (rc == -ENODATA) {
        engine_request_fail(r, PROTO_E_INVALID_PARAMS,
                            "the grammar allows no token of the model's that is not forbidden");
    } else if (rc == -E2BIG) {
        engine_request_fail(r, PROTO_E_INVALID_PARAMS, GRAMMAR_PLACES_MESSAGE);
    } else if (rc == -EDOM) {
        engine_request_fail(r, PROTO_E_BACKEND, "the backend computed what are not numbers");
    } else if (rc < 0) {
        engine_request_fail(r, PROTO_E_NO_MEMORY, "no memory for an event");
    }
}

/* What ended the request ended the samples that went on until then. Where there were none, it has
 * come too late to matter. */
static void settle_samples(struct request *r)
{
    bool all_ended = r->kind == REQUEST_GENERATE && r->finish != FINISH_ERROR;
    for (uint32_t i = 0; i < r->n_samples; i++) {
        if (r->samples[i].finish == FINISH_NONE) {
            r->samples[i].finish = r->finish;
            all_ended = false;
        }
    }
    r->finish = all_ended ? r->samples[0].finish : r->finish;
}

void engine_settle(struct engine *e, struct request *r)
{
    if (r->is_queued || r->n_sequences > 0) {
        return;
    }
    settle_samples(r);
    if (r->finish == FINISH_NONE) {
        r->finish = FINISH_LENGTH; /* all inputs of an EMBED are done */
    }
    if (r->finish != FINISH_CANCELLED) {
        engine_note_latency(e, &e->latency.whole, r->submitted_ns, engine_now_ns());
    }
    pthread_mutex_lock(&e->lock);
    fair_leave(&e->fair, r->user);
    r->user = NULL;
    pthread_mutex_unlock(&e->lock);
    struct request_event *done = r->done_event;
    r->done_event = NULL;
    publish_done(&e->publisher, r, done);
}

/* ---- deadlines --------------------------------------------------------------------------- */

/* The loop submits at any time: after now was looked at, too. */
static uint64_t age_ns(const struct request *r, uint64_t now_ns)
{
    return now_ns > r->submitted_ns ? now_ns - r->submitted_ns : 0;
}

static bool is_late(const struct request *r, uint64_t now_ns)
{
    return r->deadline_ms > 0 && age_ns(r, now_ns) >= (uint64_t)r->deadline_ms * 1000000u;
}

/* What has been generated is the caller's; without anything, the time was for nothing. */
static void end_late(struct request *r, const char *while_what)
{
    char message[160];
    if (r->kind == REQUEST_GENERATE && r->n_generated > 0 && r->finish == FINISH_NONE) {
        r->finish = FINISH_TIME;
        return;
    }
    snprintf(message, sizeof(message), "'deadline_ms' %u has passed while the request %s",
             r->deadline_ms, while_what);
    engine_request_fail(r, PROTO_E_DEADLINE, message);
}

static void end_hopeless(struct request *r)
{
    char message[200];
    snprintf(
        message, sizeof(message),
        "'deadline_ms' %u cannot be met: the request needs %.0f ms at least, going by the steps "
        "so far",
        r->deadline_ms, r->needed_ms);
    engine_request_fail(r, PROTO_E_DEADLINE, message);
}

static bool is_hopeless(const struct request *r, uint64_t now_ns)
{
    double left_ms = r->deadline_ms - (double)age_ns(r, now_ns) / 1e6;
    return r->deadline_ms > 0 && deadline_is_hopeless(r->needed_ms, left_ms);
}

/* Tokens that a generation has in any case: nothing but their number ends it. */
static uint64_t tokens_least(const struct request *r)
{
    bool free_to_end = !r->ignore_eos || r->n_stops > 0 || r->grammar != NULL;
    uint32_t n_ctx = sequence_positions_max(r);
    uint64_t room = n_ctx > r->n_tokens ? n_ctx - r->n_tokens : 1;
    uint64_t n = free_to_end && r->n_predict > 1 ? 1 : r->n_predict;
    return n < room ? n : room;
}

static double estimate(struct engine *e, const struct request *r)
{
    struct deadline_work work = {.n_batch = e->options.n_batch};
    struct kv_space *space = NULL;
    if (r->kind == REQUEST_EMBED) {
        for (size_t i = 0; i < r->embed.n_inputs; i++) {
            work.prompt_tokens += r->embed.inputs[i].n_tokens;
        }
        return deadline_needed_ms(engine_cost(e, r->model), &work);
    }
    if (engine_find_space(e, r, &space) && space != NULL) {
        const struct kv_text text = {r->tokens, r->n_tokens, r->strict ? 0 : r->n_tokens};
        work.cached_tokens = kv_space_known_tokens(space, &text, r->cache_exact);
    }
    work.prompt_tokens = r->n_tokens - work.cached_tokens;
    work.tokens_least = r->kind == REQUEST_GENERATE ? tokens_least(r) : 0;
    return deadline_needed_ms(engine_cost(e, r->model), &work);
}

/* Only this thread takes requests off the queue, so one that was found stays. */
static struct request *find_new_deadline(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    struct request *r = e->n_new_deadlines > 0 ? e->queue : NULL;
    while (r != NULL && (r->deadline_ms == 0 || r->needed_ms >= 0)) {
        r = r->next;
    }
    e->n_new_deadlines -= r != NULL;
    pthread_mutex_unlock(&e->lock);
    return r;
}

int engine_deadline_timeout_ms(const struct engine *e)
{
    uint64_t now = engine_now_ns(), first = UINT64_MAX;
    for (const struct request *r = e->queue; r != NULL; r = r->next) {
        uint64_t due = r->submitted_ns + (uint64_t)r->deadline_ms * 1000000u;
        first = r->deadline_ms > 0 && due < first ? due : first;
    }
    for (const struct sequence *s = e->running; s != NULL; s = s->next) {
        const struct request *r = s->request;
        uint64_t due = r->submitted_ns + (uint64_t)r->deadline_ms * 1000000u;
        first = r->deadline_ms > 0 && due < first ? due : first;
    }
    if (first == UINT64_MAX) {
        return -1;
    }
    uint64_t left_ms = first <= now ? 0 : (first - now) / 1000000u + 1;
    return left_ms < INT32_MAX ? (int)left_ms : INT32_MAX;
}

/* ---- those that wait --------------------------------------------------------------------- */

/* Whether the request is to leave the queue. */
static bool ends_waiting(const struct engine *e, struct request *r, uint64_t now_ns)
{
    if (r->finish != FINISH_NONE) {
        return true; /* a sequence of it failed */
    }
    if (atomic_load(&r->cancelled) || atomic_load(&e->stop)) {
        r->finish = FINISH_CANCELLED;
    } else if (is_late(r, now_ns)) {
        end_late(r, "waited");
    } else if (r->n_sequences == 0 && is_hopeless(r, now_ns)) {
        end_hopeless(r);
    }
    return r->finish != FINISH_NONE;
}

void engine_drop_ended(struct engine *e)
{
    struct request *dropped = NULL;
    for (struct request *r; (r = find_new_deadline(e)) != NULL;) {
        r->needed_ms = estimate(e, r);
    }
    uint64_t now = engine_now_ns();
    pthread_mutex_lock(&e->lock);
    struct request **link = &e->queue;
    while (*link != NULL) {
        struct request *r = *link;
        if (ends_waiting(e, r, now)) {
            *link = r->next;
            r->is_queued = false;
            r->next = dropped;
            dropped = r;
            e->n_waiting--;
            r->user->n_waiting--;
            order_pace_note(&e->pace, now);
        } else {
            link = &r->next;
        }
    }
    e->queue_end = link;
    pthread_mutex_unlock(&e->lock);
    while (dropped != NULL) {
        struct request *r = dropped;
        dropped = r->next;
        engine_settle(e, r);
    }
}

/* ---- those that run ---------------------------------------------------------------------- */

static void fill_timings(struct sequence *s)
{
    struct request *r = s->request;
    uint64_t computed_ns = s->prompt_done_ns != 0 ? s->prompt_done_ns : engine_now_ns();
    struct request_timings *t = &r->timings;
    t->queue_ms = ms_between(r->submitted_ns, s->started_ns);
    t->prompt_ms = ms_between(s->started_ns, computed_ns);
    t->first_token_ms = r->n_generated > 0 ? ms_between(r->submitted_ns, s->prompt_done_ns) : 0;
    t->predict_ms = ms_between(s->prompt_done_ns, s->last_token_ns);
}

/* Takes a sequence out, releases its KV, and gives its request back to the loop. */
static void retire(struct engine *e, struct sequence *s)
{
    struct request *r = s->request;
    if (publish_rest(&e->publisher, s) < 0) {
        r->finish = FINISH_NONE; /* its text is not whole: whatever ended it, this is an error */
        engine_request_fail(r, PROTO_E_NO_MEMORY, "no memory for an event");
    }
    fill_timings(s);
    pthread_mutex_lock(&e->lock);
    struct sequence **link = &e->running;
    while (*link != s) {
        link = &(*link)->next;
    }
    *link = s->next;
    pthread_mutex_unlock(&e->lock);
    engine_leave_place(e, s);
    kv_sequence_checkpoint(&s->kv);
    sequence_destroy(s);
    r->n_sequences--;
    engine_settle(e, r);
}

void engine_retire_finished(struct engine *e)
{
    uint64_t now = engine_now_ns();
    for (struct sequence *s = e->running, *next; s != NULL; s = next) {
        struct request *r = s->request;
        next = s->next;
        if (atomic_load(&r->cancelled) && r->finish == FINISH_NONE) {
            r->finish = FINISH_CANCELLED;
        } else if (is_late(r, now)) {
            end_late(r, "was computed");
        }
        bool is_needed = s->begins.logits != NULL;
        if ((s->finished && !is_needed) || r->finish != FINISH_NONE) {
            retire(e, s);
        }
    }
}
