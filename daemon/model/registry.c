#include "daemon/model/registry.h"

#include <dirent.h>
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SUFFIX ".gguf"

/* A model that is loaded or being loaded. Entries are linked in the order of their creation. */
struct entry {
    struct entry *next;
    char *name, *path;
    struct model *model;          /* NULL while loading */
    atomic_bool cancel;         /* set by registry_destroy, read by the loader */
    struct model_options options; /* strings owned: see copy_options() */
    char *strings[2];             /* backend, attention_backend */
    struct waiter *waiters;
};

/* Somebody who asked for the load. */
struct waiter {
    struct waiter *next;
    struct registry_load callbacks;
};

/* The lock guards entries, their waiters and the queue; models are immutable once published. */
struct registry {
    struct registry_options options;
    char **dirs;
    size_t n_dirs;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t loader;
    bool stop;
    struct entry *entries; /* those with model == NULL and not failed form the loader's queue */
};

/* ---- names ------------------------------------------------------------------------------------
 */

static bool has_suffix(const char *name)
{
    size_t bytes = strlen(name);
    return bytes > strlen(SUFFIX) && strcmp(name + bytes - strlen(SUFFIX), SUFFIX) == 0;
}

/* A path is absolute; a plain name has no slash and does not start with a dot. */
static int resolve(struct registry *r, const char *name, char path[PATH_MAX], struct fmt_error *err)
{
    if (name[0] == '/') {
        if (!r->options.allow_paths) {
            return fmt_fail(err, -EACCES,
                            "'%s' is a path: this daemon takes names of its models folders", name);
        }
        if (realpath(name, path) == NULL) {
            return fmt_fail(err, -errno, "%s: %s", name, strerror(errno));
        }
        return 0;
    }
    if (strchr(name, '/') != NULL || name[0] == '.' || name[0] == '\0') {
        return fmt_fail(err, -EINVAL, "'%s' is neither a model's name nor an absolute path", name);
    }
    for (size_t i = 0; i < r->n_dirs; i++) {
        int n =
            snprintf(path, PATH_MAX, "%s/%s%s", r->dirs[i], name, has_suffix(name) ? "" : SUFFIX);
        if (n > 0 && n < PATH_MAX && access(path, F_OK) == 0) {
            return 0;
        }
    }
    return fmt_fail(err, -ENOENT, "no model '%s' in %s%s", name,
                    r->n_dirs > 0 ? r->dirs[0] : "any folder: none is configured",
                    r->n_dirs > 1 ? " and the other folders" : "");
}

/* "name" of "/a/b/name.gguf". Malloc'ed. */
static char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');
    char *name = strdup(slash != NULL ? slash + 1 : path);
    if (name != NULL && has_suffix(name)) {
        name[strlen(name) - strlen(SUFFIX)] = '\0';
    }
    return name;
}

/* Finds by the served name, with or without suffix, or by path. Locked by the caller. */
static struct entry *find(struct registry *r, const char *name)
{
    for (struct entry *e = r->entries; e != NULL; e = e->next) {
        size_t bytes = strlen(e->name);
        bool same = strncmp(name, e->name, bytes) == 0 &&
                    (name[bytes] == '\0' || strcmp(name + bytes, SUFFIX) == 0);
        if (same || strcmp(name, e->path) == 0) {
            return e;
        }
    }
    return NULL;
}

/* ---- entries ----------------------------------------------------------------------------------
 */

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
    model_unref(e->model);
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
    e->path = strdup(path);
    e->name = serve_as != NULL ? strdup(serve_as) : base_name(path);
    if (e->path == NULL || e->name == NULL || copy_options(r, options, e) < 0) {
        entry_destroy(e);
        return NULL;
    }
    return e;
}

