#include "daemon/model/registry_internal.h"

#include "daemon/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- entries ----------------------------------------------------------------------------- */

/* Its model has been destroyed, or never was. */
static void entry_destroy(struct entry *e)
{
    if (e == NULL) {
        return;
    }
    while (e->waiters != NULL) {
        struct waiter *w = e->waiters;
        e->waiters = w->next;
        free(w);
    }
    free(e->name);
    free(e->path);
    free(e->strings[0]);
    free(e->strings[1]);
    free(e);
}

static int copy_options(struct registry *r, const struct model_options *given, struct entry *e)
{
    struct model_options o = r->options.defaults;
    if (given != NULL) {
        o.n_ctx = given->n_ctx > 0 ? given->n_ctx : o.n_ctx;
        o.backend = given->backend != NULL ? given->backend : o.backend;
        o.attention_backend =
            given->attention_backend != NULL ? given->attention_backend : o.attention_backend;
        /* GQA_NONE stands for "not given": the type F32 is 0. */
        o.k_type = given->k_type != GQA_NONE ? given->k_type : o.k_type;
        o.v_type = given->v_type != GQA_NONE ? given->v_type : o.v_type;
    }
    const char **specs[2] = {&o.backend, &o.attention_backend};
    for (size_t i = 0; i < 2; i++) {
        if (*specs[i] != NULL) {
            e->strings[i] = strdup(*specs[i]);
            if (e->strings[i] == NULL) {
                return -ENOMEM;
            }
            *specs[i] = e->strings[i];
        }
    }
    o.path = e->path;
    o.name = e->name;
    e->options = o;
    return 0;
}

static struct entry *entry_create(struct registry *r, const char *path, const char *serve_as,
                                  const struct model_options *options)
{
    struct entry *e = calloc(1, sizeof(*e));
    if (e == NULL) {
        return NULL;
    }
    e->registry = r;
    e->path = strdup(path);
    e->name = serve_as != NULL ? strdup(serve_as) : registry_base_name(path);
    if (e->path == NULL || e->name == NULL || copy_options(r, options, e) < 0) {
        entry_destroy(e);
        return NULL;
    }
    return e;
}

/* ---- the loader thread ------------------------------------------------------------------- */

struct progress {
    struct registry *registry;
    struct entry *entry;
};

static void on_progress(void *arg, const char *stage, uint64_t done, uint64_t total)
{
    struct progress *p = arg;
    pthread_mutex_lock(&p->registry->lock);
    for (struct waiter *w = p->entry->waiters; w != NULL; w = w->next) {
        if (w->callbacks.on_progress != NULL) {
            w->callbacks.on_progress(w->callbacks.arg, stage, done, total);
        }
    }
    pthread_mutex_unlock(&p->registry->lock);
}

static void unlink_entry(struct registry *r, struct entry *e)
{
    struct entry **link = &r->entries;
    while (*link != e) {
        link = &(*link)->next;
    }
    *link = e->next;
}

void registry_free_dirs(char **dirs, size_t n_dirs)
{
    for (size_t i = 0; dirs != NULL && i < n_dirs; i++) {
        free(dirs[i]);
    }
    free(dirs);
}

int registry_set_dirs(struct registry *r, const char *const *dirs, size_t n_dirs)
{
    char **copy = calloc(n_dirs + 1, sizeof(*copy));
    int rc = copy == NULL ? -ENOMEM : 0;
    for (size_t i = 0; rc == 0 && i < n_dirs; i++) {
        copy[i] = strdup(dirs[i]);
        rc = copy[i] == NULL ? -ENOMEM : 0;
    }
    if (rc < 0) {
        registry_free_dirs(copy, n_dirs);
        return rc;
    }
    pthread_mutex_lock(&r->lock);
    char **old = r->dirs;
    size_t n_old = r->n_dirs;
    r->dirs = copy;
    r->n_dirs = n_dirs;
    pthread_mutex_unlock(&r->lock);
    registry_free_dirs(old, n_old);
    return 0;
}

static void registry_free(struct registry *r)
{
    registry_free_dirs(r->dirs, r->n_dirs);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->wake);
    free(r);
}

/* Locked by the caller; unlocks. */
static void unlock_and_drop(struct registry *r)
{
    bool last = --r->refs == 0;
    pthread_mutex_unlock(&r->lock);
    if (last) {
        registry_free(r);
    }
}

