/* Plans that the engine asks for, and those that it has done with: making and closing one takes
 * long, and is for the task pool. */
#include "daemon/handlers_internal.h"

#include "daemon/log.h"
#include "daemon/model/plan.h"

#include <errno.h>
#include <stdlib.h>

/* ---- what is no longer in use ------------------------------------------------------------ */

struct closing {
    struct task task;
    struct engine_retired retired;
};

static void close_work(struct task *t)
{
    struct engine_retired *r = &((struct closing *)t)->retired;
    plan_unref(r->plan);
    model_unref(r->model);
}

static void close_done(struct task *t)
{
    free(t);
}

void service_close_retired(struct service *s)
{
    struct engine_retired retired;
    while (engine_take_retired(s->engine, &retired)) {
        struct closing *c = calloc(1, sizeof(*c));
        if (!c) {
            plan_unref(retired.plan); /* slow, but nothing is lost */
            model_unref(retired.model);
            continue;
        }
        const struct task task = {
            .work = close_work, .done = close_done, .uid = TASK_OF_DAEMON, .is_owed = true};
        *c = (struct closing){task, retired};
        if (s->host.run(s->host.data, &c->task) < 0) {
            close_work(&c->task);
            close_done(&c->task);
        }
    }
}

/* ---- what stands in for a backend that fails ---------------------------------------------- */

static void substitute_work(struct task *t)
{
    struct substitute *sub = (struct substitute *)t;
    const struct plan_specs specs = {sub->wanted.spec, NULL};
    struct fmt_error err = {""};
    if (plan_create(sub->wanted.model, &specs, &sub->swap.plan, &err) < 0) {
        sub->swap.plan = NULL;
        log_error("model '%s': nothing can stand in for its backend: %s",
                  model_name(sub->wanted.model), err.text);
    }
}

static void substitute_done(struct task *t)
{
    struct substitute *sub = (struct substitute *)t;
    struct service *s = sub->service;
    if (sub->swap.result < 0) {
        plan_unref(sub->swap.plan); /* the daemon ends: nobody waits for the loop */
    }
    model_unref(sub->wanted.model);
    sub->service = NULL;
    service_make_substitutes(s);
}

/* The engine thread. */
static void on_substituted(void *arg)
{
    struct substitute *sub = arg;
    sub->task = (struct task){.done = substitute_done};
    sub->service->host.post(sub->service->host.data, &sub->task);
}

/* The loop: hands over what there is, also nothing. */
static void substitute_ready(struct task *t)
{
    struct substitute *sub = (struct substitute *)t;
    struct service *s = sub->service;
    sub->swap.model = sub->wanted.model;
    sub->swap.substitute = true;
    sub->swap.done = on_substituted;
    sub->swap.arg = sub;
    sub->swap.result = s->stopped ? -ESHUTDOWN : engine_swap(s->engine, &sub->swap);
    if (sub->swap.result < 0) {
        substitute_done(t);
    }
}

void service_make_substitutes(struct service *s)
{
    struct substitute *sub = &s->substitute;
    if (sub->service || s->stopped || !engine_take_wanted(s->engine, &sub->wanted)) {
        return;
    }
    sub->service = s;
    sub->swap = (struct engine_swap){0};
    sub->task =
        (struct task){.work = substitute_work, .done = substitute_ready, .uid = TASK_OF_DAEMON};
    if (s->host.run(s->host.data, &sub->task) < 0) {
        substitute_ready(&sub->task); /* without a plan */
    }
}
