#include "daemon/sched/engine.h"

#include "daemon/sched/batch.h"
#include "daemon/sched/publish.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define MIN_OUT_ROWS 128u

/* The lock guards the queue of waiting requests, the list of running sequences (written by the
 * engine thread only, so that it reads it without), the events not yet taken, and the flags. */
struct engine {
    struct engine_options options;
    struct kv_arena *arena;
    struct batch batch;
    struct publisher publisher;
    pthread_t thread;

    pthread_mutex_t lock;
    pthread_cond_t wake;
    atomic_bool stop; /* written under the lock */
    bool draining, kicked;
    struct request *queue, **queue_end;
    uint32_t n_waiting, n_running;
    struct sequence *running; /* oldest first */
    struct request_event *events, **events_end;

    /* The engine thread's own. */
    uint64_t bytes_committed; /* of the arena's bound, by admitted sequences */
    uint64_t turn;            /* counts steps, for the order of models */

    /* Written by the engine thread, read by the loop. */
    _Atomic uint64_t n_requests, n_steps, n_prompt_tokens, n_generated_tokens, step_ns_total;
    _Atomic uint64_t step_started_ns;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double ms_between(uint64_t from_ns, uint64_t to_ns)
{
    return from_ns == 0 || to_ns < from_ns ? 0 : (double)(to_ns - from_ns) / 1e6;
}

uint32_t engine_max_out_rows(uint32_t n_parallel)
{
    return n_parallel > MIN_OUT_ROWS ? n_parallel : MIN_OUT_ROWS;
}

/* ---- events -----------------------------------------------------------------------------------
 */

static void emit(void *arg, struct request_event *event)
{
    struct engine *e = arg;
    event->next = NULL;
    pthread_mutex_lock(&e->lock);
    *e->events_end = event;
    e->events_end = &event->next;
    pthread_mutex_unlock(&e->lock);
}

struct request_event *engine_take_events(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    struct request_event *events = e->events;
    e->events = NULL;
    e->events_end = &e->events;
    pthread_mutex_unlock(&e->lock);
    return events;
}

/* ---- the end of requests -----------------------------------------------------------------------
 */

static void request_fail(struct request *r, enum proto_error_code code, const char *message)
{
    if (r->finish == FINISH_NONE) {
        r->finish = FINISH_ERROR;
        r->error = code;
        snprintf(r->error_message, sizeof(r->error_message), "%s", message);
    }
}

static void request_done(struct engine *e, struct request *r)
{
    struct request_event *done = r->done_event;
    r->done_event = NULL;
    publish_done(&e->publisher, r, done);
}

static void fill_timings(struct sequence *s)
{
    struct request *r = s->request;
    uint64_t computed_ns = s->prompt_done_ns != 0 ? s->prompt_done_ns : now_ns();
    r->timings = (struct request_timings){
        .queue_ms = ms_between(r->submitted_ns, s->started_ns),
        .prompt_ms = ms_between(s->started_ns, computed_ns),
        .first_token_ms = r->n_generated > 0 ? ms_between(r->submitted_ns, s->prompt_done_ns) : 0,
        .predict_ms = ms_between(s->prompt_done_ns, s->last_token_ns),
    };
}

/* Takes a sequence out, releases its KV, and gives its request back to the loop. */
static void retire(struct engine *e, struct sequence *s)
{
    struct request *r = s->request;
    if (publish_rest(&e->publisher, s) < 0) {
        r->finish = FINISH_NONE; /* its text is not whole: whatever ended it, this is an error */
        request_fail(r, PROTO_E_NO_MEMORY, "no memory for an event");
    }
    fill_timings(s);
    pthread_mutex_lock(&e->lock);
    struct sequence **link = &e->running;
    while (*link != s) {
        link = &(*link)->next;
    }
    *link = s->next;
    e->n_running--;
    pthread_mutex_unlock(&e->lock);
    e->bytes_committed -= s->bytes_committed;
    sequence_destroy(s);
    request_done(e, r);
}

static void retire_finished(struct engine *e)
{
    for (struct sequence *s = e->running, *next; s != NULL; s = next) {
        next = s->next;
        if (atomic_load(&s->request->cancelled) && s->request->finish == FINISH_NONE) {
            s->request->finish = FINISH_CANCELLED;
        }
        if (s->request->finish != FINISH_NONE) {
            retire(e, s);
        }
    }
}

/* ---- admission ---------------------------------------------------------------------------------
 */

static int start_sequence(struct engine *e, struct request *r, uint64_t bytes)
{
    struct sequence *s;
    int rc = sequence_create(r, e->arena, &s);
    if (rc < 0) {
        return rc;
    }
    s->bytes_committed = bytes;
    s->last_turn = e->turn;
    s->started_ns = now_ns();
    r->n_prompt = (uint32_t)r->n_tokens;
    e->bytes_committed += bytes;
    pthread_mutex_lock(&e->lock);
    struct sequence **end = &e->running;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    *end = s;
    e->n_running++;
    pthread_mutex_unlock(&e->lock);
    return 0;
}

/* Takes the oldest request off the queue if it may start, or has ended while it waited. Sequences
 * are admitted with all the KV that they can come to need, so that none starves half-way. */
static struct request *take_admissible(struct engine *e, uint64_t *ret_bytes)
{
    pthread_mutex_lock(&e->lock);
    struct request *r = e->queue;
    if (r != NULL) {
        uint64_t bytes = sequence_bytes_needed(r);
        uint64_t bytes_max = e->options.kv_bytes_max;
        bool ended = e->stop || atomic_load(&r->cancelled) || bytes > bytes_max;
        bool fits = e->n_running < e->options.n_parallel && bytes <= bytes_max &&
                    e->bytes_committed <= bytes_max - bytes;
        if (ended || fits) {
            e->queue = r->next;
            e->queue_end = e->queue == NULL ? &e->queue : e->queue_end;
            e->n_waiting--;
            *ret_bytes = bytes;
        } else {
            r = NULL;
        }
    }
    pthread_mutex_unlock(&e->lock);
    return r;
}

static void admit(struct engine *e)
{
    struct request *r;
    uint64_t bytes = 0;
    while ((r = take_admissible(e, &bytes)) != NULL) {
        if (atomic_load(&r->cancelled) || e->stop) {
            r->finish = FINISH_CANCELLED;
        } else if (bytes > e->options.kv_bytes_max) {
            char message[160];
            snprintf(message, sizeof(message),
                     "the request can need %llu bytes of KV cache, the bound is %llu",
                     (unsigned long long)bytes, (unsigned long long)e->options.kv_bytes_max);
            request_fail(r, PROTO_E_NO_MEMORY, message);
        } else {
            int rc = start_sequence(e, r, bytes);
            if (rc == -EINVAL) {
                request_fail(r, PROTO_E_INVALID_PARAMS, "sampling parameters do not fit together");
            } else if (rc < 0) {
                request_fail(r, PROTO_E_NO_MEMORY, "no memory for the sequence");
            }
        }
        if (r->finish != FINISH_NONE) {
            request_done(e, r);
        }
    }
}

/* Requests that were cancelled while others are before them in the queue. */
static void drop_cancelled(struct engine *e)
{
    struct request *dropped = NULL;
    pthread_mutex_lock(&e->lock);
    struct request **link = &e->queue;
    while (*link != NULL) {
        struct request *r = *link;
        if (atomic_load(&r->cancelled)) {
            *link = r->next;
            r->next = dropped;
            dropped = r;
            e->n_waiting--;
        } else {
            link = &r->next;
        }
    }
    e->queue_end = link;
    pthread_mutex_unlock(&e->lock);
    while (dropped != NULL) {
        struct request *r = dropped;
        dropped = r->next;
        r->finish = FINISH_CANCELLED;
        request_done(e, r);
    }
}

/* ---- steps -------------------------------------------------------------------------------------
 */

/* The sequence waits for blocks that others give back. Admission counts what every sequence can
 * come to need, but a slab that holds blocks of several can be reused for its own size only. */
static void on_no_memory(void *arg, struct sequence *s)
{
    s->starved = true;
}

/* The sequence whose model has waited longest, or NULL when none can run. Models take turns. */
static struct sequence *choose_sequence(struct engine *e)
{
    struct sequence *chosen = NULL;
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        bool can_run = !s->starved && !sequence_is_paused(s);
        if (can_run && (chosen == NULL || s->last_turn < chosen->last_turn)) {
            chosen = s;
        }
    }
    return chosen;
}

