/* ring_tsan - a ring with both ends in one process and on one mapping, in two threads that sleep
 * and wake each other as daemon and client do; for -Db_sanitize=thread, and as a check of every
 * byte.
 *
 *   ring_tsan [MESSAGES]      default 100000 */
#include "ipc/ring_map.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MESSAGE_MAX 20000u

static struct ring_map map;
static unsigned long n_messages;

static uint32_t next(uint64_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 7;
    *x ^= *x << 17;
    return (uint32_t)(*x >> 32);
}

/* The length and the bytes of message i, the same on both sides. */
static size_t make_message(unsigned long i, uint8_t *to)
{
    uint64_t x = 88172645463325252u + i * 0x9e3779b97f4a7c15u;
    uint32_t r = next(&x);
    size_t bytes = 1 + (r % 16 == 0 ? next(&x) % MESSAGE_MAX : next(&x) % 100);
    for (size_t k = 0; k < bytes; k++) {
        to[k] = (uint8_t)(i + k * 3);
    }
    return bytes;
}

/* Sleeps until the other side has published; wait and bell are this side's. */
static void sleep_on(_Atomic uint32_t *wait, _Atomic uint32_t *bell, const struct ring_in *in,
                     const struct ring_out *out)
{
    uint32_t seen = atomic_load(bell);
    ring_wait_for(wait, RING_WAIT_FUTEX | RING_WAIT_ROOM);
    if ((in != NULL && !ring_in_has_some(in)) || (out != NULL && !ring_out_has_moved(out))) {
        ring_bell_wait(bell, seen, 10000000);
    }
    ring_wait_for(wait, RING_WAIT_NOTHING);
}

static void wake(_Atomic uint32_t *wait, _Atomic uint32_t *bell)
{
    if (ring_take_wait(wait, RING_WAIT_FUTEX | RING_WAIT_ROOM) != RING_WAIT_NOTHING) {
        ring_bell_ring(bell);
    }
}

/* A bell that the client rings takes the eventfd's place here. */
static _Atomic uint32_t daemon_bell;

static void *client(void *ret_wrong)
{
    struct ring_control *c = map.control;
    struct ring_in in;
    struct ring_out out;
    static uint8_t message[MESSAGE_MAX];
    ring_map_client_ends(&map, &in, &out);
    for (unsigned long i = 0; i < n_messages; i++) {
        size_t bytes = make_message(i, message), done = 0;
        int rc;
        while ((rc = ring_out_put(&out, message, bytes, &done)) == 0) {
            ring_out_publish(&out);
            wake(&c->daemon_wait, &daemon_bell);
            sleep_on(&c->client_wait, &c->client_bell, NULL, &out);
        }
        if (rc < 0) {
            *(const char **)ret_wrong = "the client found a head that cannot be";
            return NULL;
        }
        if (i % 3 == 0 || i + 1 == n_messages) { /* several at once, too */
            ring_out_publish(&out);
            wake(&c->daemon_wait, &daemon_bell);
        }
    }
    return NULL;
}

static const char *take_all(struct ring_in *in)
{
    struct ring_control *c = map.control;
    static uint8_t expected[MESSAGE_MAX], got[MESSAGE_MAX + RING_RECORD_MAX];
    for (unsigned long i = 0; i < n_messages; i++) {
        size_t bytes = make_message(i, expected), at = 0, n;
        bool last = false;
        while (!last) {
            int rc = ring_in_take(in, 1u << 20, got + at, &n, &last);
            if (rc < 0 || (rc == 1 && at + n > bytes)) {
                return "a record that cannot be";
            }
            if (rc == 0) {
                sleep_on(&c->daemon_wait, &daemon_bell, in, NULL);
                continue;
            }
            at += n;
            if (ring_in_publish(in)) {
                wake(&c->client_wait, &c->client_bell);
            }
        }
        if (at != bytes || memcmp(got, expected, bytes) != 0) {
            return "a message that is not what was sent";
        }
    }
    return NULL;
}

int main(int argc, char **argv)
{
    const struct ring_sizes sizes = {.ring_bytes = 4096, .in_bytes = 4096, .out_bytes = 4096};
    pthread_t thread;
    int fds[2];
    struct ring_in in;
    struct ring_out out;
    const char *wrong_there = NULL;
    n_messages = argc > 1 ? strtoul(argv[1], NULL, 10) : 100000;
    if (ring_map_create(&sizes, &map, fds) < 0 ||
        pthread_create(&thread, NULL, client, &wrong_there) != 0) {
        return EXIT_FAILURE;
    }
    ring_map_daemon_ends(&map, &in, &out);
    const char *wrong = take_all(&in);
    if (wrong == NULL) {
        pthread_join(thread, NULL);
    }
    if (wrong != NULL || wrong_there != NULL) {
        fprintf(stderr, "ring_tsan: %s\n", wrong != NULL ? wrong : wrong_there);
        return EXIT_FAILURE;
    }
    printf("ring_tsan: %lu messages\n", n_messages);
    return EXIT_SUCCESS;
}