static int add_waiter(struct entry *e, const struct registry_load *callbacks)
{
    struct waiter *w = calloc(1, sizeof(*w));
    if (w == NULL) {
        return -ENOMEM;
    }
    w->callbacks = *callbacks;
    struct waiter **end = &e->waiters;
    while (*end != NULL) {
        end = &(*end)->next;
    }
    *end = w;
    return 0;
}

/* ---- the loader thread ------------------------------------------------------------------------
 */

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

/* Tells all who waited. Locked: nobody can join the entry in between. */
static void finish_load(struct registry *r, struct entry *e, struct model *m, int rc,
                        const char *message)
{
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

static void *loader_main(void *arg)
{
    struct registry *r = arg;
    pthread_mutex_lock(&r->lock);
    while (!r->stop) {
        struct entry *e = next_load(r);
        if (e == NULL) {
            pthread_cond_wait(&r->wake, &r->lock);
            continue;
        }
        pthread_mutex_unlock(&r->lock);
        struct fmt_error err = {""};
        struct model *m = NULL;
        struct progress p = {r, e};
        int rc = model_load(&e->options, r->options.catalogue, r->options.pool, r->options.io,
                            &e->cancel, on_progress, &p, &m, &err);
        pthread_mutex_lock(&r->lock);
        finish_load(r, e, m, rc, err.text);
    }
    struct entry *e;
    while ((e = next_load(r)) != NULL) {
        finish_load(r, e, NULL, -ECANCELED, "the daemon is ending");
    }
    pthread_mutex_unlock(&r->lock);
    return NULL;
}

/* ---- interface --------------------------------------------------------------------------------
 */

static void registry_free(struct registry *r)
{
    for (size_t i = 0; r->dirs != NULL && i < r->n_dirs; i++) {
        free(r->dirs[i]);
    }
    free(r->dirs);
    pthread_mutex_destroy(&r->lock);
    pthread_cond_destroy(&r->wake);
    free(r);
}

int registry_create(const struct registry_options *options, struct registry **ret)
{
    struct registry *r = calloc(1, sizeof(*r));
    if (r == NULL) {
        return -ENOMEM;
    }
    r->options = *options;
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->wake, NULL);
    r->dirs = calloc(options->n_dirs + 1, sizeof(*r->dirs));
    int rc = r->dirs == NULL ? -ENOMEM : 0;
    for (size_t i = 0; rc == 0 && i < options->n_dirs; i++) {
        r->dirs[i] = strdup(options->dirs[i]);
        rc = r->dirs[i] == NULL ? -ENOMEM : 0;
        r->n_dirs += rc == 0;
    }
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
    while (r->entries != NULL) {
        struct entry *e = r->entries;
        r->entries = e->next;
        entry_destroy(e);
    }
    registry_free(r);
}

int registry_load(struct registry *r, const char *name_or_path, const char *serve_as,
                  const struct model_options *options, const struct registry_load *callbacks,
                  struct fmt_error *err)
{
    pthread_mutex_lock(&r->lock);
    struct entry *e = find(r, serve_as != NULL ? serve_as : name_or_path);
    int rc = 0;
    if (e != NULL && e->model != NULL) {
        rc = fmt_fail(err, -EEXIST, "a model is loaded under the name '%s'", e->name);
    } else if (e == NULL) {
        char path[PATH_MAX];
        rc = resolve(r, name_or_path, path, err);
        if (rc == 0) {
            e = entry_create(r, path, serve_as, options);
            struct entry *same = e != NULL ? find(r, e->name) : NULL;
            if (e == NULL) {
                rc = fmt_fail(err, -ENOMEM, "no memory");
            } else if (same != NULL) {
                rc = fmt_fail(err, -EEXIST, "the name '%s' is taken by %s", e->name, same->path);
                entry_destroy(e);
            }
        }
        if (rc == 0) {
            struct entry **end = &r->entries;
            while (*end != NULL) {
                end = &(*end)->next;
            }
            *end = e;
        }
    }
    if (rc == 0) {
        rc = add_waiter(e, callbacks);
        pthread_cond_signal(&r->wake);
    }
    pthread_mutex_unlock(&r->lock);
    return rc;
}

