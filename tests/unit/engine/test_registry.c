/* Models by name: what may be named, who waits for a load, and how entries end. */
#include "daemon/model/registry_internal.h"
#include "tests/unit/engine/parts.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct parts parts;
static struct registry *registry;

static void open_registry(bool allow_paths)
{
    const char *dirs[] = {parts.folder.path};
    struct registry_options o = {
        .dirs = dirs,
        .n_dirs = 1,
        .allow_paths = allow_paths,
        .catalogue = parts.catalogue,
        .pool = parts.pool,
        .io = parts.io,
        .defaults = parts_model_options(),
    };
    cr_assert(eq(int, registry_create(&o, &registry), 0));
}

static void setup(void)
{
    struct tiny t = tiny_default();
    parts_init(&parts, 1);
    tiny_write(&t, folder_path(&parts.folder, "a.gguf"));
    tiny_write(&t, folder_path(&parts.folder, "b.gguf"));
    open_registry(false);
}

static void teardown(void)
{
    registry_destroy(registry);
    parts_finish(&parts);
}

TestSuite(registry, .init = setup, .fini = teardown, .timeout = 120);

/* One who waits for a load. */
struct waiter {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int done, result;
    bool progress_after_done, saw_ready;
    struct model *model;
    char message[320];
};

static void on_progress(void *arg, const char *stage, uint64_t done, uint64_t total)
{
    struct waiter *w = arg;
    w->progress_after_done |= w->done > 0;
    w->saw_ready |= strcmp(stage, "ready") == 0;
}

static void on_done(void *arg, struct model *m, int result, const char *message)
{
    struct waiter *w = arg;
    pthread_mutex_lock(&w->lock);
    w->done++;
    w->model = m;
    w->result = result;
    snprintf(w->message, sizeof(w->message), "%s", message);
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
}

static void waiter_init(struct waiter *w)
{
    *w = (struct waiter){0};
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->wake, NULL);
}

static int load(struct waiter *w, const char *name, const char *serve_as, struct fmt_error *err)
{
    const struct registry_load callbacks = {
        .name = name, .on_progress = on_progress, .on_done = on_done, .arg = w};
    err->text[0] = '\0';
    return registry_load(registry, name, serve_as, NULL, &callbacks, err);
}

static int wait_for(struct waiter *w)
{
    pthread_mutex_lock(&w->lock);
    while (w->done == 0) {
        pthread_cond_wait(&w->wake, &w->lock);
    }
    pthread_mutex_unlock(&w->lock);
    cr_expect(eq(int, w->done, 1));
    cr_expect(not(w->progress_after_done));
    return w->result;
}

/* Loads and waits; the reference is dropped. */
static int load_now(const char *name, const char *serve_as)
{
    struct waiter w;
    struct fmt_error err;
    waiter_init(&w);
    int rc = load(&w, name, serve_as, &err);
    rc = rc < 0 ? rc : wait_for(&w);
    model_unref(w.model);
    return rc;
}

static unsigned users_of_cpu(void)
{
    struct backend_info info[1];
    backend_catalogue_list(parts.catalogue, info, 1);
    return info[0].users;
}

