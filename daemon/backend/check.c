#include "daemon/backend/check.h"

#include "daemon/backend/image.h"
#include "daemon/backend/verdict.h"

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

#define CHILD_IMAGE_FD 3

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
static int read_report(int fd, uint64_t deadline_ms, char *text, size_t *ret_bytes)
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
        ssize_t bytes = read(fd, text + used, PLUGIN_REPORT_BYTES_MAX - used);
        if (bytes < 0 && errno == EINTR) {
            continue;
        }
        if (bytes <= 0) {
            *ret_bytes = used;
            return bytes < 0 ? -errno : 0;
        }
        used += (size_t)bytes;
        if (used == PLUGIN_REPORT_BYTES_MAX) {
            return -EMSGSIZE;
        }
    }
}

/* What became of the child, in words. */
static int judge(int status, int rc, const struct plugin_report *r, unsigned timeout_ms,
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
    if (!r->complete) {
        return reason_fail(reason, -EBADMSG, "its check ended early, with status %d",
                           WEXITSTATUS(status));
    }
    if (WEXITSTATUS(status) != 0) {
        return reason_fail(reason, -EBADMSG, "%s",
                           r->probe.reason[0] != '\0' ? r->probe.reason
                                                      : "its check failed without a word");
    }
    if (!plugin_report_has_name(r)) {
        return reason_fail(reason, -EINVAL, "its name is not made of a-z, 0-9, '_' and '-'");
    }
    return 0;
}

/* Runs the child; text has its report, if it told one. */
static int run_child(const struct plugin_checker *k, int image_fd, const char *options, char *text,
                     size_t *ret_bytes, struct plugin_report *ret, struct gqa_reason *reason)
{
    int output[2];
    if (pipe2(output, O_CLOEXEC) < 0) {
        return reason_fail(reason, -errno, "pipe: %s", strerror(errno));
    }
    pid_t child;
    int rc = spawn_check(k->program, image_fd, options, output[1], &child, reason);
    close(output[1]);
    if (rc < 0) {
        close(output[0]);
        return rc;
    }
    uint64_t deadline_ms = now_ms() + k->timeout_ms;
    int read_rc = read_report(output[0], deadline_ms, text, ret_bytes);
    close(output[0]);
    int status = 0;
    rc = wait_child(child, read_rc < 0 ? 0 : deadline_ms, &status);
    struct plugin_report report;
    plugin_report_parse(text, *ret_bytes, &report);
    rc = judge(status, read_rc < 0 ? read_rc : rc, &report, k->timeout_ms, reason);
    if (rc == 0) {
        *ret = report;
    }
    return rc;
}

int plugin_check(const struct plugin_checker *k, int image_fd, const char *options,
                 struct plugin_report *ret, struct gqa_reason *reason)
{
    char text[PLUGIN_REPORT_BYTES_MAX];
    size_t bytes = 0;
    struct verdict_key key;
    bool has_key = k->verdicts != NULL && verdict_key(k->program, image_fd, options, &key) == 0;
    int rc = run_child(k, image_fd, options, text, &bytes, ret, reason);
    if (has_key && rc == 0 && verdict_may_be_kept(ret)) {
        verdict_remember(k->verdicts, &key, text, bytes);
    } else if (has_key) {
        verdict_forget(k->verdicts, &key);
    }
    return rc;
}

int plugin_check_once(const struct plugin_checker *k, int image_fd, const char *options,
                      struct plugin_report *ret, struct gqa_reason *reason)
{
    struct verdict_key key;
    if (k->verdicts != NULL && verdict_key(k->program, image_fd, options, &key) == 0 &&
        verdict_recall(k->verdicts, &key, ret)) {
        return 0;
    }
    return plugin_check(k, image_fd, options, ret, reason);
}
