/* tests/unit/client/fake_gqad.c - a gqad for gqa_spawn(): serves hello and pings on --serve-fd
 * until the pipe of --lifetime-fd ends. FAKE_GQAD=die: ends at once with status 3. Its hello
 * carries its arguments. */
#include "peer.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static void hello(int fd, int argc, char **argv)
{
    struct ipc_buffer b;
    uint32_t id = peer_expect(fd, "gqa.hello");
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, id);
    ipc_pack_map(&b, 2);
    ipc_pack_str(&b, "protocol");
    ipc_pack_u64(&b, GQA_PROTOCOL_VERSION);
    ipc_pack_str(&b, "args");
    ipc_pack_array(&b, (size_t)argc);
    for (int i = 0; i < argc; i++) {
        ipc_pack_str(&b, argv[i]);
    }
    peer_send(fd, &b);
}

int main(int argc, char **argv)
{
    const char *mode = getenv("FAKE_GQAD");
    int serve = -1, lifetime = -1;
    if (mode != NULL && strcmp(mode, "die") == 0) {
        return 3;
    }
    for (int i = 1; i + 1 < argc; i++) {
        if (strcmp(argv[i], "--serve-fd") == 0) {
            serve = atoi(argv[i + 1]);
        } else if (strcmp(argv[i], "--lifetime-fd") == 0) {
            lifetime = atoi(argv[i + 1]);
        }
    }
    puts("READY"); /* must not reach the caller's standard output */
    fflush(stdout);
    hello(serve, argc, argv);
    for (;;) {
        struct pollfd fds[] = {{.fd = lifetime}, {.fd = serve, .events = POLLIN}};
        if (poll(fds, 2, -1) < 0 || fds[0].revents != 0) {
            return 0;
        }
        if (fds[1].revents & POLLIN) {
            peer_answer(serve, peer_expect(serve, "gqa.ping"));
        }
    }
}
