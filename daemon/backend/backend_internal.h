/* daemon/backend/backend_internal.h - what catalogue.c and backend.c share; private to this folder.
 *
 * Locks: scanning serialises scans, which take seconds (children run); lock guards the entries and
 * the modules' counts, and is held for moments only; loading serialises dlopen of one module. None
 * is taken while another is held, except lock inside scanning. */
#ifndef DAEMON_BACKEND_BACKEND_INTERNAL_H
#define DAEMON_BACKEND_BACKEND_INTERNAL_H

#include "daemon/backend/backend.h"
#include "daemon/backend/check.h"
#include "daemon/backend/image.h"

#include <limits.h>
#include <pthread.h>

#define MAX_PLUGINS       64
#define MODULE_TESTED_MAX 8u /* options whose self-test is remembered */

/* One version of a plugin's file: mapped while a backend uses it. The catalogue holds a reference
 * to the newest; backends hold theirs. */
struct module {
    unsigned refs; /* guarded by the catalogue's lock */
    struct plugin_image image;
    void *handle; /* NULL until the first open; guarded by loading */
    const struct gqa_plugin *plugin;
    bool stays_mapped; /* its threads outlive close(): unmapping would pull their code away */
    char tested[MODULE_TESTED_MAX][64]; /* options that passed; guarded by the catalogue's lock */
    uint32_t n_tested;
};

/* A file that was found. Entries stay where they are until the catalogue ends. */
struct entry {
    char path[PATH_MAX];
    struct module *module; /* NULL when the file was refused or is gone */
    struct plugin_report report;
    struct gqa_reason reason; /* why it is not usable */
    bool usable;
    bool seen; /* by the scan in progress */
    unsigned users;
    uint64_t n_faults; /* of steps */
    char last_fault[128];
};

struct backend_catalogue {
    pthread_mutex_t scanning, lock, loading;
    char **dirs;
    size_t n_dirs;
    char check_program[PATH_MAX];
    char *verdicts;
    struct plugin_checker checker; /* with the two above */
    struct entry entries[MAX_PLUGINS];
    size_t n_entries;
};

/* Drops a reference that was counted under the lock. NULL is legal. */
void catalogue_module_unref(struct backend_catalogue *c, struct module *m);

/* The entry of spec's name (NULL: of the best plugin), with a reason where there is none that can
 * be used. Locked by the caller. */
int catalogue_choose(struct backend_catalogue *c, const char *spec, struct entry **ret,
                     struct gqa_reason *reason);

#endif
