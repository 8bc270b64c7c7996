/* daemon/model/registry_internal.h - what registry.c and registry_list.c share; private to them. */
#ifndef DAEMON_MODEL_REGISTRY_INTERNAL_H
#define DAEMON_MODEL_REGISTRY_INTERNAL_H

#include "daemon/log.h"
#include "daemon/model/registry.h"

#include <limits.h>
#include <pthread.h>

/* A model that is loaded or being loaded. Entries are linked in the order of their creation. One
 * whose model was taken out lives until the model's last reference goes; then the loader thread
 * destroys both, since unmapping and closing may take long. */
struct entry {
    struct entry *next;
    struct registry *registry;
    char *name, *path;
    struct model *model;          /* NULL while loading */
    atomic_bool cancel;           /* set by registry_destroy, read by the loader */
    struct model_options options; /* strings owned: see copy_options() */
    char *strings[2];             /* backend, attention_backend */
    struct waiter *waiters;
};

/* Somebody who asked for the load. */
struct waiter {
    struct waiter *next;
    struct registry_load callbacks;
};

#define REGISTRY_REFUSED_LINES 16u

/* The lock guards everything below it; models are immutable once published. */
struct registry {
    struct registry_options options;
    char **dirs;
    size_t n_dirs;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_t loader;
    bool stop, stopped;    /* the loader shall end; has ended */
    uint32_t refs;         /* the owner's, and one of every model that is not destroyed yet */
    struct entry *entries; /* those with model == NULL form the loader's queue */
    struct entry *retired; /* their models wait for the loader to destroy them */
    struct log_pace refused_lines[REGISTRY_REFUSED_LINES]; /* about models, by their name */
};

/* A plain name has no slash and does not start with a dot. */
bool registry_is_plain_name(const char *name);

/* The file of a name, or of a path where paths are allowed, which becomes canonical. */
int registry_resolve(struct registry *r, const char *name, char path[PATH_MAX],
                     struct fmt_error *err);

/* A malloc'ed list of malloc'ed names; NULL is legal. */
void registry_free_dirs(char **dirs, size_t n_dirs);

/* "name" of "/a/b/name.gguf". Malloc'ed. */
char *registry_base_name(const char *path);

/* Finds by the served name, with or without suffix, or by path. Locked by the caller. */
struct entry *registry_find(struct registry *r, const char *name);

#endif
