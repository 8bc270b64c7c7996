#include "tools/plugin-check/hosts.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CROWD_WORKERS 3u

static void host_log(void *data, int level, const char *message)
{
    fprintf(stderr, "gqa-plugin-check: plugin says: %s\n", message);
}

static void *host_allocate(void *data, size_t bytes)
{
    void *memory = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    return memory != NULL ? memset(memory, 0, bytes) : NULL;
}

static void host_release(void *data, void *memory, size_t bytes)
{
    free(memory);
}

static void alone_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    for (uint32_t i = 0; i < n_tasks; i++) {
        fn(arg, i, 0);
    }
}

static void crowd_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    for (uint32_t i = n_tasks; i-- > 0;) {
        fn(arg, i, i % CROWD_WORKERS);
    }
}

const struct gqa_host host_alone = {
    .struct_size = sizeof(host_alone),
    .abi_major = GQA_PLUGIN_ABI_MAJOR,
    .abi_minor = GQA_PLUGIN_ABI_MINOR,
    .n_threads = 1,
    .log = host_log,
    .parallel = alone_parallel,
    .allocate = host_allocate,
    .release = host_release,
};

const struct gqa_host host_crowd = {
    .struct_size = sizeof(host_crowd),
    .abi_major = GQA_PLUGIN_ABI_MAJOR,
    .abi_minor = GQA_PLUGIN_ABI_MINOR,
    .n_threads = CROWD_WORKERS,
    .log = host_log,
    .parallel = crowd_parallel,
    .allocate = host_allocate,
    .release = host_release,
};

/* ---- a team of threads ------------------------------------------------------------------- */

struct member {
    struct host_team *team;
    uint32_t worker;
    pthread_t thread;
};

struct host_team {
    struct gqa_host host;
    gqa_task_fn fn;
    void *arg;
    uint32_t n_tasks;
    atomic_uint next, generation, left;
    atomic_bool stop;
    uint32_t n_members;
    struct member members[]; /* the caller is worker 0 and none of them */
};

static void take_tasks(struct host_team *t, uint32_t worker)
{
    uint32_t i;
    while ((i = atomic_fetch_add_explicit(&t->next, 1, memory_order_relaxed)) < t->n_tasks) {
        t->fn(t->arg, i, worker);
    }
    atomic_fetch_sub_explicit(&t->left, 1,
                              memory_order_release); /* pairs with team_parallel's wait */
}

static void *member_main(void *arg)
{
    struct member *m = arg;
    struct host_team *t = m->team;
    unsigned seen = 0;
    for (;;) {
        /* Pairs with the release in team_parallel(). */
        while (atomic_load_explicit(&t->generation, memory_order_acquire) == seen) {
            if (atomic_load_explicit(&t->stop, memory_order_relaxed)) {
                return NULL;
            }
            sched_yield(); /* the machine may have fewer cores to spare than threads */
        }
        seen++;
        take_tasks(t, m->worker);
    }
}

static void team_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    struct host_team *t = data;
    t->fn = fn;
    t->arg = arg;
    t->n_tasks = n_tasks;
    atomic_store_explicit(&t->next, 0, memory_order_relaxed);
    atomic_store_explicit(&t->left, t->n_members + 1, memory_order_relaxed);
    atomic_fetch_add_explicit(&t->generation, 1, memory_order_release);
    take_tasks(t, 0);
    while (atomic_load_explicit(&t->left, memory_order_acquire) != 0) {
        sched_yield();
    }
}

int host_team_create(uint32_t n_threads, struct host_team **ret)
{
    struct host_team *t = calloc(1, sizeof(*t) + n_threads * sizeof(t->members[0]));
    if (t == NULL) {
        return -ENOMEM;
    }
    t->host = host_alone;
    t->host.data = t;
    t->host.parallel = team_parallel;
    for (uint32_t i = 1; i < n_threads; i++) {
        struct member *m = &t->members[i - 1];
        *m = (struct member){.team = t, .worker = i};
        int rc = -pthread_create(&m->thread, NULL, member_main, m);
        if (rc < 0) {
            host_team_destroy(t);
            return rc;
        }
        t->n_members++;
    }
    t->host.n_threads = t->n_members + 1;
    *ret = t;
    return 0;
}

void host_team_destroy(struct host_team *t)
{
    if (t == NULL) {
        return;
    }
    atomic_store_explicit(&t->stop, true, memory_order_relaxed);
    for (uint32_t i = 0; i < t->n_members; i++) {
        pthread_join(t->members[i].thread, NULL);
    }
    free(t);
}

const struct gqa_host *host_team_host(const struct host_team *t)
{
    return &t->host;
}
