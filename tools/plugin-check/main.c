/* gqa-plugin-check - loads a plugin, probes it and compares it with the reference, outside the
 * daemon: a plugin that crashes or hangs here takes nobody with it.
 *
 *   gqa-plugin-check PLUGIN.so            for people: a line per problem, then the whole matrix
 *   gqa-plugin-check --json PLUGIN.so     the same as one document
 *   gqa-plugin-check --bench PLUGIN.so    how fast it is
 *   gqa-plugin-check --report PLUGIN.so   for the daemon: key=value lines, the self-test alone
 *
 * Except for the daemon, which is a watcher itself, the plugin runs in a child, so that its crash
 * or hang is told in words. What the plugin itself prints goes to standard error. A report ends
 * with verdict=...: a plugin that ends the process leaves it out. */
#include "tools/plugin-check/examine.h"

#include <gqa/host_x86.h>

#include <argp.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <sysexits.h>
#include <time.h>
#include <unistd.h>

#define EXIT_WRONG    1
#define EXIT_UNUSABLE 2

#define THREADS_MAX       256u
#define TIMEOUT_S_DEFAULT 900u

enum { OPTION_TIMEOUT = 256 };

struct arguments {
    enum results_form form;
    bool bench, selftest_only;
    uint32_t n_threads, timeout_s;
    const char *path, *options;
};

/* Shared with the child, in which constants have the same addresses. */
static struct shared {
    const char *phase, *at; /* at: within the phase, or NULL */
    bool finished;
} * shared;

/* ---- command line ------------------------------------------------------------------------ */

static uint32_t number(struct argp_state *state, const char *text, uint32_t most)
{
    char *end;
    unsigned long n = strtoul(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end != '\0' || n < 1 || n > most) {
        argp_error(state, "'%s' is not a number from 1 to %u", text, most);
    }
    return (uint32_t)n;
}

