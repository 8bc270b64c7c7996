/* daemon/log.h - the daemon's log: standard error, or the journal when started by systemd.
 *
 * Only the daemon logs, once, where the request or file is known; libraries return errors. Prompt
 * text and tokens never go into the log. Safe from any thread after log_init. */
#ifndef DAEMON_LOG_H
#define DAEMON_LOG_H

#include <stdbool.h>
#include <stdint.h>

enum log_level {
    LOG_LEVEL_ERROR = 3,
    LOG_LEVEL_WARNING = 4,
    LOG_LEVEL_INFO = 6,
    LOG_LEVEL_DEBUG = 7
};

/* "error", "warning", "info", "debug"; -EINVAL otherwise. */
int log_level_by_name(const char *name, enum log_level *ret);
void log_init(enum log_level level);
void log_write(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* Lines that clients can bring about as often as they like: one and n_more in LOG_PACE_NS, the
 * first of which tells how many were left out before. All else is zero to begin with; guarded by
 * its owner. */
#define LOG_PACE_NS 10000000000u
struct log_pace {
    uint64_t ends_ns; /* of any clock that only goes on */
    uint32_t n_more, n_written;
    uint64_t n_left_out;
};
/* Whether one may be written now, and how many were not before it. */
bool log_pace_is_due(struct log_pace *pace, uint64_t now_ns, uint64_t *ret_n_left_out);
void log_paced(struct log_pace *pace, uint64_t now_ns, enum log_level level, const char *format,
               ...) __attribute__((format(printf, 4, 5)));

#define log_error(...)   log_write(LOG_LEVEL_ERROR, __VA_ARGS__)
#define log_warning(...) log_write(LOG_LEVEL_WARNING, __VA_ARGS__)
#define log_info(...)    log_write(LOG_LEVEL_INFO, __VA_ARGS__)
#define log_debug(...)   log_write(LOG_LEVEL_DEBUG, __VA_ARGS__)

#endif
