#include "daemon/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define LOG_LINE_BYTES 2048 /* longer messages are cut */

static const struct {
    const char *name;
    enum log_level level;
} levels[] = {
    {"error", LOG_LEVEL_ERROR},
    {"warning", LOG_LEVEL_WARNING},
    {"info", LOG_LEVEL_INFO},
    {"debug", LOG_LEVEL_DEBUG},
};

static atomic_int log_level_max = LOG_LEVEL_INFO;
static atomic_bool log_to_journal;

int log_level_by_name(const char *name, enum log_level *ret)
{
    for (size_t i = 0; i < sizeof(levels) / sizeof(levels[0]); i++) {
        if (strcmp(name, levels[i].name) == 0) {
            *ret = levels[i].level;
            return 0;
        }
    }
    return -EINVAL;
}

static const char *level_name(enum log_level level)
{
    for (size_t i = 0; i < sizeof(levels) / sizeof(levels[0]); i++) {
        if (level == levels[i].level) {
            return levels[i].name;
        }
    }
    return "info";
}

void log_init(enum log_level level)
{
    atomic_store(&log_level_max, level);
    atomic_store(&log_to_journal, getenv("JOURNAL_STREAM") != NULL);
}

/* Names come from clients and files: a line break in one must not forge a line of the log. */
static void replace_controls(char *text, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c < 0x20 || c == 0x7f) {
            text[i] = '?';
        }
    }
}

/* The journal takes the level from a "<N>" in front and adds time and name itself. */
static size_t write_prefix(char *line, size_t capacity, enum log_level level)
{
    int n;
    if (atomic_load(&log_to_journal)) {
        n = snprintf(line, capacity, "<%d>", (int)level);
    } else {
        struct timespec now;
        struct tm tm;
        clock_gettime(CLOCK_REALTIME, &now);
        localtime_r(&now.tv_sec, &tm);
        n = snprintf(line, capacity, "gqad %02d:%02d:%02d.%03d %s: ", tm.tm_hour, tm.tm_min,
                     tm.tm_sec, (int)(now.tv_nsec / 1000000), level_name(level));
    }
    return n > 0 ? (size_t)n : 0;
}

void log_write(enum log_level level, const char *format, ...)
{
    if ((int)level > atomic_load_explicit(&log_level_max, memory_order_relaxed)) {
        return;
    }
    int saved_errno = errno;
    char line[LOG_LINE_BYTES];
    size_t used = write_prefix(line, sizeof(line), level);
    va_list args;
    va_start(args, format);
    int n = vsnprintf(line + used, sizeof(line) - used - 1, format, args);
    va_end(args);
    if (n > 0) {
        size_t bytes = (size_t)n;
        if (bytes > sizeof(line) - used - 2) {
            bytes = sizeof(line) - used - 2;
        }
        replace_controls(line + used, bytes);
        used += bytes;
    }
    line[used++] = '\n';
    /* One write per line keeps threads apart; there is nobody to tell when it fails. */
    ssize_t written = write(STDERR_FILENO, line, used);
    (void)written;
    errno = saved_errno;
}

bool log_pace_is_due(struct log_pace *pace, uint64_t now_ns, uint64_t *ret_n_left_out)
{
    if (now_ns < pace->ends_ns && pace->n_written > pace->n_more) {
        pace->n_left_out++;
        return false;
    }
    if (now_ns >= pace->ends_ns) {
        pace->ends_ns = now_ns + LOG_PACE_NS;
        pace->n_written = 0;
    }
    *ret_n_left_out = pace->n_left_out;
    pace->n_left_out = 0;
    pace->n_written++;
    return true;
}

void log_paced(struct log_pace *pace, uint64_t now_ns, enum log_level level, const char *format,
               ...)
{
    uint64_t n_left_out;
    if (!log_pace_is_due(pace, now_ns, &n_left_out)) {
        return;
    }
    char text[LOG_LINE_BYTES], more[64] = "";
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof(text), format, args);
    va_end(args);
    if (n_left_out > 0) {
        snprintf(more, sizeof(more), " (%llu more before, not logged)",
                 (unsigned long long)n_left_out);
    }
    log_write(level, "%s%s", text, more);
}
