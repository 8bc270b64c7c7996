/* Frames that are no frames: giants that are only announced, giants that come,
 * nests, types that there are not, noise. Each on a connection of its own,
 * COUNT at a time; every one is cut. */
#include "tests/stress/hostile/attack.h"

#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct bytes {
    const char *name;
    const void *head;
    size_t head_bytes;
    int fill; /* repeated after the head */
    size_t fill_bytes;
};
#define HEAD(text) (text), sizeof(text) - 1

static const struct bytes frames[] = {
    {"an array of 2^32 - 1", HEAD("\xdd\xff\xff\xff\xff"), 0, 0},
    {"a map of 2^32 - 1", HEAD("\xdf\xff\xff\xff\xff"), 0, 0},
    {"a method of 4 GiB", HEAD("\x94\x00\x01\xdb\xff\xff\xff\xff"), 'x', 1000},
    {"a binary of 2 GiB", HEAD("\xc6\x7f\xff\xff\xff"), 'x', 1000},
    {"a text of 17 MiB", HEAD("\x94\x00\x01\xa8gqa.ping\x81\xa1x\xdb\x01\x10\x00\x00"), 'x',
     17u << 20},
    {"two million nils", HEAD("\x94\x00\x01\xa8gqa.ping\x81\xa1x\xdd\x00\x20\x00\x00"), 0xc0,
     1u << 21},
    {"arrays in arrays", HEAD(""), 0x91, 100000},
    {"maps in maps", HEAD("\x94\x00\x01\xa8gqa.ping"), 0x81, 100000},
    {"an extension", HEAD("\x94\x00\x01\xa8gqa.ping\xc7\x04\x01"), 'x', 4},
    {"the type that there is not", HEAD(""), 0xc1, 100},
    {"HTTP", HEAD("GET /v1/models HTTP/1.1\r\nHost: gqad\r\n\r\n"), 0, 0},
    {"an object where an array belongs", HEAD("\x81\xa7jsonrpc\xa3\x32.0"), 0, 0},
    {"a message of type 9", HEAD("\x94\x09\x01\xa8gqa.ping\x80"), 0, 0},
    {"a method that is a number", HEAD("\x94\x00\x01\x05\x80"), 0, 0},
    {"an id that is text", HEAD("\x94\x00\xa1x\xa8gqa.ping\x80"), 0, 0},
};
#define N_FRAMES (sizeof(frames) / sizeof(frames[0]))

static unsigned send_frame(const struct attack *a, const struct bytes *f, const char *fill)
{
    int fd = attack_connect(a);
    if (attack_send(fd, f->head, f->head_bytes)) {
        attack_send(fd, fill, f->fill_bytes); /* which the daemon need not wait for */
    }
    bool cut = attack_is_cut(fd, 30000);
    close(fd);
    return cut;
}

int main(int argc, char **argv)
{
    struct attack a;
    unsigned long n_cut = 0;
    attack_begin(&a, argc, argv);
    char *fills[N_FRAMES];
    for (size_t i = 0; i < N_FRAMES; i++) {
        fills[i] = malloc(frames[i].fill_bytes + 1);
        if (fills[i] == NULL) {
            return 2;
        }
        memset(fills[i], frames[i].fill, frames[i].fill_bytes);
    }
    attack_stands();
    do {
        for (size_t i = 0; i < N_FRAMES; i++) {
            if (!send_frame(&a, &frames[i], fills[i])) {
                return attack_report(false, "{\"not cut\": \"%s\"}", frames[i].name);
            }
            n_cut++;
        }
    } while (!attack_is_over(0) || n_cut < a.count);
    for (size_t i = 0; i < N_FRAMES; i++) {
        free(fills[i]);
    }
    return attack_report(true, "{\"cut\": %lu}", n_cut);
}
