/* Somebody who has nothing to do with it: calls gqa.ping all the time, and a
 * short generation with every 50th, and tells how long the pings took. COUNT is
 * not used. */
#include "tests/stress/hostile/attack.h"

#include <stdlib.h>
#include <time.h>

#define CALLS_MAX 1000000u

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static int compare(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

/* Whether the call was answered, and not refused. */
static bool call(struct attack_reader *r, uint32_t id, bool generates)
{
    struct ipc_buffer b;
    struct ipc_message m;
    ipc_buffer_init(&b);
    if (generates) {
        attack_pack_generate(&b, id, 20, 4, 1);
    } else {
        ipc_pack_request(&b, id, "gqa.ping");
        ipc_pack_map(&b, 0);
    }
    if (!attack_send_buffer(r->fd, &b)) {
        return false;
    }
    for (;;) {
        if (attack_read(r, &m) == 0) {
            return false;
        }
        bool ended = m.kind == IPC_RESPONSE && m.id == id, right = m.error == NULL;
        ipc_message_finish(&m);
        if (ended) {
            return right;
        }
    }
}

int main(int argc, char **argv)
{
    struct attack a;
    attack_begin(&a, argc, argv);
    float *us = malloc(CALLS_MAX * sizeof(*us));
    struct attack_reader r = {.fd = attack_connect(&a)};
    unsigned n = 0, n_failed = 0;
    if (us == NULL) {
        return 2;
    }
    attack_stands();
    for (uint32_t id = 1; !attack_is_over(0); id++) {
        bool generates = id % 50 == 0;
        double start = now_us();
        n_failed += !call(&r, id, generates);
        if (!generates && n < CALLS_MAX) {
            us[n++] = (float)(now_us() - start);
        }
    }
    qsort(us, n, sizeof(*us), compare);
    attack_reader_finish(&r);
    attack_report(n_failed == 0 && n > 0,
                  "{\"calls\": %u, \"failed\": %u, \"p50_us\": %.1f, \"p99_us\": "
                  "%.1f, \"max_us\": %.1f}",
                  n, n_failed, n > 0 ? (double)us[n / 2] : 0,
                  n > 0 ? (double)us[n - 1 - n / 100] : 0, n > 0 ? (double)us[n - 1] : 0);
    free(us);
    return n_failed == 0 && n > 0 ? 0 : 1;
}
