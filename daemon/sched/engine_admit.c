/* daemon/sched/engine_admit.c - how requests begin and end. */
#include "daemon/sched/engine_internal.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

uint64_t engine_now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double ms_between(uint64_t from_ns, uint64_t to_ns)
{
    return from_ns == 0 || to_ns < from_ns ? 0 : (double)(to_ns - from_ns) / 1e6;
}

/* ---- the end of requests ----------------------------------------------------------------- */

void engine_request_fail(struct request *r, enum proto_error_code code, const char *message)
{
    if (r->finish == FINISH_NONE) {
        r->finish = FINISH_ERROR;
        r->error = code;
        snprintf(r->error_message, sizeof(r->error_message), "%s", message);
    }
}

/* Gives a request back to the loop when nothing of it waits or runs. */
static void request_settle(struct engine *e, struct request *r)
{
    if (r->is_queued || r->n_sequences > 0) {
        return;
    }
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
    e->n_running--;
    r->user->n_running--;
    pthread_mutex_unlock(&e->lock);
    e->bytes_committed -= s->bytes_committed;
    kv_sequence_checkpoint(&s->kv);
    sequence_destroy(s);
    r->n_sequences--;
    request_settle(e, r);
}

void engine_retire_finished(struct engine *e)
{
    for (struct sequence *s = e->running, *next; s != NULL; s = next) {
        next = s->next;
        if (atomic_load(&s->request->cancelled) && s->request->finish == FINISH_NONE) {
            s->request->finish = FINISH_CANCELLED;
        }
        if (s->finished || s->request->finish != FINISH_NONE) {
            retire(e, s);
        }
    }
}

/* ---- admission --------------------------------------------------------------------------- */

static int start_sequence(struct engine *e, struct request *r, struct kv_space *space,
                          uint64_t bytes)
{
    struct sequence *s;
    int rc = sequence_create(r, e->cache, space, &s);
    if (rc < 0) {
        return rc;
    }
    s->bytes_committed = bytes;
    s->last_turn = e->turn;
    s->started_ns = engine_now_ns();
    if (r->n_prompt == 0) {
        engine_note_latency(e, &e->latency.queue, r->submitted_ns, s->started_ns);
    }
    r->n_prompt += (uint32_t)s->n_prompt;
    r->next_input++;
    r->n_sequences++;
    e->bytes_committed += bytes;
    pthread_mutex_lock(&e->lock);
    struct sequence **end = &e->running;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    *end = s;
    e->n_running++;
    r->user->n_running++;
    pthread_mutex_unlock(&e->lock);
    engine_note_state(s);
    return 0;
}

/* Whose blocks the request shares, or NULL. False: what its store holds is not known yet. */
static bool find_space(struct engine *e, const struct request *r, struct kv_space **ret)
{
    *ret = r->realm[0] == '\0' ? NULL
                               : kv_cache_space(e->cache, r->realm, model_kv_identity(r->model),
                                                model_kv_layout(r->model));
    return *ret == NULL || kv_space_is_ready(*ret);
}

/* Takes the first request off the queue; at its end it comes back when more inputs are to be begun
 * than the next, so that a request of many does not hold up the others. Under the lock. */
static void take_first(struct engine *e, bool ended)
{
    struct request *r = e->queue;
    e->queue = r->next;
    e->queue_end = e->queue == NULL ? &e->queue : e->queue_end;
    r->is_queued = !ended && r->kind == REQUEST_EMBED && r->next_input + 1 < r->embed.n_inputs;
    if (r->is_queued) {
        r->next = NULL;
        *e->queue_end = r;
        e->queue_end = &r->next;
    } else {
        e->n_waiting--;
        r->user->n_waiting--;
    }
}

/* Takes the oldest request off the queue if it may start, or has ended while it waited. Sequences
 * are admitted with all the KV that they can come to need, so that none starves half-way. */
static struct request *take_admissible(struct engine *e, struct kv_space **ret_space,
                                       uint64_t *ret_bytes)
{
    pthread_mutex_lock(&e->lock);
    struct request *r = e->queue; /* only this thread takes requests off */
    pthread_mutex_unlock(&e->lock);
    bool ready = r != NULL && find_space(e, r, ret_space);
    pthread_mutex_lock(&e->lock);
    if (r != NULL) {
        uint64_t bytes = sequence_bytes_needed(r, e->options.n_batch);
        uint64_t bytes_max = e->options.kv.arena_bytes_max;
        bool ended =
            e->stop || atomic_load(&r->cancelled) || r->finish != FINISH_NONE || bytes > bytes_max;
        bool fits = ready && e->n_running < e->options.n_parallel && bytes <= bytes_max &&
                    e->bytes_committed <= bytes_max - bytes;
        if (ended || fits) {
            take_first(e, ended);
            *ret_bytes = bytes;
        } else {
            r = NULL;
        }
    }
    pthread_mutex_unlock(&e->lock);
    return r;
}

void engine_admit(struct engine *e)
{
    struct request *r;
    struct kv_space *space = NULL;
    uint64_t bytes = 0;
    while ((r = take_admissible(e, &space, &bytes)) != NULL) {
        if (r->finish != FINISH_NONE) {
            /* one of its inputs failed */
        } else if (atomic_load(&r->cancelled) || e->stop) {
            r->finish = FINISH_CANCELLED;
        } else if (bytes > e->options.kv.arena_bytes_max) {
            char message[160];
            snprintf(message, sizeof(message),
                     "the request can need %llu bytes of KV cache, the bound is %llu",
                     (unsigned long long)bytes, (unsigned long long)e->options.kv.arena_bytes_max);
            engine_request_fail(r, PROTO_E_NO_MEMORY, message);
        } else {
            int rc = start_sequence(e, r, space, bytes);
            if (rc == -EINVAL) {
                engine_request_fail(r, PROTO_E_INVALID_PARAMS,
                                    "sampling parameters do not fit together");
            } else if (rc == -E2BIG) {
                engine_request_fail(r, PROTO_E_INVALID_PARAMS, GRAMMAR_PLACES_MESSAGE);
            } else if (rc < 0) {
                engine_request_fail(r, PROTO_E_NO_MEMORY, "no memory for the sequence");
            }
        }
        if (r->finish != FINISH_NONE) {
            request_settle(e, r);
        }
    }
}

void engine_drop_cancelled(struct engine *e)
{
    struct request *dropped = NULL;
    pthread_mutex_lock(&e->lock);
    struct request **link = &e->queue;
    while (*link != NULL) {
        struct request *r = *link;
        if (atomic_load(&r->cancelled) || r->finish != FINISH_NONE) {
            *link = r->next;
            r->is_queued = false;
            r->next = dropped;
            dropped = r;
            e->n_waiting--;
            r->user->n_waiting--;
        } else {
            link = &r->next;
        }
    }
    e->queue_end = link;
    pthread_mutex_unlock(&e->lock);
    while (dropped != NULL) {
        struct request *r = dropped;
        dropped = r->next;
        r->finish = r->finish == FINISH_NONE ? FINISH_CANCELLED : r->finish;
        request_settle(e, r);
    }
}
