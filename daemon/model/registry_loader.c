/* daemon/model/registry_loader.c - the threads that find and load models, and destroy them.
 *
 * One model loads after the other, since each takes memory and all cores; another thread finds
 * files meanwhile, so that nobody waits for a load to hear that there is none. But a disk may never
 * answer: who has not got on for a few seconds is not waited for. Where nobody is left to do what
 * waits another thread begins. */
#include "daemon/model/registry_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- one load ---------------------------------------------------------------------------- */

static void on_progress(void *arg, const char *stage, uint64_t done, uint64_t total)
{
    struct loader *l = arg;
    pthread_mutex_lock(&l->registry->lock);
    l->moved_ns = now_ns();
    for (struct registry_waiter *w = l->entry->waiters; w != NULL; w = w->next) {
        if (w->callbacks.on_progress != NULL) {
            w->callbacks.on_progress(w->callbacks.arg, stage, done, total);
        }
    }
    pthread_mutex_unlock(&l->registry->lock);
}

/* The last reference of a model went, in any thread: a loader takes it from here, or the caller
 * where the registry has ended. */
static void on_retired(void *arg, struct model *m)
{
    struct entry *e = arg;
    struct registry *r = e->registry;
    pthread_mutex_lock(&r->lock);
    if (!r->stopped) {
        e->next = r->retired;
        r->retired = e;
        pthread_cond_signal(&r->wake);
        pthread_mutex_unlock(&r->lock);
        return;
    }
    pthread_mutex_unlock(&r->lock);
    model_destroy(m);
    registry_entry_destroy(e);
    pthread_mutex_lock(&r->lock);
    registry_unlock_and_drop(r);
}

/* Where the file lies is told to the log alone. A request may load again what was refused before:
 * of one model a line once in a while is enough. */
static void log_refused(struct registry *r, const struct entry *e, int rc, const char *message)
{
    uint32_t hash = 0;
    for (const char *c = e->name; *c != '\0'; c++) {
        hash = hash * 31 + (unsigned char)*c;
    }
    log_paced(&r->refused_lines[hash % REGISTRY_REFUSED_LINES], now_ns(), LOG_LEVEL_WARNING,
              "model '%s' was not loaded%s%s: %s", e->name, e->path != NULL ? " from " : "",
              e->path != NULL ? e->path : "", message[0] != '\0' ? message : strerror(-rc));
}

/* Tells all who waited: m is the model, or with -EEXIST that of another entry, or NULL. Locked:
 * nobody can join the entry in between. */
static void tell(struct entry *e, struct model *m, int rc, const char *message)
{
    while (e->waiters != NULL) {
        struct registry_waiter *w = e->waiters;
        e->waiters = w->next;
        w->callbacks.on_done(w->callbacks.arg, m != NULL ? model_ref(m) : NULL, rc, message);
        free(w);
    }
}

static void give_up(struct registry *r, struct entry *e)
{
    registry_unlink(r, e);
    registry_entry_destroy(e);
}

/* Locked by the caller. */
static void finish_load(struct registry *r, struct entry *e, struct model *m, int rc,
                        const char *message)
{
    if (m == NULL) {
        log_refused(r, e, rc, message);
        tell(e, NULL, rc, message);
        give_up(r, e);
        return;
    }
    model_on_last_unref(m, on_retired, e);
    tell(e, m, rc, message);
    e->model = m;
    r->refs++;
}

/* Another entry of that name whose file is known. */
static struct entry *find_other(const struct registry *r, const struct entry *e)
{
    struct entry *other = r->entries;
    while (other != NULL &&
           (other == e || other->path == NULL || strcmp(other->name, e->name) != 0)) {
        other = other->next;
    }
    return other;
}

/* Those who wait for e wait for the other. */
static void join(struct entry *other, struct entry *e)
{
    struct registry_waiter **end = &other->waiters;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    *end = e->waiters;
    e->waiters = NULL;
}

/* The file is known: the entry waits to be loaded, or those who wait for it wait for another entry
 * of that file, or are told why not. Locked by the caller. */
