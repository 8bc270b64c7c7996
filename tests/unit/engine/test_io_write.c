/* Calls on the io thread, and what they write, with io_uring and with pwrite. */
#include "daemon/io/files.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB     (1u << 20)
#define N_SPANS 9

static struct io *make(bool fallback)
{
    struct io *io;
    cr_assert(eq(int, io_create(fallback, &io), 0));
    return io;
}

struct called { /* a call, and who waits for its end */
    struct io *io;
    int (*fn)(struct called *c);
    struct io_span *spans;
    size_t n_spans;
    int fd, result;
    bool on_thread;
    sem_t done;
};

static int call_fn(void *arg)
{
    struct called *c = arg;
    c->on_thread = io_on_thread(c->io);
    return c->fn(c);
}

static void call_done(void *arg, int result)
{
    struct called *c = arg;
    c->result = result;
    sem_post(&c->done);
}

static int call(struct called *c)
{
    struct io_call_job job = {.fn = call_fn, .done = call_done, .arg = c};
    sem_init(&c->done, 0, 0);
    cr_assert(eq(int, io_submit_call(c->io, &job), 0));
    while (sem_wait(&c->done) < 0) {
    }
    sem_destroy(&c->done);
    cr_expect(c->on_thread);
    return c->result;
}

static int write_and_sync(struct called *c)
{
    struct io_files files;
    io_files_system(c->io, &files);
    int rc = files.write(files.self, c->spans, c->n_spans);
    int synced = files.sync(files.self, c->fd);
    return rc < 0 ? rc : synced;
}

struct seen { /* what on_piece was shown */
    unsigned char *data;
    size_t bytes;
};

static void see(void *arg, const void *data, size_t bytes)
{
    struct seen *s = arg;
    memcpy(s->data + s->bytes, data, bytes);
    s->bytes += bytes;
}

static unsigned char *pattern(size_t bytes, unsigned seed)
{
    unsigned char *data = malloc(bytes + 1);
    for (size_t i = 0; i < bytes; i++) {
        data[i] = (unsigned char)((i + seed) * 2654435761u >> 13);
    }
    return data;
}

TestSuite(io_write, .timeout = 60);

Test(io_write, every_size_arrives_and_is_seen_in_order)
{
    static const size_t sizes[N_SPANS] = {0,       1,       4095,        MIB - 1,          MIB,
                                          MIB + 1, 4 * MIB, 4 * MIB + 1, 9 * MIB + MIB / 2};
    for (int fallback = 0; fallback < 2; fallback++) {
        struct io *io = make(fallback);
        int fd = memfd_create("io-write", MFD_CLOEXEC);
        struct io_span spans[N_SPANS];
        struct seen seen[N_SPANS];
        uint64_t at = 77;
        for (size_t i = 0; i < N_SPANS; i++) {
            seen[i] = (struct seen){.data = malloc(sizes[i] + 1)};
            spans[i] = (struct io_span){.fd = fd,
                                        .offset = at,
                                        .data = pattern(sizes[i], (unsigned)i),
                                        .bytes = sizes[i],
                                        .on_piece = i % 3 != 2 ? see : NULL,
                                        .arg = &seen[i],
                                        .result = -1};
            at += sizes[i] + 5;
        }
        struct called c = {
            .io = io, .fn = write_and_sync, .spans = spans, .n_spans = N_SPANS, .fd = fd};
        cr_expect(eq(int, call(&c), 0));
        for (size_t i = 0; i < N_SPANS; i++) {
            unsigned char *back = malloc(sizes[i] + 1);
            cr_expect(eq(int, spans[i].result, 0));
            cr_assert(eq(sz, (size_t)pread(fd, back, sizes[i], (off_t)spans[i].offset), sizes[i]));
            cr_expect(eq(int, memcmp(back, spans[i].data, sizes[i]), 0), "span %zu", i);
            cr_expect(eq(sz, seen[i].bytes, i % 3 != 2 ? sizes[i] : 0));
            cr_expect(eq(int, memcmp(seen[i].data, spans[i].data, seen[i].bytes), 0));
            free(back);
            free(seen[i].data);
            free((void *)spans[i].data);
        }
        io_destroy(io);
        close(fd);
    }
}

