/* Mapped files that shrink: zeros, a mark, and the process lives on. */
#include "daemon/kv/guard.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE    4096u
#define UNIT    (4 * PAGE)
#define N_UNITS 200u
#define BYTES   ((size_t)N_UNITS * UNIT)

static int fd;

static unsigned char *map_file(void)
{
    fd = memfd_create("guard", MFD_CLOEXEC);
    cr_assert(ge(int, fd, 0));
    cr_assert(eq(int, ftruncate(fd, BYTES), 0));
    unsigned char *m = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    cr_assert(m != MAP_FAILED);
    memset(m, 0xab, BYTES);
    return m;
}

TestSuite(kv_guard, .timeout = 60);

Test(kv_guard, a_shrunken_file_reads_as_zeros_and_is_marked)
{
    uint32_t id;
    cr_assert(eq(int, kv_guard_install(), 0));
    cr_assert(eq(int, kv_guard_install(), 0));
    volatile unsigned char *m = map_file();
    cr_assert(eq(int, kv_guard_add((void *)m, BYTES, UNIT, &id), 0));
    cr_expect(not(kv_guard_marked(id, 0, BYTES)));
    cr_assert(eq(int, ftruncate(fd, 10 * UNIT), 0));
    uint64_t faults = kv_guard_faults();
    cr_expect(eq(int, m[9 * UNIT], 0xab));
    cr_expect(eq(u64, kv_guard_faults(), faults));
    cr_expect(eq(int, m[20 * UNIT + 3 * PAGE + 5], 0));
    cr_expect(eq(u64, kv_guard_faults(), faults + 1));
    cr_expect(eq(int, m[20 * UNIT], 0), "all of the unit, by one fault");
    cr_expect(eq(u64, kv_guard_faults(), faults + 1));
    cr_expect(kv_guard_marked(id, 20 * UNIT, 1));
    cr_expect(kv_guard_marked(id, 19 * UNIT, UNIT + 1));
    cr_expect(not(kv_guard_marked(id, 19 * UNIT, UNIT)));
    cr_expect(not(kv_guard_marked(id, 21 * UNIT, BYTES - 21 * UNIT)));
    for (unsigned i = 10; i < N_UNITS; i++) {
        cr_expect(eq(int, m[i * UNIT + PAGE], 0));
    }
    for (unsigned i = 0; i < N_UNITS; i++) {
        cr_expect(eq(int, kv_guard_marked(id, i * UNIT, UNIT), i >= 10), "unit %u", i);
    }

    /* The file is back: mapped there again, and the marks of that unit cleared. */
    cr_assert(eq(int, ftruncate(fd, BYTES), 0));
    cr_assert(eq(int, (int)pwrite(fd, "x", 1, 20 * UNIT), 1));
    cr_assert(mmap((void *)(m + 20 * UNIT), UNIT, PROT_READ, MAP_SHARED | MAP_FIXED, fd,
                   20 * UNIT) != MAP_FAILED);
    kv_guard_clear(id, 20 * UNIT, UNIT);
    cr_expect(not(kv_guard_marked(id, 20 * UNIT, UNIT)));
    cr_expect(kv_guard_marked(id, 21 * UNIT, UNIT));
    cr_expect(eq(int, m[20 * UNIT], 'x'));
    kv_guard_remove(id);
    munmap((void *)m, BYTES);
    close(fd);
}

static void *read_all(void *arg)
{
    volatile unsigned char *m = arg;
    unsigned long sum = 0;
    for (size_t i = 0; i < BYTES; i += PAGE) {
        sum += m[i];
    }
    return (void *)sum;
}

