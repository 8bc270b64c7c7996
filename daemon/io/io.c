#include "daemon/io/io_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- the thread -------------------------------------------------------------------------- */

static _Thread_local const struct io *current; /* whose thread this is, or NULL */

static struct io_job *next_job(struct io *io, bool *ret_stop)
{
    pthread_mutex_lock(&io->lock);
    while (io->queue == NULL && !io->stop) {
        pthread_cond_wait(&io->wake, &io->lock);
    }
    struct io_job *job = io->queue;
    if (job != NULL) {
        io->queue = job->next;
        io->queue_end = io->queue == NULL ? &io->queue : io->queue_end;
    }
    *ret_stop = io->stop;
    pthread_mutex_unlock(&io->lock);
    return job;
}

/* What the queue links is a part of the job. */
#define JOB_OF(type, queued_job) ((type *)((char *)(queued_job)-offsetof(type, queued)))

static int append(struct io *io, struct io_job *job)
{
    int rc = 0;
    job->next = NULL;
    pthread_mutex_lock(&io->lock);
    if (io->stop) {
        rc = -ECANCELED;
    } else {
        *io->queue_end = job;
        io->queue_end = &job->next;
        pthread_cond_signal(&io->wake);
    }
    pthread_mutex_unlock(&io->lock);
    return rc;
}

static void run_call(struct io_call_job *job, bool stop)
{
    int rc = stop ? -ECANCELED : job->fn(job->arg);
    if (job->done != NULL) {
        job->done(job->arg, rc);
    }
}

/* A model is read for minutes: after every slice the rest goes to the queue's end. */
static void run_read(struct io *io, struct io_read_job *job, bool stop)
{
    int rc = stop ? -ECANCELED : io_run_read(io, job);
    if (rc == 0 && job->queued.taken < job->bytes) {
        rc = append(io, &job->queued);
        if (rc == 0) {
            return;
        }
    }
    job->done(job->arg, rc);
}

static void run(struct io *io, struct io_job *queued, bool stop)
{
    if (queued->is_call) {
        run_call(JOB_OF(struct io_call_job, queued), stop);
    } else {
        run_read(io, JOB_OF(struct io_read_job, queued), stop);
    }
}

static void *io_main(void *arg)
{
    struct io *io = arg;
    struct io_job *job;
    bool stop = false;
    current = io;
    while ((job = next_job(io, &stop)) != NULL) {
        run(io, job, stop);
    }
    return NULL;
}

/* ---- the ring ---------------------------------------------------------------------------- */

int io_ring_submit(struct io *io)
{
    int n = io_uring_submit(&io->ring);
    if (n == 1) {
        return 0;
    }
    atomic_store(&io->has_ring, false);
    return n < 0 ? n : -EBUSY;
}

int io_ring_wait(struct io *io, uint32_t *ret_slot, int *ret_result)
{
    struct io_uring_cqe *cqe;
    int rc = io_uring_wait_cqe(&io->ring, &cqe);
    if (rc == -EINTR) {
        return 0;
    }
    if (rc < 0) {
        return rc;
    }
    *ret_slot = (uint32_t)io_uring_cqe_get_data64(cqe);
    *ret_result = cqe->res;
    io_uring_cqe_seen(&io->ring, cqe);
    return 1;
}

/* Whether a buffer that is left is ever let go of by the kernel cannot be found out without the
 * ring. It is left once at most: no ring comes after this one. */
void io_ring_check(struct io *io, bool in_flight)
{
    if (!io->has_ring) {
        io_uring_queue_exit(&io->ring);
        io->buffers = in_flight ? NULL : io->buffers;
    }
}

int io_map_buffers(struct io *io)
{
    if (io->buffers == NULL) {
        void *buffers = mmap(NULL, (size_t)IO_N_BUFFERS * IO_BUFFER_BYTES, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (buffers == MAP_FAILED) {
            return -ENOMEM;
        }
        io->buffers = buffers;
    }
    return 0;
}

static void ring_init(struct io *io)
{
    atomic_init(&io->has_ring, io_uring_queue_init(2 * IO_N_BUFFERS, &io->ring, 0) == 0);
    if (!io->has_ring) {
        return;
    }
    struct iovec vectors[IO_N_BUFFERS];
    for (uint32_t i = 0; i < IO_N_BUFFERS; i++) {
        vectors[i] = (struct iovec){io->buffers + (size_t)i * IO_BUFFER_BYTES, IO_BUFFER_BYTES};
    }
    io->fixed_buffers = io_uring_register_buffers(&io->ring, vectors, IO_N_BUFFERS) == 0;
}

static void io_free(struct io *io)
{
    if (io->has_ring) {
        io_uring_queue_exit(&io->ring);
    }
    if (io->buffers != NULL) {
        munmap(io->buffers, (size_t)IO_N_BUFFERS * IO_BUFFER_BYTES);
    }
    pthread_mutex_destroy(&io->lock);
    pthread_cond_destroy(&io->wake);
    free(io);
}

int io_create(bool force_fallback, struct io **ret)
{
    struct io *io = calloc(1, sizeof(*io));
    if (io == NULL) {
        return -ENOMEM;
    }
    if (io_map_buffers(io) < 0) {
        free(io);
        return -ENOMEM;
    }
    io->queue_end = &io->queue;
    pthread_mutex_init(&io->lock, NULL);
    pthread_cond_init(&io->wake, NULL);
    if (!force_fallback) {
        ring_init(io);
    }
    int rc = -pthread_create(&io->thread, NULL, io_main, io);
    if (rc < 0) {
        io_free(io);
        return rc;
    }
    *ret = io;
    return 0;
}

void io_destroy(struct io *io)
{
    if (io == NULL) {
        return;
    }
    pthread_mutex_lock(&io->lock);
    io->stop = true;
    pthread_cond_signal(&io->wake);
    pthread_mutex_unlock(&io->lock);
    pthread_join(io->thread, NULL);
    io_free(io);
}

bool io_uses_uring(const struct io *io)
{
    return io->has_ring;
}

bool io_on_thread(const struct io *io)
{
    return io != NULL && current == io;
}

int io_submit_read(struct io *io, struct io_read_job *job)
{
    job->queued = (struct io_job){.is_call = false};
    return append(io, &job->queued);
}

int io_submit_call(struct io *io, struct io_call_job *job)
{
    job->queued = (struct io_job){.is_call = true};
    return append(io, &job->queued);
}
