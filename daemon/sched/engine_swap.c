/* daemon/sched/engine_swap.c - another plan for a model, between two steps.
 *
 * Sequences that run keep their K and V. What they compute from now on may differ in the last bits
 * from what their space of the cache promises: where the plans' identities differ, they share
 * nothing any more, neither taking blocks nor giving them. New requests use the new plan's space.
 */
#include "daemon/model/shadow.h"
#include "daemon/sched/engine_internal.h"

#include <errno.h>
#include <stdio.h>

int engine_swap(struct engine *e, struct engine_swap *swap)
{
    int rc = 0;
    pthread_mutex_lock(&e->lock);
    if (e->stop) {
        rc = -ESHUTDOWN;
    } else {
        struct engine_swap **end = &e->swaps;
        while (*end != NULL) {
            end = &(*end)->next;
        }
        swap->next = NULL;
        *end = swap;
        e->kicked = true;
        pthread_cond_signal(&e->wake);
    }
    pthread_mutex_unlock(&e->lock);
    return rc;
}

void engine_retire_plan(struct engine *e, struct model *m, struct plan *plan)
{
    if (plan == NULL) {
        return;
    }
    pthread_mutex_lock(&e->lock);
    bool room = e->n_retired < ENGINE_RETIRED_MAX;
    if (room) {
        e->retired[e->n_retired++] = (struct engine_retired){plan, model_ref(m)};
    }
    pthread_mutex_unlock(&e->lock);
    if (!room) {
        plan_unref(plan); /* nobody takes them: slow, but nothing is lost */
    }
}

bool engine_take_retired(struct engine *e, struct engine_retired *ret)
{
    pthread_mutex_lock(&e->lock);
    bool any = e->n_retired > 0;
    if (any) {
        *ret = e->retired[--e->n_retired];
    }
    pthread_mutex_unlock(&e->lock);
    return any;
}

uint32_t engine_detach(struct engine *e, const struct model *m)
{
    uint32_t n = 0;
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        if (s->request->model == m) {
            kv_sequence_detach(&s->kv);
            n++;
        }
    }
    return n;
}

/* What a plan cannot do ends the requests that need it. */
static void fail_unable(struct engine *e, const struct model *m, const struct plan *plan)
{
    for (struct sequence *s = e->running; s != NULL; s = s->next) {
        const struct kv_policy *p = &s->request->kv_policy;
        if (s->request->model == m && !plan_has(plan, kv_policy_caps(p))) {
            char message[160];
            snprintf(message, sizeof(message),
                     "the model's attention is computed by %s now, which has no views: "
                     "'kv_policy' %s cannot go on",
                     backend_spec(plan_attention(plan)), kv_policy_name(p->kind));
            engine_request_fail(s->request, PROTO_E_BACKEND, message);
        }
    }
}

struct plan *engine_put_plan(struct engine *e, struct model *m, struct plan *plan)
{
    struct plan *old = model_swap_plan(m, plan);
    fail_unable(e, m, plan);
    if (plan_kv_identity(old) != plan_kv_identity(plan)) {
        engine_detach(e, m);
    }
    return old;
}

/* The old plan stands by until the new one has shown that it works. */
static void run_swap(struct engine *e, struct engine_swap *swap)
{
    if (swap->substitute) {
        engine_put_substitute(e, swap->model, swap->plan);
        swap->done(swap->arg);
        return;
    }
    if (swap->shadow) {
        engine_retire_plan(e, swap->model, model_set_shadow(swap->model, swap->plan, swap->every));
        swap->done(swap->arg);
        return;
    }
    uint64_t start = engine_now_ns();
    struct model_standby *standby = model_standby(swap->model);
    struct plan *earlier = standby->plan;
    struct plan *old = engine_put_plan(e, swap->model, swap->plan);
    *standby =
        (struct model_standby){.plan = swap->required ? NULL : old, .required = swap->required};
    engine_retire_plan(e, swap->model, earlier);
    engine_retire_plan(e, swap->model, swap->required ? old : NULL);
    swap->pause_ns = engine_now_ns() - start;
    swap->done(swap->arg);
}

static struct engine_swap *take_swap(struct engine *e)
{
    pthread_mutex_lock(&e->lock);
    struct engine_swap *swap = e->swaps;
    e->swaps = swap != NULL ? swap->next : NULL;
    pthread_mutex_unlock(&e->lock);
    return swap;
}

void engine_run_swaps(struct engine *e)
{
    struct engine_swap *swap;
    while ((swap = take_swap(e)) != NULL) {
        run_swap(e, swap);
    }
}

void engine_end_swaps(struct engine *e)
{
    struct engine_swap *swap;
    struct engine_retired r;
    struct engine_wanted w;
    while ((swap = take_swap(e)) != NULL) {
        swap->result = -ESHUTDOWN;
        swap->done(swap->arg);
    }
    while (engine_take_retired(e, &r)) {
        plan_unref(r.plan);
        model_unref(r.model);
    }
    while (engine_take_wanted(e, &w)) {
        model_unref(w.model);
    }
}