/* A span that fails takes no other with it, and the next call writes right. */
Test(io_write, a_failed_span_is_told_from_the_others)
{
    for (int fallback = 0; fallback < 2; fallback++) {
        struct io *io = make(fallback);
        int fd = memfd_create("io-write", MFD_CLOEXEC);
        int full = open("/dev/full", O_WRONLY | O_CLOEXEC);
        unsigned char *data = pattern(6 * MIB, 1);
        for (int turn = 0; turn < 3; turn++) {
            struct io_span spans[] = {
                {.fd = fd, .offset = 0, .data = data, .bytes = 3 * MIB},
                {.fd = turn == 1 ? full : -1, .offset = 0, .data = data, .bytes = 6 * MIB},
                {.fd = fd, .offset = 3 * MIB, .data = data + 3 * MIB, .bytes = 3 * MIB},
            };
            struct called c = {
                .io = io, .fn = write_and_sync, .spans = spans, .n_spans = 3, .fd = fd};
            int expected = turn == 1 ? -ENOSPC : -EBADF;
            cr_expect(eq(int, call(&c), expected));
            cr_expect(eq(int, spans[0].result, 0));
            cr_expect(eq(int, spans[1].result, expected));
            cr_expect(eq(int, spans[2].result, 0));
            unsigned char *back = malloc(6 * MIB);
            cr_assert(eq(sz, (size_t)pread(fd, back, 6 * MIB, 0), 6 * MIB));
            cr_expect(eq(int, memcmp(back, data, 6 * MIB), 0));
            cr_expect(eq(int, ftruncate(fd, 0), 0));
            free(back);
        }
        free(data);
        io_destroy(io);
        close(fd);
        close(full);
    }
}

static int sync_only(struct called *c)
{
    return io_sync(c->io, c->fd);
}

Test(io_write, a_sync_that_fails_says_so)
{
    for (int fallback = 0; fallback < 2; fallback++) {
        struct io *io = make(fallback);
        struct called c = {.io = io, .fn = sync_only, .fd = -1};
        cr_expect(eq(int, call(&c), -EBADF));
        c = (struct called){.io = io, .fn = sync_only, .fd = memfd_create("s", MFD_CLOEXEC)};
        cr_expect(eq(int, call(&c), 0));
        close(c.fd);
        io_destroy(io);
    }
}

/* ---- the queue --------------------------------------------------------------------------- */

struct chain { /* a call that submits itself from done, until the end */
    struct io *io;
    struct io_call_job job;
    int runs, cancelled;
    int refused;
    sem_t ran;
};

static int chain_fn(void *arg)
{
    struct chain *c = arg;
    c->runs++;
    sem_post(&c->ran);
    return 0;
}

static void chain_done(void *arg, int result)
{
    struct chain *c = arg;
    c->cancelled += result == -ECANCELED;
    c->refused = io_submit_call(c->io, &c->job);
}

Test(io_write, a_call_may_submit_itself_until_the_thread_ends)
{
    for (int fallback = 0; fallback < 2; fallback++) {
        struct chain c = {.io = make(fallback)};
        sem_init(&c.ran, 0, 0);
        c.job = (struct io_call_job){.fn = chain_fn, .done = chain_done, .arg = &c};
        cr_assert(eq(int, io_submit_call(c.io, &c.job), 0));
        for (int i = 0; i < 100; i++) {
            while (sem_wait(&c.ran) < 0) {
            }
        }
        cr_expect(not(io_on_thread(c.io)));
        io_destroy(c.io);
        cr_expect(ge(int, c.runs, 100));
        cr_expect(le(int, c.cancelled, 1));
        cr_expect(eq(int, c.refused, -ECANCELED));
        sem_destroy(&c.ran);
    }
}

struct turn { /* who came when */
    sem_t gate, done;
    int n, read, call;
};

static int wait_at_gate(void *arg)
{
    while (sem_wait(&((struct turn *)arg)->gate) < 0) {
    }
    return 0;
}

static int note_call(void *arg)
{
    struct turn *t = arg;
    t->call = ++t->n;
    return 0;
}

static void note_read(void *arg, int result)
{
    struct turn *t = arg;
    t->read = result == 0 ? ++t->n : -1;
    sem_post(&t->done);
}