Test(registry, loads_by_name_and_lists)
{
    struct registry_entry *list;
    size_t n;
    cr_assert(eq(int, load_now("a", NULL), 0));
    cr_expect(eq(int, load_now("a", NULL), -EEXIST));
    cr_expect(eq(int, load_now("b.gguf", "other"), 0));
    struct model *m = registry_get(registry, "a"), *o = registry_get(registry, "other");
    cr_assert(m != NULL && o != NULL);
    cr_expect(eq(int, strcmp(model_name(o), "other"), 0));
    cr_expect(registry_get(registry, "b") == NULL);
    struct tiny t = tiny_default();
    tiny_write(&t, folder_path(&parts.folder, "c.gguf"));
    tiny_write(&t, folder_path(&parts.folder, "d-00001-of-00002.gguf"));
    tiny_write(&t, folder_path(&parts.folder, "d-00002-of-00002.gguf"));
    tiny_write(&t, folder_path(&parts.folder, "the-best-of-them.gguf"));
    tiny_write(&t, folder_path(&parts.folder, ".hidden.gguf"));
    cr_assert(eq(int, registry_list(registry, &list, &n), 0));
    unsigned seen = 0;
    for (size_t i = 0; i < n; i++) {
        bool loaded = strcmp(list[i].name, "a") == 0 || strcmp(list[i].name, "other") == 0;
        bool available = strcmp(list[i].name, "c") == 0 ||
                         strcmp(list[i].name, "d-00001-of-00002") == 0 ||
                         strcmp(list[i].name, "the-best-of-them") == 0;
        cr_expect(loaded || available, "%s", list[i].name);
        cr_expect(eq(int, list[i].state, loaded ? REGISTRY_LOADED : REGISTRY_AVAILABLE));
        cr_expect(eq(int, list[i].model != NULL, loaded));
        cr_expect(lt(u64, 1000, list[i].bytes));
        model_unref(list[i].model);
        seen++;
    }
    cr_expect(eq(u32, seen, 5));
    free(list);
    cr_assert(eq(int, registry_loaded(registry, &list, &n), 0));
    cr_assert(eq(sz, n, 2));
    for (size_t i = 0; i < n; i++) {
        cr_expect(list[i].model == m || list[i].model == o);
        model_unref(list[i].model);
    }
    free(list);
    model_unref(m);
    model_unref(o);
}

Test(registry, bad_names_are_refused)
{
    static const char *const bad[] = {"../a", ".hidden", "a/b", "", "./a", "..", "x/../a"};
    struct waiter w;
    struct fmt_error err;
    waiter_init(&w);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        cr_expect(eq(int, load(&w, bad[i], NULL, &err), -EINVAL), "%s", bad[i]);
        cr_expect(err.text[0] != '\0');
        cr_expect(eq(int, load(&w, "a", bad[i], &err), -EINVAL), "%s", bad[i]);
        cr_expect(err.text[0] != '\0');
    }
    cr_expect(eq(int, load(&w, "a\nb", NULL, &err), -EINVAL));
    cr_expect(eq(int, load(&w, folder_path(&parts.folder, "a.gguf"), NULL, &err), -EACCES));
    cr_expect(eq(int, w.done, 0));
    struct model *m;
    cr_expect(eq(int, registry_unload(registry, "a", &m), -ENOENT));
    cr_expect(eq(int, load(&w, "nothing", NULL, &err), 0)); /* the loader looks for it */
    cr_expect(eq(int, wait_for(&w), -ENOENT));
    cr_expect(strstr(w.message, "'nothing'") != NULL, "%s", w.message);
    cr_expect(strstr(w.message, parts.folder.path) == NULL, "%s", w.message);
}

Test(registry, paths_where_they_are_allowed)
{
    char path[128], link[128], other[128];
    struct waiter w;
    struct fmt_error err;
    waiter_init(&w);
    registry_destroy(registry);
    open_registry(true);
    snprintf(path, sizeof(path), "%s", folder_path(&parts.folder, "a.gguf"));
    snprintf(link, sizeof(link), "%s", folder_path(&parts.folder, "link.gguf"));
    snprintf(other, sizeof(other), "%s", folder_path(&parts.folder, "other.gguf"));
    cr_assert(eq(int, symlink(path, link), 0));
    cr_expect(eq(int, load_now(link, NULL), 0));
    struct model *m = registry_get(registry, path);
    cr_expect(m != NULL); /* by the path that the link leads to */
    model_unref(m);
    m = registry_get(registry, "a");
    cr_expect(m != NULL);
    model_unref(m);
    cr_expect(eq(int, load(&w, path, NULL, &err), -EEXIST));
    cr_expect(eq(int, load(&w, link, NULL, &err), 0)); /* where it leads to the loader finds out */
    cr_expect(eq(int, wait_for(&w), -EEXIST));
    m = registry_get(registry, "a");
    cr_expect(eq(ptr, w.model, m)); /* the same file's */
    model_unref(w.model);
    model_unref(m);
    cr_expect(eq(int, load_now("/nonexistent/x.gguf", NULL), -ENOENT));
    cr_assert(eq(int, symlink(folder_path(&parts.folder, "b.gguf"), other), 0));
    waiter_init(&w);
    cr_expect(eq(int, load(&w, other, "a", &err), -EEXIST));
    cr_expect(eq(int, load_now(other, NULL), 0)); /* as "b" */
    m = registry_get(registry, "b");
    cr_expect(m != NULL);
    model_unref(m);
}

