/* tests/stress/hostile/ring_enemy.h - a client with rings in shared memory that does harm: it flips
 * shared bytes under the daemon's eyes, lets indices jump, floods the doorbell and takes away its
 * O_NONBLOCK, and seldom takes an answer. One thread each. */
#ifndef TESTS_STRESS_HOSTILE_RING_ENEMY_H
#define TESTS_STRESS_HOSTILE_RING_ENEMY_H

#include "ipc/ring_map.h"

struct ring_enemy {
    int fd, fds[3]; /* the socket; the rings', the data area's and the doorbell's */
    struct ring_map map;
    struct ring_in in;
    struct ring_out out;
    uint64_t x; /* its random numbers */
};

uint32_t enemy_random(uint64_t *x); /* *x is not 0 */

/* Opens rings on a connected socket, which it takes over in every case; to be closed in every case.
 * -EBUSY: the daemon has refused the connection. -EPIPE: it has closed. -EPROTO, -errno. */
int ring_enemy_open(struct ring_enemy *e, int fd, uint64_t seed);
void ring_enemy_close(struct ring_enemy *e);
static inline bool ring_enemy_is_open(const struct ring_enemy *e)
{
    return e->map.control != NULL;
}

void ring_enemy_ask(struct ring_enemy *e);   /* for more than its ring holds */
void ring_enemy_flood(struct ring_enemy *e); /* the doorbell: to the brim, or drained */
void ring_enemy_harm(struct ring_enemy *e);  /* one of all that it can do */

#endif
