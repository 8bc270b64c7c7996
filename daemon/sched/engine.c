#include "daemon/sched/engine_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#define MIN_OUT_ROWS    128u
#define QUEUE_SHARE_MAX 4u /* requests of each user that wait though the queue is full */

uint32_t engine_max_out_rows(uint32_t n_parallel)
{
    return n_parallel > MIN_OUT_ROWS ? n_parallel : MIN_OUT_ROWS;
}

static void emit(void *arg, struct request_event *event)
{
    struct engine *e = arg;
    event->next = NULL;
    event->made_ns = event->made_ns != 0 ? event->made_ns : engine_now_ns();
    pthread_mutex_lock(&e->lock);
    bool is_rows = event->kind == REQUEST_ROWS; /* it may be gone as soon as the lock is */
    *e->events_end = event;
    e->events_end = &event->next;
    pthread_mutex_unlock(&e->lock);
    if (is_rows) { /* megabytes, as a rule: they are read while the next ones are made */
        e->options.notify(e->options.notify_arg);
    }
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

/* ---- the thread -------------------------------------------------------------------------- */

/* Until the cache, an import or a deadline has something to be done without news, or -1. Under the
 * lock. */
static int next_timeout_ms(const struct engine *e)
{
    int cache_ms = kv_cache_timeout_ms(e->cache);
    int import_ms = engine_transfer_timeout_ms(e);
    int deadline_ms = engine_deadline_timeout_ms(e);
    int ms = cache_ms < 0 || (import_ms >= 0 && import_ms < cache_ms) ? import_ms : cache_ms;
    return ms < 0 || (deadline_ms >= 0 && deadline_ms < ms) ? deadline_ms : ms;
}

/* Sleeps until somebody kicks, or the cache has something to try again. Under the lock. */
static void wait_for_kick(struct engine *e, bool busy)
{
    int timeout_ms = busy ? 0 : next_timeout_ms(e);
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000l;
    if (until.tv_nsec >= 1000000000l) {
        until.tv_nsec -= 1000000000l;
        until.tv_sec++;
    }
    int rc = 0;
    while (!busy && !e->kicked && !e->stop && rc != ETIMEDOUT) {
        rc = timeout_ms < 0 ? pthread_cond_wait(&e->wake, &e->lock)
                            : pthread_cond_timedwait(&e->wake, &e->lock, &until);
    }
}

/* Waits until there is something to do; false when the engine shall end and nothing runs. */
static bool wait_for_work(struct engine *e, bool busy)
{
    pthread_mutex_lock(&e->lock);
    bool published = e->events != NULL || e->n_retired > 0 || e->n_wanted > 0;
    pthread_mutex_unlock(&e->lock);
    if (published) {
        e->options.notify(e->options.notify_arg);
    }
    if (!busy && e->running == NULL) {
        kv_cache_trim(e->cache); /* without the lock: giving back gigabytes takes time */
    }
    pthread_mutex_lock(&e->lock);
    wait_for_kick(e, busy);
    e->kicked = false;
    if (e->weights_changed) {
        fair_apply_weights(&e->fair);
        e->weights_changed = false;
    }
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
        kv_cache_poll(e->cache);
        engine_run_kv_calls(e);
        engine_run_swaps(e);
        engine_drop_ended(e);
        busy = engine_begin_samples(e);
        engine_retire_finished(e);
        engine_admit(e);
        busy |= engine_step(e);
        engine_retire_finished(e);
    }
    return NULL;
}

static void wake_engine(void *arg)
{
    engine_kick(arg);
}

/* Timed waits go by the clock that nobody sets. */
static void init_wake(pthread_cond_t *wake)
{
    pthread_condattr_t attr;
    pthread_condattr_init(&attr);
    pthread_condattr_setclock(&attr, CLOCK_MONOTONIC);
    pthread_cond_init(wake, &attr);
    pthread_condattr_destroy(&attr);
}

/* ---- interface --------------------------------------------------------------------------- */

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
    e->kv_calls_end = &e->kv_calls;
    fair_init(&e->fair);
    pthread_mutex_init(&e->lock, NULL);
    init_wake(&e->wake);
    struct kv_cache_options kv = options->kv;
    kv.wake = wake_engine;
    kv.wake_arg = e;
    int rc = kv_cache_create(&kv, &e->cache);
    rc = rc < 0 ? rc : batch_init(&e->batch, options->n_batch, options->n_parallel);
    rc = rc < 0 ? rc : -pthread_create(&e->thread, NULL, engine_main, e);
    if (rc < 0) {
        batch_finish(&e->batch);
        rc = kv_cache_destroy(e->cache) ? rc : -ETIMEDOUT;
        pthread_mutex_destroy(&e->lock);
        pthread_cond_destroy(&e->wake);
        free(e);
        return rc;
    }
    *ret = e;
    return 0;
}

void engine_stop(struct engine *e)
{
    if (e == NULL || e->joined) {
        return;
    }
    pthread_mutex_lock(&e->lock);
    e->stop = true;
    pthread_cond_signal(&e->wake);
    pthread_mutex_unlock(&e->lock);
    pthread_join(e->thread, NULL);
    e->joined = true;
    engine_end_kv_calls(e);
    engine_end_swaps(e);
}

bool engine_destroy(struct engine *e)
{
    if (e == NULL) {
        return true;
    }
    engine_stop(e);
    engine_end_transfers(e);
    while (e->events != NULL) {
        struct request_event *event = e->events;
        e->events = event->next;
        free(event);
    }
    batch_finish(&e->batch);
    bool gone = kv_cache_destroy(e->cache);
    fair_finish(&e->fair);
    pthread_mutex_destroy(&e->lock);
    pthread_cond_destroy(&e->wake);
    free(e);
    return gone;
}

void engine_settle_cache(struct engine *e)
{
    kv_cache_settle(e->cache);
}

/* One user may fill the queue; who has hardly anything waiting is let in all the same, or the order
 * would be decided by who refills it fastest. So it may be longer by a few for each user. Under the
 * lock. */
static bool queue_has_room(const struct engine *e, uid_t uid)
{
    uint32_t share = e->options.n_queue / 4;
    share = share < 1 ? 1 : share < QUEUE_SHARE_MAX ? share : QUEUE_SHARE_MAX;
    if (e->n_waiting < e->options.n_queue) {
        return true;
    }
    const struct fair_user *u = fair_find(&e->fair, uid);
    return u == NULL || u->n_waiting < share;
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
    } else if (!queue_has_room(e, r->uid)) {
        rc = -EAGAIN;
    } else if ((rc = fair_come(&e->fair, r->uid, &r->user)) == 0) {
        r->user->n_waiting++;
        r->done_event = done;
        r->submitted_ns = r->turn_ns = engine_now_ns();
        r->needed_ms = -1;
        e->n_new_deadlines += r->deadline_ms > 0;
        r->next = NULL;
        r->is_queued = true;
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
