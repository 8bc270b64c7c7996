/* daemon/sched/engine_fault.c - a step whose backend fails is repeated on another.
 *
 * A backend that returns an error, or computes what are not numbers, costs nobody a token: nothing
 * of its step was committed, and the repetition writes all of the step's K and V again. The plan
 * that was replaced stands by until its successor has proved itself. After that a plan on the cpu
 * backend is made where it is needed: on another thread, since it may have to pack all weights.
 * Until it comes the model takes no step, and other models do; then the step is repeated on it. A
 * plan that fails several times in a row is given up. */
#include "daemon/log.h"
#include "daemon/sched/engine_internal.h"

#include <errno.h>
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

bool engine_take_wanted(struct engine *e, struct engine_wanted *ret)
{
    pthread_mutex_lock(&e->lock);
    bool any = e->n_wanted > 0;
    if (any) {
        *ret = e->wanted[--e->n_wanted];
    }
    pthread_mutex_unlock(&e->lock);
    return any;
}

/* Asks for a plan that repeats the step. False: there is none to be had. */
static bool want_standby(struct engine *e, struct model *m, const struct plan *failed)
{
    const char *spec = substitute(failed);
    pthread_mutex_lock(&e->lock);
    bool wanted = spec != NULL && e->n_wanted < ENGINE_WANTED_MAX;
    if (wanted) {
        e->wanted[e->n_wanted++] = (struct engine_wanted){model_ref(m), spec};
    }
    pthread_mutex_unlock(&e->lock);
    return wanted;
}

void engine_put_substitute(struct engine *e, struct model *m, struct plan *plan)
{
    struct model_standby *standby = model_standby(m);
    if (!standby->coming) { /* another plan has come in place of the one that failed */
        engine_retire_plan(e, m, plan);
        return;
    }
    standby->coming = false;
    standby->plan = plan;
    if (plan == NULL) { /* the step runs as it did: what it gives then is its result */
        standby->absent = true;
        standby->fault_blame = NULL;
    }
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
    standby->absent = false;
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

/* The step on the model's plan; or what a step before gave there, which waited for the standby. */
static void run_first(struct engine *e, struct plan *plan, struct model_standby *standby,
                      struct batch_result *ret)
{
    if (standby->fault_blame == NULL) {
        batch_run(&e->batch, plan, ret);
        return;
    }
    *ret = (struct batch_result){.rc = standby->fault_rc, .blame = standby->fault_blame};
    standby->fault_blame = NULL;
}

/* The step has failed and there is nothing to repeat it on. Whether that will come. */
static bool put_off(struct engine *e, struct model *m, const struct plan *plan,
                    const struct batch_result *failed)
{
    struct model_standby *standby = model_standby(m);
    if (standby->required || standby->absent || !want_standby(e, m, plan)) {
        return false;
    }
    standby->coming = true;
    standby->fault_blame = failed->blame;
    standby->fault_rc = failed->rc;
    batch_spoil_votes(&e->batch);
    return true;
}

/* 0 where the step was repeated, else -errno. */
static int repeat(struct engine *e, struct model *m, const struct batch_result *failed,
                  struct model_outputs *ret)
{
    struct plan *plan = model_plan_now(m);
    struct model_standby *standby = model_standby(m);
    struct plan *by = standby->plan;
    struct batch_result second;
    batch_spoil_votes(&e->batch);
    batch_run(&e->batch, by, &second);
    if (second.rc < 0) {
        return failed->rc < 0 ? failed->rc : second.rc;
    }
    *ret = second.outputs;
    detach_members(e, plan, by);
    if (second.sound) {
        standby->good_steps = 0;
        tell(m, failed, by);
        if (++standby->faults_in_a_row == FAULTS_IN_A_ROW_MAX) {
            give_up(e, m, standby);
        }
    } /* else the model itself gives such values, whoever computes it */
    return 0;
}

int engine_run_step(struct engine *e, struct model_outputs *ret)
{
    struct model *m = e->batch.model;
    struct plan *plan = model_plan_now(m);
    struct model_standby *standby = model_standby(m);
    bool has_waited = standby->fault_blame != NULL;
    struct batch_result first;
    run_first(e, plan, standby, &first);
    *ret = first.outputs;
    if (is_good(&first)) {
        count_good(e, m, standby);
        return 0;
    }
    if (!files_are_sound(e, m)) {
        return first.rc;
    }
    if (standby->plan == NULL && put_off(e, m, plan, &first)) {
        return ENGINE_STEP_PUT_OFF;
    }
    if (standby->plan == NULL || !plan_has(standby->plan, e->batch.caps)) {
        return has_waited && first.rc == 0 ? -EDOM : first.rc; /* its outputs are gone */
    }
    return repeat(e, m, &first, ret);
}
