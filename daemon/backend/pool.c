#include "daemon/backend/pool.h"

#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define CACHE_LINE      64
#define SPINS_PER_CHECK 64   /* pauses between two looks at the clock */
#define SPINS_TO_YIELD  4096 /* of the owner waiting for the last pieces */

/* The ticket holds (job number << 32 | next index). A worker claims a piece by moving it on with a
 * compare-and-swap, which fails when the job has changed: so a late worker does no harm, and the
 * owner waits for claimed pieces only, never for a worker that was not scheduled in time. */
struct pool {
    uint32_t n_threads;
    uint64_t spin_ns;
    pthread_t *threads; /* (n_threads - 1) */
    struct worker *workers;
    uint32_t n_started;

    /* The job; written by the owner before the ticket is, read by workers before they claim. */
    _Atomic(gqa_task_fn) fn;
    _Atomic(void *) arg;
    _Atomic uint32_t n_tasks;

    _Alignas(CACHE_LINE) _Atomic uint64_t ticket;
    _Alignas(CACHE_LINE) _Atomic uint32_t n_done;
    _Alignas(CACHE_LINE) _Atomic uint32_t job; /* futex: changes with every job */
    _Atomic uint32_t n_sleeping;
    atomic_bool stop;
};

struct worker {
    struct pool *pool;
    uint32_t index;
};

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

/* Claims and runs pieces of the current job until none are left. */
static void run_pieces(struct pool *p, uint32_t worker)
{
    for (;;) {
        /* Pairs with the release in pool_parallel: the job's fields are visible. */
        uint64_t ticket = atomic_load_explicit(&p->ticket, memory_order_acquire);
        uint32_t index = (uint32_t)ticket;
        /* Each pairs with its release in pool_parallel: who sees a field of the next job sees its
         * ticket too, so that the exchange below fails. */
        gqa_task_fn fn = atomic_load_explicit(&p->fn, memory_order_acquire);
        void *arg = atomic_load_explicit(&p->arg, memory_order_acquire);
        if (index >= atomic_load_explicit(&p->n_tasks, memory_order_acquire)) {
            return;
        }
        if (atomic_compare_exchange_weak_explicit(&p->ticket, &ticket, ticket + 1,
                                                  memory_order_acq_rel, memory_order_relaxed)) {
            fn(arg, index, worker);
            /* Pairs with the acquire in pool_parallel: the piece's writes are visible. */
            atomic_fetch_add_explicit(&p->n_done, 1, memory_order_release);
        }
    }
}

/* Returns when the job number differs from seen: polls first, then sleeps. */
static void wait_for_job(struct pool *p, uint32_t seen)
{
    uint64_t deadline = p->spin_ns > 0 ? now_ns() + p->spin_ns : 0;
    while (p->spin_ns > 0) {
        for (int i = 0; i < SPINS_PER_CHECK; i++) {
            if (atomic_load_explicit(&p->job, memory_order_acquire) != seen) {
                return;
            }
            relax();
        }
        if (now_ns() > deadline) {
            break;
        }
    }
    atomic_fetch_add(&p->n_sleeping, 1);
    while (atomic_load(&p->job) == seen) {
        syscall(SYS_futex, &p->job, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
    }
    atomic_fetch_sub(&p->n_sleeping, 1);
}

static void *worker_main(void *arg)
{
    struct worker *w = arg;
    struct pool *p = w->pool;
    uint32_t seen = 0;
    while (!atomic_load(&p->stop)) {
        wait_for_job(p, seen);
        seen = atomic_load(&p->job);
        run_pieces(p, w->index);
    }
    return NULL;
}

static void announce(struct pool *p)
{
    atomic_fetch_add(&p->job, 1);
    if (atomic_load(&p->n_sleeping) > 0) {
        syscall(SYS_futex, &p->job, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
    }
}

void pool_parallel(struct pool *p, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    if (p->n_threads == 1 || n_tasks <= 1) {
        for (uint32_t i = 0; i < n_tasks; i++) {
            fn(arg, i, 0);
        }
        return;
    }
    /* Until the ticket names the new job, no worker can claim a piece of it: its index lies past
     * any end, and only equal tickets are exchanged. */
    uint64_t job = (atomic_load_explicit(&p->ticket, memory_order_relaxed) >> 32) + 1;
    atomic_store_explicit(&p->ticket, job << 32 | UINT32_MAX, memory_order_relaxed);
    atomic_store_explicit(&p->fn, fn, memory_order_release);
    atomic_store_explicit(&p->arg, arg, memory_order_release);
    atomic_store_explicit(&p->n_tasks, n_tasks, memory_order_release);
    atomic_store_explicit(&p->n_done, 0, memory_order_relaxed);
    atomic_store_explicit(&p->ticket, (job + 1) << 32, memory_order_release);
    announce(p);
    run_pieces(p, 0);
    for (uint32_t spins = 0; atomic_load_explicit(&p->n_done, memory_order_acquire) < n_tasks;
         spins++) {
        if (spins >= SPINS_TO_YIELD) {
            sched_yield();
        } else {
            relax();
        }
    }
}

/* Worker i runs on the i-th processor that the daemon may use; worker 0 is the engine thread, which
 * the system places. Failing to pin is not a fault. */
static void pin(pthread_t thread, uint32_t worker)
{
    cpu_set_t allowed, one;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) < 0) {
        return;
    }
    uint32_t n = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (CPU_ISSET(cpu, &allowed) && n++ == worker) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            pthread_setaffinity_np(thread, sizeof(one), &one);
            return;
        }
    }
}

static uint32_t n_cpus(void)
{
    cpu_set_t allowed;
    return sched_getaffinity(0, sizeof(allowed), &allowed) < 0 ? 1 : (uint32_t)CPU_COUNT(&allowed);
}

int pool_create(uint32_t n_threads, uint32_t spin_us, struct pool **ret)
{
    if (n_threads == 0) {
        return -EINVAL;
    }
    struct pool *p = aligned_alloc(CACHE_LINE, sizeof(*p));
    if (p == NULL) {
        return -ENOMEM;
    }
    *p = (struct pool){.n_threads = n_threads};
    p->spin_ns = n_threads <= n_cpus() ? (uint64_t)spin_us * 1000u : 0;
    p->threads = calloc(n_threads, sizeof(*p->threads));
    p->workers = calloc(n_threads, sizeof(*p->workers));
    int rc = p->threads == NULL || p->workers == NULL ? -ENOMEM : 0;
    for (uint32_t i = 1; rc == 0 && i < n_threads; i++) {
        p->workers[i - 1] = (struct worker){p, i};
        rc = -pthread_create(&p->threads[i - 1], NULL, worker_main, &p->workers[i - 1]);
        if (rc == 0) {
            p->n_started++;
            pin(p->threads[i - 1], i);
        }
    }
    if (rc < 0) {
        pool_destroy(p);
        return rc;
    }
    *ret = p;
    return 0;
}

void pool_destroy(struct pool *p)
{
    if (p == NULL) {
        return;
    }
    atomic_store(&p->stop, true);
    announce(p);
    for (uint32_t i = 0; i < p->n_started; i++) {
        pthread_join(p->threads[i], NULL);
    }
    free(p->threads);
    free(p->workers);
    free(p);
}

uint32_t pool_n_threads(const struct pool *p)
{
    return p->n_threads;
}