/* Forms the next batch. False when nothing can run; where that is for want of memory alone, the
 * youngest gives way, so that the others get on. */
static bool form(struct engine *e, bool *ret_failed_one)
{
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        s->starved = false;
    }
    for (struct sequence *s; (s = choose_sequence(e)) != NULL;) {
        if (batch_form(&e->batch, s->request->model, e->running, on_no_memory, e) > 0) {
            return true;
        }
        s->starved = true; /* as all of its model that could run */
    }
    struct sequence *youngest = NULL;
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        youngest = s->starved ? s : youngest;
    }
    if (youngest != NULL) {
        request_fail(youngest->request, PROTO_E_NO_MEMORY, "no memory for a block of the KV cache");
    }
    *ret_failed_one = youngest != NULL;
    return false;
}

/* The model's next turn comes after every other's. */
static void count_turn(struct engine *e, const struct model *model)
{
    e->turn++;
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        s->last_turn = s->request->model == model ? e->turn : s->last_turn;
    }
}

/* What one member makes of its part of the step's logits. */
static void publish_member(struct engine *e, struct sequence *s, const float *logits, uint64_t now)
{
    struct request *r = s->request;
    uint32_t n_vocab = model_shape(r->model)->n_vocab;
    bool prompt_ended = s->prompt_done_ns == 0 && s->kv.n_tokens >= r->n_tokens;
    const float *rows = logits + (size_t)s->step_first_out * n_vocab;
    int rc = 0;
    if (prompt_ended) {
        s->prompt_done_ns = now;
    }
    if (r->kind == REQUEST_LOGITS) {
        rc = s->step_outs > 0 ? publish_rows(&e->publisher, s, rows) : 0;
        if (rc == 0 && prompt_ended) {
            r->finish = FINISH_LENGTH;
        }
    } else if (s->step_outs > 0 && r->n_predict == 0) {
        r->finish = FINISH_LENGTH;
    } else if (s->step_outs > 0) {
        rc = publish_token(&e->publisher, s, rows, now);
        atomic_fetch_add(&e->n_generated_tokens, rc == 0);
    }
    if (rc == -EDOM) {
        request_fail(r, PROTO_E_BACKEND, "the backend computed logits that are not numbers");
    } else if (rc < 0) {
        request_fail(r, PROTO_E_NO_MEMORY, "no memory for an event");
    }
}

