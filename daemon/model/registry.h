/* daemon/model/registry.h - models by name: available, loading, loaded.
 *
 * A name is a file's name in the models folders without ".gguf", an alias from the configuration,
 * or, where paths are allowed (a per-user daemon), an absolute path. Loading happens on the
 * registry's threads, one model at a time, in the order asked for, and finding files beside it;
 * while a disk does not answer, others are found and loaded, too. The same threads destroy models
 * whose last reference was dropped, so that nobody else waits for that.
 *
 * All functions are for the loop thread and touch no disk, but for registry_list(). Callbacks run
 * on a loader thread: they must only hand the news to the loop. */
#ifndef DAEMON_MODEL_REGISTRY_H
#define DAEMON_MODEL_REGISTRY_H

#include "daemon/model/model.h"

struct registry;

struct registry_options {
    const char *const *dirs; /* models folders */
    size_t n_dirs;
    bool allow_paths;
    struct backend_catalogue *catalogue;
    struct pool *pool;
    struct io *io;
    struct model_options defaults; /* path and name unused; strings must outlive the registry */
};

/* Other folders from now on; copied. What is loaded stays. -ENOMEM: nothing has changed. */
int registry_set_dirs(struct registry *r, const char *const *dirs, size_t n_dirs);

enum registry_state { REGISTRY_AVAILABLE, REGISTRY_LOADING, REGISTRY_LOADED };

int registry_create(const struct registry_options *options, struct registry **ret);
/* Cancels loads and drops its references. Models that others still hold are destroyed by whoever
 * drops them last; until then the registry's options (catalogue, pool) must live.
 * False: a load does not end within 10 s, since a disk does not answer (it is logged). Then nothing
 * was freed, and the process is to end without it. */
bool registry_destroy(struct registry *r);

/* One load as the caller asked for it; owned by the registry, valid inside the callbacks only. */
struct registry_load {
    const char *name;
    /* Loader or io thread. stage: "map", "read", "check", "pack", "ready". */
    void (*on_progress)(void *arg, const char *stage, uint64_t done, uint64_t total);
    /* Loader thread, once: m is a new reference for the callee. NULL on failure, with the error:
     * -ENOENT, no such file in the folders; -EEXIST, the name is taken. But with -EEXIST m is the
     * model if it had been loaded from that very file, by another path. */
    void (*on_done)(void *arg, struct model *m, int result, const char *message);
    void *arg;
};

/* Starts (or joins) the load of a model. name_or_path as above; options override the defaults where
 * non-zero, non-NULL or, for the cache types, not GQA_NONE (strings are copied); serve_as may be
 * NULL. 0: callbacks will come. -EEXIST: already loaded under that name (options are then not
 * looked at), or another file is about to be. -ENOENT: there are no folders. -EINVAL: a bad name.
 * -EACCES: a path where none is allowed. err tells. */
int registry_load(struct registry *r, const char *name_or_path, const char *serve_as,
                  const struct model_options *options, const struct registry_load *callbacks,
                  struct fmt_error *err);

/* Begins another thread where nobody is left to do what waits. To be called every second.
 */
void registry_relieve(struct registry *r);

/* A new reference to a loaded model by its name (or by the path that it was loaded from), or NULL:
 * it is not loaded, or damaged (model.h), and has left. */
struct model *registry_get(struct registry *r, const char *name);

/* Takes the model out of the registry; running requests keep theirs. *ret is the registry's
 * reference, the caller's from now on. -ENOENT, -EBUSY (loading). */
int registry_unload(struct registry *r, const char *name, struct model **ret);

struct registry_entry {
    char name[256];
    char path[4096];
    enum registry_state state;
    uint64_t bytes;
    struct model *model; /* a reference when loaded (model_unref it), else NULL */
};
/* Loaded, loading and available models. *ret is malloc'ed. Reads the models' folders, which may
 * take long: not for the loop. */
int registry_list(struct registry *r, struct registry_entry **ret, size_t *ret_count);
/* Loaded models only, without bytes: at once. */
int registry_loaded(struct registry *r, struct registry_entry **ret, size_t *ret_count);

#endif
