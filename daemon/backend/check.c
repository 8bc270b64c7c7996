#include "daemon/backend/check.h"

#include "daemon/backend/image.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define REPORT_BYTES_MAX 8192
#define CHILD_IMAGE_FD   3

extern char **environ;

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000u + (uint64_t)t.tv_nsec / 1000000u;
}

static int spawn_check(const char *program, int image_fd, const char *options, int output_fd,
                       pid_t *ret, struct gqa_reason *reason)
{
    char *argv[] = {(char *)"gqa-plugin-check", (char *)"--report",
                    (char *)"--options",        (char *)options,
                    (char *)"/proc/self/fd/3",  NULL};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_adddup2(&actions, output_fd, STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&actions, image_fd, CHILD_IMAGE_FD);
    posix_spawnattr_t attributes;
    posix_spawnattr_init(&attributes);
    sigset_t none, defaults;
    sigemptyset(&none);
    sigemptyset(&defaults);
    sigaddset(&defaults, SIGPIPE);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &defaults);
    posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    int rc = posix_spawn(ret, program, &actions, &attributes, argv, environ);
    posix_spawnattr_destroy(&attributes);
    posix_spawn_file_actions_destroy(&actions);
    return rc != 0 ? reason_fail(reason, -rc, "%s cannot be run: %s", program, strerror(rc)) : 0;
}

/* Waits for the child until the deadline, then ends it. -ETIMEDOUT; -errno where somebody else took
 * its status (a SIGCHLD that is ignored). */
static int wait_child(pid_t child, uint64_t deadline_ms, int *ret_status)
{
    const struct timespec pause = {.tv_nsec = 1000000};
    bool killed = false;
    for (;;) {
        pid_t n = waitpid(child, ret_status, killed ? 0 : WNOHANG);
        if (n == child) {
            return killed ? -ETIMEDOUT : 0;
        }
        if (n < 0 && errno != EINTR) {
            return -errno;
        }
        if (n == 0 && now_ms() >= deadline_ms) {
            kill(child, SIGKILL);
            killed = true;
        } else if (n == 0) {
            nanosleep(&pause, NULL);
        }
    }
}

/* Reads all output until its end or the deadline. -ETIMEDOUT. */
static int read_report(int fd, uint64_t deadline_ms, char *text)
{
    size_t used = 0;
    for (;;) {
        uint64_t now = now_ms();
        struct pollfd p = {.fd = fd, .events = POLLIN};
        int n = now < deadline_ms ? poll(&p, 1, (int)(deadline_ms - now)) : 0;
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? -errno : -ETIMEDOUT;
        }
        ssize_t bytes = read(fd, text + used, REPORT_BYTES_MAX - 1 - used);
        if (bytes < 0 && errno == EINTR) {
            continue;
        }
        if (bytes <= 0) {
            text[used] = '\0';
            return bytes < 0 ? -errno : 0;
        }
        used += (size_t)bytes;
        if (used == REPORT_BYTES_MAX - 1) {
            return -EMSGSIZE;
        }
    }
}

static void copy_text(char *dst, size_t bytes, const char *src)
{
    snprintf(dst, bytes, "%s", src);
}

struct report {
    struct plugin_report plugin;
    bool complete; /* the last line came: nothing in the plugin ended the process early */
};

/* "VERDICT,ERROR,NAME" */
static void take_case(struct plugin_report *r, const char *value)
{
    struct plugin_case c = {""};
    if (r->n_cases < PLUGIN_CASES_MAX &&
        sscanf(value, "%23[^,],%f,%63[^\n]", c.verdict, &c.error, c.name) == 3) {
        r->cases[r->n_cases++] = c;
    }
}