Test(io_write, a_long_read_lets_a_call_in_between)
{
    for (int fallback = 0; fallback < 2; fallback++) {
        struct io *io = make(fallback);
        struct turn t = {0};
        struct io_call_job gate = {.fn = wait_at_gate, .arg = &t};
        struct io_call_job note = {.fn = note_call, .arg = &t};
        struct io_read_job job = {
            .fd = memfd_create("long", MFD_CLOEXEC), .done = note_read, .arg = &t};
        job.bytes = 150 * (uint64_t)MIB;
        cr_assert(eq(int, ftruncate(job.fd, (off_t)job.bytes), 0));
        sem_init(&t.gate, 0, 0);
        sem_init(&t.done, 0, 0);
        cr_assert(eq(int, io_submit_call(io, &gate), 0));
        cr_assert(eq(int, io_submit_read(io, &job), 0));
        cr_assert(eq(int, io_submit_call(io, &note), 0));
        sem_post(&t.gate);
        while (sem_wait(&t.done) < 0) {
        }
        io_destroy(io);
        cr_expect(eq(int, t.call, 1));
        cr_expect(eq(int, t.read, 2));
        close(job.fd);
        sem_destroy(&t.gate);
        sem_destroy(&t.done);
    }
}

/* ---- the system's files ------------------------------------------------------------------ */

static int count_names(void *arg, const char *name, uint64_t bytes)
{
    (*(int *)arg)++;
    return 0;
}

/* Owner, mode, links and types that are not ours to use. */
Test(io_write, files_that_others_may_read_are_refused)
{
    char path[] = "/tmp/gqad-test-XXXXXX";
    struct io_files f;
    int folder, fd, n_names = 0;
    io_files_system(NULL, &f);
    cr_assert(mkdtemp(path) != NULL);
    cr_assert(eq(int, f.open_folder(f.self, path, &folder), 0));
    cr_expect(eq(int, f.open(f.self, folder, "none", IO_OPEN_EXISTING, &fd), -ENOENT));
    cr_assert(eq(int, f.open(f.self, folder, "a", IO_OPEN_CREATE, &fd), 0));
    cr_expect(eq(int, f.list(f.self, folder, count_names, &n_names), 0));
    cr_expect(eq(int, n_names, 1));

    cr_expect(eq(int, fchmod(fd, 0640), 0));
    int other;
    cr_expect(eq(int, f.open(f.self, folder, "a", IO_OPEN_EMPTY, &other), -EPERM));
    cr_expect(eq(int, fchmod(fd, 0600), 0));
    cr_expect(eq(int, symlinkat("a", folder, "link"), 0));
    cr_expect(eq(int, f.open(f.self, folder, "link", IO_OPEN_CREATE, &other), -ELOOP));
    cr_expect(eq(int, linkat(folder, "a", folder, "second", 0), 0));
    cr_expect(eq(int, f.open(f.self, folder, "a", IO_OPEN_CREATE, &other), -EPERM));
    cr_expect(eq(int, f.unlink(f.self, folder, "second"), 0));
    cr_expect(eq(int, mkfifoat(folder, "fifo", 0600), 0));
    cr_expect(eq(int, f.open(f.self, folder, "fifo", IO_OPEN_EXISTING, &other), -EPERM));

    cr_assert(eq(int, f.open(f.self, folder, "a", IO_OPEN_EXISTING, &other), 0));
    cr_expect(eq(int, f.lock(f.self, fd), 0));
    cr_expect(eq(int, f.lock(f.self, other), -EWOULDBLOCK));
    f.close(f.self, fd);
    cr_expect(eq(int, f.lock(f.self, other), 0));
    f.close(f.self, other);

    cr_expect(eq(int, fchmod(folder, 0750), 0));
    cr_expect(eq(int, f.open_folder(f.self, path, &other), -EPERM));
    cr_expect(eq(int, f.unlink(f.self, folder, "a"), 0));
    cr_expect(eq(int, f.unlink(f.self, folder, "link"), 0));
    cr_expect(eq(int, f.unlink(f.self, folder, "fifo"), 0));
    f.close(f.self, folder);
    rmdir(path);
}
