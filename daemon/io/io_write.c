/* Writing: spans are copied piece by piece into the registered buffers, all of which are in flight.
 */
#include "daemon/io/io_internal.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

struct piece { /* a write in flight */
    struct io_span *span;
    uint64_t offset;
    uint32_t wanted, put;
};

struct writing {
    struct io *io;
    struct io_span *spans;
    size_t n_spans;
    size_t next;     /* span that the next piece is of */
    size_t consumed; /* bytes of it that were taken */
    struct piece pieces[IO_N_BUFFERS];
    uint32_t free_slots; /* a bit for every buffer */
};

/* ---- plain calls ------------------------------------------------------------------------- */

int io_pread_all(int fd, void *data, size_t bytes, uint64_t offset)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pread(fd, (char *)data + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -EIO;
        }
        done += (size_t)n;
    }
    return 0;
}

int io_pwrite_all(int fd, const void *data, size_t bytes, uint64_t offset)
{
    for (size_t done = 0; done < bytes;) {
        ssize_t n = pwrite(fd, (const char *)data + done, bytes - done, (off_t)(offset + done));
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -EIO;
        }
        done += (size_t)n;
    }
    return 0;
}

static void write_plain(struct io_span *span)
{
    if (span->on_piece != NULL) {
        span->on_piece(span->arg, span->data, span->bytes);
    }
    span->result = io_pwrite_all(span->fd, span->data, span->bytes, span->offset);
}

/* ---- io_uring ---------------------------------------------------------------------------- */

static void fail(struct io_span *span, int rc)
{
    span->result = span->result == 0 ? rc : span->result;
}

/* Puts a piece, or the rest of one that came short, on the ring. */
static int submit_piece(struct writing *w, uint32_t slot)
{
    struct io *io = w->io;
    struct piece *p = &w->pieces[slot];
    struct io_uring_sqe *sqe = io_uring_get_sqe(&io->ring);
    if (sqe == NULL) {
        atomic_store(&io->has_ring, false);
        return -EBUSY;
    }
    uint8_t *data = io->buffers + (size_t)slot * IO_BUFFER_BYTES + p->put;
    uint32_t left = p->wanted - p->put;
    if (io->fixed_buffers) {
        io_uring_prep_write_fixed(sqe, p->span->fd, data, left, p->offset + p->put, (int)slot);
    } else {
        io_uring_prep_write(sqe, p->span->fd, data, left, p->offset + p->put);
    }
    io_uring_sqe_set_data64(sqe, slot);
    int rc = io_ring_submit(io);
    w->free_slots &= rc == 0 ? ~(1u << slot) : ~0u;
    return rc;
}

/* Fills a free buffer with the next bytes and sends it off. */
static int start_piece(struct writing *w)
{
    struct io_span *span = &w->spans[w->next];
    uint32_t slot = (uint32_t)__builtin_ctz(w->free_slots);
    size_t left = span->bytes - w->consumed;
    size_t n = left < IO_BUFFER_BYTES ? left : IO_BUFFER_BYTES;
    uint8_t *buffer = w->io->buffers + (size_t)slot * IO_BUFFER_BYTES;
    memcpy(buffer, (const uint8_t *)span->data + w->consumed, n);
    if (span->on_piece != NULL) {
        span->on_piece(span->arg, buffer,
                       n); /* of what will be written, still in the CPU's cache */
    }
    w->pieces[slot] =
        (struct piece){.span = span, .offset = span->offset + w->consumed, .wanted = (uint32_t)n};
    w->consumed += n;
    int rc = submit_piece(w, slot);
    if (rc < 0) {
        fail(span, rc);
    }
    return rc;
}

/* Takes one completion; a negative return is the ring's own failure. */
static int reap(struct writing *w)
{
    uint32_t slot;
    int result;
    int rc = io_ring_wait(w->io, &slot, &result);
    if (rc <= 0) {
        return rc;
    }
    struct piece *p = &w->pieces[slot];
    w->free_slots |= 1u << slot;
    if (result > 0) {
        p->put += (uint32_t)result;
    } else if (result != -EINTR && result != -EAGAIN) {
        fail(p->span, result < 0 ? result : -EIO);
        return 0;
    }
    if (p->put < p->wanted && p->span->result == 0) {
        rc = submit_piece(w, slot);
        if (rc < 0) {
            fail(p->span, rc);
            return rc;
        }
    }
    return 0;
}

static void write_ring(struct writing *w)
{
    const uint32_t all_free = (1u << IO_N_BUFFERS) - 1;
    int rc = 0;
    while (rc == 0 && (w->next < w->n_spans || w->free_slots != all_free)) {
        if (w->next < w->n_spans) {
            struct io_span *span = &w->spans[w->next];
            if (span->result != 0 || w->consumed == span->bytes) {
                w->next++;
                w->consumed = 0;
                continue;
            }
            if (w->free_slots != 0) {
                rc = start_piece(w);
                continue;
            }
        }
        rc = reap(w);
    }
    if (rc == 0) {
        return;
    }
    /* The ring is lost: what it did not take has failed, and what it took still reads our buffers.
     */
    atomic_store(&w->io->has_ring, false);
    for (size_t i = w->next; i < w->n_spans; i++) {
        fail(&w->spans[i], rc);
    }
    for (uint32_t slot = 0; slot < IO_N_BUFFERS; slot++) {
        if ((w->free_slots & 1u << slot) == 0) {
            fail(w->pieces[slot].span, rc);
        }
    }
    while (w->free_slots != all_free && reap(w) == 0) {
    }
    io_ring_check(w->io, w->free_slots != all_free);
}

int io_write_spans(struct io *io, struct io_span *spans, size_t n_spans)
{
    for (size_t i = 0; i < n_spans; i++) {
        spans[i].result = 0;
    }
    if (io->has_ring) {
        struct writing w = {.io = io, .spans = spans, .n_spans = n_spans};
        w.free_slots = (1u << IO_N_BUFFERS) - 1;
        write_ring(&w);
    } else {
        for (size_t i = 0; i < n_spans; i++) {
            write_plain(&spans[i]);
        }
    }
    int rc = 0;
    for (size_t i = 0; i < n_spans && rc == 0; i++) {
        rc = spans[i].result;
    }
    return rc;
}

int io_sync(struct io *io, int fd)
{
    struct io_uring_sqe *sqe = io->has_ring ? io_uring_get_sqe(&io->ring) : NULL;
    if (sqe == NULL) {
        return fdatasync(fd) < 0 ? -errno : 0;
    }
    io_uring_prep_fsync(sqe, fd, IORING_FSYNC_DATASYNC);
    io_uring_sqe_set_data64(sqe, 0);
    int rc = io_ring_submit(io);
    uint32_t slot;
    int result = 0;
    while (rc == 0) {
        rc = io_ring_wait(io, &slot, &result);
    }
    if (rc == 1) {
        return result;
    }
    /* Whether it was synced is not known: a failure, as any other of a disk. */
    atomic_store(&io->has_ring, false);
    io_ring_check(io, false);
    return rc;
}
