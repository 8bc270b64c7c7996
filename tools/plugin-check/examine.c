/* tools/plugin-check/examine.c - see examine.h. */
#include "tools/plugin-check/examine.h"

#include "plugins/cpu/attention.h"
#include "plugins/cpu/program.h"
#include "plugins/cpu/weights.h"
#include "tools/plugin-check/bench.h"
#include "tools/plugin-check/conform.h"
#include "tools/plugin-check/hosts.h"
#include "tools/plugin-check/problem.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* A plugin may convert or reorder in float32: every output is a weighted mean of values in -1..1,
 * summed over at most 502 tokens with about 1e-7 relative error a step. 5e-4 leaves room for fast
 * exponentials and half precision of the probabilities, and is far below any mistake. */
#define TOLERANCE 5e-4f

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

static uint64_t reference_pack_bytes(void *context, const struct gqa_weight *weight)
{
    return cpu_weights_packed_bytes(weight);
}

static int reference_pack(void *context, const struct gqa_weight *weight, uint64_t first_row,
                          uint64_t n_rows, void *dst)
{
    return cpu_weights_pack(weight, first_row, n_rows, dst);
}

static const struct gqa_program reference_program = {
    .struct_size = sizeof(reference_program),
    .pack_id = CPU_PACK_ID,
    .pack_bytes = reference_pack_bytes,
    .pack_rows = CPU_STRIP_ROWS,
    .pack = reference_pack,
    .prepare = cpu_program_prepare,
    .release = cpu_program_release,
    .begin = cpu_program_begin,
    .run = cpu_program_run,
    .end = cpu_program_end,
    .data = cpu_program_data,
};

/* ---- the self-test ----------------------------------------------------------------------- */

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
        rc = 0; /* and the reason is why not */
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

static int run_problems(const struct examination *e, const struct gqa_attention *attention,
                        void *context, struct gqa_reason *reason)
{
    struct cpu_attention *truth;
    int rc = cpu_attention_create(&host_alone, CPU_ISA_C, &truth);
    if (rc < 0) {
        snprintf(reason->text, sizeof(reason->text), "the reference: %s", strerror(-rc));
        return rc;
    }
    uint32_t n_right = 0;
    float worst = 0;
    for (uint32_t i = 0; rc >= 0 && problem_at(i) != NULL; i++) {
        float error = 0;
        struct gqa_reason why = {""};
        *e->results->at = problem_at(i)->name;
        rc = check_problem(problem_at(i), attention, context, truth, &error, reason);
        if (rc == 0) {
            why = *reason;
            reason->text[0] = '\0';
        }
        worst = error > worst ? error : worst;
        n_right += rc == 1;
        results_case(e->results, problem_at(i)->name,
                     rc < 0    ? "wrong"
                     : rc == 0 ? "not supported"
                               : "ok",
                     error, why.text);
    }
    cpu_attention_destroy(truth);
    if (rc >= 0 && n_right == 0) {
        snprintf(reason->text, sizeof(reason->text),
                 "it supports none of the self-test's problems");
        rc = -ENOTSUP;
    }
    return rc < 0 ? rc : 0;
}

/* A few ops of a program; then, where it is wanted, all that the ABI promises. */
static int run_matrix(const struct examination *e, const struct gqa_plugin *plugin,
                      const struct gqa_attention *attention, const struct gqa_program *program,
                      void *context, struct gqa_reason *reason)
{
    struct cpu_context truth = {.host = &host_alone, .isa = CPU_ISA_C};
    struct conform c = {.attention = attention,
                        .reference = &reference,
                        .program = program,
                        .reference_program = &reference_program,
                        .context = context,
                        .tolerance = TOLERANCE,
                        .results = e->results};
    int rc = cpu_attention_create(&host_alone, CPU_ISA_C, &truth.attention);
    if (rc < 0) {
        snprintf(reason->text, sizeof(reason->text), "the reference: %s", strerror(-rc));
        return rc;
    }
    c.reference_context = truth.attention;
    c.reference_program_context = &truth;
    rc = program != NULL ? conform_program_selftest(&c, reason) : 0;
    if (rc == 0 && e->matrix) {
        *e->phase = "matrix";
        rc = plugin->open(&host_crowd, e->options, &c.crowd_context, reason);
    }
    if (rc == 0 && e->matrix) {
        rc = conform_run(&c, reason);
        rc = rc == 0 && program != NULL ? conform_program_run(&c, reason) : rc;
        plugin->close(c.crowd_context);
    }
    cpu_attention_destroy(truth.attention);
    return rc;
}