/* All are asked for before the loader can have come to the third: "a" is loaded once, for two. */
Test(registry, two_waiters_share_one_load)
{
    struct waiter first, second, third, other;
    struct fmt_error err;
    waiter_init(&first);
    waiter_init(&second);
    waiter_init(&third);
    waiter_init(&other);
    cr_assert(eq(int, load(&first, "b", NULL, &err), 0), "%s", err.text);
    cr_assert(eq(int, load(&second, "a", NULL, &err), 0), "%s", err.text);
    int joined = load(&third, "a.gguf", NULL, &err);
    cr_expect(eq(int, load(&other, "b", "a", &err), -EEXIST), "another file under that name");
    cr_expect(strstr(err.text, "'a'") != NULL, "%s", err.text);
    cr_expect(strstr(err.text, parts.folder.path) == NULL, "%s", err.text);
    cr_expect(eq(int, wait_for(&first), 0));
    cr_expect(eq(int, wait_for(&second), 0));
    cr_expect(second.saw_ready);
    if (joined == 0) {
        cr_expect(eq(int, wait_for(&third), 0));
        cr_expect(third.saw_ready);
        cr_expect(eq(ptr, second.model, third.model));
    } else {
        fprintf(stderr, "NOTE: both loads had ended before the third was asked for\n");
        cr_expect(eq(int, joined, -EEXIST));
    }
    model_unref(first.model);
    model_unref(second.model);
    model_unref(third.model);
}

static sem_t held, let_go;

static int hold_io(void *arg)
{
    sem_post(&held);
    sem_wait(&let_go);
    return 0;
}

static bool is_done(struct waiter *w)
{
    pthread_mutex_lock(&w->lock);
    bool done = w->done > 0;
    pthread_mutex_unlock(&w->lock);
    return done;
}

/* The first load reads by an io thread that does not answer. */
Test(registry, a_load_that_stands_still_is_not_waited_for)
{
    struct io_call_job hold = {.fn = hold_io};
    struct waiter first, second, same;
    struct fmt_error err;
    waiter_init(&first);
    waiter_init(&second);
    waiter_init(&same);
    pthread_mutex_lock(&registry->lock);
    registry->stalled_ns = UINT64_MAX;
    pthread_mutex_unlock(&registry->lock);
    sem_init(&held, 0, 0);
    sem_init(&let_go, 0, 0);
    cr_assert(eq(int, io_submit_call(parts.io, &hold), 0));
    sem_wait(&held);
    cr_assert(eq(int, load(&first, "a", NULL, &err), 0));
    cr_expect(eq(int, load_now("nothing", NULL), -ENOENT)); /* nor for a load to find a file */
    cr_assert(eq(int, load(&second, "b", NULL, &err), 0));
    registry_relieve(registry);
    cr_expect(not(is_done(&second))); /* the first may still get on */
    cr_expect(eq(u32, registry->n_loaders, REGISTRY_LOADERS));
    pthread_mutex_lock(&registry->lock);
    registry->stalled_ns = 0;
    pthread_mutex_unlock(&registry->lock);
    while (!is_done(&second)) { /* the first may not have taken its own yet */
        registry_relieve(registry);
        sched_yield();
    }
    model_unref(second.model);
    cr_expect(not(is_done(&first)));
    cr_assert(eq(int, load(&same, "a", NULL, &err), 0)); /* waits for the first */
    registry_relieve(registry);
    sem_post(&let_go);
    cr_expect(eq(int, wait_for(&first), 0));
    cr_expect(eq(int, wait_for(&same), 0));
    cr_expect(eq(ptr, first.model, same.model));
    model_unref(first.model);
    model_unref(same.model);
    cr_expect(eq(int, load_now("b", NULL), -EEXIST));
}

