/* engine_tsan - one thread submits, cancels, takes events, lists, loads and unloads, asks the
 * cache, as the loop does, another looks on and changes weights, while the engine, its pool, the
 * loader and the io thread work; in an arena and a number of places so small that sequences give
 * way all the time. For -Db_sanitize=thread.
 *
 *   engine_tsan [REQUESTS]      default 300 */
#include "daemon/model/registry.h"
#include "daemon/sched/engine.h"
#include "tests/unit/engine/parts.h"

#include <errno.h>
#include <ftw.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#define N_LIVE 12u

struct rig {
    struct parts parts;
    struct registry *registry;
    struct io *kv_io;
    char kv_folder[128];
    struct engine *engine;
    struct request *live[N_LIVE];
    uint64_t x;
    unsigned long n_done, n_cancelled, n_late, n_errors;
    uint64_t n_seen;
    atomic_bool ended;
    atomic_uint n_loads, n_loaded; /* asked for, and answered on the loader thread */
    atomic_uint n_notified;
};

static uint32_t next(struct rig *g)
{
    g->x ^= g->x << 13;
    g->x ^= g->x >> 7;
    g->x ^= g->x << 17;
    return (uint32_t)(g->x >> 32);
}

static void notify(void *arg)
{
    atomic_fetch_add(&((struct rig *)arg)->n_notified, 1);
}

static void on_loaded(void *arg, struct model *m, int result, const char *message)
{
    atomic_fetch_add(&((struct rig *)arg)->n_loaded, 1);
    model_unref(m);
}

static void load(struct rig *g, const char *name)
{
    const struct registry_load callbacks = {.name = name, .on_done = on_loaded, .arg = g};
    struct fmt_error err = {""};
    if (registry_load(g->registry, name, NULL, NULL, &callbacks, &err) == 0) {
        atomic_fetch_add(&g->n_loads, 1);
    }
}

static struct request *make(struct rig *g, struct model *m)
{
    struct request *r = request_create(next(g) % 4 == 0 ? REQUEST_LOGITS : REQUEST_GENERATE, m);
    size_t n = 1 + next(g) % 400;
    r->tokens = malloc(n * sizeof(*r->tokens));
    for (size_t i = 0; i < n; i++) {
        r->tokens[i] = (int32_t)(3 + next(g) % (TINY_VOCAB - 3));
    }
    r->n_tokens = n;
    /* Two of three share a few prompts, in one of two realms; the others share nothing. */
    unsigned share = next(g) % 3;
    for (size_t i = 0; share > 0 && i < n; i++) {
        r->tokens[i] = (int32_t)(3 + (i * i + share * 7) % (TINY_VOCAB - 3));
    }
    snprintf(r->realm, sizeof(r->realm), "%s", share == 0 ? "" : share == 1 ? "one" : "two");
    r->n_predict = next(g) % 40;
    r->logprobs = next(g) % 2;
    r->uid = next(g) % 3;
    r->priority = (int32_t)(next(g) % 5) - 2;
    r->deadline_ms = next(g) % 8 == 0 ? 1 + next(g) % 50 : 0;
    return r;
}

static void take_events(struct rig *g)
{
    struct request_event *following;
    for (struct request_event *e = engine_take_events(g->engine); e != NULL; e = following) {
        following = e->next;
        struct request *r = e->request;
        atomic_fetch_sub(&r->undelivered_bytes, e->bytes);
        for (unsigned i = 0; e->kind == REQUEST_DONE && i < N_LIVE; i++) {
            if (g->live[i] == r) {
                g->live[i] = NULL;
                g->n_done++;
                g->n_cancelled += r->finish == FINISH_CANCELLED;
                g->n_errors += r->finish == FINISH_ERROR && r->error != PROTO_E_DEADLINE;
                g->n_late += r->finish == FINISH_TIME || r->error == PROTO_E_DEADLINE;
                request_destroy(r);
                break;
            }
        }
        free(e);
    }
}

static void submit_one(struct rig *g, unsigned slot)
{
    static const char *const names[] = {"a", "b"};
    const char *name = names[next(g) % 2];
    struct model *m = registry_get(g->registry, name);
    if (m == NULL) {
        load(g, name);
        return;
    }
    struct request *r = make(g, m);
    model_unref(m);
    if (engine_submit(g->engine, r) == 0) {
        g->live[slot] = r;
    } else {
        request_destroy(r);
    }
}

static void *onlooker(void *arg)
{
    struct rig *g = arg;
    const struct timespec moment = {.tv_nsec = 500000};
    for (uint32_t i = 0; !atomic_load(&g->ended); i++) {
        const struct fair_weight weights[] = {{i % 3, 1 + i % 7}};
        struct fair_user users[8];
        static struct engine_stats stats;
        engine_stats(g->engine, &stats);
        engine_users(g->engine, users, 8);
        engine_retry_ms(g->engine);
        engine_set_weights(g->engine, weights, i % 2);
        engine_kick(g->engine);
        nanosleep(&moment, NULL);
    }
    return NULL;
}

