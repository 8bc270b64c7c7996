/* gqa-plugin-check - loads a plugin, probes it and compares it with the reference, outside the
 * daemon: a plugin that crashes or hangs here takes nobody with it.
 *
 *   gqa-plugin-check PLUGIN.so            for people: a line per problem, then the whole matrix
 *   gqa-plugin-check --report PLUGIN.so   for the daemon: key=value lines
 *
 * The report ends with verdict=...: a plugin that ends the process leaves it out. What the plugin
 * itself prints goes to standard error. Exit status: 0 usable or not (usable=...), 1 wrong results
 * or a broken plugin, 64 usage. */
#include "plugins/cpu/attention.h"
#include "tools/plugin-check/conform.h"
#include "tools/plugin-check/problem.h"

#include <argp.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sysexits.h>
#include <unistd.h>

/* A plugin may convert or reorder in float32: every output is a weighted mean of values in -1..1,
 * summed over at most 502 tokens with about 1e-7 relative error a step. 5e-4 leaves room for fast
 * exponentials and half precision of the probabilities, and is far below any mistake. */
#define TOLERANCE 5e-4f

struct arguments {
    bool report;
    const char *path;
    const char *options;
};

/* Standard output as it was given; the plugin's own words go elsewhere. */
static FILE *out;

/* ---- a host of one thread ---------------------------------------------------------------- */

static void host_log(void *data, int level, const char *message)
{
    fprintf(stderr, "gqa-plugin-check: plugin says: %s\n", message);
}

static void host_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    for (uint32_t i = 0; i < n_tasks; i++) {
        fn(arg, i, 0);
    }
}

static void *host_allocate(void *data, size_t bytes)
{
    void *memory = aligned_alloc(64, (bytes + 63) & ~(size_t)63);
    return memory != NULL ? memset(memory, 0, bytes) : NULL;
}

static void host_release(void *data, void *memory, size_t bytes)
{
    free(memory);
}

static const struct gqa_host host = {
    .struct_size = sizeof(host),
    .n_threads = 1,
    .log = host_log,
    .parallel = host_parallel,
    .allocate = host_allocate,
    .release = host_release,
};

/* Three workers, of which none exists: the last piece comes first. */
#define CROWD_WORKERS 3u

static void crowd_parallel(void *data, gqa_task_fn fn, void *arg, uint32_t n_tasks)
{
    for (uint32_t i = n_tasks; i-- > 0;) {
        fn(arg, i, i % CROWD_WORKERS);
    }
}

static const struct gqa_host crowd = {
    .struct_size = sizeof(crowd),
    .n_threads = CROWD_WORKERS,
    .log = host_log,
    .parallel = crowd_parallel,
    .allocate = host_allocate,
    .release = host_release,
};

/* ---- the reference as an interface ------------------------------------------------------- */

static int reference_supports(void *context, const struct gqa_attn_layer *layer,
                              struct gqa_reason *reason)
{
    return cpu_attention_supports(layer, reason);
}

static int reference_append(void *context, const struct gqa_attn_layer *layer,
                            const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    return cpu_attention_append(context, layer, batch, io);
}

static int reference_attend(void *context, const struct gqa_attn_layer *layer,
                            const struct gqa_attn_batch *batch, const struct gqa_attn_io *io)
{
    return cpu_attention_attend(context, layer, batch, io);
}

static int reference_observe(void *context, const struct gqa_attn_layer *layer,
                             const struct gqa_attn_batch *batch, const struct gqa_attn_io *io,
                             uint32_t seq, uint32_t n_observed, uint32_t n_votes, float *votes)
{
    return cpu_attention_observe(context, layer, batch, io, seq, n_observed, n_votes, votes);
}

static const struct gqa_attention reference = {
    .struct_size = sizeof(reference),
    .caps = CPU_ATTENTION_CAPS,
    .supports = reference_supports,
    .append = reference_append,
    .attend = reference_attend,
    .observe = reference_observe,
};

/* ---- the check --------------------------------------------------------------------------- */

/* Largest difference, or infinity where the candidate has none of the numbers. */
static float max_difference(const struct problem_spec *s, const float *truth, const float *got)
{
    float worst = 0;
    size_t n = (size_t)s->n_rows * s->n_heads * s->dim;
    for (size_t i = 0; i < n; i++) {
        float difference = fabsf(truth[i] - got[i]);
        if (!(difference <= TOLERANCE * 1e6f)) {
            return INFINITY;
        }
        worst = difference > worst ? difference : worst;
    }
    return worst;
}

