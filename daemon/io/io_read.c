/* Reading: pieces of a job in flight in all buffers, handed over in order. */
#include "daemon/io/io_internal.h"

#include <errno.h>

struct piece { /* a read in flight, or done and waiting for its turn */
    uint64_t offset;
    uint32_t wanted, got;
    bool done;
};

static bool job_cancelled(const struct io_read_job *job)
{
    return job->cancel != NULL && atomic_load(job->cancel);
}

/* ---- plain ------------------------------------------------------------------------ */

static int read_plain(struct io *io, struct io_read_job *job, uint64_t offset, uint64_t bytes)
{
    int mapped = io_map_buffers(io);
    if (mapped < 0) {
        return mapped;
    }
    for (uint64_t done = 0; done < bytes;) {
        size_t n = bytes - done < IO_BUFFER_BYTES ? (size_t)(bytes - done) : IO_BUFFER_BYTES;
        if (job_cancelled(job)) {
            return -ECANCELED;
        }
        int rc = io_pread_all(job->fd, io->buffers, n, offset + done);
        if (rc == 0 && job->on_data != NULL) {
            rc = job->on_data(job->arg, offset + done, io->buffers, n);
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
    uint8_t *data = io->buffers + (size_t)slot * IO_BUFFER_BYTES + p->got;
    if (io->fixed_buffers) {
        io_uring_prep_read_fixed(sqe, job->fd, data, p->wanted - p->got, p->offset + p->got,
                                 (int)slot);
    } else {
        io_uring_prep_read(sqe, job->fd, data, p->wanted - p->got, p->offset + p->got);
    }
    io_uring_sqe_set_data64(sqe, slot);
    return io_ring_submit(io);
}

/* Takes one completion. *ret_rc gets the read's own failure. */
static int reap(struct io *io, const struct io_read_job *job, struct piece *pieces,
                uint32_t *in_flight, int *ret_rc)
{
    uint32_t slot;
    int result;
    int rc = io_ring_wait(io, &slot, &result);
    if (rc <= 0) {
        return rc;
    }
    struct piece *p = &pieces[slot];
    (*in_flight)--;
    if (result > 0 && (uint32_t)result > p->wanted - p->got) {
        *ret_rc = -EIO; /* no answer to what was asked */
        return 0;
    }
    if (result > 0) {
        p->got += (uint32_t)result;
    } else if (result != -EINTR && result != -EAGAIN) {
        *ret_rc = result < 0 ? result : -EIO;
        return 0;
    }
    p->done = p->got == p->wanted;
    rc = 0;
    if (!p->done && *ret_rc == 0) {
        rc = submit_piece(io, job, pieces, slot);
        *in_flight += rc == 0;
    }
    return rc;
}

/* Keeps IO_N_BUFFERS reads in flight and hands their data over in order. */
static int read_ring(struct io *io, struct io_read_job *job, uint64_t offset, uint64_t bytes)
{
    struct piece pieces[IO_N_BUFFERS] = {0};
    uint64_t n_pieces = (bytes + IO_BUFFER_BYTES - 1) / IO_BUFFER_BYTES;
    uint64_t submitted = 0, delivered = 0;
    uint32_t in_flight = 0;
    int rc = 0;
    while (delivered < n_pieces && rc == 0) {
        while (rc == 0 && submitted < n_pieces && submitted - delivered < IO_N_BUFFERS) {
            uint32_t slot = (uint32_t)(submitted % IO_N_BUFFERS);
            uint64_t at = submitted * IO_BUFFER_BYTES;
            uint64_t left = bytes - at;
            pieces[slot] = (struct piece){
                .offset = offset + at,
                .wanted = left < IO_BUFFER_BYTES ? (uint32_t)left : IO_BUFFER_BYTES,
            };
            rc = submit_piece(io, job, pieces, slot);
            in_flight += rc == 0;
            submitted += rc == 0;
        }
        struct piece *next = &pieces[delivered % IO_N_BUFFERS];
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
                              io->buffers + (delivered % IO_N_BUFFERS) * IO_BUFFER_BYTES,
                              next->wanted);
        }
        delivered += rc == 0;
    }
    /* Reads still in flight would write into buffers of the next job, which would take their
     * completions for its own: what cannot be waited for ends the ring. */
    int ignored = -ECANCELED;
    while (in_flight > 0 && reap(io, job, pieces, &in_flight, &ignored) == 0) {
    }
    if (in_flight > 0) {
        atomic_store(&io->has_ring, false);
    }
    io_ring_check(io, in_flight > 0);
    return rc;
}

int io_run_read(struct io *io, struct io_read_job *job)
{
    uint64_t offset = job->offset + job->queued.taken;
    uint64_t left = job->bytes - job->queued.taken;
    uint64_t bytes = left < IO_SLICE_BYTES ? left : IO_SLICE_BYTES;
    int rc;
    if (io->has_ring) {
        rc = read_ring(io, job, offset, bytes);
    } else {
        rc = read_plain(io, job, offset, bytes);
    }
    job->queued.taken += bytes;
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
