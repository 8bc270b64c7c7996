/* daemon/sched/engine_fault.c - a step whose backend fails is repeated on another.
 *
 * A backend that returns an error, or computes what are not numbers, costs nobody a token: nothing
 * of its step was committed, and the repetition writes all of the step's K and V again. The plan
 * that was replaced stands by until its successor has proved itself; after that, the cpu backend is
 * opened where it is needed. A plan that fails several times in a row is given up. */
#include "daemon/log.h"
#include "daemon/sched/engine_internal.h"

#include <stdio.h>
#include <string.h>

#define FAULTS_IN_A_ROW_MAX 3u
#define STANDBY_STEPS       64u /* good ones, after which the old plan is closed */
#define CPU                 "cpu"
#define CPU_REFERENCE       "cpu:isa=c"

/* What takes over for a plan with nothing standing by: the cpu backend at its best, and for that
 * backend itself the reference. NULL: there is none. */
static const char *substitute(const struct plan *p)
{
    bool is_cpu = strcmp(backend_name(plan_backend(p)), CPU) == 0 &&
                  strcmp(backend_name(plan_attention(p)), CPU) == 0;
    return !is_cpu ? CPU : strcmp(backend_isa(plan_backend(p)), "c") == 0 ? NULL : CPU_REFERENCE;
}

/* The plan that repeats the step, or NULL. Opening one takes milliseconds where it shares the
 * packed weights. */
static struct plan *find_standby(struct model *m, struct model_standby *standby,
                                 const struct plan *failed)
{
    const struct plan_specs specs = {substitute(failed), NULL};
    struct fmt_error err = {""};
    if (standby->plan != NULL || standby->required || specs.program == NULL) {
        return standby->plan;
    }
    if (plan_create(m, &specs, &standby->plan, &err) < 0) {
        log_error("model '%s': nothing can stand in for its backend: %s", model_name(m), err.text);
        return NULL;
    }
    return standby->plan;
}

static bool is_good(const struct batch_result *r)
{
    return r->rc == 0 && r->sound;
}

/* The mapped files have failed, not the backend. */
static bool files_are_sound(struct engine *e, const struct model *m)
{
    return !kv_cache_has_faults(e->cache) && !model_is_damaged(m);
}

static void count_good(struct engine *e, struct model *m, struct model_standby *standby)
{
    standby->faults_in_a_row = 0;
    if (standby->plan != NULL && ++standby->good_steps == STANDBY_STEPS) {
        engine_retire_plan(e, m, standby->plan);
        standby->plan = NULL;
        standby->good_steps = 0;
    }
}

/* The repetition's K and V are of the standby's numerics. */
static void detach_members(struct engine *e, const struct plan *a, const struct plan *b)
{
    for (uint32_t i = 0; plan_kv_identity(a) != plan_kv_identity(b) && i < e->batch.n_seqs; i++) {
        kv_sequence_detach(&e->batch.members[i]->kv);
    }
}

static void tell(const struct model *m, const struct batch_result *failed, const struct plan *by)
{
    char what[128];
    if (failed->rc < 0) {
        snprintf(what, sizeof(what), "a step failed: %s", strerror(-failed->rc));
    } else {
        snprintf(what, sizeof(what), "a step gave what are not numbers");
    }
    backend_note_fault(failed->blame, what);
    log_error("backend %s, model '%s': %s; it was repeated on %s", backend_spec(failed->blame),
              model_name(m), what, backend_spec(plan_backend(by)));
}

static void give_up(struct engine *e, struct model *m, struct model_standby *standby)
{
    struct plan *by = standby->plan;
    log_error("model '%s': %u steps in a row failed on %s, attention %s; it goes on with %s",
              model_name(m), FAULTS_IN_A_ROW_MAX, backend_spec(plan_backend(model_plan_now(m))),
              backend_spec(plan_attention(model_plan_now(m))), backend_spec(plan_backend(by)));
    *standby = (struct model_standby){0};
    engine_retire_plan(e, m, engine_put_plan(e, m, by));
}

int engine_run_step(struct engine *e, struct model_outputs *ret)
{
    struct model *m = e->batch.model;
    struct plan *plan = model_plan_now(m);
    struct model_standby *standby = model_standby(m);
    struct batch_result first, second;
    batch_run(&e->batch, plan, &first);
    *ret = first.outputs;
    if (is_good(&first)) {
        count_good(e, m, standby);
        return 0;
    }
    struct plan *by = files_are_sound(e, m) ? find_standby(m, standby, plan) : NULL;
    if (by == NULL || !plan_has(by, e->batch.caps)) {
        return first.rc;
    }
    batch_spoil_votes(&e->batch);
    batch_run(&e->batch, by, &second);
    if (second.rc < 0) {
        return first.rc;
    }
    *ret = second.outputs;
    detach_members(e, plan, by);
    if (second.sound) {
        standby->good_steps = 0;
        tell(m, &first, by);
        if (++standby->faults_in_a_row == FAULTS_IN_A_ROW_MAX) {
            give_up(e, m, standby);
        }
    } /* else the model itself gives such values, whoever computes it */
    return 0;
}
