/* plugins/common/check.h - what is wrong with the description of a program.
 *
 * A backend checks a description once, before it builds from it: no op then refers to a register,
 * weight, layer or table that is not there, or to one of another shape, and running needs no
 * checks. What only some backends can do, each says in its rules. */
#ifndef PLUGINS_COMMON_CHECK_H
#define PLUGINS_COMMON_CHECK_H

#include <gqa/plugin.h>

/* Limits of a description: far above any model, small enough that no product overflows. */
#define PLUGIN_WIDTH_MAX   (1u << 30)
#define PLUGIN_ITEMS_MAX   (1u << 20) /* ops, registers, weights, layers, tables: of each */
#define PLUGIN_EXPERTS_MAX 4096u

/* Functions give 0 or -errno with a reason; NULL: nothing to say. */
struct plugin_rules {
    uint32_t rows_max; /* of a batch */
    /* A layer that an ATTENTION runs on. */
    int (*layer)(const struct gqa_attn_layer *layer, struct gqa_reason *reason);
    /* The matrix of a LINEAR, whose shape is right: its type and packed form. */
    int (*matrix)(const struct gqa_weight *weight, struct gqa_reason *reason);
};

/* 0; -EINVAL for a description that contradicts itself; -ENOTSUP for what the backend does not do.
 * The reason names the op's index and kind, and its tensor and type where there is one. */
int plugin_check(const struct gqa_program_desc *desc, const struct plugin_rules *rules,
                 struct gqa_reason *reason);

/* Fills reason with "op 12 (linear, layer 3), blk.3.attn_q.weight (Q4_K): " and the text; weight is
 * an index or GQA_NONE. Returns error. */
__attribute__((format(printf, 6, 7))) int plugin_refuse_op(const struct gqa_program_desc *desc,
                                                           uint32_t index, uint32_t weight,
                                                           int error, struct gqa_reason *reason,
                                                           const char *format, ...);

#endif