static void settle(struct registry *r, struct entry *e, const char *path)
{
    struct fmt_error err;
    char *name = e->is_renamed ? strdup(e->name) : registry_base_name(path);
    e->path = strdup(path);
    if (e->path == NULL || name == NULL) {
        free(name);
        finish_load(r, e, NULL, -ENOMEM, "no memory");
        return;
    }
    free(e->name);
    e->name = name;
    struct entry *other = find_other(r, e);
    if (other == NULL) {
        e->options.path = e->path;
        e->options.name = e->name;
        return;
    }
    bool same = strcmp(other->path, path) == 0;
    if (same && other->model == NULL) {
        join(other, e);
    } else {
        int rc = registry_fail_taken(other, &err);
        tell(e, same ? other->model : NULL, rc, err.text);
    }
    give_up(r, e);
}

/* The first entry that waits to be found, or to be loaded; or NULL. */
static struct entry *next(const struct registry *r, bool found)
{
    struct entry *e = r->entries;
    while (e != NULL && (e->model != NULL || e->is_taken || (e->path != NULL) != found)) {
        e = e->next;
    }
    return e;
}

static void take(struct loader *l, struct entry *e, bool loads)
{
    e->is_taken = true;
    l->entry = e;
    l->loads = loads;
    l->moved_ns = now_ns();
}

/* Locked by the caller, and unlocked while it works. */
static void find_one(struct loader *l, struct entry *e)
{
    struct registry *r = l->registry;
    struct fmt_error err = {""};
    char path[PATH_MAX], **dirs = NULL;
    size_t n_dirs = 0;
    take(l, e, false);
    int rc = registry_copy_dirs(r, &dirs, &n_dirs);
    pthread_mutex_unlock(&r->lock);
    rc = rc < 0 ? fmt_fail(&err, rc, "no memory")
                : registry_locate(e->asked, dirs, n_dirs, path, &err);
    registry_free_dirs(dirs, n_dirs);
    pthread_mutex_lock(&r->lock);
    l->entry = NULL;
    e->is_taken = false;
    if (rc < 0) {
        finish_load(r, e, NULL, rc, err.text);
    } else {
        settle(r, e, path);
    }
}

/* The shared io thread, unless somebody waits for it, perhaps for ever. Locked by the caller. */
static struct io *io_of(struct loader *l)
{
    const struct registry *r = l->registry;
    for (uint32_t i = 0; i < r->n_loaders; i++) {
        const struct loader *other = &r->loaders[i];
        if (other != l && other->entry != NULL && other->loads) {
            return l->io != NULL || io_create(!io_uses_uring(r->options.io), &l->io) == 0
                       ? l->io
                       : r->options.io;
        }
    }
    return r->options.io;
}

/* The same. */
static void load_one(struct loader *l, struct entry *e)
{
    struct registry *r = l->registry;
    struct fmt_error err = {""};
    struct model *m = NULL;
    take(l, e, true);
    struct io *io = io_of(l);
    pthread_mutex_unlock(&r->lock);
    int rc = model_load(&e->options, r->options.catalogue, r->options.pool, io, &e->cancel,
                        on_progress, l, &m, &err);
    pthread_mutex_lock(&r->lock);
    l->entry = NULL;
    finish_load(r, e, m, rc, err.text);
}

/* The same. */
static void destroy_one_retired(struct registry *r)
{
    struct entry *e = r->retired;
    r->retired = e->next;
    pthread_mutex_unlock(&r->lock);
    model_destroy(e->model);
    registry_entry_destroy(e);
    pthread_mutex_lock(&r->lock);
    r->refs--; /* never the last: the owner's stays until this thread has ended */
}

/* ---- the threads ------------------------------------------------------------------------- */

static bool gets_on(const struct loader *l)
{
    return now_ns() - l->moved_ns < l->registry->stalled_ns;
}

/* Somebody finds a file, or loads, and gets on with it. Locked by the caller. */
static bool somebody(const struct registry *r, bool loads)
{
    for (uint32_t i = 0; i < r->n_loaders; i++) {
        const struct loader *l = &r->loaders[i];
        if (l->entry != NULL && l->loads == loads && gets_on(l)) {
            return true;
        }
    }
    return false;
}

