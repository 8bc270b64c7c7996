/* daemon/sched/engine_watch.c - what can be seen of the engine from outside: counters, latencies,
 * users, open requests. */
#include "daemon/sched/engine_internal.h"

/* ---- the engine thread notes ------------------------------------------------------------- */

void engine_note_latency(struct engine *e, struct histogram *h, uint64_t from_ns, uint64_t to_ns)
{
    pthread_mutex_lock(&e->lock);
    histogram_add(h, to_ns > from_ns ? to_ns - from_ns : 0);
    pthread_mutex_unlock(&e->lock);
}

void engine_note_state(const struct sequence *s)
{
    struct request *r = s->request;
    atomic_store_explicit(&r->seen.state,
                          s->prompt_done_ns == 0 ? REQUEST_STATE_PREFILL : REQUEST_STATE_DECODE,
                          memory_order_relaxed);
    atomic_store_explicit(&r->seen.n_prompt, r->n_prompt, memory_order_relaxed);
    atomic_store_explicit(&r->seen.n_cached, r->n_cached, memory_order_relaxed);
    atomic_store_explicit(&r->seen.n_generated, r->n_generated, memory_order_relaxed);
}

void engine_note_step(struct engine *e, uint64_t step_ns)
{
    struct batch *b = &e->batch;
    double ms = (double)step_ns / 1e6;
    atomic_store(&e->step_rows, b->n_rows);
    pthread_mutex_lock(&e->lock);
    histogram_add(&e->latency.step, step_ns);
    for (uint32_t i = 0; i < b->n_seqs; i++) {
        struct sequence *s = b->members[i];
        struct request *r = s->request;
        bool prompt = s->prompt_done_ns == 0;
        if (r->noted_turn != e->turn) { /* once, however many of its sequences take part */
            r->noted_turn = e->turn;
            r->n_steps++;
            *(prompt ? &r->timings.prefill_ms : &r->timings.decode_ms) += ms;
        }
        *(prompt ? &r->user->tokens_prompt : &r->user->tokens_generated) += s->step_rows;
        fair_charge(&e->fair, r->user, s->step_rows);
    }
    pthread_mutex_unlock(&e->lock);
}

/* ---- the loop looks ---------------------------------------------------------------------- */

void engine_stats(struct engine *e, struct engine_stats *ret)
{
    *ret = (struct engine_stats){
        .n_requests = atomic_load(&e->n_requests),
        .n_steps = atomic_load(&e->n_steps),
        .n_prompt_tokens = atomic_load(&e->n_prompt_tokens),
        .n_generated_tokens = atomic_load(&e->n_generated_tokens),
        .step_ns_total = atomic_load(&e->step_ns_total),
        .n_preemptions = atomic_load(&e->n_preemptions),
        .step_rows = atomic_load(&e->step_rows),
        .kv_bytes_used = kv_arena_bytes_used(kv_cache_arena(e->cache)),
        .kv_bytes_max = kv_arena_bytes_max(kv_cache_arena(e->cache)),
        .kv_blocks_used = kv_arena_blocks_used(kv_cache_arena(e->cache)),
    };
    pthread_mutex_lock(&e->lock);
    ret->n_running = e->n_running;
    ret->n_waiting = e->n_waiting;
    ret->latency = e->latency;
    pthread_mutex_unlock(&e->lock);
    kv_cache_stats(e->cache, &ret->kv);
}

size_t engine_users(struct engine *e, struct fair_user *ret, size_t max)
{
    size_t n = 0;
    pthread_mutex_lock(&e->lock);
    for (const struct fair_user *u = e->fair.users; u != NULL; u = u->next, n++) {
        if (n < max) {
            ret[n] = *u;
        }
    }
    pthread_mutex_unlock(&e->lock);
    return n;
}

uint32_t engine_retry_ms(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    uint32_t ms = order_retry_ms(&e->pace, engine_now_ns());
    pthread_mutex_unlock(&e->lock);
    return ms;
}

int engine_set_weights(struct engine *e, const struct fair_weight *weights, size_t n)
{
    pthread_mutex_lock(&e->lock);
    int rc = fair_set_weights(&e->fair, weights, n);
    e->weights_changed = true;
    pthread_mutex_unlock(&e->lock);
    return rc;
}

/* A request of many sequences is told once. */
static size_t add_request(const struct request *r, const struct request **ret, size_t n, size_t max)
{
    size_t known = n < max ? n : max;
    for (size_t i = 0; i < known; i++) {
        if (ret[i] == r) {
            return n;
        }
    }
    if (n < max) {
        ret[n] = r;
    }
    return n + 1;
}

size_t engine_requests(struct engine *e, const struct request **ret, size_t max)
{
    size_t n = 0;
    pthread_mutex_lock(&e->lock);
    for (const struct sequence *s = e->running; s != NULL; s = s->next) {
        n = add_request(s->request, ret, n, max);
    }
    for (const struct request *r = e->queue; r != NULL; r = r->next) {
        n = add_request(r, ret, n, max);
    }
    pthread_mutex_unlock(&e->lock);
    return n;
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
