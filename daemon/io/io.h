/* daemon/io/io.h - the io thread: one io_uring, with pread and pwrite where it is refused.
 *
 * Jobs are queued from any thread and run by the io thread in their order, several reads or writes
 * in flight at once in registered buffers (4 MiB in all). A long read lets others in between.
 * Callbacks run on the io thread and must not block; they may submit jobs. */
#ifndef DAEMON_IO_IO_H
#define DAEMON_IO_IO_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct io;

/* force_fallback: never try io_uring (tests, and hosts where it is unwanted). */
int io_create(bool force_fallback, struct io **ret);
void io_destroy(struct io *io); /* waits for the running job, fails queued ones with -ECANCELED */
bool io_uses_uring(const struct io *io);

struct io_job { /* a place in the queue */
    struct io_job *next;
    uint64_t taken; /* bytes of a read that are done */
    bool is_call;
};

/* Reads [offset, offset + bytes) of fd in pieces, in order, and hands each to on_data; a non-zero
 * return of on_data ends the job with that code. done gets 0, or -errno (-EIO: short file).
 * fd stays the caller's and must live until done. *cancel may be set to true at any time:
 * -ECANCELED. The job's memory is the caller's until done has returned. */
struct io_read_job {
    int fd;
    uint64_t offset, bytes;
    int (*on_data)(void *arg, uint64_t offset, const void *data, size_t bytes); /* NULL: none */
    void (*done)(void *arg, int result);
    void *arg;
    const atomic_bool *cancel; /* or NULL */
    struct io_job queued;      /* the io thread's */
};
int io_submit_read(struct io *io, struct io_read_job *job);

/* The same, waiting for the end in the calling thread (never the loop or the io thread). */
int io_read_wait(struct io *io, struct io_read_job *job);

/* Runs a function on the io thread, which may block on files, and nothing else. done gets what it
 * returned, or -ECANCELED when the thread ended before. The job's memory is the caller's again when
 * done is called, so done may submit it anew. -ECANCELED: the thread ends; done is not called. */
struct io_call_job {
    int (*fn)(void *arg);
    void (*done)(void *arg, int result); /* or NULL */
    void *arg;
    struct io_job queued; /* the io thread's */
};
int io_submit_call(struct io *io, struct io_call_job *job);

bool io_on_thread(const struct io *io); /* whether the caller runs on it */

/* ---- inside a call, on the io thread -------------------------------------------------------- */

struct io_span { /* bytes that go into a file in one piece */
    int fd;
    uint64_t offset;
    const void *data;
    size_t bytes;
    /* Sees the bytes as they are copied for writing, in order and one span after another: checksums
     * cost no second pass. NULL: nobody looks. */
    void (*on_piece)(void *arg, const void *data, size_t bytes);
    void *arg;
    int result; /* 0 or -errno; a span that was written in part has failed */
};

/* Writes all spans, in any order among each other; returns the first failure. */
int io_write_spans(struct io *io, struct io_span *spans, size_t n_spans);
int io_sync(struct io *io, int fd); /* fdatasync */

#endif
