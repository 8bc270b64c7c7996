/* plugins/cpu/program_check.h - what is wrong with an op of a description. Private to prepare. */
#ifndef PLUGINS_CPU_PROGRAM_CHECK_H
#define PLUGINS_CPU_PROGRAM_CHECK_H

#include <gqa/plugin.h>

/* 0; -EINVAL for an op that contradicts its description; -ENOTSUP for what this backend does not
 * do. The reason names the op's index and kind, and its tensor and type where there is one. Weights
 * are checked for shape here; cpu_matrix_init checks the packed form. */
int cpu_program_check_op(const struct gqa_program_desc *desc, uint32_t index,
                         struct gqa_reason *reason);

/* A weight of one or two dimensions that has been checked, as float32; NULL for GQA_NONE. The
 * caller frees it. 0 or -ENOMEM. */
int cpu_program_floats(const struct gqa_program_desc *desc, uint32_t weight, float **ret);

/* Fills reason with "op 12 (linear, layer 3), blk.3.attn_q.weight (Q4_K): " and the text; weight is
 * an index or GQA_NONE. Returns error. */
__attribute__((format(printf, 6, 7))) int cpu_program_fail(const struct gqa_program_desc *desc,
                                                           uint32_t index, uint32_t weight,
                                                           int error, struct gqa_reason *reason,
                                                           const char *format, ...);

#endif