/* The last reference of a model went, in any thread: the loader takes it from here, or the caller
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
    entry_destroy(e);
    pthread_mutex_lock(&r->lock);
    unlock_and_drop(r);
}

/* Where the file lies is told to the log alone. A request may load again what was refused before:
 * of one model a line once in a while is enough. */
static void log_refused(struct registry *r, const struct entry *e, int rc, const char *message)
{
    struct timespec now;
    uint32_t hash = 0;
    for (const char *c = e->name; *c != '\0'; c++) {
        hash = hash * 31 + (unsigned char)*c;
    }
    clock_gettime(CLOCK_MONOTONIC, &now);
    log_paced(&r->refused_lines[hash % REGISTRY_REFUSED_LINES],
              (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec, LOG_LEVEL_WARNING,
              "model '%s' was not loaded from %s: %s", e->name, e->path,
              message[0] != '\0' ? message : strerror(-rc));
}

/* Tells all who waited. Locked: nobody can join the entry in between. */
static void finish_load(struct registry *r, struct entry *e, struct model *m, int rc,
                        const char *message)
{
    if (m != NULL) {
        model_on_last_unref(m, on_retired, e);
    } else {
        log_refused(r, e, rc, message);
    }
    while (e->waiters != NULL) {
        struct waiter *w = e->waiters;
        e->waiters = w->next;
        w->callbacks.on_done(w->callbacks.arg, m != NULL ? model_ref(m) : NULL, rc, message);
        free(w);
    }
    if (m == NULL) {
        unlink_entry(r, e);
        entry_destroy(e);
    } else {
        e->model = m;
        r->refs++;
    }
}

static struct entry *next_load(struct registry *r)
{
    struct entry *e = r->entries;
    while (e != NULL && e->model != NULL) {
        e = e->next;
    }
    return e;
}

/* Locked by the caller, and unlocked while it works. */
static void load_one(struct registry *r, struct entry *e)
{
    pthread_mutex_unlock(&r->lock);
    struct fmt_error err = {""};
    struct model *m = NULL;
    struct progress p = {r, e};
    int rc = model_load(&e->options, r->options.catalogue, r->options.pool, r->options.io,
                        &e->cancel, on_progress, &p, &m, &err);
    pthread_mutex_lock(&r->lock);
    finish_load(r, e, m, rc, err.text);
}

/* The same. */
static void destroy_one_retired(struct registry *r)
{
    struct entry *e = r->retired;
    r->retired = e->next;
    pthread_mutex_unlock(&r->lock);
    model_destroy(e->model);
    entry_destroy(e);
    pthread_mutex_lock(&r->lock);
    r->refs--; /* never the last: the owner's stays until this thread has ended */
}

static void *loader_main(void *arg)
{
    struct registry *r = arg;
    struct entry *e;
    pthread_mutex_lock(&r->lock);
    while (!r->stop || r->retired != NULL) {
        if (r->retired != NULL) {
            destroy_one_retired(r);
        } else if ((e = next_load(r)) != NULL) {
            load_one(r, e);
        } else {
            pthread_cond_wait(&r->wake, &r->lock);
        }
    }
    while ((e = next_load(r)) != NULL) {
        finish_load(r, e, NULL, -ECANCELED, "the daemon is ending");
    }
    r->stopped = true;
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* ---- interface --------------------------------------------------------------------------- */

int registry_create(const struct registry_options *options, struct registry **ret)
{
    struct registry *r = calloc(1, sizeof(*r));
    if (r == NULL) {
        return -ENOMEM;
    }
    r->options = *options;
    r->refs = 1;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->wake, NULL);
    int rc = registry_set_dirs(r, options->dirs, options->n_dirs);
    rc = rc < 0 ? rc : -pthread_create(&r->loader, NULL, loader_main, r);
    if (rc < 0) {
        registry_free(r);
        return rc;
    }
    *ret = r;
    return 0;
}

void registry_destroy(struct registry *r)
{
    if (r == NULL) {
        return;
    }
    pthread_mutex_lock(&r->lock);
    r->stop = true;
    for (struct entry *e = r->entries; e != NULL; e = e->next) {
        e->cancel = true;
    }
    pthread_cond_signal(&r->wake);
    pthread_mutex_unlock(&r->lock);
    pthread_join(r->loader, NULL);
    /* Models that others still use outlive the registry's entry list, and it waits for them. */
    while (r->entries != NULL) {
        struct entry *e = r->entries;
        r->entries = e->next;
        model_unref(e->model);
    }
    pthread_mutex_lock(&r->lock);
    unlock_and_drop(r);
}

/* A damaged model gives no more results: it leaves, and whoever wants it loads it anew. Locked by
 * the caller; the reference is the caller's to drop without the lock, or NULL. */
static struct model *take_damaged(struct registry *r, const char *name)
{
    struct entry *e = registry_find(r, name);
    if (e == NULL || e->model == NULL || !model_is_damaged(e->model)) {
        return NULL;
    }
    log_warning("model '%s': a file of it was cut, or the disk cannot read it: it is unloaded",
                e->name);
    unlink_entry(r, e);
    return e->model;
}

/* The entry under that name or path, or a new one at the end of the loader's queue. Locked by the
 * caller. */
static int join_or_add(struct registry *r, const char *name_or_path, const char *serve_as,
                       const struct model_options *options, struct entry **ret,
                       struct fmt_error *err)
{
    char path[PATH_MAX];
    struct entry *same = registry_find(r, serve_as != NULL ? serve_as : name_or_path);
    if (same != NULL && same->model != NULL) {
        return fmt_fail(err, -EEXIST,
                        "a model is loaded under the name '%s': unload it, or give another name",
                        same->name);
    }
    int rc = registry_resolve(r, name_or_path, path, err);
    if (rc < 0) {
        return rc;
    }
    struct entry *e = entry_create(r, path, serve_as, options);
    if (e == NULL) {
        return fmt_fail(err, -ENOMEM, "no memory");
    }
    same = registry_find(r, e->name);
    if (same == NULL) {
        struct entry **end = &r->entries;
        while (*end != NULL) {
            end = &(*end)->next;
        }
        *end = e;
        *ret = e;
        return 0;
    }
    entry_destroy(e);
    if (same->model != NULL || strcmp(same->path, path) != 0) {
        return fmt_fail(err, -EEXIST, "the name '%s' is taken by %s", same->name,
                        fmt_file_name(same->path));
    }
    *ret = same;
    return 0;
}

int registry_load(struct registry *r, const char *name_or_path, const char *serve_as,
                  const struct model_options *options, const struct registry_load *callbacks,
                  struct fmt_error *err)
{
    if (serve_as != NULL && !registry_is_plain_name(serve_as)) {
        return fmt_fail(err, -EINVAL, "'%.128s' cannot be a model's name", serve_as);
    }
    struct waiter *w = calloc(1, sizeof(*w));
    if (w == NULL) {
        return fmt_fail(err, -ENOMEM, "no memory");
    }
    w->callbacks = *callbacks;
    struct entry *e = NULL;
    pthread_mutex_lock(&r->lock);
    struct model *damaged = take_damaged(r, serve_as != NULL ? serve_as : name_or_path);
    int rc = join_or_add(r, name_or_path, serve_as, options, &e, err);
    if (rc == 0) {
        struct waiter **end = &e->waiters;
        while (*end != NULL) {
            end = &(*end)->next;
        }
        *end = w;
        pthread_cond_signal(&r->wake);
    }
    pthread_mutex_unlock(&r->lock);
    model_unref(damaged);
    if (rc < 0) {
        free(w);
    }
    return rc;
}

struct model *registry_get(struct registry *r, const char *name)
{
    pthread_mutex_lock(&r->lock);
    struct model *damaged = take_damaged(r, name);
    struct entry *e = registry_find(r, name);
    struct model *m = e != NULL && e->model != NULL ? model_ref(e->model) : NULL;
    pthread_mutex_unlock(&r->lock);
    model_unref(damaged);
    return m;
}

int registry_unload(struct registry *r, const char *name, struct model **ret)
{
    pthread_mutex_lock(&r->lock);
    struct entry *e = registry_find(r, name);
    int rc = e == NULL ? -ENOENT : e->model == NULL ? -EBUSY : 0;
    if (rc == 0) {
        unlink_entry(r, e);
        *ret = e->model; /* with the last reference, the entry goes too */
    }
    pthread_mutex_unlock(&r->lock);
    return rc;
}
