/* Connections that take up room and do nothing useful, COUNT of them at once.
 * As many as are cut come again; those that the daemon is to cut go on until it
 * has cut as many. What they are is this program's name: silent, half, stalled,
 * idle. */
#include "tests/stress/hostile/attack.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static const struct attack *attack;
static unsigned long n_cut;

/* Says nothing at all. */
static int open_silent(unsigned i)
{
    return attack_connect(attack);
}

/* Begins a hello and does not end it; every third one has closed its own end.
 */
static int open_half(unsigned i)
{
    struct ipc_buffer b;
    int fd = attack_connect(attack);
    ipc_buffer_init(&b);
    attack_pack_hello(&b, 1);
    attack_send(fd, b.data, 1 + i % (b.bytes - 1));
    ipc_buffer_finish(&b);
    if (i % 3 == 0) {
        shutdown(fd, SHUT_WR);
    }
    return fd;
}

/* Asks for more than its socket holds, and reads none of it. Every 50th
 * generates too. */
static int open_stalled(unsigned i)
{
    struct ipc_buffer b;
    int fd = attack_connect(attack), size = 4096;
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
    ipc_buffer_init(&b);
    attack_pack_hello(&b, 1);
    for (uint32_t id = 2; id < 10; id++) {
        ipc_pack_request(&b, id, "gqa.api_info");
        ipc_pack_map(&b, 0);
    }
    if (i % 50 == 0) {
        attack_pack_generate(&b, 10, 8, 50, 1);
    }
    attack_send_buffer(fd, &b);
    return fd;
}

/* Says hello, hears it, and nothing more. */
static int open_idle(unsigned i)
{
    struct ipc_buffer b;
    struct ipc_message m;
    struct attack_reader r = {.fd = attack_connect(attack)};
    ipc_buffer_init(&b);
    attack_pack_hello(&b, 1);
    if (attack_send_buffer(r.fd, &b) && attack_read(&r, &m) == 1) {
        ipc_message_finish(&m);
    }
    attack_reader_finish(&r);
    return r.fd;
}

static const struct kind {
    const char *name;
    int (*open)(unsigned i);
    bool is_cut; /* by the daemon, sooner or later */
} kinds[] = {
    {"silent", open_silent, true},
    {"half", open_half, true},
    {"stalled", open_stalled, false},
    {"idle", open_idle, false},
};

/* Opens again those that were cut. What a stalled one was sent stays where it
 * is. */
static void reopen(const struct kind *kind, struct pollfd *fds)
{
    for (unsigned i = 0; i < attack->count; i++) {
        if (fds[i].revents & (POLLHUP | POLLERR)) {
            close(fds[i].fd);
            fds[i].fd = kind->open(i);
            n_cut++;
        }
    }
}

int main(int argc, char **argv)
{
    struct attack a;
    const struct kind *kind = NULL;
    attack_begin(&a, argc, argv);
    attack = &a;
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        const char *name = strrchr(argv[0], '/') != NULL ? strrchr(argv[0], '/') + 1 : argv[0];
        kind = strstr(name, kinds[i].name) != NULL ? &kinds[i] : kind;
    }
    struct pollfd *fds = calloc(a.count, sizeof(*fds));
    if (kind == NULL || fds == NULL) {
        return 2;
    }
    for (unsigned i = 0; i < a.count; i++) {
        fds[i] = (struct pollfd){.fd = kind->open(i)};
    }
    attack_stands();
    while (!attack_is_over(10) || (kind->is_cut && n_cut < a.count)) {
        if (poll(fds, a.count, 0) > 0) {
            reopen(kind, fds);
        }
    }
    for (unsigned i = 0; i < a.count; i++) {
        close(fds[i].fd);
    }
    free(fds);
    return attack_report(true, "{\"held\": %u, \"cut\": %lu}", a.count, n_cut);
}
