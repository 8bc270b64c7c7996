/* daemon/model/plan_internal.h - a plan's parts; private to model*.c and plan*.c. */
#ifndef DAEMON_MODEL_PLAN_INTERNAL_H
#define DAEMON_MODEL_PLAN_INTERNAL_H

#include "daemon/model/packed.h"
#include "daemon/model/plan.h"
#include "daemon/model/program.h"

struct plan {
    atomic_uint refs;
    struct model *model;
    struct backend *backend;       /* owns the program's context */
    struct backend *attention;     /* another one for attention alone, or NULL */
    struct model_program program;  /* the model's, with weights as this backend wants them */
    struct packed_weights *packed; /* shared */
    void *prepared;                /* the backend's program */
    const struct kv_identity *identity;
};

/* The steps of plan_create(), for the model's loader, which has work of its own between them. */
int plan_open(struct model *m, const struct plan_specs *specs, struct plan **ret,
              struct fmt_error *err);
int plan_prepare(struct plan *p, struct fmt_error *err);

#endif