/* ---- the plugin -------------------------------------------------------------------------- */

/* Threads of this process; close() must have joined its own. */
static uint32_t count_threads(void)
{
    uint32_t n = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (const struct dirent *d; tasks != NULL && (d = readdir(tasks)) != NULL;) {
        n += d->d_name[0] != '.';
    }
    if (tasks != NULL) {
        closedir(tasks);
    }
    return n;
}

/* Whether a table is as long as that of ABI 1.0, and has what it must have. */
static int check_table(const char *name, uint32_t bytes, size_t least, bool is_whole,
                       struct gqa_reason *reason)
{
    if (bytes < least) {
        snprintf(reason->text, sizeof(reason->text), "its %s has %u bytes, must have %zu", name,
                 bytes, least);
        return -ENOEXEC;
    }
    if (!is_whole) {
        snprintf(reason->text, sizeof(reason->text), "it has no complete %s", name);
        return -ENOEXEC;
    }
    return 0;
}

/* The plugin's tables as far as this program knows them. */
struct tables {
    struct gqa_attention attention;
    struct gqa_program program;
    bool has_program;
};

static int take_attention(const struct gqa_attention *a, struct tables *ret,
                          struct gqa_reason *reason)
{
    const size_t least = GQA_SIZE_TO(struct gqa_attention, observe);
    uint32_t bytes = a != NULL ? a->struct_size : (uint32_t)least;
    bool is_whole = a != NULL && bytes >= least && a->supports != NULL && a->append != NULL &&
                    a->attend != NULL;
    int rc = check_table(GQA_ATTENTION_0, bytes, least, is_whole, reason);
    if (rc == 0) {
        gqa_take(&ret->attention, sizeof(ret->attention), a);
    }
    return rc;
}

/* p may be NULL: there is none. */
static int take_program(const struct gqa_program *p, struct tables *ret, struct gqa_reason *reason)
{
    const size_t least = GQA_SIZE_TO(struct gqa_program, observe);
    ret->has_program = p != NULL;
    if (p == NULL) {
        return 0;
    }
    bool is_whole = p->struct_size >= least && p->pack_bytes != NULL && p->pack != NULL &&
                    p->prepare != NULL && p->release != NULL && p->begin != NULL &&
                    p->run != NULL && p->end != NULL && p->data != NULL;
    int rc = check_table(GQA_PROGRAM_0, p->struct_size, least, is_whole, reason);
    if (rc == 0) {
        gqa_take(&ret->program, sizeof(ret->program), p);
    }
    return rc;
}

static int use_context(const struct examination *e, const struct gqa_plugin *plugin, bool on_device,
                       void *context, struct gqa_reason *reason)
{
    struct tables tables;
    int rc = take_attention(plugin->get_interface(context, GQA_ATTENTION_0), &tables, reason);
    rc = rc < 0 ? rc : take_program(plugin->get_interface(context, GQA_PROGRAM_0), &tables, reason);
    if (rc < 0) {
        return rc;
    }
    const struct gqa_attention *attention = &tables.attention;
    const struct gqa_program *program = tables.has_program ? &tables.program : NULL;
    results_list(e->results, "interfaces",
                 program != NULL ? GQA_ATTENTION_0 "," GQA_PROGRAM_0 : GQA_ATTENTION_0);
    results_caps(e->results, attention->caps);
    if (e->bench) {
        *e->phase = "bench";
        const struct bench b = {.attention = attention,
                                .program = program,
                                .context = context,
                                .n_threads = e->n_threads,
                                .on_device = on_device,
                                .results = e->results};
        return bench_run(&b, reason);
    }
    *e->phase = "self-test";
    rc = run_problems(e, attention, context, reason);
    return rc < 0 ? rc : run_matrix(e, plugin, attention, program, context, reason);
}

