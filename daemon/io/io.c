#include "daemon/io/io.h"

#include <errno.h>
#include <liburing.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* Registered buffers count against RLIMIT_MEMLOCK, which unprivileged daemons have 8 MiB of. */
#define N_BUFFERS    4u
#define BUFFER_BYTES (1u << 20)

struct piece { /* a read in flight, or done and waiting for its turn */
    uint64_t offset;
    uint32_t wanted, got;
    bool done;
};

struct io {
    pthread_t thread;
    pthread_mutex_t lock; /* guards the queue and stop */
    pthread_cond_t wake;
    struct io_read_job *queue, **queue_end;
    bool stop;
    atomic_bool has_ring; /* written by the io thread */

    /* The io thread's own. */
    bool fixed_buffers;
    struct io_uring ring;
    uint8_t *buffers; /* N_BUFFERS of BUFFER_BYTES */
};

static bool job_cancelled(const struct io_read_job *job)
{
    return job->cancel != NULL && atomic_load(job->cancel);
}

/* ---- pread ------------------------------------------------------------------------------- */

/* 0, or -errno; a file that ends early is -EIO. */
static int pread_all(int fd, uint8_t *data, size_t bytes, uint64_t offset)
{
    while (bytes > 0) {
        ssize_t n = pread(fd, data, bytes, (off_t)offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -EIO;
        }
        data += n;
        bytes -= (size_t)n;
        offset += (uint64_t)n;
    }
    return 0;
}

static int read_plain(struct io *io, struct io_read_job *job)
{
    for (uint64_t done = 0; done < job->bytes;) {
        size_t n = job->bytes - done < BUFFER_BYTES ? (size_t)(job->bytes - done) : BUFFER_BYTES;
        if (job_cancelled(job)) {
            return -ECANCELED;
        }
        int rc = pread_all(job->fd, io->buffers, n, job->offset + done);
        if (rc == 0 && job->on_data != NULL) {
            rc = job->on_data(job->arg, job->offset + done, io->buffers, n);
        }
        if (rc != 0) {
            return rc;
        }
        done += n;
    }
    return 0;
}

/* ---- io_uring ---------------------------------------------------------------------------- */

/* Puts the next read of a piece, or the rest of one that came short, on the ring. */
static int submit_piece(struct io *io, const struct io_read_job *job, struct piece *pieces,
                        uint32_t slot)
{
    struct piece *p = &pieces[slot];
    struct io_uring_sqe *sqe = io_uring_get_sqe(&io->ring);
    if (sqe == NULL) {
        atomic_store(&io->has_ring, false);
        return -EBUSY;
    }
    uint8_t *data = io->buffers + (size_t)slot * BUFFER_BYTES + p->got;
    if (io->fixed_buffers) {
        io_uring_prep_read_fixed(sqe, job->fd, data, p->wanted - p->got, p->offset + p->got,
                                 (int)slot);
    } else {
        io_uring_prep_read(sqe, job->fd, data, p->wanted - p->got, p->offset + p->got);
    }
    io_uring_sqe_set_data64(sqe, slot);
    /* A read that was not taken stays in the ring's queue: the ring cannot be used further. */
    int n = io_uring_submit(&io->ring);
    if (n == 1) {
        return 0;
    }
    atomic_store(&io->has_ring, false);
    return n < 0 ? n : -EBUSY;
}

/* Takes one completion. *ret_rc gets the read's own failure. */
static int reap(struct io *io, const struct io_read_job *job, struct piece *pieces,
                uint32_t *in_flight, int *ret_rc)
{
    struct io_uring_cqe *cqe;
    int rc = io_uring_wait_cqe(&io->ring, &cqe);
    if (rc == -EINTR) {
        return 0;
    }
    if (rc < 0) {
        return rc;
    }
    uint32_t slot = (uint32_t)io_uring_cqe_get_data64(cqe);
    int result = cqe->res;
    io_uring_cqe_seen(&io->ring, cqe);
    struct piece *p = &pieces[slot];
    (*in_flight)--;
    if (result > 0) {
        p->got += (uint32_t)result;
    } else if (result != -EINTR && result != -EAGAIN) {
        *ret_rc = result < 0 ? result : -EIO;
        return 0;
    }
    p->done = p->got == p->wanted;
    if (!p->done && *ret_rc == 0) {
        rc = submit_piece(io, job, pieces, slot);
        *in_flight += rc == 0;
    }
    return rc;
}

