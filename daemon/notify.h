/* daemon/notify.h - what the service manager hears: sd_notify, the watchdog, passed sockets.
 *
 * Without libsystemd, or without a manager, every function does nothing. */
#ifndef DAEMON_NOTIFY_H
#define DAEMON_NOTIFY_H

#include <stdint.h>

void notify_ready(void);
void notify_stopping(void);
void notify_reloading(void);
void notify_watchdog(void);
/* Asks for so much more time to start or stop. */
void notify_extend_timeout(uint64_t usec);

/* Within which time the manager wants a sign of life; 0: never. */
uint64_t notify_watchdog_usec(void);

/* Sockets that the manager opened: their count and, as is its custom, the first descriptor. Each is
 * checked to be a listening Unix stream socket: -EINVAL otherwise. */
int notify_listen_fds(int *ret_first, int *ret_count);

#endif