/* 1 right, 0 not supported, or -errno with a reason. */
static int check_problem(const struct problem_spec *s, const struct gqa_attention *attention,
                         void *context, struct cpu_attention *truth_context, float *ret_error,
                         struct gqa_reason *reason)
{
    float *truth = NULL, *got = NULL;
    int rc = problem_run(s, &reference, truth_context, &truth, reason);
    rc = rc < 0 ? rc : problem_run(s, attention, context, &got, reason);
    if (rc == -ENOTSUP && truth != NULL) {
        rc = 0;
    } else if (rc < 0) {
        snprintf(reason->text, sizeof(reason->text), "self-test '%s': %s", s->name, strerror(-rc));
    } else {
        *ret_error = max_difference(s, truth, got);
        rc = 1;
        if (!(*ret_error <= TOLERANCE)) {
            snprintf(reason->text, sizeof(reason->text),
                     "self-test '%s': wrong by %g, tolerance %g", s->name, (double)*ret_error,
                     (double)TOLERANCE);
            rc = -EBADMSG;
        }
    }
    free(truth);
    free(got);
    return rc;
}

static int run_problems(const struct arguments *a, const struct gqa_attention *attention,
                        void *context, struct gqa_reason *reason)
{
    struct cpu_attention *truth;
    int rc = cpu_attention_create(&host, CPU_ISA_C, &truth);
    if (rc < 0) {
        snprintf(reason->text, sizeof(reason->text), "the reference: %s", strerror(-rc));
        return rc;
    }
    uint32_t n_right = 0;
    float worst = 0;
    for (uint32_t i = 0; rc >= 0 && problem_at(i) != NULL; i++) {
        float error = 0;
        rc = check_problem(problem_at(i), attention, context, truth, &error, reason);
        worst = error > worst ? error : worst;
        n_right += rc == 1;
        if (a->report) {
            fprintf(out, "case=%s,%.9g,%s\n",
                    rc < 0    ? "wrong"
                    : rc == 0 ? "not supported"
                              : "ok",
                    (double)error, /* no comma of a name ends it: it comes last */
                    problem_at(i)->name);
        } else {
            fprintf(out, "%-40s %s  %.3g\n", problem_at(i)->name,
                    rc < 0    ? "WRONG"
                    : rc == 0 ? "not supported"
                              : "ok",
                    (double)error);
        }
    }
    cpu_attention_destroy(truth);
    if (rc >= 0 && n_right == 0) {
        snprintf(reason->text, sizeof(reason->text),
                 "it supports none of the self-test's problems");
        rc = -ENOTSUP;
    }
    if (rc >= 0) {
        fprintf(out, "selftest=%u problems, largest difference %.3g\n", n_right, (double)worst);
    }
    return rc < 0 ? rc : 0;
}

/* All that the ABI promises, for people. */
static int run_matrix(const struct arguments *a, const struct gqa_plugin *plugin,
                      const struct gqa_attention *attention, void *context,
                      struct gqa_reason *reason)
{
    struct conform c = {.attention = attention,
                        .reference = &reference,
                        .context = context,
                        .tolerance = TOLERANCE,
                        .out = out};
    struct cpu_attention *truth;
    int rc = cpu_attention_create(&host, CPU_ISA_C, &truth);
    if (rc < 0) {
        snprintf(reason->text, sizeof(reason->text), "the reference: %s", strerror(-rc));
        return rc;
    }
    c.reference_context = truth;
    rc = plugin->open(&crowd, a->options, &c.crowd_context, reason);
    if (rc == 0) {
        rc = conform_run(&c, reason);
        plugin->close(c.crowd_context);
    }
    cpu_attention_destroy(truth);
    return rc;
}

