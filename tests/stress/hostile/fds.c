/* Descriptors sent to the daemon, as many as a message takes, with good
 * messages, with pieces of messages and again and again on COUNT connections at
 * once. Every sender is dropped. */
#include "tests/stress/hostile/attack.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define FDS_MAX 253u /* the kernel's SCM_MAX_FD */

static bool send_fds(int fd, int passed, unsigned n, const void *data, size_t bytes)
{
    static union {
        struct cmsghdr head;
        char data[CMSG_SPACE(sizeof(int) * FDS_MAX)];
    } control;
    struct iovec iov = {(void *)(uintptr_t)data, bytes};
    struct msghdr m = {.msg_iov = &iov,
                       .msg_iovlen = 1,
                       .msg_control = control.data,
                       .msg_controllen = CMSG_SPACE(sizeof(int) * n)};
    memset(&control, 0, sizeof(control));
    struct cmsghdr *c = CMSG_FIRSTHDR(&m);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int) * n);
    for (unsigned i = 0; i < n; i++) {
        memcpy(CMSG_DATA(c) + i * sizeof(int), &passed, sizeof(int));
    }
    /* ETOOMANYREFS: the kernel's own bound on descriptors in flight; a dropped
     * peer is the aim. */
    return sendmsg(fd, &m, MSG_NOSIGNAL) >= 0 || errno == EPIPE || errno == ECONNRESET ||
           errno == ETOOMANYREFS;
}

int main(int argc, char **argv)
{
    static const unsigned numbers[] = {1, 2, 3, 17, FDS_MAX};
    struct attack a;
    struct ipc_buffer b;
    attack_begin(&a, argc, argv);
    int *fds = calloc(a.count, sizeof(*fds)), passed = open("/dev/null", O_RDONLY | O_CLOEXEC);
    unsigned long n_dropped = 0, n_kept = 0;
    if (fds == NULL || passed < 0) {
        return 2;
    }
    ipc_buffer_init(&b);
    attack_pack_hello(&b, 1);
    attack_stands();
    do {
        for (unsigned i = 0; i < a.count; i++) {
            fds[i] = attack_connect(&a);
            size_t bytes = i % 2 == 0 ? b.bytes : 1; /* a whole hello, or its first byte */
            for (unsigned k = 0; k < 3; k++) {
                if (!send_fds(fds[i], passed, numbers[(i + k) % 5], b.data, bytes)) {
                    return attack_report(false, "{\"sendmsg\": \"%s\"}", strerror(errno));
                }
            }
        }
        for (unsigned i = 0; i < a.count; i++) {
            bool cut = attack_is_cut(fds[i], 30000);
            n_dropped += cut;
            n_kept += !cut;
            close(fds[i]);
        }
    } while (!attack_is_over(0));
    ipc_buffer_finish(&b);
    free(fds);
    return attack_report(n_kept == 0, "{\"dropped\": %lu, \"kept\": %lu}", n_dropped, n_kept);
}
