/* pool_tsan - jobs of ever changing size on pools that are made and ended under way; for
 * -Db_sanitize=thread, and as a plain check of the results.
 *
 *   pool_tsan [ROUNDS]      default 40 */
#include "daemon/backend/pool.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define MAX_TASKS      4096u
#define JOBS_PER_ROUND 500u

static uint32_t values[MAX_TASKS]; /* plain memory: the pool must order what touches it */

struct job {
    uint32_t add;
};

static void add(void *arg, uint32_t index, uint32_t worker)
{
    const struct job *job = arg;
    values[index] += job->add;
}

static uint32_t next(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return (uint32_t)(*x >> 32);
}

/* Returns whether every piece ran exactly once. */
static int round_of_jobs(struct pool *p, uint64_t *x)
{
    for (uint32_t i = 0; i < JOBS_PER_ROUND; i++) {
        uint32_t n_tasks = next(x) % (next(x) % 8 == 0 ? MAX_TASKS : 9);
        struct job job = {next(x)}; /* on the stack: no worker may look later */
        for (uint32_t k = 0; k < n_tasks; k++) {
            values[k] = k;
        }
        pool_parallel(p, add, &job, n_tasks);
        for (uint32_t k = 0; k < n_tasks; k++) {
            if (values[k] != k + job.add) {
                fprintf(stderr, "pool_tsan: piece %u of %u ran wrong\n", k, n_tasks);
                return 0;
            }
        }
        if (next(x) % 64 == 0) {
            usleep(300); /* the workers go to sleep */
        }
    }
    return 1;
}

int main(int argc, char **argv)
{
    unsigned long rounds = argc > 1 ? strtoul(argv[1], NULL, 10) : 40;
    uint64_t x = 88172645463325252u;
    for (unsigned long r = 0; r < rounds; r++) {
        struct pool *p;
        if (pool_create(1 + r % 5, r % 3 == 0 ? 0 : 50, &p) < 0) {
            return EXIT_FAILURE;
        }
        int good = round_of_jobs(p, &x);
        pool_destroy(p);
        if (!good) {
            return EXIT_FAILURE;
        }
    }
    printf("pool_tsan: %lu rounds of %u jobs\n", rounds, JOBS_PER_ROUND);
    return EXIT_SUCCESS;
}
