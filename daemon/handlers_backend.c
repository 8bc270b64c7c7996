/* backend.list, use, selftest: what computes, for those who may change it.
 *
 * A use has four parts: the task pool looks at the folders again, tests the plugin and prepares the
 * plan; the engine puts it in place between two steps; the loop answers; and the task pool closes
 * what is no longer in use. One use at a time: the next plan shares what the one in place has. */
#include "daemon/handlers_internal.h"

#include "daemon/log.h"
#include "daemon/model/shadow.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define SPEC_BYTES_MAX 128
#define SHADOW_OFF     "off" /* in the place of a backend's name */

/* ---- backend.list ------------------------------------------------------------------------ */

#define BACKENDS_MAX 64u /* listed; more plugins than that are a mistake in the folders */

static void pack_caps(struct ipc_buffer *b, uint32_t caps)
{
    static const char *const names[] = {"shared",    "sparse",  "tree",
                                        "no_commit", "observe", "mutual"};
    size_t n = 0;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        n += caps >> i & 1;
    }
    pack_kv_array(b, "attention", n);
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (caps >> i & 1) {
            ipc_pack_str(b, names[i]);
        }
    }
}

static void pack_backend(struct ipc_buffer *b, const struct backend_info *info, bool with_path)
{
    char abi[16];
    snprintf(abi, sizeof(abi), "%u.%u", info->abi_major, info->abi_minor);
    ipc_pack_map(b, 17 + (with_path ? 1 : 0) + (info->reason[0] ? 1 : 0));
    pack_kv_str(b, "name", info->name);
    pack_kv_str(b, "version", info->version);
    pack_kv_str(b, "build", info->build);
    if (with_path) {
        pack_kv_str(b, "path", info->path);
    }
    pack_kv_bool(b, "usable", info->usable);
    if (info->reason[0]) {
        pack_kv_str(b, "reason", info->reason);
    }
    pack_kv_str(b, "isa", info->isa);
    pack_kv_list(b, "isas", info->isas);
    pack_kv_str(b, "device", info->device);
    pack_kv_u64(b, "devices", info->n_devices);
    pack_kv_u64(b, "score", info->score);
    pack_kv_bool(b, "remembered", info->remembered);
    pack_kv_str(b, "abi", abi);
    pack_kv_list(b, "interfaces", info->interfaces);
    pack_kv_u64(b, "users", info->users);
    pack_kv_bool(b, "default", info->is_default);
    pack_caps(b, info->caps);
    pack_kv_u64(b, "faults", info->n_faults);
    pack_kv_str(b, "last_fault", info->last_fault);
}

static void pack_shadow(struct ipc_buffer *b, const char *model, const struct shadow_facts *f)
{
    ipc_pack_map(b, 14);
    pack_kv_str(b, "model", model);
    pack_kv_bool(b, "active", f->active);
    pack_kv_str(b, "program", f->program);
    pack_kv_str(b, "attention", f->attention);
    pack_kv_u64(b, "every", f->every);
    pack_kv_u64(b, "steps", f->n_steps);
    pack_kv_u64(b, "rows", f->n_rows);
    pack_kv_u64(b, "top1_differ", f->n_top1);
    pack_kv_f64(b, "abs_max", f->abs_max);
    pack_kv_f64(b, "rel_max", f->rel_max);
    pack_kv_f64(b, "kl_max", f->kl_max);
    pack_kv_f64(b, "time_ratio", f->model_ns > 0 ? (double)f->ns / (double)f->model_ns : 0);
    pack_kv_u64(b, "faults", f->n_faults);
    pack_kv_str(b, "last_fault", f->last_fault);
}

static void pack_shadows(struct ipc_buffer *b, struct service *s)
{
    struct registry_entry *entries = NULL;
    struct shadow_facts f;
    size_t count = 0, n = 0;
    if (registry_loaded(s->registry, &entries, &count) < 0) {
        count = 0;
    }
    for (size_t i = 0; i < count; i++) {
        bool has = model_shadow_facts(entries[i].model, &f);
        if (!has) {
            model_unref(entries[i].model);
            entries[i].model = NULL;
        }
        n += has;
    }
    pack_kv_array(b, "shadows", n);
    for (size_t i = 0; i < count; i++) {
        if (entries[i].model) {
            model_shadow_facts(entries[i].model, &f);
            pack_shadow(b, entries[i].name, &f);
            model_unref(entries[i].model);
        }
    }
    free(entries);
}

void handle_backend_list(struct call *call)
{
    struct backend_info *infos = calloc(BACKENDS_MAX, sizeof(*infos));
    if (!infos) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory to list the backends");
        return;
    }
    size_t count = backend_catalogue_list(call->service->catalogue, infos, BACKENDS_MAX);
    if (count > BACKENDS_MAX) {
        count = BACKENDS_MAX;
    }
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 2);
    pack_shadows(b, call->service);
    pack_kv_array(b, "backends", count);
    for (size_t i = 0; i < count; i++) {
        pack_backend(b, &infos[i], call_may_see_paths(call));
    }
    free(infos);
    call_end(call);
}