Test(registry, a_failure_is_told_to_all_and_may_be_tried_again)
{
    struct tiny t = tiny_default();
    t.without_tensor = "output_norm.weight";
    tiny_write(&t, folder_path(&parts.folder, "c.gguf"));
    struct waiter w;
    struct fmt_error err;
    waiter_init(&w);
    cr_assert(eq(int, load(&w, "c", NULL, &err), 0));
    cr_expect(eq(int, wait_for(&w), -EINVAL));
    cr_expect(w.model == NULL);
    cr_expect(strstr(w.message, "output_norm.weight is missing") != NULL, "%s", w.message);
    cr_expect(strncmp(w.message, "c.gguf: ", 8) == 0, "'%s' names the folder", w.message);
    t = tiny_default();
    tiny_write(&t, folder_path(&parts.folder, "c.gguf"));
    cr_expect(eq(int, load_now("c", NULL), 0));
}

Test(registry, a_model_that_is_unloaded_lives_for_those_who_use_it)
{
    cr_assert(eq(int, load_now("a", NULL), 0));
    struct model *m = registry_get(registry, "a"), *its = NULL;
    cr_assert(m != NULL);
    cr_expect(eq(int, registry_unload(registry, "a", &its), 0));
    cr_expect(eq(ptr, its, m));
    model_unref(its); /* the registry's */
    cr_expect(eq(int, registry_unload(registry, "a", &its), -ENOENT));
    cr_expect(registry_get(registry, "a") == NULL);
    cr_expect(eq(u32, tokenizer_n_vocab(model_tokenizer(m)), TINY_VOCAB));
    cr_expect(eq(u32, users_of_cpu(), 1));
    cr_expect(eq(int, load_now("a", NULL), 0)); /* a second one beside it */
    cr_expect(eq(u32, users_of_cpu(), 2));
    model_unref(m);
    registry_destroy(registry); /* waits for what the loader has to destroy */
    cr_expect(eq(u32, users_of_cpu(), 0));
    open_registry(false);
}

Test(registry, a_model_may_outlive_the_registry)
{
    cr_assert(eq(int, load_now("a", NULL), 0));
    struct model *m = registry_get(registry, "a");
    registry_destroy(registry);
    cr_expect(eq(u32, users_of_cpu(), 1));
    cr_expect(eq(u32, model_n_ctx(m), 512));
    model_unref(m);
    cr_expect(eq(u32, users_of_cpu(), 0));
    open_registry(false);
}

Test(registry, destroy_while_loading_tells_everybody)
{
    struct waiter w[3];
    struct fmt_error err;
    const char *const names[] = {"a", "b", "a"};
    unsigned n_cancelled = 0;
    for (int round = 0; round < 10; round++) {
        bool asked[3];
        for (int i = 0; i < 3; i++) {
            waiter_init(&w[i]);
            asked[i] = load(&w[i], names[i], NULL, &err) == 0;
        }
        registry_destroy(registry);
        for (int i = 0; i < 3; i++) {
            cr_expect(eq(int, w[i].done, asked[i]));
            cr_expect(w[i].result == 0 || w[i].result == -ECANCELED);
            n_cancelled += w[i].result == -ECANCELED;
            model_unref(w[i].model);
        }
        cr_expect(eq(u32, users_of_cpu(), 0));
        open_registry(false);
    }
    cr_expect(lt(u32, 0, n_cancelled));
}
