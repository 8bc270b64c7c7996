/* daemon/io/io_internal.h - what the files of io/ share: the thread's state and its ring. */
#ifndef DAEMON_IO_IO_INTERNAL_H
#define DAEMON_IO_IO_INTERNAL_H

#include "daemon/io/io.h"

#include <liburing.h>
#include <pthread.h>

/* Registered buffers count against RLIMIT_MEMLOCK, which unprivileged daemons have 8 MiB of. */
#define IO_N_BUFFERS    4u
#define IO_BUFFER_BYTES (1u << 20)
#define IO_SLICE_BYTES  (64u << 20) /* of a long read, before other jobs get their turn */

struct io {
    pthread_t thread;
    pthread_mutex_t lock; /* guards the queue and stop */
    pthread_cond_t wake;
    struct io_job *queue, **queue_end;
    bool stop;
    atomic_bool has_ring; /* written by the io thread */

    /* The io thread's own. */
    bool fixed_buffers;
    struct io_uring ring;
    uint8_t *buffers; /* IO_N_BUFFERS of IO_BUFFER_BYTES; NULL: to be mapped anew */
};

/* Submits the one entry that was prepared. When it was not taken it stays in the ring's queue, and
 * the ring cannot be used further: has_ring becomes false. */
int io_ring_submit(struct io *io);

/* Waits for a completion. 1: *ret_slot, *ret_result are set; 0: a signal came, wait again; or
 * -errno. */
int io_ring_wait(struct io *io, uint32_t *ret_slot, int *ret_result);

/* Runs the next slice of a read. */
int io_run_read(struct io *io, struct io_read_job *job);

/* Gives the ring back once it was found unusable. in_flight: the kernel may still work on what it
 * took, and on its buffers: they stay mapped, and nobody uses them again. */
void io_ring_check(struct io *io, bool in_flight);

/* Maps buffers where there are none: -ENOMEM. */
int io_map_buffers(struct io *io);

/* Plain calls, repeated until all is done. -EIO: the file ends early. */
int io_pread_all(int fd, void *data, size_t bytes, uint64_t offset);
int io_pwrite_all(int fd, const void *data, size_t bytes, uint64_t offset);

#endif