static void look_around(struct rig *g)
{
    static struct engine_stats stats;
    struct registry_entry *list;
    size_t n;
    const struct request *requests[32];
    engine_stats(g->engine, &stats);
    engine_step_started_ns(g->engine);
    size_t n_open = engine_requests(g->engine, requests, 32);
    for (size_t i = 0; i < n_open && i < 32; i++) {
        g->n_seen += atomic_load(&requests[i]->seen.n_generated);
    }
    if (registry_list(g->registry, &list, &n) == 0) {
        for (size_t i = 0; i < n; i++) {
            model_unref(list[i].model);
        }
        free(list);
    }
}

static void on_kv_done(void *arg)
{
    struct engine_kv_call *call = arg;
    free(call->spaces);
    free(call);
}

/* List, drop and purge in the midst of everything. */
static void ask_cache(struct rig *g)
{
    static const enum engine_kv_op ops[] = {ENGINE_KV_LIST, ENGINE_KV_LIST, ENGINE_KV_DROP,
                                            ENGINE_KV_PURGE};
    struct engine_kv_call *call = calloc(1, sizeof(*call));
    *call = (struct engine_kv_call){.op = ops[next(g) % 4],
                                    .all = next(g) % 2,
                                    .realm = "one",
                                    .done = on_kv_done,
                                    .arg = call};
    if (engine_kv(g->engine, call) < 0) {
        free(call);
    }
}

static void one_turn(struct rig *g)
{
    const struct timespec moment = {.tv_nsec = 200000};
    unsigned slot = next(g) % N_LIVE;
    if (g->live[slot] == NULL) {
        submit_one(g, slot);
    } else if (next(g) % 256 == 0) {
        engine_cancel(g->engine, g->live[slot]);
    }
    if (next(g) % 64 == 0) {
        struct model *m;
        if (registry_unload(g->registry, next(g) % 2 ? "a" : "b", &m) == 0) {
            model_unref(m);
        }
    }
    if (next(g) % 32 == 0) {
        ask_cache(g);
    }
    if (next(g) % 16 == 0) {
        look_around(g);
        engine_kick(g->engine);
    }
    take_events(g);
    nanosleep(&moment, NULL);
}

static int rig_init(struct rig *g)
{
    struct tiny t = tiny_default();
    parts_init(&g->parts, 2);
    snprintf(g->kv_folder, sizeof(g->kv_folder), "%s", folder_path(&g->parts.folder, "kv"));
    if (mkdir(g->kv_folder, 0700) < 0 || io_create(false, &g->kv_io) < 0) {
        return -1;
    }
    tiny_write(&t, folder_path(&g->parts.folder, "a.gguf"));
    t.seed = 2;
    tiny_write(&t, folder_path(&g->parts.folder, "b.gguf"));
    const char *dirs[] = {g->parts.folder.path};
    struct registry_options registry = {.dirs = dirs,
                                        .n_dirs = 1,
                                        .catalogue = g->parts.catalogue,
                                        .pool = g->parts.pool,
                                        .io = g->parts.io,
                                        .defaults = parts_model_options()};
    struct engine_options engine = {.pool = g->parts.pool,
                                    .n_batch = PARTS_BATCH,
                                    .n_parallel = 6,
                                    .n_queue = 4,
                                    .kv = {.arena_bytes_max = 8u << 20,
                                           .folder = g->kv_folder,
                                           .io = g->kv_io,
                                           .store_bytes_max = 4u << 20,
                                           .pool = g->parts.pool},
                                    .notify = notify,
                                    .notify_arg = g};
    int rc = registry_create(&registry, &g->registry);
    return rc < 0 ? rc : engine_create(&engine, &g->engine);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *walk)
{
    return remove(path);
}

int main(int argc, char **argv)
{
    static struct rig g = {.x = 88172645463325252u};
    unsigned long wanted = argc > 1 ? strtoul(argv[1], NULL, 10) : 300;
    if (rig_init(&g) < 0) {
        return EXIT_FAILURE;
    }
    pthread_t thread;
    if (pthread_create(&thread, NULL, onlooker, &g) != 0) {
        return EXIT_FAILURE;
    }
    while (g.n_done < wanted) {
        one_turn(&g);
    }
    atomic_store(&g.ended, true);
    pthread_join(thread, NULL);
    static struct engine_stats stats;
    engine_stats(g.engine, &stats);
    load(&g, "a"); /* ends in the middle of whatever is under way */
    engine_destroy(g.engine);
    registry_destroy(g.registry);
    for (unsigned i = 0; i < N_LIVE; i++) {
        request_destroy(g.live[i]);
    }
    io_destroy(g.kv_io);
    nftw(g.kv_folder, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    struct backend_info info[1];
    backend_catalogue_list(g.parts.catalogue, info, 1);
    parts_finish(&g.parts);
    printf(
        "engine_tsan: %lu requests, %lu cancelled, %lu late, %lu errors, %llu gave way, %u loads, "
        "%u notices\n",
        g.n_done, g.n_cancelled, g.n_late, g.n_errors, (unsigned long long)stats.n_preemptions,
        atomic_load(&g.n_loads), atomic_load(&g.n_notified));
    bool answered = atomic_load(&g.n_loads) == atomic_load(&g.n_loaded);
    if (g.n_errors > 0 || info[0].users > 0 || !answered) {
        fprintf(stderr, "engine_tsan: %u contexts left, %u of %u loads answered\n", info[0].users,
                atomic_load(&g.n_loaded), atomic_load(&g.n_loads));
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
