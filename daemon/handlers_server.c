/* gqa.hello, gqa.ping, gqa.api_info, server.stats, server.drain, server.reload. */
#include "daemon/handlers_internal.h"

#include "daemon/log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const features[] = {"stream", "cancel", "tensor", "autoload"};

/* ---- gqa.* ------------------------------------------------------------------------------- */

static void pack_limits(struct ipc_buffer *b, const struct service *s)
{
    pack_kv_map(b, "limits", 6 + QUOTA_COUNT);
    pack_kv_u64(b, "frame_bytes", PROTO_FRAME_BYTES_MAX);
    pack_kv_u64(b, "depth", PROTO_DEPTH_MAX);
    pack_kv_u64(b, "elements", PROTO_ELEMENTS_MAX);
    pack_kv_u64(b, "tokens", PROTO_TOKENS_MAX);
    pack_kv_u64(b, "text_bytes", PROTO_TEXT_BYTES_MAX);
    pack_kv_u64(b, "calls_per_connection", s->limits.calls_per_connection);
    for (unsigned k = 0; k < QUOTA_COUNT; k++) {
        char key[48];
        snprintf(key, sizeof(key), "%s_per_user", quota_name(k));
        pack_kv_u64(b, key, s->quotas->limits.of[k]);
    }
}

void handle_hello(struct call *call)
{
    const struct proto_hello *p = &call->params.hello;
    uint32_t low = p->version_min;
    uint32_t high = p->has_version_max ? p->version_max : GQA_PROTOCOL_VERSION;
    if (low > GQA_PROTOCOL_VERSION || high < GQA_PROTOCOL_VERSION_MIN || low > high) {
        call_fail(call, PROTO_E_VERSION, "the client speaks versions %u to %u, the daemon %u to %u",
                  low, high, GQA_PROTOCOL_VERSION_MIN, GQA_PROTOCOL_VERSION);
        return;
    }
    char realm[16];
    snprintf(realm, sizeof(realm), "%u", call->uid);
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 8);
    pack_kv_str(b, "server", "gqad");
    pack_kv_str(b, "version", GQAD_VERSION);
    pack_kv_u64(b, "protocol", high < GQA_PROTOCOL_VERSION ? high : GQA_PROTOCOL_VERSION);
    pack_kv_array(b, "features", sizeof(features) / sizeof(features[0]));
    for (size_t i = 0; i < sizeof(features) / sizeof(features[0]); i++) {
        ipc_pack_str(b, features[i]);
    }
    pack_limits(b, call->service);
    pack_kv_u64(b, "uid", call->uid);
    pack_kv_str(b, "realm", realm);
    pack_kv_bool(b, "admin", call->caller->admin);
    call_end(call);
}

void handle_ping(struct call *call)
{
    call_end_empty(call);
}

void handle_api_info(struct call *call)
{
    ipc_pack_api_info(call_begin_result(call));
    call_end(call);
}

/* ---- server.* ---------------------------------------------------------------------------- */

static void pack_models(struct ipc_buffer *b, struct service *s)
{
    struct registry_entry *entries = NULL;
    size_t count = 0;
    size_t n_loaded = 0;
    if (registry_list(s->registry, &entries, &count) < 0) {
        count = 0;
    }
    for (size_t i = 0; i < count; i++) {
        n_loaded += entries[i].model != NULL;
    }
    pack_kv_array(b, "models", n_loaded);
    for (size_t i = 0; i < count; i++) {
        if (entries[i].model) {
            ipc_pack_map(b, 2);
            pack_kv_str(b, "name", entries[i].name);
            pack_kv_u64(b, "n_running", engine_model_users(s->engine, entries[i].model));
            model_unref(entries[i].model);
        }
    }
    free(entries);
}

/* What each user holds, against its quotas; users see their own. */
static void pack_users(struct ipc_buffer *b, const struct call *call)
{
    const struct quota_user *u;
    size_t count = 0;
    LIST_FOREACH(u, &call->service->quotas->users, entry)
    {
        count += call->caller->admin || u->uid == call->uid;
    }
    pack_kv_array(b, "users", count);
    LIST_FOREACH(u, &call->service->quotas->users, entry)
    {
        if (call->caller->admin || u->uid == call->uid) {
            ipc_pack_map(b, 2 + QUOTA_COUNT);
            pack_kv_u64(b, "uid", u->uid);
            for (unsigned k = 0; k < QUOTA_COUNT; k++) {
                pack_kv_u64(b, quota_name(k), u->used.of[k]);
            }
            pack_kv_u64(b, "refused", u->n_refused);
        }
    }
}

static void pack_loop(struct ipc_buffer *b, const struct service_host_facts *facts)
{
    pack_kv_map(b, "loop", 3);
    pack_kv_u64(b, "turns_total", facts->n_turns);
    pack_kv_f64(b, "turn_ms_mean",
                facts->n_turns ? (double)facts->turn_ns_busy / 1e6 / (double)facts->n_turns : 0);
    pack_kv_f64(b, "turn_ms_max", (double)facts->turn_ns_max / 1e6);
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
    ipc_pack_map(b, 15);
    pack_kv_f64(b, "uptime_s", (double)(clock_now_ns() - s->started_ns) / 1e9);
    pack_kv_str(b, "version", GQAD_VERSION);
    pack_kv_u64(b, "num_requests_running", stats.n_running);
    pack_kv_u64(b, "num_requests_waiting", stats.n_waiting);
    pack_kv_u64(b, "requests_total", stats.n_requests);
    pack_kv_u64(b, "tokens_prompt_total", stats.n_prompt_tokens);
    pack_kv_u64(b, "tokens_generated_total", stats.n_generated_tokens);
    pack_kv_u64(b, "steps_total", stats.n_steps);
    pack_kv_f64(b, "step_ms_mean", step_ms);
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

/* The answer comes when all is done: then the caller knows that the daemon is about to be gone. */
void handle_server_drain(struct call *call)
{
    struct service *s = call->service;
    uint32_t timeout_ms = call->params.server_drain.timeout_ms;
    call->wait = CALL_WAIT_DRAIN;
    LIST_INSERT_HEAD(&s->drains, call, of_drain);
    s->n_open--;
    log_info("drain: asked for by uid %u", call->uid);
    s->host.drain(s->host.data, timeout_ms);
}

void handle_server_reload(struct call *call)
{
    struct service *s = call->service;
    struct ipc_error e;
    if (s->host.reload(s->host.data, &e) < 0) {
        call_fail_error(call, &e);
        return;
    }
    call_end_empty(call);
}
