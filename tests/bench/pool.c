/* tests/bench/pool.c - what it costs to lend pieces of work to the daemon's compute threads.
 *
 *   bench_pool [-t threads] [-n calls]
 *
 * Each call runs one empty piece for each thread; before it the owner works alone for a while, as
 * between two ops of a step. Printed are the median and the 99th percentile of the calls, for
 * pauses in which workers poll and for one after which they sleep. */
#include "daemon/backend/pool.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define SPIN_US   50u
#define CALLS_MAX 1000000u

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void empty_piece(void *arg, uint32_t index, uint32_t worker)
{
}

static int compare(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void bench_pause(struct pool *p, uint64_t pause_ns, uint64_t *times, uint32_t n_calls)
{
    for (uint32_t i = 0; i < n_calls; i++) {
        uint64_t until = now_ns() + pause_ns, start;

        while ((start = now_ns()) < until) {
        }
        pool_parallel(p, empty_piece, NULL, pool_n_threads(p));
        times[i] = now_ns() - start;
    }
    qsort(times, n_calls, sizeof(*times), compare);
    printf("%u threads  pause %4.0f us  median %6.2f us  99 %% %6.2f us\n", pool_n_threads(p),
           (double)pause_ns * 1e-3, (double)times[n_calls / 2] * 1e-3,
           (double)times[(uint64_t)n_calls * 99 / 100] * 1e-3);
}

int main(int argc, char **argv)
{
    static const uint64_t pauses_ns[] = {0, 5000, 20000, 200000};
    uint32_t n_threads = 2, n_calls = 5000;
    struct pool *pool;
    int option;

    while ((option = getopt(argc, argv, "t:n:")) != -1) {
        switch (option) {
        case 't':
            n_threads = (uint32_t)atoi(optarg);
            break;
        case 'n':
            n_calls = (uint32_t)atoi(optarg);
            break;
        default:
            n_calls = 0;
        }
    }
    if (n_threads == 0 || n_calls == 0 || n_calls > CALLS_MAX) {
        fprintf(stderr, "usage: bench_pool [-t threads] [-n calls]\n");
        return 64;
    }
    uint64_t *times = malloc(n_calls * sizeof(*times));
    if (times == NULL || pool_create(n_threads, SPIN_US, &pool) < 0) {
        free(times);
        return 1;
    }
    for (size_t i = 0; i < sizeof(pauses_ns) / sizeof(pauses_ns[0]); i++) {
        bench_pause(pool, pauses_ns[i], times, n_calls);
    }
    pool_destroy(pool);
    free(times);
    return 0;
}