/* False: there is nothing to do, or it is another's turn. Locked by the caller. */
static bool do_something(struct loader *l)
{
    struct registry *r = l->registry;
    struct entry *e;
    if (r->retired != NULL) {
        destroy_one_retired(r);
    } else if ((e = next(r, false)) != NULL) {
        find_one(l, e);
    } else if ((e = next(r, true)) != NULL && !somebody(r, true)) {
        load_one(l, e);
    } else {
        return false;
    }
    pthread_cond_broadcast(&r->wake); /* another may have its turn now */
    return true;
}

static void *loader_main(void *arg)
{
    struct loader *l = arg;
    struct registry *r = l->registry;
    struct entry *e;
    pthread_mutex_lock(&r->lock);
    while (!r->stop || r->retired != NULL) {
        if (!do_something(l)) {
            pthread_cond_wait(&r->wake, &r->lock);
        }
    }
    while ((e = next(r, false)) != NULL || (e = next(r, true)) != NULL) {
        finish_load(r, e, NULL, -ECANCELED, "the daemon is ending");
    }
    r->stopped = --r->n_running == 0;
    pthread_cond_broadcast(&r->wake);
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

int registry_start_loader(struct registry *r)
{
    struct loader *l = &r->loaders[r->n_loaders];
    *l = (struct loader){.registry = r};
    int rc = -pthread_create(&l->thread, NULL, loader_main, l);
    if (rc == 0) {
        r->n_loaders++;
        r->n_running++;
    }
    return rc;
}

static const struct loader *find_stuck(const struct registry *r)
{
    for (uint32_t i = 0; i < r->n_loaders; i++) {
        if (r->loaders[i].entry != NULL && !gets_on(&r->loaders[i])) {
            return &r->loaders[i];
        }
    }
    return NULL;
}

/* Nobody is left to do what waits. */
static void begin_another(struct registry *r)
{
    const struct loader *stuck = find_stuck(r);
    if (r->n_loaders < REGISTRY_LOADERS_MAX && registry_start_loader(r) == 0 && stuck != NULL) {
        log_warning(
            "model '%s' does not get on with loading (a disk that does not answer?): others "
            "are loaded beside it",
            stuck->entry->name);
    }
}

void registry_relieve(struct registry *r)
{
    bool has_idle = false;
    pthread_mutex_lock(&r->lock);
    for (uint32_t i = 0; i < r->n_loaders; i++) {
        has_idle |= r->loaders[i].entry == NULL;
    }
    if (has_idle) {
        pthread_cond_broadcast(&r->wake);
    } else if (!r->stop && ((next(r, false) != NULL && !somebody(r, false)) ||
                            (next(r, true) != NULL && !somebody(r, true)))) {
        begin_another(r);
    }
    pthread_mutex_unlock(&r->lock);
}

bool registry_stop_loaders(struct registry *r)
{
    struct timespec until;
    int rc = 0;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += r->end_s;
    pthread_mutex_lock(&r->lock);
    r->stop = true;
    for (struct entry *e = r->entries; e != NULL; e = e->next) {
        e->cancel = true;
    }
    pthread_cond_broadcast(&r->wake);
    while (r->n_running > 0 && rc != ETIMEDOUT) {
        rc = pthread_cond_timedwait(&r->wake, &r->lock, &until);
    }
    bool all = r->n_running == 0;
    pthread_mutex_unlock(&r->lock);
    if (!all) {
        log_error("models are still being loaded %u s after that was to end (a disk that does not "
                  "answer?): the daemon ends without them",
                  r->end_s);
        return false;
    }
    for (uint32_t i = 0; i < r->n_loaders; i++) {
        pthread_join(r->loaders[i].thread, NULL);
    }
    return true;
}

void registry_free_loaders(struct registry *r)
{
    for (uint32_t i = 0; i < r->n_loaders; i++) {
        io_destroy(r->loaders[i].io);
    }
}
