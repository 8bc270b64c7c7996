/* server.stats and server.requests: what the daemon does, and for whom. */
#include "daemon/handlers_internal.h"

#include <stdio.h>
#include <stdlib.h>

#define REQUESTS_MAX 1024u /* told in one answer; some 200 bytes each */

/* ---- open requests ----------------------------------------------------------------------- */

static size_t list_requests(struct service *s, const struct request **ret)
{
    size_t n = engine_requests(s->engine, ret, REQUESTS_MAX);
    return n < REQUESTS_MAX ? n : REQUESTS_MAX;
}

static enum request_state state_of(const struct request *r)
{
    enum request_state state = atomic_load_explicit(&r->seen.state, memory_order_relaxed);
    bool paused = state != REQUEST_STATE_WAITING && request_is_paused(r);
    return paused ? REQUEST_STATE_PAUSED : state;
}

static uint64_t n_prompt_of(const struct request *r)
{
    uint64_t n = r->n_tokens;
    for (size_t i = 0; i < r->embed.n_inputs; i++) {
        n += r->embed.inputs[i].n_tokens;
    }
    return n;
}

static void pack_request(struct ipc_buffer *b, const struct request *r, uint64_t now_ns)
{
    static const char *const kinds[] = {"generate", "logits", "embed"};
    ipc_pack_map(b, 9);
    pack_kv_u64(b, "uid", r->uid);
    pack_kv_str(b, "model", model_name(r->model));
    pack_kv_str(b, "kind", kinds[r->kind]);
    pack_kv_str(b, "state", request_state_name(state_of(r)));
    pack_kv_i64(b, "priority", r->priority);
    pack_kv_u64(b, "n_prompt", n_prompt_of(r));
    pack_kv_u64(b, "n_cached", atomic_load_explicit(&r->seen.n_cached, memory_order_relaxed));
    pack_kv_u64(b, "n_generated", atomic_load_explicit(&r->seen.n_generated, memory_order_relaxed));
    pack_kv_f64(b, "age_ms", (double)(now_ns - r->submitted_ns) / 1e6);
}

void handle_server_requests(struct call *call)
{
    bool all = call->params.server_requests.all;
    const struct request *requests[REQUESTS_MAX];
    size_t n_told = 0;
    if (all && !call->caller->admin) {
        call_fail(call, PROTO_E_ACCESS_DENIED, "'all' is for administrators");
        return;
    }
    size_t n = list_requests(call->service, requests);
    for (size_t i = 0; i < n; i++) {
        n_told += all || requests[i]->uid == call->uid;
    }
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 1);
    pack_kv_array(b, "requests", n_told);
    for (size_t i = 0; i < n; i++) {
        if (all || requests[i]->uid == call->uid) {
            pack_request(b, requests[i], clock_now_ns());
        }
    }
    call_end(call);
}

/* ---- parts of server.stats --------------------------------------------------------------- */

static void pack_model(struct ipc_buffer *b, const struct registry_entry *entry,
                       const struct request *const *requests, size_t n_requests)
{
    uint64_t n_waiting = 0, n_running = 0;
    for (size_t i = 0; i < n_requests; i++) {
        if (requests[i]->model == entry->model) {
            enum request_state state = state_of(requests[i]);
            n_waiting += state == REQUEST_STATE_WAITING;
            n_running += state != REQUEST_STATE_WAITING;
        }
    }
    ipc_pack_map(b, 3);
    pack_kv_str(b, "name", entry->name);
    pack_kv_u64(b, "n_running", n_running);
    pack_kv_u64(b, "n_waiting", n_waiting);
}

static void pack_models(struct ipc_buffer *b, struct service *s)
{
    const struct request *requests[REQUESTS_MAX];
    size_t n_requests = list_requests(s, requests);
    struct registry_entry *entries = NULL;
    size_t count = 0;
    if (registry_loaded(s->registry, &entries, &count) < 0) {
        count = 0;
    }
    pack_kv_array(b, "models", count);
    for (size_t i = 0; i < count; i++) {
        pack_model(b, &entries[i], requests, n_requests);
        model_unref(entries[i].model);
    }
    free(entries);
}

/* ---- users ------------------------------------------------------------------------------- */

/* Who is told of: counted first, then packed. */
struct users {
    const struct call *call;
    struct fair_user had[FAIR_USERS_MAX]; /* (n) of the engine */
    size_t n, count;
    struct ipc_buffer *b; /* NULL: they are counted */
};

/* What a user has had of the engine, what it holds against its quotas, how it behaves. */
static void pack_user(struct ipc_buffer *b, const struct service *s, uid_t uid,
                      const struct fair_user *had)
{
    const struct quota_user *holds = quota_user(s->quotas, uid);
    const struct penalty *penalty = penalty_find(s->penalties, uid);
    ipc_pack_map(b, 9 + QUOTA_COUNT);
    pack_kv_u64(b, "uid", uid);
    pack_kv_u64(b, "weight", had->weight);
    pack_kv_u64(b, "n_running", had->n_running);
    pack_kv_u64(b, "n_waiting", had->n_waiting);
    pack_kv_u64(b, "tokens_prompt_total", had->tokens_prompt);
    pack_kv_u64(b, "tokens_generated_total", had->tokens_generated);
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        pack_kv_u64(b, quota_name(k), holds ? holds->used.of[k] : 0);
    }
    pack_kv_u64(b, "refused", holds ? holds->n_refused : 0);
    pack_kv_u64(b, "strikes", penalty ? (uint64_t)penalty->strikes : 0);
    pack_kv_bool(b, "slowed", penalty && penalty->slowed);
}