Test(kv_guard, many_threads_fault_at_once)
{
    pthread_t threads[8];
    uint32_t id;
    cr_assert(eq(int, kv_guard_install(), 0));
    for (int round = 0; round < 20; round++) {
        unsigned char *m = map_file();
        cr_assert(eq(int, kv_guard_add(m, BYTES, UNIT, &id), 0));
        cr_assert(eq(int, ftruncate(fd, 0), 0));
        for (int i = 0; i < 8; i++) {
            cr_assert(eq(int, pthread_create(&threads[i], NULL, read_all, m), 0));
        }
        for (int i = 0; i < 8; i++) {
            void *sum;
            pthread_join(threads[i], &sum);
            cr_expect(sum == NULL);
        }
        for (unsigned i = 0; i < N_UNITS; i++) {
            cr_expect(kv_guard_marked(id, i * UNIT, 1));
        }
        kv_guard_remove(id);
        munmap(m, BYTES);
        close(fd);
    }
}

/* What signal ends a child that does this; 0: none. */
static int signal_of(void (*fn)(void))
{
    int status;
    pid_t pid = fork();
    cr_assert(ge(int, pid, 0));
    if (pid == 0) {
        struct sigaction plain = {.sa_handler = SIG_DFL};
        sigaction(SIGBUS, &plain, NULL);
        kv_guard_install();
        fn();
        _exit(0);
    }
    cr_assert(eq(int, waitpid(pid, &status, 0), pid));
    return WIFSIGNALED(status) ? WTERMSIG(status) : 0;
}

static void fault_elsewhere(void)
{
    volatile unsigned char *m = map_file();
    uint32_t id;
    kv_guard_add((void *)m, 10 * UNIT, UNIT, &id); /* the first units only */
    if (ftruncate(fd, 0) == 0 && m[0] == 0) {
        (void)m[10 * UNIT];
    }
}

static void fault_after_removal(void)
{
    volatile unsigned char *m = map_file();
    uint32_t id;
    kv_guard_add((void *)m, BYTES, UNIT, &id);
    kv_guard_remove(id);
    if (ftruncate(fd, 0) == 0) {
        (void)m[0];
    }
}

static void fault_inside(void)
{
    volatile unsigned char *m = map_file();
    uint32_t id;
    kv_guard_add((void *)m, BYTES, UNIT, &id);
    if (ftruncate(fd, 0) == 0) {
        (void)m[BYTES - 1];
    }
}

static void sent(void)
{
    kill(getpid(), SIGBUS);
}

Test(kv_guard, other_faults_end_the_process)
{
    cr_expect(eq(int, signal_of(fault_inside), 0));
    cr_expect(eq(int, signal_of(fault_elsewhere), SIGBUS));
    cr_expect(eq(int, signal_of(fault_after_removal), SIGBUS));
    cr_expect(eq(int, signal_of(sent), SIGBUS));
}

Test(kv_guard, the_table_has_an_end)
{
    uint32_t ids[KV_GUARD_MAX], id;
    unsigned char *m = map_file();
    cr_expect(eq(int, kv_guard_add(m + 1, BYTES, UNIT, &id), -EINVAL));
    cr_expect(eq(int, kv_guard_add(m, BYTES - 1, UNIT, &id), -EINVAL));
    cr_expect(eq(int, kv_guard_add(m, 0, UNIT, &id), -EINVAL));
    cr_expect(eq(int, kv_guard_add(m, BYTES, 100, &id), -EINVAL));
    cr_expect(eq(int, kv_guard_add(m, BYTES, 0, &id), -EINVAL));
    cr_expect(eq(int, kv_guard_add(NULL, BYTES, UNIT, &id), -EINVAL));
    for (unsigned i = 0; i < KV_GUARD_MAX; i++) {
        cr_assert(eq(int, kv_guard_add(m, BYTES, UNIT, &ids[i]), 0));
    }
    cr_expect(eq(int, kv_guard_add(m, BYTES, UNIT, &id), -ENOSPC));
    kv_guard_remove(ids[77]);
    cr_expect(eq(int, kv_guard_add(m, BYTES, UNIT, &id), 0));
    cr_expect(eq(u32, id, ids[77]));
    munmap(m, BYTES);
    close(fd);
}