/* ---- backend.use ------------------------------------------------------------------------- */

struct backend_job {
    struct engine_swap swap;
    struct call *call;
    struct backend_catalogue *catalogue;
    char spec[SPEC_BYTES_MAX];
    bool is_use, attention_only;
    struct fmt_error err;
    uint64_t prepare_ns;
    struct plugin_report report; /* of a self-test */
};

/* "NAME" or "NAME:isa=LEVEL" */
static void write_spec(char *ret, struct proto_string name, bool has_isa, struct proto_string isa)
{
    if (has_isa) {
        snprintf(ret, SPEC_BYTES_MAX, "%.*s:isa=%.*s", (int)name.bytes, name.data, (int)isa.bytes,
                 isa.data);
    } else {
        snprintf(ret, SPEC_BYTES_MAX, "%.*s", (int)name.bytes, name.data);
    }
}

static struct backend_job *job_create(struct call *call)
{
    struct backend_job *job = calloc(1, sizeof(*job));
    if (!job) {
        call_fail(call, PROTO_E_NO_MEMORY, "no memory for a backend");
        return NULL;
    }
    job->call = call;
    job->catalogue = call->service->catalogue;
    call->backend = job;
    return job;
}

void backend_job_destroy(struct call *call)
{
    struct backend_job *job = call->backend;
    if (job) {
        call->service->using_backend &= !job->is_use;
        plan_unref(job->swap.plan); /* only where there was no memory to do it elsewhere */
        free(job);
    }
}

static enum proto_error_code backend_error_code(int rc)
{
    return rc == -ENOENT   ? PROTO_E_NOT_FOUND
           : rc == -ENOMEM ? PROTO_E_NO_MEMORY
           : rc == -EINVAL ? PROTO_E_INVALID_PARAMS
                           : PROTO_E_BACKEND;
}

/* The task pool. */
static void use_work(struct task *t)
{
    struct call *call = call_of_task(t);
    struct backend_job *job = call->backend;
    struct gqa_reason reason = {""};
    uint64_t start = clock_now_ns();
    const struct plan_specs specs = {job->attention_only ? NULL : job->spec,
                                     job->attention_only ? job->spec : NULL};
    if (job->swap.shadow && strcmp(job->spec, SHADOW_OFF) == 0) {
        return;
    }
    backend_catalogue_rescan(job->catalogue);
    int rc = backend_ensure_tested(job->catalogue, job->spec, &reason);
    if (rc < 0) {
        fmt_fail(&job->err, rc, "backend %s: %s", job->spec, reason.text);
    } else {
        rc = plan_create(call->model, &specs, &job->swap.plan, &job->err);
    }
    job->prepare_ns = clock_now_ns() - start;
    call->task_result = rc;
}

static void use_end(struct task *t)
{
    struct call *call = call_of_task(t);
    struct backend_job *job = call->backend;
    int rc = job->swap.result;
    call->wait = CALL_WAIT_NOTHING;
    if (rc == -ESHUTDOWN) {
        call_fail(call, PROTO_E_DRAINING, "the daemon is about to end");
    } else if (rc == -ECANCELED) {
        call_fail_cancelled(call);
    } else if (rc < 0) {
        log_warning("model '%s': its backend stays: %s", model_name(call->model), job->err.text);
        call_fail(call, backend_error_code(rc), "%s", job->err.text);
    } else {
        job->swap.plan = NULL; /* the engine's */
        struct model_facts facts;
        model_facts(call->model, &facts);
        log_info("model '%s' is computed by %s, attention by %s", model_name(call->model),
                 facts.program_backend, facts.attention_backend);
        struct ipc_buffer *b = call_begin_result(call);
        ipc_pack_map(b, 6);
        pack_kv_str(b, "model", model_name(call->model));
        pack_kv_str(b, "program", facts.program_backend);
        pack_kv_str(b, "attention", facts.attention_backend);
        pack_kv_str(b, "isa", facts.isa);
        pack_kv_f64(b, "prepare_ms", (double)job->prepare_ns / 1e6);
        pack_kv_f64(b, "pause_ms", (double)job->swap.pause_ns / 1e6);
        call_end(call);
    }
}

static void undo_work(struct task *t)
{
    struct backend_job *job = call_of_task(t)->backend;
    plan_unref(job->swap.plan);
    job->swap.plan = NULL;
}

/* A plan that was not put in place is closed before the answer. */
static void undo_use(struct call *call)
{
    const struct service_host *host = &call->service->host;
    call->task =
        (struct task){.work = undo_work, .done = use_end, .uid = call->uid, .is_owed = true};
    call->wait = CALL_WAIT_TASK;
    if (!call->backend->swap.plan || host->run(host->data, &call->task) < 0) {
        use_end(&call->task);
    }
}

