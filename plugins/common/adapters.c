#include "plugins/common/adapters.h"

#include "format/types.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Fills reason with "adapter 3 of blk.0.attn_q.weight, LOW.weight (Q4_0): " and the text; weight is
 * the matrix in question, an index that may be wrong. Returns error. */
__attribute__((format(printf, 6, 7))) static int fail(const struct gqa_program_desc *desc,
                                                      const struct gqa_adapter *adapter,
                                                      uint32_t weight, int error,
                                                      struct gqa_reason *reason, const char *format,
                                                      ...)
{
    const struct gqa_weight *base =
        adapter->weight < desc->n_weights ? &desc->weights[adapter->weight] : NULL;
    char tensor[96] = "", what[96];
    va_list args;

    va_start(args, format);
    vsnprintf(what, sizeof(what), format, args);
    va_end(args);
    if (weight < desc->n_weights && weight != adapter->weight) {
        const struct gqa_weight *w = &desc->weights[weight];
        const struct fmt_type_info *type = fmt_type_info(w->type);
        snprintf(tensor, sizeof(tensor), ", %.64s (%s)", w->name != NULL ? w->name : "?",
                 type != NULL ? type->name : "unknown type");
    }
    snprintf(reason->text, sizeof(reason->text), "adapter %u of %.48s%s: %s", adapter->id,
             base != NULL && base->name != NULL ? base->name : "?", tensor, what);
    return error;
}

#define FAIL(weight, error, ...) fail(desc, adapter, weight, error, reason, __VA_ARGS__)

/* One of the two factors. */
static int check_factor(const struct gqa_program_desc *desc, const struct gqa_adapter *adapter,
                        uint32_t weight, uint64_t n_in, uint64_t n_out, struct gqa_reason *reason)
{
    if (weight >= desc->n_weights) {
        return FAIL(GQA_NONE, -EINVAL, "weight %u of %u", weight, desc->n_weights);
    }
    const struct gqa_weight *w = &desc->weights[weight];
    if (w->n_dims != 2 || w->ne[0] != n_in || w->ne[1] != n_out) {
        return FAIL(weight, -EINVAL, "is %llu x %llu instead of %llu x %llu",
                    (unsigned long long)w->ne[0], (unsigned long long)w->ne[1],
                    (unsigned long long)n_in, (unsigned long long)n_out);
    }
    if (w->type != GQA_TYPE_F32 && w->type != GQA_TYPE_F16 && w->type != GQA_TYPE_BF16) {
        return FAIL(weight, -ENOTSUP, "adapters are of type F32, F16 or BF16");
    }
    if (n_in == 0 || n_in > INT32_MAX || n_out == 0 || n_out > INT32_MAX) {
        return FAIL(weight, -EINVAL, "not a matrix");
    }
    return w->data != NULL ? 0 : FAIL(weight, -EINVAL, "has no data");
}

static int check_adapter(const struct gqa_program_desc *desc, const struct gqa_adapter *adapter,
                         struct gqa_reason *reason)
{
    if (adapter->id == GQA_NONE) {
        return FAIL(GQA_NONE, -EINVAL, "this id means none");
    }
    if (adapter->weight >= desc->n_weights || desc->weights[adapter->weight].n_dims != 2) {
        return FAIL(adapter->weight, -EINVAL, "weight %u of %u is no matrix", adapter->weight,
                    desc->n_weights);
    }
    if (!isfinite(adapter->scale)) {
        return FAIL(adapter->weight, -EINVAL, "scale %g", (double)adapter->scale);
    }
    const struct gqa_weight *base = &desc->weights[adapter->weight];
    uint64_t rank = adapter->a < desc->n_weights ? desc->weights[adapter->a].ne[1] : 0;

    int r = check_factor(desc, adapter, adapter->a, base->ne[0], rank, reason);
    return r == 0 ? check_factor(desc, adapter, adapter->b, rank, base->ne[1], reason) : r;
}

static int by_weight_and_id(const void *left, const void *right)
{
    const struct gqa_adapter *a = left, *b = right;

    if (a->weight != b->weight) {
        return a->weight < b->weight ? -1 : 1;
    }
    return a->id < b->id ? -1 : a->id > b->id;
}

static int by_number(const void *left, const void *right)
{
    const uint32_t *a = left, *b = right;

    return *a < *b ? -1 : *a > *b;
}

/* The distinct ids, ascending. */
static void list_ids(struct plugin_adapters *a)
{
    for (uint32_t i = 0; i < a->n; i++) {
        a->ids[i] = a->all[i].id;
    }
    qsort(a->ids, a->n, sizeof(*a->ids), by_number);
    a->n_ids = 0;
    for (uint32_t i = 0; i < a->n; i++) {
        if (a->n_ids == 0 || a->ids[a->n_ids - 1] != a->ids[i]) {
            a->ids[a->n_ids++] = a->ids[i];
        }
    }
}

int plugin_adapters_init(struct plugin_adapters *ret, const struct gqa_program_desc *desc,
                         struct gqa_reason *reason)
{
    *ret = (struct plugin_adapters){0};
    if (desc->n_adapters == 0) {
        return 0;
    }
    ret->all = calloc(desc->n_adapters, sizeof(*ret->all));
    ret->ids = calloc(desc->n_adapters, sizeof(*ret->ids));
    if (ret->all == NULL || ret->ids == NULL) {
        return -ENOMEM;
    }
    ret->n = desc->n_adapters;
    memcpy(ret->all, desc->adapters, ret->n * sizeof(*ret->all));
    for (uint32_t i = 0; i < ret->n; i++) {
        int r = check_adapter(desc, &ret->all[i], reason);
        if (r < 0) {
            return r;
        }
    }
    qsort(ret->all, ret->n, sizeof(*ret->all), by_weight_and_id);
    for (uint32_t i = 1; i < ret->n; i++) {
        const struct gqa_adapter *adapter = &ret->all[i];
        if (by_weight_and_id(adapter - 1, adapter) == 0) {
            return FAIL(GQA_NONE, -EINVAL, "is there twice");
        }
    }
    list_ids(ret);
    return 0;
}

void plugin_adapters_finish(struct plugin_adapters *a)
{
    free(a->all);
    free(a->ids);
    *a = (struct plugin_adapters){0};
}

uint32_t plugin_adapters_find(const struct plugin_adapters *a, uint32_t id)
{
    const uint32_t *found =
        a->n_ids > 0 ? bsearch(&id, a->ids, a->n_ids, sizeof(*a->ids), by_number) : NULL;
    return found != NULL ? (uint32_t)(found - a->ids) : GQA_NONE;
}

uint32_t plugin_adapters_of(const struct plugin_adapters *a, uint32_t weight, uint32_t *ret_n)
{
    uint32_t low = 0, high = a->n;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (a->all[middle].weight < weight) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    uint32_t end = low;
    while (end < a->n && a->all[end].weight == weight) {
        end++;
    }
    *ret_n = end - low;
    return low;
}
