/* Clients with rings in shared memory, COUNT of them at once. What they do is this program's name.
 *
 * rings: every third is stopped, with questions whose answers its ring does not hold; the others do
 * all the harm they can, and those that are cut come again.
 * doorbell: O_NONBLOCK taken away from the doorbells, which are filled to the brim and drained, a
 * thousand times a second. */
#include "tests/stress/hostile/attack.h"
#include "tests/stress/hostile/ring_enemy.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct attack *attack;
static unsigned long n_opened, n_refused, n_failed;

/* Who is slowed is refused: it tries again. */
static void open_one(struct ring_enemy *e, uint64_t seed)
{
    int rc = ring_enemy_open(e, attack_connect(attack), seed);
    bool refused = rc == -EBUSY || rc == -EPIPE;
    n_opened++;
    n_refused += refused;
    n_failed += rc < 0 && !refused;
    if (rc < 0 && !refused) {
        fprintf(stderr, "attack: ring.open: %s\n", strerror(-rc));
    }
}

static bool is_cut(const struct ring_enemy *e)
{
    struct pollfd p = {.fd = e->fd, .events = POLLRDHUP};
    return poll(&p, 1, 0) > 0;
}

static void open_all(struct ring_enemy *enemies)
{
    for (unsigned i = 0; i < attack->count; i++) {
        open_one(&enemies[i], 0x9e3779b97f4a7c15u * (i + 1));
        if (ring_enemy_is_open(&enemies[i])) {
            ring_enemy_ask(&enemies[i]);
            ring_enemy_flood(&enemies[i]); /* which rings it as well */
        }
    }
}

/* Returns how often they did something. */
static unsigned long harm(struct ring_enemy *enemies)
{
    unsigned long n = 0;
    while (!attack_is_over(0)) {
        for (unsigned i = 0; i < attack->count && n_failed == 0; i++) {
            if (i % 3 != 0 && is_cut(&enemies[i])) {
                uint64_t seed = enemies[i].x;
                ring_enemy_close(&enemies[i]);
                open_one(&enemies[i], seed);
            } else if (i % 3 != 0 && ring_enemy_is_open(&enemies[i])) {
                ring_enemy_harm(&enemies[i]);
                n++;
            }
        }
    }
    return n;
}

static unsigned long ring_doorbells(struct ring_enemy *enemies)
{
    unsigned long n = 0;
    while (!attack_is_over(1)) {
        for (unsigned i = 0; i < attack->count; i++) {
            ring_enemy_flood(&enemies[i]);
            n++;
        }
    }
    return n;
}

int main(int argc, char **argv)
{
    struct attack a;
    attack_begin(&a, argc, argv);
    attack = &a;
    struct ring_enemy *enemies = calloc(a.count, sizeof(*enemies));
    if (enemies == NULL) {
        return 2;
    }
    open_all(enemies);
    attack_stands();
    unsigned long n = strstr(argv[0], "doorbell") != NULL ? ring_doorbells(enemies) : harm(enemies);
    for (unsigned i = 0; i < a.count; i++) {
        ring_enemy_close(&enemies[i]);
    }
    free(enemies);
    return attack_report(n_failed == 0, "{\"opened\": %lu, \"refused\": %lu, \"did\": %lu}",
                         n_opened, n_refused, n);
}
