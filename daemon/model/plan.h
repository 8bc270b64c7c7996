/* daemon/model/plan.h - which backends compute a model, and the program that they prepared.
 *
 * A model has one plan at a time; another one can be made while steps run and put in its place
 * between two steps. Plans are constant once made, but for the program's own room, which belongs to
 * the engine thread, and reference counted. Weights are shared between plans whose backends want
 * the same layout. A plan lives no longer than its model. */
#ifndef DAEMON_MODEL_PLAN_H
#define DAEMON_MODEL_PLAN_H

#include "daemon/model/model.h"

/* Which backends; NULL stands for what the model has now: an attention of NULL for the program's
 * own. "NAME" or "NAME:options". */
struct plan_specs {
    const char *program, *attention;
};

/* Opens the backends, checks that they can compute every layer, packs or shares the weights, and
 * prepares the program. Takes long; any thread but the loop's and the engine's. -ENOENT, -ENOTSUP
 * and so on, with a sentence. */
int plan_create(struct model *m, const struct plan_specs *specs, struct plan **ret,
                struct fmt_error *err);
struct plan *plan_ref(struct plan *p);
/* The last one closes the backends, which may take long. NULL is legal. */
void plan_unref(struct plan *p);

struct backend *plan_backend(const struct plan *p);   /* of the program; the plan's reference */
struct backend *plan_attention(const struct plan *p); /* the same one, or another */
bool plan_has(const struct plan *p, uint32_t caps);   /* its attention: enum gqa_attn_caps */
const struct kv_identity *plan_kv_identity(const struct plan *p); /* lives as long as the model */

/* The model's plan, a new reference. Any thread. */
struct plan *model_plan(const struct model *m);
/* The same, borrowed: valid until it is swapped. Engine thread. */
struct plan *model_plan_now(const struct model *m);
/* Puts p, a reference, in its place and returns the old one's. Engine thread, between steps. */
struct plan *model_swap_plan(struct model *m, struct plan *p);

/* What stands in for the plan when it fails. The engine thread's. */
struct model_standby {
    struct plan *plan; /* a reference, or NULL: none yet */
    bool required;     /* nothing does: its failures are errors */
    bool coming;       /* it is being prepared, and the model takes no step before */
    bool absent;       /* it could not be */
    uint32_t good_steps, faults_in_a_row;
    /* The step that waits for it: who failed, and with what (0: numbers that are none). */
    struct backend *fault_blame; /* of the plan in place, or NULL: no step waits */
    int fault_rc;
};
struct model_standby *model_standby(struct model *m);

/* model_step() on that plan. On failure *ret_blame is the backend that failed. Engine thread. */
int plan_step(struct plan *p, const struct model_batch *batch, struct model_outputs *ret,
              struct backend **ret_blame);

/* Whether all that the step has computed are numbers: what it gave, and the rows that later ones
 * are to see. Before the plan's next step. */
bool plan_step_is_sound(const struct plan *p, const struct model_batch *batch,
                        const struct model_outputs *out);

#endif
