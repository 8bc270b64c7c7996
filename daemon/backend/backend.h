/* daemon/backend/backend.h - plugins: found, checked, opened, counted.
 *
 * The catalogue lists the plugins of the configured folders. Loading one: owner and mode are
 * checked, the file is copied to a sealed memfd, its ELF note is read and a foreign ABI refused
 * before any code runs, probe and self-test run in a child (gqa-plugin-check) under a deadline
 * unless these bytes have passed here before, and only then is it opened with dlopen through
 * /proc/self/fd, which stays open until after dlclose.
 *
 * A backend is one opened context (plugin + options) over one pool; it is reference counted, and
 * its plugin stays mapped while any context lives. Catalogue functions are safe from any thread;
 * a context's interfaces are used by the engine thread only. */
#ifndef DAEMON_BACKEND_BACKEND_H
#define DAEMON_BACKEND_BACKEND_H

#include "daemon/backend/check.h"
#include "daemon/backend/pool.h"

#include <gqa/plugin.h>
#include <stdbool.h>
#include <stddef.h>

struct backend_catalogue;
struct backend;

struct backend_catalogue_options {
    const char *const *dirs; /* searched in order; the first of a name wins */
    size_t n_dirs;
    const char *check_program; /* gqa-plugin-check, or NULL: beside the daemon's own binary */
    unsigned check_timeout_ms; /* of one child */
    /* Folder of checks that were passed (verdict.h), or NULL: each start checks everything. */
    const char *verdicts;
};

/* Scans the folders; a bad plugin is listed as unusable with its reason, never an error. */
int backend_catalogue_create(const struct backend_catalogue_options *options,
                             struct backend_catalogue **ret);
void backend_catalogue_destroy(struct backend_catalogue *c); /* all backends must be released */
/* Looks at the folders again: new and replaced files are seen; open backends are untouched. */
int backend_catalogue_rescan(struct backend_catalogue *c);

/* What backend.list tells of one plugin. Strings are copies. */
struct backend_info {
    char name[32], version[32], build[128], path[512];
    char isa[64], isas[192], device[128], reason[256];
    char interfaces[128]; /* comma-separated */
    uint16_t abi_major, abi_minor;
    bool usable, is_default;
    bool remembered; /* its check was passed before this start */
    unsigned users;  /* open contexts */
    uint32_t score, n_devices;
    uint32_t caps;     /* enum gqa_attn_caps of its attention */
    uint64_t n_faults; /* steps that it failed */
    char last_fault[128];
};
/* Fills up to max entries; returns how many there are. */
size_t backend_catalogue_list(struct backend_catalogue *c, struct backend_info *ret, size_t max);

/* Whether that is the name of the plugin that a spec of NULL stands for. */
bool backend_is_default(struct backend_catalogue *c, const char *name);

/* Opens spec, "NAME" or "NAME:options" (NULL: the usable plugin of the highest score, with a
 * program interface). -ENOENT, -ENOTSUP, -EACCES, ... with a reason. pool outlives the backend. */
int backend_open(struct backend_catalogue *c, const char *spec, struct pool *pool,
                 struct backend **ret, struct gqa_reason *reason);
/* Runs the self-test of spec's plugin, with its options, in a child. The plugin's errors are
 * results of the report; otherwise -errno with a reason. Takes seconds. */
int backend_selftest(struct backend_catalogue *c, const char *spec, struct plugin_report *ret,
                     struct gqa_reason *reason);
/* The same, unless this file has passed with these options before. */
int backend_ensure_tested(struct backend_catalogue *c, const char *spec, struct gqa_reason *reason);

/* Counts a step that the backend failed, for backend_catalogue_list(). */
void backend_note_fault(struct backend *b, const char *what);

struct backend *backend_ref(struct backend *b);
void backend_unref(struct backend *b); /* the last one closes the context; NULL is legal */

/* Lends work to the pool's threads: pool_parallel(). Engine thread. */
void backend_parallel(const struct backend *b, gqa_task_fn fn, void *arg, uint32_t n_tasks);

const char *backend_name(const struct backend *b); /* "cpu" */
const char *backend_spec(const struct backend *b); /* "cpu:isa=avx2" as opened */
const char *backend_isa(const struct backend *b);  /* level in use, from options or probe */
void *backend_context(const struct backend *b);
const struct gqa_attention *backend_attention(const struct backend *b); /* never NULL */
const struct gqa_program *backend_program(const struct backend *b);     /* NULL: attention only */

#endif