static int open_and_use(const struct examination *e, const struct gqa_plugin *plugin,
                        bool on_device, struct gqa_reason *reason)
{
    struct host_team *team = NULL;
    void *context = NULL;
    *e->phase = "open";
    int rc = e->bench ? host_team_create(e->n_threads, &team) : 0;
    rc = rc < 0 ? rc
                : plugin->open(e->bench ? host_team_host(team) : &host_alone, e->options, &context,
                               reason);
    if (rc < 0) {
        if (reason->text[0] == '\0') {
            snprintf(reason->text, sizeof(reason->text), "open failed: %s", strerror(-rc));
        }
        host_team_destroy(team);
        return rc;
    }
    rc = use_context(e, plugin, on_device, context, reason);
    *e->phase = "close";
    *e->results->at = NULL;
    plugin->close(context);
    host_team_destroy(team);
    uint32_t left = count_threads();
    results_number(e->results, "threads_left", left > 1 ? left - 1 : 0);
    return rc;
}

static bool is_plugin(const struct gqa_plugin *p)
{
    return p != NULL && p->magic == GQA_PLUGIN_MAGIC && p->abi_major == GQA_PLUGIN_ABI_MAJOR &&
           p->struct_size >= GQA_SIZE_TO(struct gqa_plugin, close) && p->name != NULL &&
           p->probe != NULL && p->open != NULL && p->get_interface != NULL && p->close != NULL;
}

int examine(const struct examination *e, struct gqa_reason *reason)
{
    char path[PATH_MAX];
    *e->phase = "loading";
    /* A name without a slash is a file here, too, and not what the linker finds elsewhere. */
    snprintf(path, sizeof(path), "%s%s", strchr(e->path, '/') == NULL ? "./" : "", e->path);
    void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (handle == NULL) {
        snprintf(reason->text, sizeof(reason->text), "%s", dlerror());
        return -ENOEXEC;
    }
    const struct gqa_plugin *plugin = dlsym(handle, GQA_PLUGIN_SYMBOL);
    if (!is_plugin(plugin)) {
        snprintf(reason->text, sizeof(reason->text), "no symbol %s of ABI %u", GQA_PLUGIN_SYMBOL,
                 GQA_PLUGIN_ABI_MAJOR);
        return -ENOEXEC;
    }
    results_text(e->results, "name", plugin->name);
    results_text(e->results, "version", plugin->version != NULL ? plugin->version : "");
    results_text(e->results, "build", plugin->build != NULL ? plugin->build : "");
    struct gqa_probe probe = {.struct_size = sizeof(probe)};
    *e->phase = "probe";
    int rc = plugin->probe(&probe);
    if (rc < 0) {
        snprintf(reason->text, sizeof(reason->text), "probe failed: %s", strerror(-rc));
        return rc;
    }
    probe.isa[sizeof(probe.isa) - 1] = probe.isas[sizeof(probe.isas) - 1] = '\0';
    probe.device[sizeof(probe.device) - 1] = probe.reason[sizeof(probe.reason) - 1] = '\0';
    results_number(e->results, "usable", probe.usable);
    results_number(e->results, "score", probe.score);
    results_number(e->results, "devices", probe.n_devices);
    results_text(e->results, "isa", probe.isa);
    results_list(e->results, "isas", probe.isas);
    results_text(e->results, "device", probe.device);
    if (!probe.usable) {
        snprintf(reason->text, sizeof(reason->text), "%.255s", probe.reason);
        return 1;
    }
    return open_and_use(e, plugin, probe.n_devices > 0, reason);
}
