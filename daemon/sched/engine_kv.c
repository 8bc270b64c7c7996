/* daemon/sched/engine_kv.c - what people ask of the KV cache, done between two steps. */
#include "daemon/sched/engine_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define SPACES_MAX 1024
#define CALLS_NS   2000000u /* then sequences step: who asks without end holds nobody up */

int engine_kv(struct engine *e, struct engine_kv_call *call)
{
    int rc = 0;
    pthread_mutex_lock(&e->lock);
    if (e->stop) {
        rc = -ESHUTDOWN;
    } else {
        call->next = NULL;
        *e->kv_calls_end = call;
        e->kv_calls_end = &call->next;
        e->kicked = true;
        pthread_cond_signal(&e->wake);
    }
    pthread_mutex_unlock(&e->lock);
    return rc;
}

static struct engine_kv_call *take_call(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    struct engine_kv_call *call = e->kv_calls;
    if (call != NULL) {
        e->kv_calls = call->next;
        e->kv_calls_end = e->kv_calls == NULL ? &e->kv_calls : e->kv_calls_end;
    }
    pthread_mutex_unlock(&e->lock);
    return call;
}

static void list(struct engine *e, struct engine_kv_call *call, const char *realm)
{
    size_t n = kv_cache_list(e->cache, realm, NULL, 0);
    n = n < SPACES_MAX ? n : SPACES_MAX;
    call->spaces = calloc(n + 1, sizeof(*call->spaces));
    if (call->spaces == NULL) {
        call->result = -ENOMEM;
        return;
    }
    kv_cache_list(e->cache, realm, call->spaces, n);
    call->n_spaces = n;
}

static void purged(void *arg, int result, const struct kv_removed *removed)
{
    struct engine_kv_call *call = arg;
    call->result = result;
    call->removed = *removed;
    call->done(call->arg);
}

static bool concerns(const struct engine_kv_call *call, const struct request *r)
{
    return call->all || strcmp(call->realm, r->realm) == 0;
}

bool engine_is_barred(const struct engine *e, const struct request *r)
{
    return e->waiting_call != NULL && concerns(e->waiting_call, r);
}

/* Sequences of the realm give their blocks back, and compute them again afterwards: what they were
 * told to forget, they do not serve from. Others are none of its business. */
static void purge(struct engine *e, struct engine_kv_call *call, const char *realm)
{
    if (!engine_release_exports(e, realm)) {
        e->waiting_call = call; /* a piece is being copied: its end kicks the engine */
        return;
    }
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        if (concerns(call, s->request)) {
            kv_sequence_reset(&s->kv);
        }
    }
    const struct kv_purge how = {purged, call};
    int rc = kv_cache_purge(e->cache, realm, &how);
    if (rc < 0) {
        const struct kv_removed nothing = {0, 0};
        purged(call, rc, &nothing);
    }
}

/* Sequences may step before it is run again. */
static void defer(struct engine *e, struct engine_kv_call *call)
{
    struct engine_kv_call **end = &e->deferred;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    call->next = NULL;
    *end = call;
}

static void run_call(struct engine *e, struct engine_kv_call *call)
{
    const char *realm = call->all ? NULL : call->realm;
    bool removes = call->op == ENGINE_KV_DROP || call->op == ENGINE_KV_PURGE;
    if (removes && !kv_cache_is_quiet(e->cache, realm)) {
        e->waiting_call = call; /* for as long as a disk takes: nobody of the realm steps before */
        return;
    }
    switch (call->op) {
    case ENGINE_KV_LIST:
        list(e, call, realm);
        break;
    case ENGINE_KV_DROP:
        kv_cache_drop(e->cache, realm, call->model != NULL ? call->model->id : NULL,
                      &call->removed);
        break;
    case ENGINE_KV_PURGE:
        purge(e, call, realm);
        return;
    default:
        call->result = engine_transfer(e, call);
        if (call->result == -EAGAIN) {
            defer(e, call);
            return;
        }
    }
    call->done(call->arg);
}

static void run_deferred(struct engine *e)
{
    struct engine_kv_call *call = e->deferred, *next;
    e->deferred = NULL;
    for (; call != NULL; call = next) {
        next = call->next;
        run_call(e, call);
    }
}

void engine_run_kv_calls(struct engine *e)
{
    engine_drop_idle_imports(e);
    run_deferred(e);
    uint64_t end_ns = engine_now_ns() + CALLS_NS;
    struct engine_kv_call *call = e->waiting_call;
    e->waiting_call = NULL;
    while (call != NULL || (call = take_call(e)) != NULL) {
        run_call(e, call);
        if (e->waiting_call != NULL) {
            return; /* the others wait behind it */
        }
        if (engine_now_ns() >= end_ns) {
            engine_kick(e); /* there may be more */
            return;
        }
        call = NULL;
    }
}

static void shut_out(struct engine_kv_call *call)
{
    call->result = -ESHUTDOWN;
    call->done(call->arg);
}

void engine_end_kv_calls(struct engine *e)
{
    struct engine_kv_call *call = e->waiting_call;
    e->waiting_call = NULL;
    if (call != NULL) {
        shut_out(call);
    }
    while ((call = e->deferred) != NULL) {
        e->deferred = call->next;
        shut_out(call);
    }
    while ((call = take_call(e)) != NULL) {
        shut_out(call);
    }
}
