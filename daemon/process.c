#include "daemon/process.h"

#include "daemon/kv/guard.h"
#include "daemon/log.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <linux/sched/types.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

/* In a user namespace that maps only some ids, the kernel shows every other client as one and the
 * same "nobody": users could not be told apart. Only a daemon of one user can live with that. */
int process_check_identity(void)
{
    unsigned inside;
    unsigned outside;
    unsigned count;
    FILE *f = fopen("/proc/self/uid_map", "re");
    if (!f) {
        log_error("/proc/self/uid_map: %s", strerror(errno));
        return -errno;
    }
    int n = fscanf(f, "%u %u %u", &inside, &outside, &count);
    fclose(f);
    if (n != 3 || inside != 0 || outside != 0 || count != UINT32_MAX) {
        log_error("this user namespace does not map all user ids, so clients cannot be told apart; "
                  "run with --user, or without PrivateUsers=");
        return -EPERM;
    }
    return 0;
}

int process_fill_standard_fds(void)
{
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++) {
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", O_RDWR) < 0) {
            return -errno;
        }
    }
    return 0;
}

/* Prompts live in this process's memory: no core file may keep them. */
static void forbid_core_files(void)
{
    const struct rlimit none = {0, 0};
    if (setrlimit(RLIMIT_CORE, &none) < 0) {
        log_warning("core files cannot be forbidden: %s", strerror(errno));
    }
}

/* Every connection takes a descriptor: use what the host allows. */
static void raise_fd_limit(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < limit.rlim_max) {
        limit.rlim_cur = limit.rlim_max;
        setrlimit(RLIMIT_NOFILE, &limit);
    }
}

#define FDS_EXPECTED 65536u /* 8 bytes of the kernel's memory each */

/* The kernel's table of descriptors grows by doubling, and once there are threads it waits until
 * none of them can be looking at the old one: 10 ms and more in accept(). So it grows now. */
static void widen_fd_table(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) < 0) {
        return;
    }
    rlim_t n = limit.rlim_cur < FDS_EXPECTED ? limit.rlim_cur : FDS_EXPECTED;
    int fd = fcntl(STDERR_FILENO, F_DUPFD_CLOEXEC, (int)n - 1);
    if (fd >= 0) {
        close(fd);
    }
}

#define LOOP_SLICE_NS 100000u /* the least that the kernel takes */

/* This thread becomes the loop's, which works in short steps and for others: it asks to be run
 * sooner and for less at a time. Its share stays what it was, no privilege is needed, and kernels
 * before 6.12 take no notice. Other threads do not inherit it. */
static void ask_for_short_slices(void)
{
    struct sched_attr a = {0};
    if (syscall(SYS_sched_getattr, 0, &a, sizeof(a), 0) < 0) {
        return;
    }
    a.sched_flags = SCHED_FLAG_RESET_ON_FORK;
    a.sched_runtime = LOOP_SLICE_NS;
    if (a.sched_policy == SCHED_NORMAL && syscall(SYS_sched_setattr, 0, &a, 0) < 0) {
        log_info("the loop's thread has the usual time slices: shorter ones are refused: %s",
                 strerror(errno));
    }
}

/* Before there are threads: files that are mapped may shrink, and that must not end the daemon. */
static void survive_lost_pages(void)
{
    int rc = kv_guard_install();
    if (rc < 0) {
        log_warning("a mapped file that shrinks will end this process: %s", strerror(-rc));
    }
}

void process_prepare(void)
{
    forbid_core_files();
    raise_fd_limit();
    widen_fd_table();
    ask_for_short_slices();
    survive_lost_pages();
}
