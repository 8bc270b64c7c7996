/* client/wait.c - gqa_wait(): a look for the answer, then sleep.
 *
 * Waking a sleeper takes some microseconds where its core still runs, and forty where a virtual
 * machine has halted it: more than a small call takes. So the first wait after a request looks for
 * the answer before it sleeps, if those of late came soon; for twice as long as they took, and
 * never longer than LOOK_US_MAX. What comes later, a stream's tokens, is slept for: a program has
 * its core's time taken by looking for one window per request, and by none where answers are slow,
 * as they are while the daemon computes on all cores. */
#include "client/internal.h"

#include <errno.h>
#include <poll.h>
#include <time.h>

#define LOOK_US_MIN 10u
#define LOOK_US_MAX 100u
#define PACE_US_MAX 150u /* slower answers are not looked for; so much of it may be the wakings */
#define NOTE_US_MAX 300u /* one that is slower still counts as so much */

static uint64_t look_us(const struct gqa *g)
{
    if (g->spin_us > 0) {
        return g->spin_us < GQA_SPIN_NEVER ? g->spin_us : 0;
    }
    if (!g->has_asked || g->pace_us > PACE_US_MAX) {
        return 0;
    }
    uint64_t us = 2 * g->pace_us;
    return us < LOOK_US_MIN ? LOOK_US_MIN : us < LOOK_US_MAX ? us : LOOK_US_MAX;
}

/* The wait is over, and took so long. Only a request's first one tells of its answer's pace. */
static void note_pace(struct gqa *g, uint64_t us)
{
    if (g->has_asked) {
        g->has_asked = false;
        g->pace_us = (3 * g->pace_us + (us < NOTE_US_MAX ? (uint32_t)us : NOTE_US_MAX)) / 4;
    }
}

uint64_t client_left_until(uint64_t deadline_us)
{
    uint64_t now = client_now_us();
    return now < deadline_us ? deadline_us - now : 0;
}

/* Sleeps until then, UINT64_MAX for ever, or not at all. What poll() says, or -errno. */
int client_poll(const struct gqa *g, short events, uint64_t until_us)
{
    uint64_t left = until_us > 0 ? client_left_until(until_us) : 0;
    struct timespec t = {.tv_sec = (time_t)(left / 1000000u),
                         .tv_nsec = (long)(left % 1000000u) * 1000};
    struct pollfd p = {.fd = g->fd, .events = events};
    int n = ppoll(&p, 1, until_us == UINT64_MAX ? NULL : &t, NULL);
    return n < 0 ? -errno : n;
}

static int wait_for_socket(const struct gqa *g, uint64_t look_until_us, uint64_t until_us)
{
    short events = (short)gqa_events(g);
    int n = 0;
    while (n == 0 && client_now_us() < look_until_us) {
        n = client_poll(g, events, 0);
    }
    return n != 0 ? n : client_poll(g, events, until_us);
}

int gqa_wait(struct gqa *g, uint64_t timeout_usec)
{
    if (g->dispatching) {
        return -EDEADLK;
    }
    if (g->lost < 0) {
        return -ENOTCONN;
    }
    uint64_t now = client_now_us(), due = client_timeout_usec(g);
    uint64_t left = due <= now ? 0 : due == UINT64_MAX ? UINT64_MAX : due - now;
    bool due_first = left <= timeout_usec && left != UINT64_MAX;
    uint64_t wait = left < timeout_usec ? left : timeout_usec;
    uint64_t until = wait < UINT64_MAX - now ? now + wait : UINT64_MAX;
    uint64_t look = look_us(g);
    uint64_t look_until = look < wait ? now + look : until;
    int n = g->ring != NULL ? client_ring_wait(g, look_until, until)
                            : wait_for_socket(g, look_until, until);
    note_pace(g, client_now_us() - now);
    return n < 0 ? n : n > 0 || due_first;
}
