/* The io thread, with io_uring and with pread. */
#include "daemon/io/io_internal.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB (1u << 20)

/* Waits for the ring's completions from the fail_from-th on fail, fail_count of them; the others
 * tell of excess bytes more than there were; and the ring's buffers may be refused. The linker
 * wraps both for this program. */
static atomic_int fail_from, fail_count, excess;
static bool refuse_buffers;
int __real_io_ring_wait(struct io *io, uint32_t *ret_slot, int *ret_result);
int __wrap_io_ring_wait(struct io *io, uint32_t *ret_slot, int *ret_result);
int __real_io_uring_register_buffers(struct io_uring *ring, const struct iovec *vectors,
                                     unsigned n);
int __wrap_io_uring_register_buffers(struct io_uring *ring, const struct iovec *vectors,
                                     unsigned n);

int __wrap_io_ring_wait(struct io *io, uint32_t *ret_slot, int *ret_result)
{
    if (fail_count > 0 && --fail_from < 0) {
        fail_count--;
        return -EBADR;
    }
    int rc = __real_io_ring_wait(io, ret_slot, ret_result);
    if (rc == 1) {
        *ret_result += excess;
    }
    return rc;
}

int __wrap_io_uring_register_buffers(struct io_uring *ring, const struct iovec *vectors, unsigned n)
{
    return refuse_buffers ? -ENOMEM : __real_io_uring_register_buffers(ring, vectors, n);
}

static int file_of(size_t bytes)
{
    int fd = memfd_create("io-test", MFD_CLOEXEC);
    cr_assert(ge(int, fd, 0));
    unsigned char *data = malloc(bytes + 1);
    for (size_t i = 0; i < bytes; i++) {
        data[i] = (unsigned char)(i * 2654435761u >> 13);
    }
    cr_assert(eq(sz, (size_t)write(fd, data, bytes), bytes));
    free(data);
    return fd;
}

struct sink {
    unsigned char *data;
    uint64_t next, start;
    int calls, fail_at, failure;
    bool out_of_order;
    atomic_bool *cancel;        /* set at the first piece */
    const unsigned char *first; /* where the first piece lay */
};

static int take(void *arg, uint64_t offset, const void *data, size_t bytes)
{
    struct sink *s = arg;
    s->out_of_order |= offset != s->next;
    s->first = s->first != NULL ? s->first : data;
    if (s->data != NULL) {
        memcpy(s->data + (offset - s->start), data, bytes);
    }
    s->next = offset + bytes;
    if (s->cancel != NULL) {
        atomic_store(s->cancel, true);
    }
    return ++s->calls == s->fail_at ? s->failure : 0;
}

static struct io *make(bool fallback)
{
    struct io *io;
    cr_assert(eq(int, io_create(fallback, &io), 0));
    if (fallback) {
        cr_expect(not(io_uses_uring(io)));
    } else if (!io_uses_uring(io)) {
        fprintf(stderr, "NOTE: io_uring is refused here: pread is tested twice\n");
    }
    return io;
}

/* Reads [offset, offset + bytes) of a file through io and compares with pread. */
static void check_bytes(struct io *io, int fd, uint64_t offset, size_t bytes)
{
    unsigned char *truth = malloc(bytes + 1);
    struct sink s = {.data = malloc(bytes + 1), .next = offset, .start = offset};
    struct io_read_job job = {
        .fd = fd, .offset = offset, .bytes = bytes, .on_data = take, .arg = &s};
    cr_assert(eq(sz, (size_t)pread(fd, truth, bytes, (off_t)offset), bytes));
    cr_expect(eq(int, io_read_wait(io, &job), 0));
    cr_expect(not(s.out_of_order));
    cr_expect(eq(u64, s.next, offset + bytes));
    cr_expect(eq(int, memcmp(truth, s.data, bytes), 0), "%zu bytes from %llu", bytes,
              (unsigned long long)offset);
    free(truth);
    free(s.data);
}

TestSuite(io, .timeout = 60);

Test(io, the_same_bytes_at_any_size)
{
    static const size_t sizes[] = {0,       1,       4095,        MIB - 1,          MIB,
                                   MIB + 1, 4 * MIB, 4 * MIB + 1, 9 * MIB + MIB / 2};
    int fd = file_of(10 * MIB);
    for (int fallback = 0; fallback < 2; fallback++) {
        struct io *io = make(fallback);
        for (size_t i = 0; i < sizeof(sizes) / sizeof(sizes[0]); i++) {
            check_bytes(io, fd, 0, sizes[i]);
            check_bytes(io, fd, 77777, sizes[i]);
        }
        io_destroy(io);
    }
    close(fd);
}

static int read_with(struct io *io, int fd, uint64_t bytes, struct sink *s,
                     const atomic_bool *cancel)
{
    struct io_read_job job = {.fd = fd, .bytes = bytes, .on_data = take, .arg = s};
    job.cancel = cancel;
    return io_read_wait(io, &job);
}

/* After every failure the next job reads right: nothing is left in flight. */
Test(io, failures_end_the_job_and_nothing_else)
{
    int fd = file_of(10 * MIB), cut = file_of(3 * MIB + 5);
    for (int fallback = 0; fallback < 2; fallback++) {
        struct io *io = make(fallback);
        struct sink s = {.fail_at = 2, .failure = -ENOSPC};
        cr_expect(eq(int, read_with(io, fd, 10 * MIB, &s, NULL), -ENOSPC));
        cr_expect(eq(int, s.calls, 2));
        check_bytes(io, fd, 1, 5 * MIB);

        s = (struct sink){.fail_at = 1, .failure = 7};
        cr_expect(eq(int, read_with(io, fd, 10 * MIB, &s, NULL), 7));
        check_bytes(io, fd, 0, 9 * MIB);

        s = (struct sink){0};
        cr_expect(eq(int, read_with(io, cut, 9 * MIB, &s, NULL), -EIO));
        cr_expect(le(u64, s.next, 3 * MIB));
        check_bytes(io, cut, 0, 3 * MIB + 5);

        s = (struct sink){0};
        cr_expect(eq(int, read_with(io, -1, 5 * MIB, &s, NULL), -EBADF));
        cr_expect(eq(int, s.calls, 0));
        check_bytes(io, fd, 12345, MIB);
        io_destroy(io);
    }
    close(fd);
    close(cut);
}

