/* daemon/model/model_ops.c - how long a model's ops take. */
#include "daemon/model/model_internal.h"

size_t model_op_times(const struct model *m, struct gqa_op_time *ret, size_t max)
{
    uint32_t n = 0;
    model_lock(m); /* a plan that is held here would perhaps be destroyed here */
    const struct plan *p = m->plan;
    const struct gqa_program *iface = backend_program(p->backend);
    if (iface->op_times != NULL) {
        n = iface->op_times(backend_context(p->backend), p->prepared, ret, (uint32_t)max);
    }
    model_unlock(m);
    return n < max ? n : max;
}

const char *model_op_name(uint32_t kind)
{
    static const char *const names[] = {
        [GQA_OP_EMBED] = "embed",   [GQA_OP_NORM] = "norm",           [GQA_OP_LINEAR] = "linear",
        [GQA_OP_ROPE] = "rope",     [GQA_OP_ATTENTION] = "attention", [GQA_OP_GLU] = "glu",
        [GQA_OP_ADD] = "add",       [GQA_OP_SCALE] = "scale",         [GQA_OP_SOFTCAP] = "softcap",
        [GQA_OP_GATHER] = "gather", [GQA_OP_EXPERTS] = "experts",
    };
    bool known = kind < sizeof(names) / sizeof(names[0]) && names[kind] != NULL;
    return known ? names[kind] : "other";
}
