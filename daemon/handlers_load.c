/* Loading on demand, unloading when the last request has ended.
 *
 * The registry reports from its loader thread. A struct load takes the news under its lock and
 * travels to the loop as a posted task, at most once at a time; it outlives a call that gives up.
 */
#include "daemon/handlers_internal.h"

#include "daemon/log.h"

#include <errno.h>
#include <fnmatch.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LOAD_PROGRESS_INTERVAL_NS 50000000u

struct load {
    struct service *service;
    /* The loop's. */
    struct call *call; /* NULL: it gave up, or a preload */
    bool wants_progress;
    void (*then)(struct call *call);
    void (*preloaded)(void *arg, int result);
    void *preloaded_arg;
    char name[PROTO_PATH_BYTES_MAX + 1];
    /* Under the lock. */
    pthread_mutex_t lock;
    struct task task;
    bool posted, finished, has_progress;
    uint64_t reported_ns;
    char stage[16];
    uint64_t done, total;
    struct model *model; /* a reference */
    int result;
    char message[320];
};

static void load_free(struct load *load)
{
    pthread_mutex_destroy(&load->lock);
    free(load);
}

void load_detach(struct load *load)
{
    if (load->call) {
        load->call->wait = CALL_WAIT_NOTHING;
        load->call->load = NULL;
        load->call = NULL;
    }
}

static enum proto_error_code load_error_code(int result)
{
    switch (result) {
    case -ENOENT:
        return PROTO_E_NOT_FOUND;
    case -EEXIST:
        return PROTO_E_EXISTS;
    case -ENOMEM:
        return PROTO_E_NO_MEMORY;
    case -EIO:
    case -EACCES:
    case -EPERM:
        return PROTO_E_IO;
    case -ECANCELED:
        return PROTO_E_DRAINING;
    default:
        return PROTO_E_MODEL_REFUSED;
    }
}

static void pack_progress(struct call *call, const char *stage, uint64_t done, uint64_t total)
{
    struct ipc_buffer *b = call_begin_event(call);
    ipc_pack_map(b, 3);
    pack_kv_str(b, "stage", stage);
    pack_kv_u64(b, "done", done);
    pack_kv_u64(b, "total", total);
    call_end_event(call);
}

/* The loop hears of the end. model is a reference that it takes. */
static void load_finished(struct load *load, struct model *model, int result, const char *message)
{
    struct call *call = load->call;
    if (load->preloaded) {
        load->preloaded(load->preloaded_arg, result == -EEXIST ? 0 : result);
    }
    if (!call) {
        model_unref(model);
        return;
    }
    load_detach(load);
    /* Whoever only names a model wants it, and it was loaded under another name of its file. */
    bool has_model = result == -EEXIST && model && call->method != PROTO_MODEL_LOAD;
    if (result < 0 && !has_model) {
        model_unref(model);
        call_fail(call, load_error_code(result), "model '%.128s': %s", load->name, message);
        return;
    }
    call->model = model;
    load->then(call);
}

/* On the loop: takes a copy of the news, then acts on it without the lock. */
static void load_news(struct task *t)
{
    struct load *load = (struct load *)((char *)t - offsetof(struct load, task));
    char stage[sizeof(load->stage)];

    pthread_mutex_lock(&load->lock);
    load->posted = false;
    bool finished = load->finished;
    bool has_progress = load->has_progress;
    uint64_t done = load->done;
    uint64_t total = load->total;
    load->has_progress = false;
    memcpy(stage, load->stage, sizeof(stage));
    pthread_mutex_unlock(&load->lock);

    if (has_progress && load->call && load->wants_progress && load->call->caller &&
        !load->call->caller->congested) {
        pack_progress(load->call, stage, done, total);
    }
    if (finished) {
        load_finished(load, load->model, load->result, load->message);
        load_free(load);
    }
}

static void post_locked(struct load *load)
{
    if (!load->posted) {
        load->posted = true;
        load->task = (struct task){.done = load_news};
        load->service->host.post(load->service->host.data, &load->task);
    }
}

static void on_progress(void *arg, const char *stage, uint64_t done, uint64_t total)
{
    struct load *load = arg;
    uint64_t now = clock_now_ns();
    pthread_mutex_lock(&load->lock);
    bool new_stage = strncmp(load->stage, stage, sizeof(load->stage) - 1) != 0;
    if (new_stage || done == total || now - load->reported_ns >= LOAD_PROGRESS_INTERVAL_NS) {
        snprintf(load->stage, sizeof(load->stage), "%s", stage);
        load->done = done;
        load->total = total;
        load->reported_ns = now;
        load->has_progress = true;
        post_locked(load);
    }
    pthread_mutex_unlock(&load->lock);
}

static void on_done(void *arg, struct model *m, int result, const char *message)
{
    struct load *load = arg;
    pthread_mutex_lock(&load->lock);
    load->finished = true;
    load->model = m;
    load->result = result < 0 ? result : m ? 0 : -EIO;
    snprintf(load->message, sizeof(load->message), "%s",
             message && message[0] ? message : strerror(-load->result));
    post_locked(load);
    pthread_mutex_unlock(&load->lock);
}

static struct load *load_create(struct service *s, const char *name)
{
    struct load *load = calloc(1, sizeof(*load));
    if (!load) {
        return NULL;
    }
    load->service = s;
    snprintf(load->name, sizeof(load->name), "%s", name);
    pthread_mutex_init(&load->lock, NULL);
    return load;
}

static int load_start(struct load *load, const char *serve_as, const struct model_options *options,
                      struct fmt_error *err)
{
    const struct registry_load callbacks = {
        .name = load->name, .on_progress = on_progress, .on_done = on_done, .arg = load};
    err->text[0] = '\0';
    int rc = registry_load(load->service->registry, load->name, serve_as, options, &callbacks, err);
    if (rc < 0 && !err->text[0]) {
        snprintf(err->text, sizeof(err->text), "%s", strerror(-rc));
    }
    return rc;
}

