/* What computes: pool, io, backends, models, engine. */
#include "daemon/server_internal.h"

#include "daemon/log.h"
#include "daemon/model/weights_cache.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define POOL_SPIN_US     50u
#define CHECK_TIMEOUT_MS 30000u /* of one plugin's check in its child */

static int explain(int rc, const char *what)
{
    if (rc < 0) {
        log_error("%s: %s", what, strerror(-rc));
    }
    return rc;
}

/* Scans the folders. What is remembered lies in the user's own cache even where the rest is
 * temporary: nothing of it is about prompts. */
static int open_catalogue(struct parts *p, const struct config *c)
{
    char *verdicts = NULL;
    if (c->plugin_verdicts && asprintf(&verdicts, "%s/verdicts", c->cache_dir) < 0) {
        return -ENOMEM;
    }
    if (verdicts) {
        places_make_private(c->cache_dir); /* where that fails nothing is remembered */
    }
    const struct backend_catalogue_options options = {
        .dirs = (const char *const *)c->plugin_dir.items,
        .n_dirs = c->plugin_dir.count,
        .check_timeout_ms = CHECK_TIMEOUT_MS,
        .verdicts = verdicts,
    };
    int rc = backend_catalogue_create(&options, &p->catalogue);
    free(verdicts);
    return rc;
}

/* A setting's backend that is not there: known now, not with the first model. */
static void tell_missing(const char *key, const char *spec, const struct backend_info *info,
                         size_t n)
{
    size_t bytes = strcspn(spec, ":");
    for (size_t i = 0; i < n; i++) {
        if (strlen(info[i].name) == bytes && strncmp(info[i].name, spec, bytes) == 0) {
            return;
        }
    }
    if (bytes > 0 && n > 0) {
        log_warning("%s = %s: no plugin is called '%.*s': no model can be loaded unless it names "
                    "another",
                    key, spec, (int)bytes, spec);
    }
}

static int make_catalogue(struct parts *p, const struct config *c)
{
    int rc = open_catalogue(p, c);
    if (rc < 0) {
        return rc;
    }
    struct backend_info info[16];
    size_t n = backend_catalogue_list(p->catalogue, info, 16);
    /* Of those that are not usable the catalogue has told why. */
    for (size_t i = 0; i < n && i < 16; i++) {
        if (info[i].usable) {
            log_info("backend %s: %s on %s%s", info[i].name, info[i].isa, info[i].device,
                     info[i].is_default ? " (default)" : "");
        }
    }
    if (n <= 16) { /* else the rest may have it */
        tell_missing("backend", c->backend, info, n);
        tell_missing("attention", c->attention, info, n);
    }
    if (n == 0) {
        log_warning("no backend lies in %s: no model can be loaded", c->plugin_dir.items[0]);
    }
    return 0;
}

static int make_registry(struct parts *p, const struct config *c)
{
    places_tell_missing(c);
    uint32_t max_out_rows = engine_max_out_rows(c->parallel);
    const struct registry_options options = {
        .dirs = (const char *const *)c->models_dir.items,
        .n_dirs = c->models_dir.count,
        .allow_paths = c->user_mode,
        .catalogue = p->catalogue,
        .pool = p->pool,
        .io = p->io,
        .defaults = {.n_ctx = c->ctx_size,
                     .k_type = c->cache_type_k,
                     .v_type = c->cache_type_v,
                     .digests = p->digests,
                     .weights = p->weights,
                     .max_batch_rows = c->batch_size,
                     .max_out_rows = max_out_rows < c->batch_size ? max_out_rows : c->batch_size,
                     .backend = c->backend[0] ? c->backend : NULL,
                     .attention_backend = c->attention[0] ? c->attention : NULL}};
    return registry_create(&options, &p->registry);
}

/* Packed weights, and what names them: in the user's own cache even where the rest is temporary. A
 * folder that cannot be made is the cache's trouble to tell, when it is wanted. */
