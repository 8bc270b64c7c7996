/* An engine that cannot be made while the disk of its cache does not answer. The linker wraps the
 * making of threads, which fails here, and the cache's end, whose patience is none. */
#include "daemon/io/io.h"
#include "daemon/kv/cache_internal.h"
#include "daemon/sched/engine.h"
#include "tests/unit/engine/folder.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <pthread.h>
#include <semaphore.h>

TestSuite(engine_create, .timeout = 60);

static bool no_threads;
static struct kv_cache *left; /* by its engine, for the io thread */

int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *),
                          void *arg);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *),
                          void *arg);
int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attr, void *(*fn)(void *),
                          void *arg)
{
    return no_threads ? EAGAIN : __real_pthread_create(thread, attr, fn, arg);
}

bool __real_kv_cache_destroy(struct kv_cache *c);
bool __wrap_kv_cache_destroy(struct kv_cache *c);
bool __wrap_kv_cache_destroy(struct kv_cache *c)
{
    c->end_s = 0;
    bool gone = __real_kv_cache_destroy(c);
    left = gone ? NULL : c;
    return gone;
}

static int wait_for(void *arg)
{
    while (sem_wait(arg) < 0) {
    }
    return 0;
}

static void on_notify(void *arg)
{
}

/* What the caller is told, with the io thread at work on something that takes for ever. */
static int create(struct io *io, const char *folder)
{
    const struct engine_options options = {
        .n_batch = 64,
        .n_parallel = 4,
        .n_queue = 4,
        .kv = {.arena_bytes_max = 16u << 20, .folder = folder, .io = io},
        .notify = on_notify,
    };
    struct engine *engine = NULL;
    no_threads = true;
    int rc = engine_create(&options, &engine);
    no_threads = false;
    cr_expect(eq(ptr, engine, NULL));
    return rc;
}

Test(engine_create, tells_that_the_io_thread_must_not_be_waited_for)
{
    struct folder folder;
    struct io *io;
    sem_t opened;
    folder_init(&folder);
    sem_init(&opened, 0, 0);
    cr_assert(eq(int, io_create(false, &io), 0));
    struct io_call_job job = {.fn = wait_for, .arg = &opened};
    cr_assert(eq(int, io_submit_call(io, &job), 0));
    cr_expect(eq(int, create(io, folder.path), -ETIMEDOUT));
    cr_expect(ne(ptr, left, NULL));
    sem_post(&opened); /* the disk answers after all */
    io_destroy(io);
    if (left != NULL) {
        cr_expect(__real_kv_cache_destroy(left));
    }
    sem_destroy(&opened);
    folder_finish(&folder);
}

Test(engine_create, tells_what_failed_else)
{
    cr_expect(eq(int, create(NULL, NULL), -EAGAIN));
    cr_expect(eq(ptr, left, NULL));
}
