/* daemon/peer_alarm.h - a timer of the loop that costs nothing while it waits.
 *
 * libuv's timers become the timeout of each sleep, so a near one has the kernel program the
 * processor's clock at every falling asleep and waking up: on virtual machines 15 us each time, for
 * whoever is served then. This is a timerfd, programmed once. Loop thread only. */
#ifndef DAEMON_PEER_ALARM_H
#define DAEMON_PEER_ALARM_H

#include <stdint.h>
#include <uv.h>

struct peer_alarm {
    int fd;
    uint64_t at_ns; /* 0: not set */
    uv_poll_t poll;
    void (*rings)(struct peer_alarm *a);
};

/* -errno, or what libuv says; nothing is left then. */
int peer_alarm_init(struct peer_alarm *a, uv_loop_t *loop, void (*rings)(struct peer_alarm *a));
/* Rings once, at a time of uv_hrtime()'s clock, instead of when it was to. */
void peer_alarm_set(struct peer_alarm *a, uint64_t at_ns);
/* The handle is closed. One that was all zeros, or never was made, is legal. */
void peer_alarm_finish(struct peer_alarm *a);

#endif