struct model *registry_get(struct registry *r, const char *name)
{
    pthread_mutex_lock(&r->lock);
    struct entry *e = find(r, name);
    struct model *m = e != NULL && e->model != NULL ? model_ref(e->model) : NULL;
    pthread_mutex_unlock(&r->lock);
    return m;
}

int registry_unload(struct registry *r, const char *name)
{
    pthread_mutex_lock(&r->lock);
    struct entry *e = find(r, name);
    int rc = e == NULL ? -ENOENT : e->model == NULL ? -EBUSY : 0;
    if (rc == 0) {
        unlink_entry(r, e);
    }
    pthread_mutex_unlock(&r->lock);
    if (rc == 0) {
        entry_destroy(e);
    }
    return rc;
}

/* ---- listing ----------------------------------------------------------------------------------
 */

struct listing {
    struct registry_entry *items;
    size_t count, capacity;
};

static int list_add(struct listing *l, const char *name, const char *path,
                    enum registry_state state, struct model *model)
{
    if (l->count == l->capacity) {
        size_t capacity = l->capacity > 0 ? l->capacity * 2 : 16;
        struct registry_entry *items = realloc(l->items, capacity * sizeof(*items));
        if (items == NULL) {
            return -ENOMEM;
        }
        l->items = items;
        l->capacity = capacity;
    }
    struct registry_entry *item = &l->items[l->count++];
    *item = (struct registry_entry){.state = state};
    snprintf(item->name, sizeof(item->name), "%s", name);
    snprintf(item->path, sizeof(item->path), "%s", path);
    item->model = model != NULL ? model_ref(model) : NULL;
    struct stat st;
    item->bytes = stat(path, &st) == 0 ? (uint64_t)st.st_size : 0;
    return 0;
}

/* Files of one folder that no entry has. Later parts of split models are not models. */
static int list_folder(struct registry *r, const char *dir, struct listing *l)
{
    DIR *d = opendir(dir);
    if (d == NULL) {
        return 0; /* an absent folder holds no models */
    }
    int rc = 0;
    for (struct dirent *file; rc == 0 && (file = readdir(d)) != NULL;) {
        const char *split = strstr(file->d_name, "-of-");
        bool later_part =
            split != NULL && split - file->d_name >= 6 && strncmp(split - 6, "-00001", 6) != 0;
        char path[PATH_MAX];
        int n = snprintf(path, sizeof(path), "%s/%s", dir, file->d_name);
        if (!has_suffix(file->d_name) || file->d_name[0] == '.' || later_part || n < 0 ||
            n >= (int)sizeof(path)) {
            continue;
        }
        char *name = base_name(path);
        rc = name == NULL ? -ENOMEM : 0;
        if (rc == 0 && find(r, name) == NULL && find(r, path) == NULL) {
            rc = list_add(l, name, path, REGISTRY_AVAILABLE, NULL);
        }
        free(name);
    }
    closedir(d);
    return rc;
}

int registry_list(struct registry *r, struct registry_entry **ret, size_t *ret_count)
{
    struct listing l = {0};
    int rc = 0;
    pthread_mutex_lock(&r->lock);
    for (struct entry *e = r->entries; rc == 0 && e != NULL; e = e->next) {
        rc = list_add(&l, e->name, e->path, e->model != NULL ? REGISTRY_LOADED : REGISTRY_LOADING,
                      e->model);
    }
    for (size_t i = 0; rc == 0 && i < r->n_dirs; i++) {
        rc = list_folder(r, r->dirs[i], &l);
    }
    pthread_mutex_unlock(&r->lock);
    if (rc < 0) {
        for (size_t i = 0; i < l.count; i++) {
            model_unref(l.items[i].model);
        }
        free(l.items);
        return rc;
    }
    *ret = l.items;
    *ret_count = l.count;
    return 0;
}
