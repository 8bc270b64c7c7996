#include "plugins/common/weights.h"

#include "format/types.h"

#include <errno.h>
#include <stdlib.h>

int plugin_weight_floats(const struct gqa_program_desc *desc, uint32_t weight, float **ret)
{
    if (weight == GQA_NONE) {
        *ret = NULL;
        return 0;
    }
    const struct gqa_weight *w = &desc->weights[weight];
    uint64_t n = plugin_weight_values(w);
    float *values = malloc(n * sizeof(*values));
    if (values == NULL) {
        return -ENOMEM;
    }
    fmt_type_info(w->type)->dequantise(w->data, values, n);
    *ret = values;
    return 0;
}