/* The engine thread. */
static void on_swapped(void *arg)
{
    struct call *call = arg;
    struct service *s = call->service;
    call->task = (struct task){.done = use_end};
    s->host.post(s->host.data, &call->task);
}

/* The loop: the plan is ready, or is not to be. */
static void use_prepared(struct task *t)
{
    struct call *call = call_of_task(t);
    struct backend_job *job = call->backend;
    job->swap.result = call->task_result;
    if (call->task_result < 0) {
        use_end(t);
        return;
    }
    if (!call_is_stopped(call)) {
        job->swap.done = on_swapped;
        job->swap.arg = call;
        job->swap.model = call->model;
        call->wait = CALL_WAIT_POST;
        job->swap.result = engine_swap(call->service->engine, &job->swap);
        if (job->swap.result == 0) {
            return;
        }
    } else {
        job->swap.result = -ECANCELED;
    }
    undo_use(call);
}

/* The model that params name, or the only one there is. NULL, and the call has failed. */
static struct model *find_model(struct call *call)
{
    const struct proto_backend_use *p = &call->params.backend_use;
    char name[PROTO_PATH_BYTES_MAX + 1];
    if (p->has_model) {
        snprintf(name, sizeof(name), "%.*s", (int)p->model.bytes, p->model.data);
        struct model *m = registry_get(call->service->registry, name);
        if (!m) {
            call_fail(call, PROTO_E_NOT_FOUND, "model '%.128s' is not loaded", name);
        }
        return m;
    }
    struct registry_entry *entries = NULL;
    struct model *only = NULL;
    size_t count = 0;
    if (registry_loaded(call->service->registry, &entries, &count) < 0) {
        count = 0;
    }
    for (size_t i = 0; i < count; i++) {
        if (!only) {
            only = entries[i].model;
        } else {
            model_unref(entries[i].model);
        }
    }
    free(entries);
    if (count != 1) {
        model_unref(only);
        call_fail(call, PROTO_E_INVALID_PARAMS, "'model' is missing, and %zu models are loaded",
                  count);
        return NULL;
    }
    return only;
}

void handle_backend_use(struct call *call)
{
    struct service *s = call->service;
    const struct proto_backend_use *p = &call->params.backend_use;
    if (s->using_backend) {
        call_fail(call, PROTO_E_BUSY, "another backend is being put in use");
        return;
    }
    struct model *m = find_model(call);
    if (!m) {
        return; /* the call has failed, and is gone */
    }
    call->model = m;
    struct backend_job *job = job_create(call);
    if (!job) {
        return;
    }
    write_spec(job->spec, p->backend, p->has_isa, p->isa);
    job->attention_only = p->attention_only;
    job->swap.required = p->require;
    job->swap.shadow = p->shadow;
    job->swap.every = p->every;
    job->is_use = s->using_backend = true;
    call_run(call, use_work, use_prepared);
}

/* ---- backend.selftest -------------------------------------------------------------------- */

static void selftest_work(struct task *t)
{
    struct call *call = call_of_task(t);
    struct backend_job *job = call->backend;
    struct gqa_reason reason = {""};
    uint64_t start = clock_now_ns();
    backend_catalogue_rescan(job->catalogue);
    call->task_result = backend_selftest(job->catalogue, job->spec, &job->report, &reason);
    fmt_fail(&job->err, call->task_result, "backend %s: %s", job->spec, reason.text);
    job->prepare_ns = clock_now_ns() - start;
}

static void selftest_done(struct task *t)
{
    struct call *call = call_of_task(t);
    struct backend_job *job = call->backend;
    if (call_is_stopped(call)) {
        call_fail_cancelled(call);
        return;
    }
    if (call->task_result < 0) {
        call_fail(call, backend_error_code(call->task_result), "%s", job->err.text);
        return;
    }
    const struct plugin_report *r = &job->report;
    struct ipc_buffer *b = call_begin_result(call);
    ipc_pack_map(b, 4);
    pack_kv_str(b, "backend", job->spec);
    pack_kv_str(b, "version", r->version);
    pack_kv_f64(b, "ms", (double)job->prepare_ns / 1e6);
    pack_kv_array(b, "cases", r->n_cases);
    for (uint32_t i = 0; i < r->n_cases; i++) {
        ipc_pack_map(b, 3);
        pack_kv_str(b, "name", r->cases[i].name);
        pack_kv_str(b, "verdict", r->cases[i].verdict);
        pack_kv_f64(b, "error", (double)r->cases[i].error);
    }
    call_end(call);
}

void handle_backend_selftest(struct call *call)
{
    const struct proto_backend_selftest *p = &call->params.backend_selftest;
    struct backend_job *job = job_create(call);
    if (job) {
        write_spec(job->spec, p->backend, p->has_isa, p->isa);
        call_run(call, selftest_work, selftest_done);
    }
}
