#include "daemon/notify.h"

#include <errno.h>

#ifdef HAVE_SYSTEMD

#include <stdbool.h>
#include <sys/socket.h>
#include <systemd/sd-daemon.h>
#include <time.h>

void notify_ready(void)
{
    sd_notify(0, "READY=1\nSTATUS=serving");
}

void notify_stopping(void)
{
    sd_notify(0, "STOPPING=1\nSTATUS=finishing the requests that run");
}

void notify_reloading(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%llu",
               (unsigned long long)t.tv_sec * 1000000u + (unsigned long long)t.tv_nsec / 1000u);
}

void notify_watchdog(void)
{
    sd_notify(0, "WATCHDOG=1");
}

void notify_extend_timeout(uint64_t usec)
{
    sd_notifyf(0, "EXTEND_TIMEOUT_USEC=%llu", (unsigned long long)usec);
}

uint64_t notify_watchdog_usec(void)
{
    uint64_t usec = 0;
    return sd_watchdog_enabled(0, &usec) > 0 ? usec : 0;
}

int notify_listen_fds(int *ret_first, int *ret_count)
{
    int count = sd_listen_fds(1);
    if (count < 0) {
        return count;
    }
    for (int i = 0; i < count; i++) {
        if (sd_is_socket_unix(SD_LISTEN_FDS_START + i, SOCK_STREAM, 1, NULL, 0) <= 0) {
            return -EINVAL;
        }
    }
    *ret_first = SD_LISTEN_FDS_START;
    *ret_count = count;
    return 0;
}

#else

void notify_ready(void)
{
}

void notify_stopping(void)
{
}

void notify_reloading(void)
{
}

void notify_watchdog(void)
{
}

void notify_extend_timeout(uint64_t usec)
{
    (void)usec;
}

uint64_t notify_watchdog_usec(void)
{
    return 0;
}

int notify_listen_fds(int *ret_first, int *ret_count)
{
    *ret_first = -1;
    *ret_count = 0;
    return 0;
}

#endif
