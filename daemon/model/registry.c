#include "daemon/model/registry_internal.h"

#include "daemon/log.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

/* ---- entries ----------------------------------------------------------------------------- */

void registry_entry_destroy(struct entry *e)
{
    if (e == NULL) {
        return;
    }
    while (e->waiters != NULL) {
        struct registry_waiter *w = e->waiters;
        e->waiters = w->next;
        free(w);
    }
    free(e->asked);
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
    e->options = o;
    return 0;
}

static struct entry *entry_create(struct registry *r, const char *asked, const char *serve_as,
                                  const struct model_options *options)
{
    struct entry *e = calloc(1, sizeof(*e));
    if (e == NULL) {
        return NULL;
    }
    e->registry = r;
    e->asked = strdup(asked);
    e->name = serve_as != NULL ? strdup(serve_as) : registry_base_name(asked);
    e->is_renamed = serve_as != NULL;
    if (e->asked == NULL || e->name == NULL || copy_options(r, options, e) < 0) {
        registry_entry_destroy(e);
        return NULL;
    }
    return e;
}

void registry_unlink(struct registry *r, struct entry *e)
{
    struct entry **link = &r->entries;
    while (*link != e) {
        link = &(*link)->next;
    }
    *link = e->next;
}

/* ---- folders, and the end ---------------------------------------------------------------- */

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
    registry_free_loaders(r);
    registry_free_dirs(r->dirs, r->n_dirs);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->wake);
    free(r);
}

void registry_unlock_and_drop(struct registry *r)
{
    bool last = --r->refs == 0;
    pthread_mutex_unlock(&r->lock);
    if (last) {
        registry_free(r);
    }
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
    r->stalled_ns = REGISTRY_STALLED_NS;
    r->end_s = REGISTRY_END_S;
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->wake, &monotonic);
    pthread_condattr_destroy(&monotonic);
    int rc = registry_set_dirs(r, options->dirs, options->n_dirs);
    pthread_mutex_lock(&r->lock);
    while (rc == 0 && r->n_loaders < REGISTRY_LOADERS) {
        rc = registry_start_loader(r);
    }
    pthread_mutex_unlock(&r->lock);
    if (rc < 0) {
        registry_stop_loaders(r);
        registry_free(r);
        return rc;
    }
    *ret = r;
    return 0;
}

bool registry_destroy(struct registry *r)
{
    if (r == NULL) {
        return true;
    }
    if (!registry_stop_loaders(r)) {
        return false;
    }
    /* Models that others still use outlive the registry's entry list, and it waits for them. */
    while (r->entries != NULL) {
        struct entry *e = r->entries;
        r->entries = e->next;
        model_unref(e->model);
    }
    pthread_mutex_lock(&r->lock);
    registry_unlock_and_drop(r);
    return true;
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
    registry_unlink(r, e);
    return e->model;
}

static bool is_path(const char *asked)
{
    return asked[0] == '/';
}

/* What is loaded under that name, or is about to be from another file: which one a path leads to
 * the loader finds out. */
static int refuse_taken(const struct entry *same, const char *asked, struct fmt_error *err)
{
    if (same->model != NULL) {
        return fmt_fail(err, -EEXIST,
                        "a model is loaded under the name '%s': unload it, or give another name",
                        same->name);
    }
    if (!is_path(same->asked) && !is_path(asked)) {
        return registry_fail_taken(same, err);
    }
    return 0;
}

/* The entry that was asked for likewise, or a new one at the end of the loaders' queue. Nothing
 * here touches a disk. Locked by the caller. */
static int join_or_add(struct registry *r, const char *asked, const char *serve_as,
                       const struct model_options *options, struct entry **ret,
                       struct fmt_error *err)
{
    struct entry *same = registry_find(r, serve_as != NULL ? serve_as : asked);
    if (same != NULL && same->model == NULL && registry_is_same_name(same->asked, asked)) {
        *ret = same;
        return 0;
    }
    int rc = same != NULL ? refuse_taken(same, asked, err) : 0;
    if (rc < 0) {
        return rc;
    }
    struct entry *e = entry_create(r, asked, serve_as, options);
    if (e == NULL) {
        return fmt_fail(err, -ENOMEM, "no memory");
    }
    struct entry **end = &r->entries;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    *end = e;
    *ret = e;
    return 0;
}

int registry_load(struct registry *r, const char *name_or_path, const char *serve_as,
                  const struct model_options *options, const struct registry_load *callbacks,
                  struct fmt_error *err)
{
    if (serve_as != NULL && !registry_is_plain_name(serve_as)) {
        return fmt_fail(err, -EINVAL, "'%.128s' cannot be a model's name", serve_as);
    }
    int rc = registry_check_name(r, name_or_path, err);
    if (rc < 0) {
        return rc;
    }
    struct registry_waiter *w = calloc(1, sizeof(*w));
    if (w == NULL) {
        return fmt_fail(err, -ENOMEM, "no memory");
    }
    w->callbacks = *callbacks;
    struct entry *e = NULL;
    pthread_mutex_lock(&r->lock);
    struct model *damaged = take_damaged(r, serve_as != NULL ? serve_as : name_or_path);
    rc = join_or_add(r, name_or_path, serve_as, options, &e, err);
    if (rc == 0) {
        struct registry_waiter **end = &e->waiters;
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
        registry_unlink(r, e);
        *ret = e->model; /* with the last reference, the entry goes too */
    }
    pthread_mutex_unlock(&r->lock);
    return rc;
}