void call_load(struct call *call, const char *name, const char *serve_as,
               const struct model_options *options, void (*then)(struct call *))
{
    struct fmt_error err;
    struct load *load = load_create(call->service, name);
    if (!load) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory to load a model");
        return;
    }
    load->call = call;
    load->then = then;
    load->wants_progress = call->method == PROTO_MODEL_LOAD;
    call->load = load;
    call->wait = CALL_WAIT_LOAD;
    int rc = load_start(load, serve_as, options, &err);
    if (rc < 0) {
        load_detach(load);
        load_free(load);
        /* Whoever only names a model wants it, and another's load of it may have just ended. */
        call->model = rc == -EEXIST && call->method != PROTO_MODEL_LOAD
                          ? registry_get(call->service->registry, name)
                          : NULL;
        if (call->model) {
            then(call);
            return;
        }
        call_fail(call, rc == -EINVAL ? PROTO_E_INVALID_PARAMS : load_error_code(rc),
                  "model '%.128s': %s", name, err.text);
    }
}

void service_preload(struct service *s, const char *name, void (*done)(void *arg, int result),
                     void *arg)
{
    struct fmt_error err;
    struct load *load = load_create(s, name);
    int rc = -ENOMEM;
    if (load) {
        load->preloaded = done;
        load->preloaded_arg = arg;
        rc = load_start(load, NULL, NULL, &err);
        if (rc == 0) {
            return;
        }
        load_free(load);
    } else {
        snprintf(err.text, sizeof(err.text), "no memory");
    }
    if (rc != -EEXIST) {
        log_warning("model '%s' was not loaded: %s", name, err.text);
    }
    if (done) {
        done(arg, rc == -EEXIST ? 0 : rc);
    }
}

/* ---- on demand --------------------------------------------------------------------------- */

static bool may_autoload(const struct call *call, const char *name)
{
    const struct service_limits *l = &call->service->limits;
    if (call->caller && call->caller->admin && l->allow_autoload) {
        return true;
    }
    if (!l->allow_autoload || l->n_allow_models == 0) {
        return l->allow_autoload;
    }
    for (size_t i = 0; i < l->n_allow_models; i++) {
        if (fnmatch(l->allow_models[i], name, 0) == 0) {
            return true;
        }
    }
    return false;
}

/* A second copy beside one that still has requests would cost the memory twice. */
static bool is_unloading(const struct service *s, const char *name)
{
    const struct unload *u;
    LIST_FOREACH(u, &s->unloads, entry)
    {
        if (strcmp(model_name(u->model), name) == 0) {
            return true;
        }
    }
    return false;
}

void call_with_model(struct call *call, struct proto_string name, void (*then)(struct call *))
{
    struct service *s = call->service;
    char text[PROTO_PATH_BYTES_MAX + 1];
    snprintf(text, sizeof(text), "%.*s", (int)name.bytes, name.data);

    struct model *m = registry_get(s->registry, text);
    if (!m && is_unloading(s, text)) {
        call_fail(call, PROTO_E_DRAINING, "model '%.128s' is being unloaded", text);
    } else if (m) {
        call->model = m;
        then(call);
    } else if (may_autoload(call, text)) {
        call_load(call, text, NULL, NULL, then);
    } else {
        call_fail(call, PROTO_E_NOT_FOUND,
                  "model '%.128s' is not loaded, and the configuration does not let it load itself",
                  text);
    }
}

/* ---- unloading --------------------------------------------------------------------------- */

/* The last reference unmaps gigabytes, which is not for the loop. */
static void unload_work(struct task *t)
{
    struct unload *u = (struct unload *)((char *)t - offsetof(struct unload, task));
    model_unref(u->model);
    u->model = NULL;
}

static void unload_done(struct task *t)
{
    struct unload *u = (struct unload *)((char *)t - offsetof(struct unload, task));
    struct call *call = u->call;
    free(u);
    if (call) {
        call->wait = CALL_WAIT_NOTHING;
        call->unload = NULL;
        call_end_empty(call);
    }
}

static void unload_finish(struct service *s, struct unload *u)
{
    LIST_REMOVE(u, entry);
    log_info("model '%s' is unloaded", model_name(u->model));
    u->task = (struct task){
        .work = unload_work, .done = unload_done, .uid = TASK_OF_DAEMON, .is_owed = true};
    if (s->host.run(s->host.data, &u->task) < 0) {
        unload_work(&u->task);
        unload_done(&u->task);
    }
}

void service_check_unloads(struct service *s)
{
    struct unload *next;
    for (struct unload *u = LIST_FIRST(&s->unloads); u; u = next) {
        next = LIST_NEXT(u, entry);
        if (engine_model_users(s->engine, u->model) == 0) {
            unload_finish(s, u);
        }
    }
}

void unload_start(struct call *call, struct model *m)
{
    struct service *s = call->service;
    struct unload *u = calloc(1, sizeof(*u));
    if (!u) {
        model_unref(m);
        call_fail(call, PROTO_E_NO_MEMORY, "no memory to unload a model");
        return;
    }
    u->model = m;
    u->call = call;
    call->unload = u;
    call->wait = CALL_WAIT_UNLOAD;
    LIST_INSERT_HEAD(&s->unloads, u, entry);
    service_check_unloads(s);
}

void unload_detach(struct call *call)
{
    struct unload *u = call->unload;
    call->wait = CALL_WAIT_NOTHING;
    call->unload = NULL;
    u->call = NULL;
}