/* Keeps N_BUFFERS reads in flight and hands their data over in order. */
static int read_ring(struct io *io, struct io_read_job *job)
{
    struct piece pieces[N_BUFFERS] = {0};
    uint64_t n_pieces = (job->bytes + BUFFER_BYTES - 1) / BUFFER_BYTES;
    uint64_t submitted = 0, delivered = 0;
    uint32_t in_flight = 0;
    int rc = 0;
    while (delivered < n_pieces && rc == 0) {
        while (rc == 0 && submitted < n_pieces && submitted - delivered < N_BUFFERS) {
            uint32_t slot = (uint32_t)(submitted % N_BUFFERS);
            uint64_t at = submitted * BUFFER_BYTES;
            uint64_t left = job->bytes - at;
            pieces[slot] = (struct piece){
                .offset = job->offset + at,
                .wanted = left < BUFFER_BYTES ? (uint32_t)left : BUFFER_BYTES,
            };
            rc = submit_piece(io, job, pieces, slot);
            in_flight += rc == 0;
            submitted += rc == 0;
        }
        struct piece *next = &pieces[delivered % N_BUFFERS];
        int failure = 0;
        while (rc == 0 && !next->done) {
            rc = reap(io, job, pieces, &in_flight, &failure);
            rc = rc < 0 ? rc : failure;
        }
        if (rc == 0 && job_cancelled(job)) {
            rc = -ECANCELED;
        }
        if (rc == 0 && job->on_data != NULL) {
            rc = job->on_data(job->arg, next->offset,
                              io->buffers + (delivered % N_BUFFERS) * BUFFER_BYTES, next->wanted);
        }
        delivered += rc == 0;
    }
    /* Reads still in flight would write into buffers of the next job. */
    int ignored = -ECANCELED;
    while (in_flight > 0 && reap(io, job, pieces, &in_flight, &ignored) == 0) {
    }
    return rc;
}

/* ---- the thread -------------------------------------------------------------------------- */

static struct io_read_job *next_job(struct io *io, bool *ret_stop)
{
    pthread_mutex_lock(&io->lock);
    while (io->queue == NULL && !io->stop) {
        pthread_cond_wait(&io->wake, &io->lock);
    }
    struct io_read_job *job = io->queue;
    if (job != NULL) {
        io->queue = job->next;
        io->queue_end = io->queue == NULL ? &io->queue : io->queue_end;
    }
    *ret_stop = io->stop;
    pthread_mutex_unlock(&io->lock);
    return job;
}

static int run_job(struct io *io, struct io_read_job *job)
{
    if (!io->has_ring) {
        return read_plain(io, job);
    }
    int rc = read_ring(io, job);
    if (!io->has_ring) {
        io_uring_queue_exit(&io->ring);
    }
    return rc;
}

static void *io_main(void *arg)
{
    struct io *io = arg;
    struct io_read_job *job;
    bool stop = false;
    while ((job = next_job(io, &stop)) != NULL) {
        job->done(job->arg, stop ? -ECANCELED : run_job(io, job));
    }
    return NULL;
}

static void ring_init(struct io *io)
{
    atomic_init(&io->has_ring, io_uring_queue_init(2 * N_BUFFERS, &io->ring, 0) == 0);
    if (!io->has_ring) {
        return;
    }
    struct iovec vectors[N_BUFFERS];
    for (uint32_t i = 0; i < N_BUFFERS; i++) {
        vectors[i] = (struct iovec){io->buffers + (size_t)i * BUFFER_BYTES, BUFFER_BYTES};
    }
    io->fixed_buffers = io_uring_register_buffers(&io->ring, vectors, N_BUFFERS) == 0;
}

static void io_free(struct io *io)
{
    if (io->has_ring) {
        io_uring_queue_exit(&io->ring);
    }
    munmap(io->buffers, (size_t)N_BUFFERS * BUFFER_BYTES);
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
    io->buffers = mmap(NULL, (size_t)N_BUFFERS * BUFFER_BYTES, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (io->buffers == MAP_FAILED) {
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

int io_submit_read(struct io *io, struct io_read_job *job)
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

/* ---- waiting ----------------------------------------------------------------------------- */

struct waiting {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    bool done;
    int result;
    struct io_read_job *job;
};

static int on_wait_data(void *arg, uint64_t offset, const void *data, size_t bytes)
{
    struct io_read_job *job = ((struct waiting *)arg)->job;
    return job->on_data != NULL ? job->on_data(job->arg, offset, data, bytes) : 0;
}

static void on_wait_done(void *arg, int result)
{
    struct waiting *w = arg;
    pthread_mutex_lock(&w->lock);
    w->done = true;
    w->result = result;
    pthread_cond_signal(&w->wake);
    pthread_mutex_unlock(&w->lock);
}

int io_read_wait(struct io *io, struct io_read_job *job)
{
    struct waiting w = {.job = job};
    struct io_read_job inner = *job;
    inner.on_data = on_wait_data;
    inner.done = on_wait_done;
    inner.arg = &w;
    pthread_mutex_init(&w.lock, NULL);
    pthread_cond_init(&w.wake, NULL);
    int rc = io_submit_read(io, &inner);
    if (rc == 0) {
        pthread_mutex_lock(&w.lock);
        while (!w.done) {
            pthread_cond_wait(&w.wake, &w.lock);
        }
        pthread_mutex_unlock(&w.lock);
        rc = w.result;
    }
    pthread_mutex_destroy(&w.lock);
    pthread_cond_destroy(&w.wake);
    return rc;
}