static bool has_used_engine(const struct users *u, uid_t uid)
{
    for (size_t i = 0; i < u->n; i++) {
        if (u->had[i].uid == uid) {
            return true;
        }
    }
    return false;
}

/* Users see themselves. */
static void tell_user(struct users *u, uid_t uid, const struct fair_user *had)
{
    if (!u->call->caller->admin && uid != u->call->uid) {
        return;
    }
    u->count++;
    if (u->b) {
        pack_user(u->b, u->call->service, uid, had);
    }
}

/* Those who have used the engine, then those who only hold something, then those who are only
 * remembered for what they did. */
static void tell_users(struct users *u)
{
    static const struct fair_user nothing = {.weight = 1};
    const struct service *s = u->call->service;
    const struct quota_user *q;
    const struct penalty *p;
    for (size_t i = 0; i < u->n; i++) {
        tell_user(u, u->had[i].uid, &u->had[i]);
    }
    LIST_FOREACH(q, &s->quotas->users, entry)
    {
        if (!has_used_engine(u, q->uid)) {
            tell_user(u, q->uid, &nothing);
        }
    }
    LIST_FOREACH(p, &s->penalties->users, entry)
    {
        if (!has_used_engine(u, p->uid) && !quota_user(s->quotas, p->uid)) {
            tell_user(u, p->uid, &nothing);
        }
    }
}

static void pack_users(struct ipc_buffer *b, const struct call *call)
{
    struct users u = {.call = call};
    size_t n = engine_users(call->service->engine, u.had, FAIR_USERS_MAX);
    u.n = n < FAIR_USERS_MAX ? n : FAIR_USERS_MAX;
    tell_users(&u);
    pack_kv_array(b, "users", u.count);
    u.b = b;
    tell_users(&u);
}

/* ---- server.stats ------------------------------------------------------------------------ */

static void pack_quantiles(struct ipc_buffer *b, const char *key, const struct histogram *h)
{
    pack_kv_map(b, key, 3);
    pack_kv_u64(b, "count", h->count);
    pack_kv_f64(b, "p50", histogram_quantile(h, 0.5) / 1e9);
    pack_kv_f64(b, "p99", histogram_quantile(h, 0.99) / 1e9);
}

static void pack_latency(struct ipc_buffer *b, const struct engine_stats *stats)
{
    const struct engine_latency *l = &stats->latency;
    pack_kv_map(b, "latency", 4);
    pack_quantiles(b, "time_to_first_token_seconds", &l->first_token);
    pack_quantiles(b, "inter_token_latency_seconds", &l->inter_token);
    pack_quantiles(b, "request_queue_time_seconds", &l->queue);
    pack_quantiles(b, "e2e_request_latency_seconds", &l->whole);
    pack_kv_map(b, "step", 3);
    pack_kv_f64(b, "p50_ms", histogram_quantile(&l->step, 0.5) / 1e6);
    pack_kv_f64(b, "p99_ms", histogram_quantile(&l->step, 0.99) / 1e6);
    pack_kv_u64(b, "rows", stats->step_rows);
}

static void pack_loop(struct ipc_buffer *b, const struct service_host_facts *facts)
{
    pack_kv_map(b, "loop", 4);
    pack_kv_u64(b, "turns_total", facts->n_turns);
    pack_kv_f64(b, "turn_ms_mean",
                facts->n_turns ? (double)facts->turn_ns_busy / 1e6 / (double)facts->n_turns : 0);
    pack_kv_f64(b, "turn_ms_max", (double)facts->turn_ns_max / 1e6);
    pack_kv_f64(b, "turn_cpu_ms_max", (double)facts->turn_cpu_ns_max / 1e6);
}

void handle_server_stats(struct call *call)
{
    struct service *s = call->service;
    struct engine_stats stats;
    struct service_host_facts facts = {0};
    s->host.facts(s->host.data, &facts);
    engine_stats(s->engine, &stats);
    double step_ms =
        stats.n_steps ? (double)stats.step_ns_total / 1e6 / (double)stats.n_steps : 0.0;

    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 18);
    pack_kv_f64(b, "uptime_s", (double)(clock_now_ns() - s->started_ns) / 1e9);
    pack_kv_str(b, "version", GQAD_VERSION);
    pack_kv_u64(b, "num_requests_running", stats.n_running);
    pack_kv_u64(b, "num_requests_waiting", stats.n_waiting);
    pack_kv_u64(b, "requests_total", stats.n_requests);
    pack_kv_u64(b, "tokens_prompt_total", stats.n_prompt_tokens);
    pack_kv_u64(b, "tokens_generated_total", stats.n_generated_tokens);
    pack_kv_u64(b, "steps_total", stats.n_steps);
    pack_kv_f64(b, "step_ms_mean", step_ms);
    pack_kv_u64(b, "preemptions_total", stats.n_preemptions);
    pack_latency(b, &stats);
    pack_kv_map(b, "kv", 8);
    pack_kv_u64(b, "bytes_used", stats.kv_bytes_used);
    pack_kv_u64(b, "bytes_max", stats.kv_bytes_max);
    pack_kv_u64(b, "bytes_cached", stats.kv.arena_bytes_cached);
    pack_kv_u64(b, "blocks_used", stats.kv.blocks_held);
    pack_kv_u64(b, "store_bytes", stats.kv.store_bytes);
    pack_kv_str(b, "store_state", stats.kv.store_state);
    pack_kv_u64(b, "prefix_cache_queries", stats.kv.queries);
    pack_kv_u64(b, "prefix_cache_hits", stats.kv.hits);
    pack_kv_u64(b, "connections", facts.n_connections);
    pack_loop(b, &facts);
    pack_users(b, call);
    pack_kv_bool(b, "draining", s->draining);
    pack_models(b, s);
    call_end(call);
}