static int make_weights_cache(struct parts *p, const struct config *c)
{
    if (asprintf(&p->digests, "%s/digests", c->cache_dir) < 0) {
        p->digests = NULL;
        return -ENOMEM;
    }
    char *folder;
    if (!c->weights_cache) {
        return 0;
    }
    if (asprintf(&folder, "%s/weights", c->cache_dir) < 0) {
        return -ENOMEM;
    }
    places_make_private(c->cache_dir);
    const struct weights_cache_options options = {.folder = folder,
                                                  .bytes_max = places_weights_bytes(c)};
    int rc = weights_cache_create(&options, &p->weights);
    free(folder);
    return rc;
}

/* The store's io thread is not the loader's: a large model is read for minutes, and blocks must not
 * wait for that. */
static int make_cache_files(struct parts *p, const struct config *c)
{
    if (!c->kv_store) {
        return 0;
    }
    if (asprintf(&p->kv_folder, "%s/kv", c->cache_dir) < 0) {
        p->kv_folder = NULL;
        return -ENOMEM;
    }
    int rc = places_make_private(p->kv_folder);
    if (rc < 0) {
        log_warning("%s: %s: the KV cache is kept in memory alone", p->kv_folder, strerror(-rc));
        free(p->kv_folder);
        p->kv_folder = NULL;
        return 0;
    }
    return io_create(!c->io_uring, &p->kv_io);
}

static int make_engine(struct parts *p, const struct config *c, void (*notify)(void *),
                       void *notify_arg)
{
    const struct engine_options options = {
        .pool = p->pool,
        .n_batch = c->batch_size,
        .n_parallel = c->parallel,
        .n_queue = c->queue_size,
        .step_ms_target = c->step_ms_target,
        .kv = {.arena_bytes_max = c->kv_bytes,
               .folder = p->kv_folder,
               .io = p->kv_io,
               .store_bytes_max = places_store_bytes(c),
               .store_bytes_per_realm = c->kv_store_bytes_per_user,
               .pool = p->pool},
        .notify = notify,
        .notify_arg = notify_arg,
    };
    int rc = engine_create(&options, &p->engine);
    if (rc == -ETIMEDOUT) {
        p->kv_io = NULL; /* as in parts_destroy_engine() */
    }
    return rc;
}

int parts_create(struct parts *p, const struct config *c, bool in_memory, void (*notify)(void *),
                 void *notify_arg)
{
    *p = (struct parts){0};
    int rc = explain(pool_create(c->threads, POOL_SPIN_US, &p->pool), "compute threads");
    if (rc == 0) {
        rc = explain(io_create(!c->io_uring, &p->io), "the io thread");
    }
    if (rc == 0 && c->io_uring && !io_uses_uring(p->io)) {
        log_info("io_uring is refused here: files are read with pread");
    }
    if (rc == 0) {
        rc = explain(in_memory ? 0 : make_cache_files(p, c), "the folder of the KV cache");
    }
    if (rc == 0 && (!in_memory || c->weights_cache)) {
        rc = explain(make_weights_cache(p, c), "the folder of packed weights");
    }
    if (rc == 0) {
        rc = explain(make_catalogue(p, c), "backends");
    }
    if (rc == 0) {
        rc = explain(make_registry(p, c), "models");
    }
    if (rc == 0) {
        rc = explain(make_engine(p, c, notify, notify_arg), "the engine");
    }
    if (rc < 0 && parts_stop(p)) { /* nothing loads yet */
        parts_destroy(p);
    }
    return rc;
}

bool parts_stop(struct parts *p)
{
    engine_stop(p->engine);
    bool ended = registry_destroy(p->registry);
    p->registry = NULL;
    return ended;
}

void parts_destroy_engine(struct parts *p)
{
    if (!engine_destroy(p->engine)) {
        p->kv_io = NULL; /* its thread ends when the disk answers, or with the process */
    }
    p->engine = NULL;
}

void parts_destroy(struct parts *p)
{
    parts_destroy_engine(p);
    backend_catalogue_destroy(p->catalogue);
    io_destroy(p->kv_io);
    io_destroy(p->io);
    pool_destroy(p->pool);
    weights_cache_destroy(p->weights);
    free(p->kv_folder);
    free(p->digests);
    *p = (struct parts){0};
}