static error_t parse_option(int key, char *value, struct argp_state *state)
{
    struct arguments *a = state->input;
    switch (key) {
    case 'r':
        a->form = RESULTS_REPORT;
        a->selftest_only = true;
        return 0;
    case 'j':
        a->form = RESULTS_JSON;
        return 0;
    case 'b':
        a->bench = true;
        return 0;
    case 's':
        a->selftest_only = true;
        return 0;
    case 't':
        a->n_threads = number(state, value, THREADS_MAX);
        return 0;
    case OPTION_TIMEOUT:
        a->timeout_s = number(state, value, 86400);
        return 0;
    case 'o':
        a->options = value;
        return 0;
    case ARGP_KEY_ARG:
        if (a->path != NULL) {
            argp_error(state, "one plugin at a time");
        }
        a->path = value;
        return 0;
    case ARGP_KEY_END:
        if (a->path == NULL) {
            argp_error(state, "which plugin?");
        }
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---- the check --------------------------------------------------------------------------- */

/* No core of a plugin's crash, and no line of its own in the results. */
static int open_output(FILE **ret)
{
    const struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    int fd = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 10);
    if (fd < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) {
        return -errno;
    }
    *ret = fdopen(fd, "w");
    return *ret == NULL ? -errno : 0;
}

static void tell_reason(const struct arguments *a, struct results *r, struct gqa_reason *reason)
{
    for (char *c = reason->text; *c != '\0'; c++) {
        *c = *c == '\n' ? ' ' : *c; /* one line */
    }
    results_text(r, "reason", reason->text);
    if (a->form == RESULTS_TEXT) {
        fprintf(stderr, "gqa-plugin-check: %s: %s\n", a->path, reason->text);
    }
}

/* The exit status of what examine() said. */
static int tell_verdict(const struct arguments *a, struct results *r, int rc,
                        struct gqa_reason *reason)
{
    if (rc != 0) {
        tell_reason(a, r, reason);
    }
    if (a->form == RESULTS_REPORT) {
        results_text(r, "verdict", rc < 0 ? "refused" : "done");
    } else {
        results_text(r, "verdict", rc < 0 ? "refused" : rc > 0 ? "unusable" : "passed");
    }
    int told = results_finish(r);
    if (told < 0) {
        return EX_IOERR;
    }
    if (a->form == RESULTS_REPORT) { /* the daemon reads "usable" */
        return rc < 0 ? EXIT_WRONG : EXIT_SUCCESS;
    }
    return rc < 0 ? EXIT_WRONG : rc > 0 ? EXIT_UNUSABLE : EXIT_SUCCESS;
}

static int check_here(const struct arguments *a, FILE *out)
{
    struct results results;
    struct gqa_reason reason = {""};
    if (results_init(&results, out, a->form) < 0) {
        return EX_OSERR;
    }
    results.at = &shared->at;
    if (a->form == RESULTS_JSON) {
        results_text(&results, "file", a->path);
    }
    const struct examination e = {
        .path = a->path,
        .options = a->options,
        .matrix = !a->selftest_only,
        .bench = a->bench,
        .n_threads = a->n_threads,
        .results = &results,
        .phase = &shared->phase,
    };
    return tell_verdict(a, &results, examine(&e, &reason), &reason);
}

/* ---- the child --------------------------------------------------------------------------- */

/* Waits for the child, or ends it after the timeout. */
static int wait_child(pid_t child, uint32_t timeout_s, bool *ret_late)
{
    sigset_t set;
    int status;
    const struct timespec timeout = {.tv_sec = timeout_s};
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    *ret_late = sigtimedwait(&set, NULL, &timeout) < 0 && errno == EAGAIN;
    if (*ret_late) {
        kill(child, SIGKILL);
    }
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    return status;
}

/* What a child that told no verdict has died of. */
static int tell_death(const struct arguments *a, FILE *out, int status, bool late)
{
    struct results results;
    struct gqa_reason reason;
    char where[160];
    if (results_init(&results, out, a->form) < 0) {
        return EX_OSERR;
    }
    snprintf(where, sizeof(where), "%s%s%s%s", shared->phase, shared->at != NULL ? " '" : "",
             shared->at != NULL ? shared->at : "", shared->at != NULL ? "'" : "");
    if (late) {
        snprintf(reason.text, sizeof(reason.text), "%s did not end within %u s", where,
                 a->timeout_s);
    } else if (WIFSIGNALED(status)) {
        snprintf(reason.text, sizeof(reason.text), "crashed with signal %d (%s) in %s",
                 WTERMSIG(status), strsignal(WTERMSIG(status)), where);
    } else {
        snprintf(reason.text, sizeof(reason.text), "the plugin ended the process in %s, status %d",
                 where, WEXITSTATUS(status));
    }
    if (a->form == RESULTS_JSON) {
        results_text(&results, "file", a->path);
    }
    return tell_verdict(a, &results, -EFAULT, &reason);
}

/* The statuses that only check_here() has; a plugin that calls exit() may have any, so a mark tells
 * the two apart. */
static int check_in_child(const struct arguments *a, FILE *out)
{
    bool late = false;
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigprocmask(SIG_BLOCK, &set, NULL);
    pid_t child = fork();
    if (child < 0) {
        fprintf(stderr, "gqa-plugin-check: fork: %s\n", strerror(errno));
        return EX_OSERR;
    }
    if (child == 0) {
        sigprocmask(SIG_UNBLOCK, &set, NULL);
        int status = check_here(a, out);
        shared->finished = true;
        _exit(status);
    }
    int status = wait_child(child, a->timeout_s, &late);
    return shared->finished && WIFEXITED(status) ? WEXITSTATUS(status)
                                                 : tell_death(a, out, status, late);
}

int main(int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"json", 'j', NULL, 0, "Print the results as JSON", 0},
        {"bench", 'b', NULL, 0, "Measure how fast it is, instead of checking it", 0},
        {"threads", 't', "N", 0, "Threads of the bench (all that this process may use)", 0},
        {"selftest", 's', NULL, 0, "Only what the daemon checks at a start", 0},
        {"options", 'o', "KEY=VALUE,...", 0, "Options for the plugin, such as isa=avx2", 0},
        {"timeout", OPTION_TIMEOUT, "SECONDS", 0, "Give up after so long (900)", 0},
        {"report", 'r', NULL, 0, "Print key=value lines for the daemon", 0},
        {0},
    };
    static const struct argp parser = {
        .options = options,
        .parser = parse_option,
        .args_doc = "PLUGIN.so",
        .doc = "Loads a plugin and compares it with the reference, or measures it."
               "\vExit status: 0 passed, 1 wrong or broken, 2 not usable here, 64 usage.",
    };
    struct arguments a = {.options = "", .timeout_s = TIMEOUT_S_DEFAULT};
    FILE *out;

    gqa_host_permit_tiles();
    argp_err_exit_status = EX_USAGE;
    argp_program_version = "gqa-plugin-check " GQAD_VERSION;
    argp_parse(&parser, argc, argv, 0, NULL, &a);
    if (a.n_threads == 0) {
        long n = sysconf(_SC_NPROCESSORS_ONLN);
        a.n_threads = n < 1 ? 1 : n > (long)THREADS_MAX ? THREADS_MAX : (uint32_t)n;
    }
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED || open_output(&out) < 0) {
        fprintf(stderr, "gqa-plugin-check: %s\n", strerror(errno));
        return EX_OSERR;
    }
    shared->phase = "start";
    return a.form == RESULTS_REPORT ? check_here(&a, out) : check_in_child(&a, out);
}
