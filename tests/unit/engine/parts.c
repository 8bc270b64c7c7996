#include "tests/unit/engine/parts.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void need(int rc, const char *what)
{
    if (rc < 0) {
        fprintf(stderr, "%s: %s\n", what, strerror(-rc));
        exit(99);
    }
}

void parts_init(struct parts *p, uint32_t n_threads)
{
    folder_init(&p->folder);
    size_t bytes;
    unsigned char *plugin = file_read(getenv("GQAD_TEST_CPU"), &bytes);
    folder_write(&p->folder, "cpu.so", plugin, bytes, 0755);
    free(plugin);
    need(pool_create(n_threads, 50, &p->pool), "pool");
    need(io_create(false, &p->io), "io");
    const char *dirs[] = {p->folder.path};
    struct backend_catalogue_options options = {.dirs = dirs,
                                                .n_dirs = 1,
                                                .check_program = getenv("GQAD_TEST_CHECK"),
                                                .check_timeout_ms = 120000};
    need(backend_catalogue_create(&options, &p->catalogue), "catalogue");
}

void parts_finish(struct parts *p)
{
    backend_catalogue_destroy(p->catalogue);
    io_destroy(p->io);
    pool_destroy(p->pool);
    folder_finish(&p->folder);
}

struct model_options parts_model_options(void)
{
    return (struct model_options){
        .k_type = GQA_TYPE_F16,
        .v_type = GQA_TYPE_F16,
        .max_batch_rows = PARTS_BATCH,
        .max_out_rows = 128,
    };
}

int parts_try_load(struct parts *p, const struct tiny *t, struct model **ret, struct fmt_error *err)
{
    char path[128];
    snprintf(path, sizeof(path), "%s", folder_path(&p->folder, "try.gguf"));
    tiny_write(t, path);
    struct model_options options = parts_model_options();
    options.path = path;
    options.name = "try";
    return model_load(&options, p->catalogue, p->pool, p->io, NULL, NULL, NULL, ret, err);
}

struct model *parts_load(struct parts *p, const struct tiny *t, const char *name)
{
    return parts_load_kv(p, t, name, parts_model_options().k_type);
}

struct model *parts_load_kv(struct parts *p, const struct tiny *t, const char *name,
                            uint32_t kv_type)
{
    char path[128], file[64];
    struct fmt_error err = {""};
    struct model *m = NULL;
    snprintf(file, sizeof(file), "%s.gguf", name);
    snprintf(path, sizeof(path), "%s", folder_path(&p->folder, file));
    tiny_write(t, path);
    struct model_options options = parts_model_options();
    options.path = path;
    options.name = name;
    options.k_type = options.v_type = kv_type;
    need(model_load(&options, p->catalogue, p->pool, p->io, NULL, NULL, NULL, &m, &err), err.text);
    return m;
}

struct waiting {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    struct model *model;
    int result;
    bool done;
};

static void on_loaded(void *arg, struct model *m, int result, const char *message)
{
    struct waiting *w = arg;
    pthread_mutex_lock(&w->lock);
    w->model = m;
    w->result = result;
    w->done = true;
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
}

struct model *parts_registry_load(struct registry *r, const char *name)
{
    struct waiting w = {.result = 0};
    struct fmt_error err = {""};
    pthread_mutex_init(&w.lock, NULL);
    pthread_cond_init(&w.wake, NULL);
    const struct registry_load callbacks = {.name = name, .on_done = on_loaded, .arg = &w};
    need(registry_load(r, name, NULL, NULL, &callbacks, &err), err.text);
    pthread_mutex_lock(&w.lock);
    while (!w.done) {
        pthread_cond_wait(&w.wake, &w.lock);
    }
    pthread_mutex_unlock(&w.lock);
    need(w.result, name);
    return w.model;
}