/* One step of one model. False when there is nothing to do. */
static bool step(struct engine *e)
{
    bool failed_one = false;
    if (!form(e, &failed_one)) {
        return failed_one; /* it is retired, and its blocks may do for another */
    }
    struct batch *b = &e->batch;
    count_turn(e, b->model);
    uint64_t start = now_ns();
    atomic_store(&e->step_started_ns, start);
    const float *logits = NULL;
    int rc = batch_run(b, &logits);
    uint64_t end = now_ns();
    atomic_store(&e->step_started_ns, 0);
    atomic_fetch_add(&e->n_steps, 1);
    atomic_fetch_add(&e->step_ns_total, end - start);
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        struct sequence *s = b->members[i];
        if (rc < 0) {
            char message[96];
            snprintf(message, sizeof(message), "the backend failed: %s", strerror(-rc));
            request_fail(s->request, PROTO_E_BACKEND, message);
            continue;
        }
        if (s->prompt_done_ns == 0) {
            atomic_fetch_add(&e->n_prompt_tokens, s->step_rows);
        }
        publish_member(e, s, logits, end);
    }
    return true;
}

/* Waits until there is something to do; false when the engine shall end and nothing runs. */
static bool wait_for_work(struct engine *e, bool busy)
{
    pthread_mutex_lock(&e->lock);
    bool published = e->events != NULL;
    pthread_mutex_unlock(&e->lock);
    if (published) {
        e->options.notify(e->options.notify_arg);
    }
    if (!busy && e->running == NULL) {
        kv_arena_trim(e->arena); /* without the lock: giving back gigabytes takes time */
    }
    pthread_mutex_lock(&e->lock);
    while (!busy && !e->kicked && !e->stop) {
        pthread_cond_wait(&e->wake, &e->lock);
    }
    e->kicked = false;
    bool ended = e->stop && e->running == NULL && e->queue == NULL;
    for (struct sequence *s = e->running; e->stop && s != NULL; s = s->next) {
        atomic_store(&s->request->cancelled, true);
    }
    pthread_mutex_unlock(&e->lock);
    return !ended;
}

static void *engine_main(void *arg)
{
    struct engine *e = arg;
    bool busy = false;
    while (wait_for_work(e, busy)) {
        drop_cancelled(e);
        retire_finished(e);
        admit(e);
        busy = step(e);
        retire_finished(e);
    }
    return NULL;
}

