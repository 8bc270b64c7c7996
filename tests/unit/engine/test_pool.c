/* The compute pool: every piece once, all writes seen, and an end in every state. */
#include "daemon/backend/pool.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#define MAX_THREADS 5u

struct counts {
    uint32_t n_threads;
    atomic_uint wrong_worker;
    uint32_t *runs;                /* (n_tasks) plain: the pool orders the writes */
    atomic_uint busy[MAX_THREADS]; /* a worker runs one piece at a time */
};

static void count(void *arg, uint32_t index, uint32_t worker)
{
    struct counts *c = arg;
    if (worker >= c->n_threads || atomic_fetch_add(&c->busy[worker], 1) != 0) {
        atomic_fetch_add(&c->wrong_worker, 1);
        return;
    }
    c->runs[index]++;
    atomic_fetch_sub(&c->busy[worker], 1);
}

static void check(struct pool *p, uint32_t n_tasks)
{
    struct counts c = {.n_threads = pool_n_threads(p)};
    c.runs = calloc(n_tasks + 1, sizeof(*c.runs));
    pool_parallel(p, count, &c, n_tasks);
    for (uint32_t i = 0; i < n_tasks; i++) {
        cr_assert(eq(u32, c.runs[i], 1), "index %u of %u", i, n_tasks);
    }
    cr_assert(eq(u32, c.runs[n_tasks], 0));
    cr_assert(eq(u32, atomic_load(&c.wrong_worker), 0));
    free(c.runs);
}

TestSuite(pool, .timeout = 120);

Test(pool, every_index_once_for_any_number_of_threads)
{
    static const uint32_t counts_of_tasks[] = {0, 1, 2, 3, 5, 17, 1000, 200000};
    for (uint32_t threads = 1; threads <= MAX_THREADS; threads++) {
        struct pool *p;
        cr_assert(eq(int, pool_create(threads, 50, &p), 0));
        cr_expect(eq(u32, pool_n_threads(p), threads));
        for (size_t i = 0; i < sizeof(counts_of_tasks) / sizeof(counts_of_tasks[0]); i++) {
            check(p, counts_of_tasks[i]);
        }
        for (uint32_t i = 0; i < 2000; i++) {
            check(p, i % 37);
        }
        pool_destroy(p);
    }
}

/* With no time to poll, and with long pauses, workers sleep; the next job wakes them. */
static atomic_uint helped;

static void wait_for_help(void *arg, uint32_t index, uint32_t worker)
{
    atomic_uint *arrived = arg;
    atomic_fetch_add(arrived, 1);
    while (atomic_load(arrived) < 2) { /* returns only when a second worker has come */
        usleep(100);
    }
    atomic_fetch_add(&helped, worker != 0);
}

Test(pool, sleeping_workers_wake)
{
    struct pool *p;
    cr_assert(eq(int, pool_create(2, 0, &p), 0));
    for (int i = 0; i < 20; i++) {
        atomic_uint arrived = 0;
        usleep(2000);
        pool_parallel(p, wait_for_help, &arrived, 2);
    }
    cr_expect(eq(u32, atomic_load(&helped), 20));
    pool_destroy(p);
}

Test(pool, ends_while_idle_and_at_once)
{
    for (uint32_t i = 0; i < 200; i++) {
        struct pool *p;
        cr_assert(eq(int, pool_create(1 + i % MAX_THREADS, i % 2 ? 50 : 0, &p), 0));
        if (i % 3 == 0) {
            check(p, 10);
        }
        if (i % 20 == 0) {
            usleep(3000);
        }
        pool_destroy(p);
    }
    pool_destroy(NULL);
}

Test(pool, no_threads_is_an_error)
{
    struct pool *p = NULL;
    cr_expect(eq(int, pool_create(0, 0, &p), -EINVAL));
    cr_expect(p == NULL);
}
