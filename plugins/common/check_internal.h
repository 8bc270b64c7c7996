/* plugins/common/check_internal.h - what the files of check*.c share. */
#ifndef PLUGINS_COMMON_CHECK_INTERNAL_H
#define PLUGINS_COMMON_CHECK_INTERNAL_H

#include "plugins/common/check.h"

#define PLUGIN_ACT_KINDS (GQA_ACT_RELU + 1u)

/* The op that is looked at. */
struct plugin_check {
    const struct gqa_program_desc *desc;
    const struct plugin_rules *rules;
    const struct gqa_op *op;
    uint32_t index;
    struct gqa_reason *reason;
};

#define PLUGIN_REFUSE(c, weight, error, ...) \
    plugin_refuse_op((c)->desc, (c)->index, weight, error, (c)->reason, __VA_ARGS__)

/* Columns of a register that is there. */
int plugin_check_view(const struct plugin_check *c, const char *name, const struct gqa_view *v);
/* A weight that is there, of a type that format/ reads. */
int plugin_check_readable(const struct plugin_check *c, uint32_t weight);
/* A weight of n values in one row, of any type that format/ reads; GQA_NONE is legal. */
int plugin_check_vector(const struct plugin_check *c, uint32_t weight, uint64_t n);
/* A weight of outputs x inputs; outputs 0: any number. */
int plugin_check_matrix(const struct plugin_check *c, uint32_t weight, uint64_t inputs,
                        uint64_t outputs);
int plugin_check_experts(const struct plugin_check *c);

/* Views of the same kind of rows have the same value. */
static inline uint32_t plugin_rows_kind(const struct plugin_check *c, const struct gqa_view *v)
{
    return c->desc->regs[v->reg].flags & GQA_REG_OUT;
}

static inline int plugin_views_overlap(const struct gqa_view *a, const struct gqa_view *b)
{
    return a->reg == b->reg && a->first < b->first + b->width && b->first < a->first + a->width;
}

#endif
