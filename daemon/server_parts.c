/* What computes and where it lies: pool, io, backends, models, engine, folders. */
#include "daemon/server_internal.h"

#include "daemon/log.h"

#include <errno.h>
#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define POOL_SPIN_US     50u
#define CHECK_TIMEOUT_MS 30000u /* of one plugin's check in its child */

static int explain(int rc, const char *what)
{
    if (rc < 0) {
        log_error("%s: %s", what, strerror(-rc));
    }
    return rc;
}

static int make_catalogue(struct parts *p, const struct config *c)
{
    const struct backend_catalogue_options options = {.dirs =
                                                          (const char *const *)c->plugin_dir.items,
                                                      .n_dirs = c->plugin_dir.count,
                                                      .check_timeout_ms = CHECK_TIMEOUT_MS};
    int rc = backend_catalogue_create(&options, &p->catalogue);
    if (rc < 0) {
        return rc;
    }
    struct backend_info info[16];
    size_t n = backend_catalogue_list(p->catalogue, info, 16);
    for (size_t i = 0; i < n && i < 16; i++) {
        if (info[i].usable) {
            log_info("backend %s: %s on %s%s", info[i].name, info[i].isa, info[i].device,
                     info[i].is_default ? " (default)" : "");
        } else {
            log_warning("backend %s (%s) is not usable: %s", info[i].name, info[i].path,
                        info[i].reason);
        }
    }
    if (n == 0) {
        log_warning("no backend lies in %s: no model can be loaded", c->plugin_dir.items[0]);
    }
    return 0;
}

static int make_registry(struct parts *p, const struct config *c)
{
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
                     .max_batch_rows = c->batch_size,
                     .max_out_rows = max_out_rows < c->batch_size ? max_out_rows : c->batch_size,
                     .backend = c->backend[0] ? c->backend : NULL,
                     .attention_backend = c->attention[0] ? c->attention : NULL}};
    return registry_create(&options, &p->registry);
}

int parts_create(struct parts *p, const struct config *c, void (*notify)(void *), void *notify_arg)
{
    const struct engine_options engine = {.n_batch = c->batch_size,
                                          .n_parallel = c->parallel,
                                          .n_queue = c->queue_size,
                                          .kv_bytes_max = c->kv_bytes,
                                          .notify = notify,
                                          .notify_arg = notify_arg};
    *p = (struct parts){0};
    int rc = explain(pool_create(c->threads, POOL_SPIN_US, &p->pool), "compute threads");
    if (rc == 0) {
        rc = explain(io_create(!c->io_uring, &p->io), "the io thread");
    }
    if (rc == 0 && c->io_uring && !io_uses_uring(p->io)) {
        log_info("io_uring is refused here: files are read with pread");
    }
    if (rc == 0) {
        rc = explain(make_catalogue(p, c), "backends");
    }
    if (rc == 0) {
        rc = explain(make_registry(p, c), "models");
    }
    if (rc == 0) {
        struct engine_options options = engine;
        options.pool = p->pool;
        rc = explain(engine_create(&options, &p->engine), "the engine");
    }
    if (rc < 0) {
        parts_stop(p);
        parts_destroy(p);
    }
    return rc;
}

void parts_stop(struct parts *p)
{
    engine_destroy(p->engine);
    p->engine = NULL;
    registry_destroy(p->registry);
    p->registry = NULL;
}

void parts_destroy(struct parts *p)
{
    backend_catalogue_destroy(p->catalogue);
    io_destroy(p->io);
    pool_destroy(p->pool);
    *p = (struct parts){0};
}

/* ---- folders ----------------------------------------------------------------------------- */

/* Makes the folder and its parents; only the last one's mode matters to us. */
static int make_dirs(const char *path)
{
    char copy[4096];
    if (snprintf(copy, sizeof(copy), "%s", path) >= (int)sizeof(copy)) {
        return -ENAMETOOLONG;
    }
    for (char *slash = strchr(copy + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        if (mkdir(copy, 0700) < 0 && errno != EEXIST) {
            return -errno;
        }
        *slash = '/';
    }
    return mkdir(copy, 0700) < 0 && errno != EEXIST ? -errno : 0;
}

/* What users said to the models lies in there: nobody else may look. */
static int check_private(const char *path)
{
    struct stat st;
    if (stat(path, &st) < 0) {
        return -errno;
    }
    if (!S_ISDIR(st.st_mode)) {
        return -ENOTDIR;
    }
    if (st.st_uid != geteuid()) {
        return -EPERM;
    }
    return (st.st_mode & 077) && chmod(path, 0700) < 0 ? -errno : 0;
}

static int make_temporary(struct server *s)
{
    const char *base = getenv("TMPDIR");
    char *path = NULL;
    if (asprintf(&path, "%s/gqad-XXXXXX", base && base[0] == '/' ? base : "/tmp") < 0) {
        return explain(-ENOMEM, "the cache folder");
    }
    if (!mkdtemp(path)) {
        int rc = explain(-errno, path);
        free(path);
        return rc;
    }
    s->temporary_dir = path;
    return 0;
}

int places_create(struct server *s, bool temporary_cache)
{
    if (temporary_cache) {
        return make_temporary(s);
    }
    const char *path = s->config->cache_dir;
    int rc = make_dirs(path);
    rc = rc < 0 ? rc : check_private(path);
    if (rc < 0) {
        log_error("cache_dir %s: %s", path, strerror(-rc));
    }
    return rc;
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    return remove(path);
}

void places_destroy(struct server *s)
{
    if (s->temporary_dir) {
        nftw(s->temporary_dir, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
        free(s->temporary_dir);
        s->temporary_dir = NULL;
    }
}