/* Threads of this process; close() must have joined its own. */
static unsigned count_threads(void)
{
    unsigned n = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (const struct dirent *d; tasks != NULL && (d = readdir(tasks)) != NULL;) {
        n += d->d_name[0] != '.';
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return n;
}

static int check_open(const struct arguments *a, const struct gqa_plugin *plugin,
                      struct gqa_reason *reason)
{
    void *context = NULL;
    int rc = plugin->open(&host, a->options, &context, reason);
    if (rc < 0) {
        if (reason->text[0] == '\0') {
            snprintf(reason->text, sizeof(reason->text), "open failed: %s", strerror(-rc));
        }
        return rc;
    }
    const struct gqa_attention *attention = plugin->get_interface(context, GQA_ATTENTION_0);
    const struct gqa_program *program = plugin->get_interface(context, GQA_PROGRAM_0);
    if (attention == NULL || attention->struct_size < sizeof(*attention) ||
        attention->supports == NULL || attention->append == NULL || attention->attend == NULL) {
        snprintf(reason->text, sizeof(reason->text), "it has no complete %s", GQA_ATTENTION_0);
        rc = -ENOEXEC;
    } else {
        fprintf(out, "interfaces=%s%s\ncaps=%u\n", GQA_ATTENTION_0,
                program != NULL ? "," GQA_PROGRAM_0 : "", attention->caps);
        rc = run_problems(a, attention, context, reason);
        if (rc == 0 && !a->report) {
            rc = run_matrix(a, plugin, attention, context, reason);
        }
    }
    plugin->close(context);
    unsigned left = count_threads();
    fprintf(out, "threads_left=%u\n", left > 1 ? left - 1 : 0);
    return rc;
}

static int check_plugin(const struct arguments *a, struct gqa_reason *reason)
{
    void *handle = dlopen(a->path, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        snprintf(reason->text, sizeof(reason->text), "%s", dlerror());
        return -ENOEXEC;
    }
    const struct gqa_plugin *plugin = dlsym(handle, GQA_PLUGIN_SYMBOL);
    if (plugin == NULL || plugin->magic != GQA_PLUGIN_MAGIC ||
        plugin->abi_major != GQA_PLUGIN_ABI_MAJOR || plugin->abi_minor != GQA_PLUGIN_ABI_MINOR ||
        plugin->struct_size < sizeof(*plugin) || plugin->name == NULL || plugin->probe == NULL ||
        plugin->open == NULL || plugin->get_interface == NULL || plugin->close == NULL) {
        snprintf(reason->text, sizeof(reason->text), "no symbol %s of this ABI (%u.%u)",
                 GQA_PLUGIN_SYMBOL, GQA_PLUGIN_ABI_MAJOR, GQA_PLUGIN_ABI_MINOR);
        return -ENOEXEC;
    }
    fprintf(out, "name=%s\nversion=%s\nbuild=%s\n", plugin->name,
            plugin->version != NULL ? plugin->version : "",
            plugin->build != NULL ? plugin->build : "");
    struct gqa_probe probe = {.struct_size = sizeof(probe)};
    int rc = plugin->probe(&probe);
    if (rc < 0) {
        snprintf(reason->text, sizeof(reason->text), "probe failed: %s", strerror(-rc));
        return rc;
    }
    fprintf(out, "usable=%u\nscore=%u\ndevices=%u\nisa=%.63s\nisas=%.191s\ndevice=%.127s\n",
            probe.usable, probe.score, probe.n_devices, probe.isa, probe.isas, probe.device);
    if (!probe.usable) {
        fprintf(out, "reason=%.255s\n", probe.reason);
        return 0;
    }
    return check_open(a, plugin, reason);
}

/* ---- command line ------------------------------------------------------------------------ */

static error_t parse_option(int key, char *value, struct argp_state *state)
{
    struct arguments *a = state->input;
    switch (key) {
    case 'r':
        a->report = true;
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

/* No core of a plugin's crash, and no line of its own in the report. */
static int open_output(void)
{
    const struct rlimit none = {0, 0};
    setrlimit(RLIMIT_CORE, &none);
    int fd = fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 10);
    if (fd < 0 || dup2(STDERR_FILENO, STDOUT_FILENO) < 0) {
        return -errno;
    }
    out = fdopen(fd, "w");
    return out == NULL ? -errno : 0;
}

int main(int argc, char **argv)
{
    static const struct argp_option options[] = {
        {"report", 'r', NULL, 0, "Print key=value lines for the daemon", 0},
        {"options", 'o', "KEY=VALUE,...", 0, "Options for the plugin, such as isa=avx2", 0},
        {0},
    };
    static const struct argp parser = {
        options,     parse_option,
        "PLUGIN.so", "Loads an attention plugin and compares it with the reference.",
        NULL,        NULL,
        NULL,
    };
    struct arguments a = {.options = ""};
    argp_err_exit_status = EX_USAGE;
    argp_parse(&parser, argc, argv, 0, NULL, &a);
    struct gqa_reason reason = {""};
    if (open_output() < 0) {
        fprintf(stderr, "gqa-plugin-check: standard output: %s\n", strerror(errno));
        return EX_OSERR;
    }
    int rc = check_plugin(&a, &reason);
    if (rc < 0) {
        for (char *c = reason.text; *c != '\0'; c++) {
            *c = *c == '\n' ? ' ' : *c; /* one line of the report */
        }
        fprintf(out, "reason=%s\n", reason.text);
        if (!a.report) {
            fprintf(stderr, "gqa-plugin-check: %s: %s\n", a.path, reason.text);
        }
    }
    fprintf(out, "verdict=%s\n", rc < 0 ? "refused" : "done");
    bool told = fclose(out) == 0;
    return rc < 0 || !told ? EXIT_FAILURE : EXIT_SUCCESS;
}
