/* plugins/common/adapters.h - a description's adapters (LoRA), checked and put in order. */
#ifndef PLUGINS_COMMON_ADAPTERS_H
#define PLUGINS_COMMON_ADAPTERS_H

#include <gqa/plugin.h>

struct plugin_adapters {
    struct gqa_adapter *all; /* (n) by ascending weight, then id */
    uint32_t *ids;           /* (n_ids) ascending, each once */
    uint32_t n, n_ids;
};

/* Each one's matrix is there then, with factors that fit it, of type F32, F16 or BF16, which have
 * values; there is one at most for an id and a weight. The description has been checked. 0; -EINVAL
 * or -ENOTSUP with a reason that names adapter, tensor and type; -ENOMEM without one. To be
 * finished in all cases. */
int plugin_adapters_init(struct plugin_adapters *ret, const struct gqa_program_desc *desc,
                         struct gqa_reason *reason);
void plugin_adapters_finish(struct plugin_adapters *a);

/* An id's place in ids, or GQA_NONE: no adapter has it. */
uint32_t plugin_adapters_find(const struct plugin_adapters *a, uint32_t id);

/* Those of a weight: the first's place in all, and *ret_n. */
uint32_t plugin_adapters_of(const struct plugin_adapters *a, uint32_t weight, uint32_t *ret_n);

#endif
