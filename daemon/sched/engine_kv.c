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

/* Those that waited behind another come before those that nobody has looked at. */
static void give_back(struct engine *e, struct engine_kv_call *first, struct engine_kv_call **end)
{
    if (first == NULL) {
        return;
    }
    pthread_mutex_lock(&e->lock);
    *end = e->kv_calls;
    e->kv_calls_end = e->kv_calls == NULL ? end : e->kv_calls_end;
    e->kv_calls = first;
    pthread_mutex_unlock(&e->lock);
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

/* ---- who waits --------------------------------------------------------------------------- */

static bool concerns(const struct engine_kv_call *call, const char *realm)
{
    return call->all || strcmp(call->realm, realm) == 0;
}

static bool removes(const struct engine_kv_call *call)
{
    return call->op == ENGINE_KV_DROP || call->op == ENGINE_KV_PURGE;
}

bool engine_is_barred(const struct engine *e, const struct request *r)
{
    const struct engine_kv_call *w = e->waiting;
    while (w != NULL && !concerns(w, r->realm)) {
        w = w->next;
    }
    return w != NULL;
}

/* Behind which waiting removal the call comes, or NULL. Ends of transfers wait for nobody: what
 * they let go of may be what is waited for. Nor does a removal of all wait for those of realms,
 * which could go on without end: it bars them. */
static struct engine_kv_call *find_before(const struct engine *e, const struct engine_kv_call *call)
{
    bool ends = call->op == ENGINE_KV_EXPORT_END || call->op == ENGINE_KV_IMPORT_DROP;
    bool any = call->all && !removes(call);
    struct engine_kv_call *w = ends ? NULL : e->waiting;
    while (w != NULL && !(any || w->all || (!call->all && concerns(w, call->realm)))) {
        w = w->next;
    }
    return w;
}

static void append(struct engine_kv_call **end, struct engine_kv_call *call)
{
    while (*end != NULL) {
        end = &(*end)->next;
    }
    call->next = NULL;
    *end = call;
}

static void wait_behind(struct engine_kv_call *w, struct engine_kv_call *call)
{
    call->next = NULL;
    *w->behind_end = call;
    w->behind_end = &call->next;
}

/* Whether a removal finds all that there is, and nobody who reads it. A piece that is being copied
 * is not waited for here: its end kicks the engine. */
static bool is_ready(struct engine *e, const struct engine_kv_call *call)
{
    const char *realm = call->all ? NULL : call->realm;
    return kv_cache_is_quiet(e->cache, realm) &&
           (call->op != ENGINE_KV_PURGE ||
            (engine_release_exports(e, realm) && engine_drop_imports(e, realm)));
}

/* ---- what they do ------------------------------------------------------------------------ */

/* Sequences of the realm give their blocks back, and compute them again afterwards: what they were
 * told to forget, they do not serve from. Others are none of its business. */
static void purge(struct engine *e, struct engine_kv_call *call, const char *realm)
{
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        if (concerns(call, s->request->realm)) {
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

static void do_call(struct engine *e, struct engine_kv_call *call)
{
    const char *realm = call->all ? NULL : call->realm;
    switch (call->op) {
    case ENGINE_KV_LIST:
        list(e, call, realm);
        break;
    case ENGINE_KV_DROP:
        call->result = kv_cache_drop(e->cache, realm, call->model != NULL ? call->model->id : NULL,
                                     &call->removed);
        break;
    case ENGINE_KV_PURGE:
        purge(e, call, realm);
        return;
    default:
        call->result = engine_transfer(e, call);
        if (call->result == -EAGAIN) {
            append(&e->deferred, call); /* sequences may step before it is run again */
            return;
        }
    }
    call->done(call->arg);
}

/* Or has it wait, for as long as a disk takes: nobody of the realm steps before. */
static void run_call(struct engine *e, struct engine_kv_call *call)
{
    struct engine_kv_call *before = find_before(e, call);
    if (before != NULL) {
        wait_behind(before, call);
    } else if (removes(call) && !is_ready(e, call)) {
        call->behind = NULL;
        call->behind_end = &call->behind;
        append(&e->waiting, call);
    } else {
        do_call(e, call);
    }
}

static void run_waiting(struct engine *e)
{
    struct engine_kv_call **link = &e->waiting, *call;
    while ((call = *link) != NULL) {
        if (!is_ready(e, call)) {
            link = &call->next;
            continue;
        }
        *link = call->next;
        give_back(e, call->behind, call->behind_end);
        do_call(e, call);
    }
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
    run_waiting(e);
    uint64_t end_ns = engine_now_ns() + CALLS_NS;
    for (struct engine_kv_call *call; (call = take_call(e)) != NULL;) {
        run_call(e, call);
        if (engine_now_ns() >= end_ns) {
            engine_kick(e); /* there may be more */
            return;
        }
    }
}

static void shut_out(struct engine_kv_call *call)
{
    call->result = -ESHUTDOWN;
    call->done(call->arg);
}

void engine_end_kv_calls(struct engine *e)
{
    struct engine_kv_call *call;
    while ((call = e->waiting) != NULL) {
        e->waiting = call->next;
        give_back(e, call->behind, call->behind_end);
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