/* ---- interface ---------------------------------------------------------------------------------
 */

int engine_create(const struct engine_options *options, struct engine **ret)
{
    struct engine *e = calloc(1, sizeof(*e));
    if (e == NULL) {
        return -ENOMEM;
    }
    e->options = *options;
    /* Every sequence that generates has a row in every step of its model. */
    if (e->options.n_parallel > options->n_batch) {
        e->options.n_parallel = options->n_batch;
    }
    e->publisher = (struct publisher){emit, e};
    e->queue_end = &e->queue;
    e->events_end = &e->events;
    pthread_mutex_init(&e->lock, NULL);
    pthread_cond_init(&e->wake, NULL);
    int rc = kv_arena_create(options->kv_bytes_max, &e->arena);
    rc = rc < 0 ? rc
                : batch_init(&e->batch, options->n_batch, engine_max_out_rows(options->n_parallel),
                             options->n_parallel);
    rc = rc < 0 ? rc : -pthread_create(&e->thread, NULL, engine_main, e);
    if (rc < 0) {
        batch_finish(&e->batch);
        kv_arena_destroy(e->arena);
        pthread_mutex_destroy(&e->lock);
        pthread_cond_destroy(&e->wake);
        free(e);
        return rc;
    }
    *ret = e;
    return 0;
}

void engine_destroy(struct engine *e)
{
    if (e == NULL) {
        return;
    }
    pthread_mutex_lock(&e->lock);
    e->stop = true;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
    pthread_join(e->thread, NULL);
    while (e->events != NULL) {
        struct request_event *event = e->events;
        e->events = event->next;
        free(event);
    }
    batch_finish(&e->batch);
    kv_arena_destroy(e->arena);
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->wake);
    free(e);
}

int engine_submit(struct engine *e, struct request *r)
{
    struct request_event *done = calloc(1, sizeof(*done));
    if (done == NULL) {
        return -ENOMEM;
    }
    int rc = 0;
    pthread_mutex_lock(&e->lock);
    if (e->draining || e->stop) {
        rc = -ESHUTDOWN;
    } else if (e->n_waiting >= e->options.n_queue) {
        rc = -EAGAIN;
    } else {
        r->done_event = done;
        r->submitted_ns = now_ns();
        r->next = NULL;
        *e->queue_end = r;
        e->queue_end = &r->next;
        e->n_waiting++;
        e->kicked = true;
        pthread_cond_signal(&e->wake);
    }
    pthread_mutex_unlock(&e->lock);
    if (rc < 0) {
        free(done);
        return rc;
    }
    atomic_fetch_add(&e->n_requests, 1);
    return 0;
}

void engine_kick(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    e->kicked = true;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
}

void engine_cancel(struct engine *e, struct request *r)
{
    atomic_store(&r->cancelled, true);
    engine_kick(e);
}

void engine_drain(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    e->draining = true;
    pthread_mutex_unlock(&e->lock);
}

uint64_t engine_step_started_ns(struct engine *e)
{
    return atomic_load(&e->step_started_ns);
}

void engine_stats(struct engine *e, struct engine_stats *ret)
{
    pthread_mutex_lock(&e->lock);
    uint32_t n_running = e->n_running;
    uint32_t n_waiting = e->n_waiting;
    pthread_mutex_unlock(&e->lock);
    *ret = (struct engine_stats){
        .n_running = n_running,
        .n_waiting = n_waiting,
        .n_requests = atomic_load(&e->n_requests),
        .n_steps = atomic_load(&e->n_steps),
        .n_prompt_tokens = atomic_load(&e->n_prompt_tokens),
        .n_generated_tokens = atomic_load(&e->n_generated_tokens),
        .step_ns_total = atomic_load(&e->step_ns_total),
        .kv_bytes_used = kv_arena_bytes_used(e->arena),
        .kv_bytes_max = kv_arena_bytes_max(e->arena),
        .kv_blocks_used = kv_arena_blocks_used(e->arena),
    };
}

uint32_t engine_model_users(struct engine *e, const struct model *m)
{
    uint32_t users = 0;
    pthread_mutex_lock(&e->lock);
    for (const struct request *r = e->queue; r != NULL; r = r->next) {
        users += r->model == m;
    }
    for (const struct sequence *s = e->running; s != NULL; s = s->next) {
        users += s->request->model == m;
    }
    pthread_mutex_unlock(&e->lock);
    return users;
}
