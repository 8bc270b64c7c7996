#include "daemon/peer_alarm.h"

#include <errno.h>
#include <sys/timerfd.h>
#include <unistd.h>

static void on_expired(uv_poll_t *poll, int status, int events)
{
    struct peer_alarm *a = poll->data;
    uint64_t count;
    if (read(a->fd, &count, sizeof(count)) == (ssize_t)sizeof(count)) {
        a->at_ns = 0;
        a->rings(a);
    }
}

int peer_alarm_init(struct peer_alarm *a, uv_loop_t *loop, void (*rings)(struct peer_alarm *a))
{
    *a = (struct peer_alarm){.rings = rings};
    int fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0) {
        return -errno;
    }
    int rc = uv_poll_init(loop, &a->poll, fd);
    if (rc < 0) {
        close(fd);
        return rc;
    }
    a->fd = fd;
    a->poll.data = a;
    return uv_poll_start(&a->poll, UV_READABLE, on_expired);
}

void peer_alarm_set(struct peer_alarm *a, uint64_t at_ns)
{
    const struct itimerspec when = {.it_value = {.tv_sec = (time_t)(at_ns / 1000000000u),
                                                 .tv_nsec = (long)(at_ns % 1000000000u)}};
    if (at_ns != a->at_ns && timerfd_settime(a->fd, TFD_TIMER_ABSTIME, &when, NULL) == 0) {
        a->at_ns = at_ns;
    }
}

void peer_alarm_finish(struct peer_alarm *a)
{
    if (a->fd > 0) {
        close(a->fd);
        a->fd = 0;
    }
}
