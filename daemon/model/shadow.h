/* daemon/model/shadow.h - what a second plan computes of the same steps, for comparison alone. */
#ifndef DAEMON_MODEL_SHADOW_H
#define DAEMON_MODEL_SHADOW_H

#include "daemon/model/plan.h"

struct shadow_facts {
    bool active;
    uint32_t every; /* so many steps of which one is compared */
    char program[128], attention[128];
    uint64_t n_steps, n_rows; /* compared */
    uint64_t n_top1;          /* rows whose best token is another one */
    double abs_max, rel_max;  /* largest difference of logits; over the row's largest logit */
    double kl_max;            /* of a row's distributions, in nats */
    uint64_t ns, model_ns;    /* of these steps: the shadow's, and the model's own */
    uint64_t n_faults;        /* steps that the shadow failed */
    char last_fault[64];
};

/* The engine thread's, but for facts, which the model's lock guards. */
struct model_shadow {
    struct plan *plan; /* a reference, or NULL */
    uint64_t n_seen;   /* steps that could be compared */
    uint32_t faults_in_a_row;
    struct shadow_facts facts;
};
struct model_shadow *model_shadow(struct model *m);
/* Begins, or with NULL ends, the comparison; returns the earlier plan's reference. What was found
 * stays to be read until another begins. */
struct plan *model_set_shadow(struct model *m, struct plan *p, uint32_t every);
/* False: there was none yet. Any thread. */
bool model_shadow_facts(const struct model *m, struct shadow_facts *ret);

/* Counts a step's rows: logits of both, (n_rows, n_vocab). */
void model_shadow_compare(struct model *m, const float *own, const float *other, uint32_t n_rows,
                          uint64_t own_ns, uint64_t other_ns);
/* Counts a step that the shadow failed. True: it is the third in a row. */
bool model_shadow_fault(struct model *m, const char *what);

#endif
