/* kv.stats, list, pin, drop, purge: what the cache keeps, for its owners.
 *
 * List, drop and purge run on the engine thread between two steps (engine_kv); the answer comes
 * back as a posted task. A pin is a generation of no tokens whose prompt's blocks are kept. */
#include "daemon/handlers_internal.h"

#include "daemon/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- kv.stats ---------------------------------------------------------------------------- */

void handle_kv_stats(struct call *call)
{
    struct engine_stats stats;
    engine_stats(call->service->engine, &stats);
    const struct kv_cache_stats *kv = &stats.kv;
    double fill = stats.kv_bytes_max ? (double)stats.kv_bytes_used / (double)stats.kv_bytes_max : 0;

    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 20);
    pack_kv_f64(b, "kv_cache_usage_perc", fill);
    pack_kv_u64(b, "memory_bytes_used", stats.kv_bytes_used);
    pack_kv_u64(b, "memory_bytes_max", stats.kv_bytes_max);
    pack_kv_u64(b, "memory_bytes_cached", kv->arena_bytes_cached);
    pack_kv_u64(b, "blocks_running", kv->blocks_held);
    pack_kv_u64(b, "spaces", kv->n_spaces);
    pack_kv_u64(b, "blocks", kv->n_nodes);
    pack_kv_u64(b, "prefix_cache_queries", kv->queries);
    pack_kv_u64(b, "prefix_cache_hits", kv->hits);
    pack_kv_u64(b, "store_bytes", kv->store_bytes);
    pack_kv_u64(b, "store_bytes_max", kv->store_bytes_max);
    pack_kv_u64(b, "store_bytes_synced", kv->store_bytes_synced);
    pack_kv_u64(b, "store_bytes_saved", kv->n_saved_bytes);
    pack_kv_u64(b, "store_bytes_written", kv->store_bytes_written);
    pack_kv_u64(b, "store_pending", kv->n_pending);
    pack_kv_str(b, "store_state", kv->store_state);
    pack_kv_u64(b, "evicted_memory", kv->n_evicted_arena);
    pack_kv_u64(b, "evicted_store", kv->n_evicted_store);
    pack_kv_u64(b, "blocks_corrupt", kv->n_corrupt);
    pack_kv_u64(b, "faults", kv->n_faults);
    call_end(call);
}

/* ---- calls to the engine ----------------------------------------------------------------- */

struct kv_job {
    struct engine_kv_call engine;
    struct call *call;
    void (*answer)(struct call *call, struct kv_job *job);
};

/* The loop: the engine has done it. */
static void job_done(struct task *t)
{
    struct call *call = call_of_task(t);
    struct kv_job *job = call->kv;
    call->wait = CALL_WAIT_NOTHING;
    call->kv = NULL;
    int rc = job->engine.result;
    if (call_is_stopped(call)) {
        call_fail_cancelled(call);
    } else if (rc == -ESHUTDOWN) {
        call_fail(call, PROTO_E_DRAINING, "the daemon is about to end");
    } else if (rc < 0) {
        call_fail(call, rc == -ENOMEM ? PROTO_E_NO_MEMORY : PROTO_E_IO, "the KV cache: %s",
                  strerror(-rc));
    } else {
        job->answer(call, job);
    }
    free(job->engine.spaces);
    free(job);
}

/* The engine thread. */
static void on_engine_done(void *arg)
{
    struct kv_job *job = arg;
    struct service *s = job->call->service;
    job->call->task = (struct task){.done = job_done};
    s->host.post(s->host.data, &job->call->task);
}

static void start_job(struct call *call, enum engine_kv_op op, bool all,
                      void (*answer)(struct call *call, struct kv_job *job))
{
    if (all && !call->caller->admin) {
        call_fail(call, PROTO_E_ACCESS_DENIED, "'all' is for administrators");
        return;
    }
    struct kv_job *job = calloc(1, sizeof(*job));
    if (!job) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory for a request to the cache");
        return;
    }
    *job = (struct kv_job){.engine = {.op = op, .all = all, .done = on_engine_done, .arg = job},
                           .call = call,
                           .answer = answer};
    call_realm(call, job->engine.realm);
    job->engine.model = call->model ? model_kv_identity(call->model) : NULL;
    call->kv = job;
    call->wait = CALL_WAIT_POST;
    int rc = engine_kv(call->service->engine, &job->engine);
    if (rc < 0) {
        job->engine.result = rc;
        call->task = (struct task){.done = job_done};
        job_done(&call->task);
    }
}

/* ---- kv.list ----------------------------------------------------------------------------- */

static void pack_space(struct ipc_buffer *b, const struct kv_space_facts *f)
{
    char id[2 * sizeof(f->id) + 1];
    for (size_t i = 0; i < sizeof(f->id); i++) {
        snprintf(id + 2 * i, 3, "%02x", f->id[i]);
    }
    ipc_pack_map(b, 11);
    pack_kv_str(b, "realm", f->realm);
    pack_kv_str(b, "about", f->about);
    pack_kv_str(b, "id", id);
    pack_kv_u64(b, "tokens", (uint64_t)f->n_blocks * GQA_KV_BLOCK_TOKENS);
    pack_kv_u64(b, "tokens_pinned", (uint64_t)f->n_pinned * GQA_KV_BLOCK_TOKENS);
    pack_kv_u64(b, "prefixes", f->n_prefixes);
    pack_kv_u64(b, "longest", f->n_tokens_max);
    pack_kv_u64(b, "memory_bytes", f->memory_bytes);
    pack_kv_u64(b, "store_bytes", f->store_bytes);
    pack_kv_u64(b, "hits", f->hits);
    pack_kv_str(b, "trouble", f->trouble);
}

static void answer_list(struct call *call, struct kv_job *job)
{
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 1);
    pack_kv_array(b, "spaces", job->engine.n_spaces);
    for (size_t i = 0; i < job->engine.n_spaces; i++) {
        pack_space(b, &job->engine.spaces[i]);
    }
    call_end(call);
}

void handle_kv_list(struct call *call)
{
    start_job(call, ENGINE_KV_LIST, call->params.kv_list.all, answer_list);
}

/* ---- kv.drop and kv.purge ---------------------------------------------------------------- */

static void answer_removed(struct call *call, struct kv_job *job)
{
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 2);
    pack_kv_u64(b, "tokens", job->engine.removed.n_blocks * GQA_KV_BLOCK_TOKENS);
    pack_kv_u64(b, "bytes", job->engine.removed.bytes);
    call_end(call);
}

static void drop_with_model(struct call *call)
{
    start_job(call, ENGINE_KV_DROP, call->params.kv_drop.all, answer_removed);
}

void handle_kv_drop(struct call *call)
{
    const struct proto_kv_drop *p = &call->params.kv_drop;
    if (p->has_model) {
        call_with_model(call, p->model, drop_with_model);
    } else {
        drop_with_model(call);
    }
}

static void answer_purged(struct call *call, struct kv_job *job)
{
    if (job->engine.removed.n_blocks > 0) {
        log_info("KV cache of %s purged for uid %u",
                 job->engine.all ? "all realms" : job->engine.realm, call->uid);
    }
    answer_removed(call, job);
}

void handle_kv_purge(struct call *call)
{
    start_job(call, ENGINE_KV_PURGE, call->params.kv_purge.all, answer_purged);
}
