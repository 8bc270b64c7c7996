/* daemon/backend/pool.h - the daemon's compute threads, lent to backends.
 *
 * The pool belongs to one engine thread, which is worker 0; n_threads - 1 further threads are
 * pinned and wait for work: they spin for a bounded time, then sleep on a futex. A pool of one
 * thread makes no threads and runs pieces in the caller. */
#ifndef DAEMON_BACKEND_POOL_H
#define DAEMON_BACKEND_POOL_H

#include <gqa/plugin.h>

struct pool;

/* n_threads >= 1. spin_us: how long idle workers poll before they sleep (0: not at all; the default
 * of the daemon is 50; no polling where there are fewer cores than threads). */
int pool_create(uint32_t n_threads, uint32_t spin_us, struct pool **ret);
void pool_destroy(struct pool *p); /* joins; NULL is legal */

uint32_t pool_n_threads(const struct pool *p);

/* fn(arg, index, worker) for every index in 0..n_tasks-1, each once, dynamically distributed;
 * returns when all are done, with their writes visible. From the owning thread only; not nested. */
void pool_parallel(struct pool *p, gqa_task_fn fn, void *arg, uint32_t n_tasks);

#endif
