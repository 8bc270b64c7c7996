/* plugins/common/weights.h - small weights as kernels want them. */
#ifndef PLUGINS_COMMON_WEIGHTS_H
#define PLUGINS_COMMON_WEIGHTS_H

#include <gqa/plugin.h>

/* How many values a weight of up to three dimensions has. */
static inline uint64_t plugin_weight_values(const struct gqa_weight *w)
{
    return w->ne[0] * (w->n_dims > 1 ? w->ne[1] : 1) * (w->n_dims > 2 ? w->ne[2] : 1);
}

/* A weight that has been checked as float32; NULL for GQA_NONE. The caller frees it. 0 or -ENOMEM.
 */
int plugin_weight_floats(const struct gqa_program_desc *desc, uint32_t weight, float **ret);

#endif
