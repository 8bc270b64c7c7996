/* daemon/model/registry_internal.h - what the files of the registry share; private to them. */
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
    char *asked;         /* the name or path, as it was asked for */
    char *name;          /* that it is served under; of a path, not certain before path is known */
    char *path;          /* canonical, if a path was asked for; NULL until it was found */
    bool is_renamed;     /* the name was given, and is not the file's */
    bool is_taken;       /* by a loader */
    struct model *model; /* NULL while loading */
    atomic_bool cancel;  /* set by registry_destroy, read by a loader */
    struct model_options options; /* strings owned: see copy_options() */
    char *strings[2];             /* backend, attention_backend */
    struct registry_waiter *waiters;
};

/* Somebody who asked for the load. */
struct registry_waiter {
    struct registry_waiter *next;
    struct registry_load callbacks;
};

#define REGISTRY_REFUSED_LINES 16u
#define REGISTRY_LOADERS       2u /* one loads, one finds */
#define REGISTRY_LOADERS_MAX   4u
#define REGISTRY_STALLED_NS    (3ull * 1000000000u)
#define REGISTRY_END_S         10u

/* A thread of registry_loader.c's. */
struct loader {
    struct registry *registry;
    pthread_t thread;
    struct io *io;       /* its own, or NULL */
    struct entry *entry; /* that it has taken, or NULL */
    bool loads;          /* it; or looks for its file */
    uint64_t moved_ns;   /* when that last got on */
};

/* The lock guards everything below it; models are immutable once published. */
struct registry {
    struct registry_options options;
    char **dirs;
    size_t n_dirs;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct loader loaders[REGISTRY_LOADERS_MAX];
    uint32_t n_loaders, n_running; /* begun; of these, not ended */
    uint64_t stalled_ns;           /* REGISTRY_STALLED_NS; tests take less */
    uint32_t end_s;                /* REGISTRY_END_S; likewise */
    bool stop, stopped;            /* they shall end; all have */
    uint32_t refs;         /* the owner's, and one of every model that is not destroyed yet */
    struct entry *entries; /* those with model == NULL form the loaders' queue */
    struct entry *retired; /* their models wait for a loader to destroy them */
    struct log_pace refused_lines[REGISTRY_REFUSED_LINES]; /* about models, by their name */
};

/* A plain name has no slash nor control characters, and does not start with a dot. */
bool registry_is_plain_name(const char *name);

/* Whether this may be asked for: a plain name, or a path where paths are allowed. 0, -EINVAL,
 * -EACCES or, where there is no folder, -ENOENT. */
int registry_check_name(const struct registry *r, const char *asked, struct fmt_error *err);
/* The file of a name, in the first folder that has it, or of a path, which becomes canonical. Asks
 * the disk: without the lock. */
int registry_locate(const char *asked, char *const *dirs, size_t n_dirs, char path[PATH_MAX],
                    struct fmt_error *err);
/* With or without the suffix of files. */
bool registry_is_same_name(const char *a, const char *b);
/* -EEXIST: the name of e is taken. */
int registry_fail_taken(const struct entry *e, struct fmt_error *err);

/* A copy, so that nobody waits for a disk to get the lock. Locked by the caller. 0 or -ENOMEM. */
int registry_copy_dirs(const struct registry *r, char ***ret, size_t *ret_n);
/* A malloc'ed list of malloc'ed names; NULL is legal. */
void registry_free_dirs(char **dirs, size_t n_dirs);

/* "name" of "/a/b/name.gguf". Malloc'ed. */
char *registry_base_name(const char *path);

/* Finds by the served name, with or without suffix, or by path; one that is loaded before one that
 * is not. Locked by the caller. */
struct entry *registry_find(struct registry *r, const char *name);

/* Takes it out of the list. Locked by the caller. */
void registry_unlink(struct registry *r, struct entry *e);
/* Its model has been destroyed, or never was. NULL is legal. */
void registry_entry_destroy(struct entry *e);
/* Drops one of r's references. Locked by the caller; unlocks. */
void registry_unlock_and_drop(struct registry *r);

/* 0 or -errno. Locked by the caller. */
int registry_start_loader(struct registry *r);
/* Cancels loads, and waits for the loaders' end. False: not all end (it is logged). */
bool registry_stop_loaders(struct registry *r);
void registry_free_loaders(struct registry *r);

#endif