static void take_line(struct report *report, const char *key, const char *value)
{
    struct plugin_report *r = &report->plugin;
    const struct {
        const char *key;
        char *dst;
        size_t bytes;
    } texts[] = {
        {"name", r->name, sizeof(r->name)},
        {"version", r->version, sizeof(r->version)},
        {"build", r->build, sizeof(r->build)},
        {"interfaces", r->interfaces, sizeof(r->interfaces)},
        {"isa", r->probe.isa, sizeof(r->probe.isa)},
        {"isas", r->probe.isas, sizeof(r->probe.isas)},
        {"device", r->probe.device, sizeof(r->probe.device)},
        {"reason", r->probe.reason, sizeof(r->probe.reason)},
    };
    for (size_t i = 0; i < sizeof(texts) / sizeof(texts[0]); i++) {
        if (strcmp(key, texts[i].key) == 0) {
            copy_text(texts[i].dst, texts[i].bytes, value);
        }
    }
    if (strcmp(key, "usable") == 0) {
        r->probe.usable = strcmp(value, "1") == 0;
    } else if (strcmp(key, "score") == 0) {
        r->probe.score = (uint32_t)strtoul(value, NULL, 10);
    } else if (strcmp(key, "caps") == 0) {
        r->caps = (uint32_t)strtoul(value, NULL, 10);
    } else if (strcmp(key, "threads_left") == 0) {
        r->threads_left = (uint32_t)strtoul(value, NULL, 10);
    } else if (strcmp(key, "case") == 0) {
        take_case(r, value);
    } else if (strcmp(key, "devices") == 0) {
        r->probe.n_devices = (uint32_t)strtoul(value, NULL, 10);
    } else if (strcmp(key, "verdict") == 0) {
        report->complete = true;
    }
}

static void parse_report(char *text, struct report *ret)
{
    char *rest = text;
    for (char *line; (line = strsep(&rest, "\n")) != NULL;) {
        char *equals = strchr(line, '=');
        if (equals != NULL) {
            *equals = '\0';
            take_line(ret, line, equals + 1);
        }
    }
}

/* Names stand in specs, logs and lists. */
static bool is_name(const char *name)
{
    size_t bytes = strspn(name, "abcdefghijklmnopqrstuvwxyz0123456789_-");
    return bytes > 0 && name[bytes] == '\0';
}

/* What became of the child, in words. */
static int judge(int status, int rc, const struct report *report, unsigned timeout_ms,
                 struct gqa_reason *reason)
{
    if (rc == -ETIMEDOUT) {
        return reason_fail(reason, rc, "probe and self-test did not end within %u ms", timeout_ms);
    }
    if (rc < 0) {
        return reason_fail(reason, rc, "its report cannot be read: %s", strerror(-rc));
    }
    if (WIFSIGNALED(status)) {
        return reason_fail(reason, -EFAULT, "crashed with signal %d in probe or self-test",
                           WTERMSIG(status));
    }
    if (!report->complete) {
        return reason_fail(reason, -EBADMSG, "its check ended early, with status %d",
                           WEXITSTATUS(status));
    }
    if (WEXITSTATUS(status) != 0) {
        return reason_fail(reason, -EBADMSG, "%s",
                           report->plugin.probe.reason[0] != '\0'
                               ? report->plugin.probe.reason
                               : "its check failed without a word");
    }
    if (!is_name(report->plugin.name)) {
        return reason_fail(reason, -EINVAL, "its name is not made of a-z, 0-9, '_' and '-'");
    }
    return 0;
}

int plugin_check(const char *program, int image_fd, const char *options, unsigned timeout_ms,
                 struct plugin_report *ret, struct gqa_reason *reason)
{
    int output[2];
    if (pipe2(output, O_CLOEXEC) < 0) {
        return reason_fail(reason, -errno, "pipe: %s", strerror(errno));
    }
    pid_t child;
    int rc = spawn_check(program, image_fd, options, output[1], &child, reason);
    close(output[1]);
    if (rc < 0) {
        close(output[0]);
        return rc;
    }
    uint64_t deadline_ms = now_ms() + timeout_ms;
    char text[REPORT_BYTES_MAX] = "";
    int read_rc = read_report(output[0], deadline_ms, text);
    close(output[0]);
    int status = 0;
    rc = wait_child(child, read_rc < 0 ? 0 : deadline_ms, &status);
    struct report report = {.plugin.probe.struct_size = sizeof(report.plugin.probe)};
    parse_report(text, &report);
    rc = judge(status, read_rc < 0 ? read_rc : rc, &report, timeout_ms, reason);
    if (rc == 0) {
        *ret = report.plugin;
    }
    return rc;
}