/* Reads that cannot be waited for are nobody's any more: the next job takes no completions of
 * theirs, and has buffers that they do not write into. */
static void check_lost_wait(struct io *io, int fd, int cut, int nth, int count)
{
    bool uses_uring = io_uses_uring(io);
    struct sink before = {0}, failed = {0}, after = {0};
    cr_assert(eq(int, read_with(io, fd, 1, &before, NULL), 0));
    fail_from = nth;
    fail_count = count;
    cr_expect(eq(int, read_with(io, fd, 10 * MIB, &failed, NULL), uses_uring ? -EBADR : 0));
    check_bytes(io, cut, 0, 12345);
    check_bytes(io, fd, 1, 9 * MIB);
    fail_count = 0;
    cr_assert(eq(int, read_with(io, cut, 1, &after, NULL), 0));
    size_t buffers = (size_t)IO_N_BUFFERS * IO_BUFFER_BYTES;
    bool same = after.first >= before.first && after.first < before.first + buffers;
    cr_expect(eq(int, io_uses_uring(io), uses_uring &&count == 1));
    cr_expect(eq(int, same, !uses_uring || count == 1));
}

Test(io, a_wait_that_fails_leaves_nothing_to_the_next_job)
{
    static const int counts[] = {1, 2, INT_MAX};
    int fd = file_of(10 * MIB), cut = file_of(12345);
    for (int nth = 0; nth < 6; nth++) {
        for (int i = 0; i < 6; i++) {
            refuse_buffers = i >= 3;
            struct io *io = make(false);
            check_lost_wait(io, fd, cut, nth, counts[i % 3]);
            io_destroy(io);
        }
    }
    close(fd);
    close(cut);
}

Test(io, more_than_was_asked_for_is_no_answer)
{
    int fd = file_of(10 * MIB);
    struct io *io = make(false);
    struct sink s = {0};
    excess = 1;
    cr_expect(eq(int, read_with(io, fd, MIB, &s, NULL), io_uses_uring(io) ? -EIO : 0));
    excess = 0;
    check_bytes(io, fd, 0, 9 * MIB);
    io_destroy(io);
    close(fd);
}

Test(io, cancel_before_and_during)
{
    int fd = file_of(10 * MIB);
    for (int fallback = 0; fallback < 2; fallback++) {
        struct io *io = make(fallback);
        atomic_bool cancel = true;
        struct sink s = {0};
        cr_expect(eq(int, read_with(io, fd, 10 * MIB, &s, &cancel), -ECANCELED));
        cr_expect(eq(int, s.calls, 0));
        cancel = false;
        s = (struct sink){.cancel = &cancel};
        cr_expect(eq(int, read_with(io, fd, 10 * MIB, &s, &cancel), -ECANCELED));
        cr_expect(eq(int, s.calls, 1));
        check_bytes(io, fd, 0, 10 * MIB);
        io_destroy(io);
    }
    close(fd);
}

Test(io, without_on_data_the_file_is_read_all_the_same)
{
    int fd = file_of(2 * MIB);
    for (int fallback = 0; fallback < 2; fallback++) {
        struct io *io = make(fallback);
        struct io_read_job job = {.fd = fd, .bytes = 2 * MIB};
        cr_expect(eq(int, io_read_wait(io, &job), 0));
        job.bytes++;
        cr_expect(eq(int, io_read_wait(io, &job), -EIO));
        io_destroy(io);
    }
    close(fd);
}

/* ---- the end ----------------------------------------------------------------------------- */

struct queued {
    struct io_read_job job;
    pthread_mutex_t *gate; /* the first job holds up the io thread at it */
    int done, result;
};

static int wait_at_gate(void *arg, uint64_t offset, const void *data, size_t bytes)
{
    struct queued *q = arg;
    pthread_mutex_lock(q->gate);
    pthread_mutex_unlock(q->gate);
    return 0;
}

static void on_done(void *arg, int result)
{
    struct queued *q = arg;
    q->done++;
    q->result = result;
}

Test(io, destroy_finishes_the_running_job_and_cancels_the_others)
{
    int fd = file_of(100);
    for (int fallback = 0; fallback < 2; fallback++) {
        struct io *io = make(fallback);
        pthread_mutex_t gate;
        pthread_mutex_init(&gate, NULL);
        struct queued jobs[5];
        pthread_mutex_lock(&gate);
        for (int i = 0; i < 5; i++) {
            jobs[i] = (struct queued){.gate = &gate};
            jobs[i].job = (struct io_read_job){
                .fd = fd, .bytes = 100, .on_data = wait_at_gate, .done = on_done, .arg = &jobs[i]};
            cr_assert(eq(int, io_submit_read(io, &jobs[i].job), 0));
        }
        /* Once the gate is open, the thread may be anywhere in the queue when the end comes. */
        pthread_mutex_unlock(&gate);
        io_destroy(io);
        for (int i = 0; i < 5; i++) {
            cr_expect(eq(int, jobs[i].done, 1));
            cr_expect(jobs[i].result == 0 || jobs[i].result == -ECANCELED);
        }
        pthread_mutex_destroy(&gate);
    }
    close(fd);
    io_destroy(NULL);
}
