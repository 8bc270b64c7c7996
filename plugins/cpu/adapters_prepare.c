/* plugins/cpu/adapters_prepare.c - checks and builds a program's adapters, and the room for them.
 */
#include "plugins/cpu/program.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

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

#define FAIL(weight, error, ...) fail(desc, from, weight, error, reason, __VA_ARGS__)

/* One of the two factors. */
static int build_factor(const struct gqa_program_desc *desc, const struct gqa_adapter *from,
                        uint32_t weight, uint64_t n_in, uint64_t n_out, struct cpu_matrix *ret,
                        struct gqa_reason *reason)
{
    struct gqa_reason why = {""};

    if (weight >= desc->n_weights) {
        return FAIL(GQA_NONE, -EINVAL, "weight %u of %u", weight, desc->n_weights);
    }
    const struct gqa_weight *w = &desc->weights[weight];
    if (w->n_dims != 2 || w->ne[0] != n_in || w->ne[1] != n_out) {
        return FAIL(weight, -EINVAL, "is %llu x %llu instead of %llu x %llu",
                    (unsigned long long)w->ne[0], (unsigned long long)w->ne[1],
                    (unsigned long long)n_in, (unsigned long long)n_out);
    }
    if (cpu_layout_of(w->type) != CPU_LAYOUT_COUNT) {
        return FAIL(weight, -ENOTSUP, "adapters are of type F32, F16 or BF16");
    }
    int r = cpu_matrix_init(ret, w, &why);
    return r < 0 ? FAIL(weight, r, "%.90s", why.text) : 0;
}

static int build_adapter(const struct gqa_program_desc *desc, const struct gqa_adapter *from,
                         struct cpu_adapter *ret, struct gqa_reason *reason)
{
    if (from->id == GQA_NONE) {
        return FAIL(GQA_NONE, -EINVAL, "this id means none");
    }
    if (from->weight >= desc->n_weights || desc->weights[from->weight].n_dims != 2) {
        return FAIL(from->weight, -EINVAL, "weight %u of %u is no matrix", from->weight,
                    desc->n_weights);
    }
    if (!isfinite(from->scale)) {
        return FAIL(from->weight, -EINVAL, "scale %g", (double)from->scale);
    }
    const struct gqa_weight *base = &desc->weights[from->weight];
    uint64_t rank = from->a < desc->n_weights ? desc->weights[from->a].ne[1] : 0;

    ret->id = from->id;
    ret->weight = from->weight;
    ret->scale = from->scale;
    int r = build_factor(desc, from, from->a, base->ne[0], rank, &ret->a, reason);
    return r == 0 ? build_factor(desc, from, from->b, rank, base->ne[1], &ret->b, reason) : r;
}

static int by_weight_and_id(const void *left, const void *right)
{
    const struct cpu_adapter *a = left, *b = right;

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
static void list_ids(struct cpu_adapter_list *list)
{
    for (uint32_t i = 0; i < list->n; i++) {
        list->ids[i] = list->adapters[i].id;
    }
    qsort(list->ids, list->n, sizeof(*list->ids), by_number);
    list->n_ids = 0;
    for (uint32_t i = 0; i < list->n; i++) {
        if (list->n_ids == 0 || list->ids[list->n_ids - 1] != list->ids[i]) {
            list->ids[list->n_ids++] = list->ids[i];
        }
    }
}

int cpu_adapters_init(struct cpu_adapter_list *ret, const struct gqa_program_desc *desc,
                      struct gqa_reason *reason)
{
    if (desc->n_adapters == 0) {
        return 0;
    }
    ret->adapters = calloc(desc->n_adapters, sizeof(*ret->adapters));
    ret->ids = calloc(desc->n_adapters, sizeof(*ret->ids));
    if (ret->adapters == NULL || ret->ids == NULL) {
        return -ENOMEM;
    }
    ret->n = desc->n_adapters;
    for (uint32_t i = 0; i < ret->n; i++) {
        int r = build_adapter(desc, &desc->adapters[i], &ret->adapters[i], reason);
        if (r < 0) {
            return r;
        }
    }
    qsort(ret->adapters, ret->n, sizeof(*ret->adapters), by_weight_and_id);
    for (uint32_t i = 1; i < ret->n; i++) {
        if (by_weight_and_id(&ret->adapters[i - 1], &ret->adapters[i]) == 0) {
            const struct gqa_adapter twice = {.id = ret->adapters[i].id,
                                              .weight = ret->adapters[i].weight};
            return fail(desc, &twice, GQA_NONE, -EINVAL, reason, "is there twice");
        }
    }
    list_ids(ret);
    return 0;
}

void cpu_adapters_finish(struct cpu_adapter_list *list)
{
    free(list->adapters);
    free(list->ids);
    *list = (struct cpu_adapter_list){0};
}

int cpu_adapters_have(const struct cpu_adapter_list *list, uint32_t id)
{
    return list->n_ids > 0 &&
           bsearch(&id, list->ids, list->n_ids, sizeof(*list->ids), by_number) != NULL;
}

const struct cpu_adapter *cpu_adapters_of(const struct cpu_adapter_list *list, uint32_t weight,
                                          uint32_t *ret_n)
{
    uint32_t low = 0, high = list->n;

    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        if (list->adapters[middle].weight < weight) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    uint32_t end = low;
    while (end < list->n && list->adapters[end].weight == weight) {
        end++;
    }
    *ret_n = end - low;
    return end > low ? &list->adapters[low] : NULL;
}

static uint32_t larger(uint32_t a, uint32_t b)
{
    return a > b ? a : b;
}

int cpu_adapter_room_init(struct cpu_program *p)
{
    const struct gqa_host *host = p->context->host;
    struct cpu_adapter_room *room = &p->adapter_room;
    size_t rows = p->max_rows;
    uint32_t most = 0;

    for (uint32_t i = 0; i < p->n_ops; i++) {
        const struct cpu_op *op = &p->ops[i];
        most = larger(most, op->n_adapters);
        for (uint32_t j = 0; j < op->n_adapters; j++) {
            room->x_width = larger(room->x_width, op->adapters[j].a.k);
            room->t_width = larger(room->t_width, op->adapters[j].a.n);
            room->y_width = larger(room->y_width, op->adapters[j].b.n);
        }
    }
    if (most == 0) {
        return 0;
    }
    room->entries = calloc(rows, sizeof(*room->entries));
    room->rows = calloc(rows, sizeof(*room->rows));
    room->first = calloc((size_t)most + 1, sizeof(*room->first));
    room->next = calloc((size_t)most + 1, sizeof(*room->next));
    room->products = calloc(most, sizeof(*room->products));
    if (room->entries == NULL || room->rows == NULL || room->first == NULL || room->next == NULL ||
        room->products == NULL) {
        return -ENOMEM;
    }
    room->x = host->allocate(host->data, sizeof(float) * rows * room->x_width);
    room->t = host->allocate(host->data, sizeof(float) * rows * room->t_width);
    room->y = host->allocate(host->data, sizeof(float) * rows * room->y_width);
    return room->x != NULL && room->t != NULL && room->y != NULL ? 0 : -ENOMEM;
}

static void release(const struct cpu_program *p, float *memory, uint32_t width)
{
    const struct gqa_host *host = p->context->host;

    if (memory != NULL) {
        host->release(host->data, memory, sizeof(float) * p->max_rows * width);
    }
}

void cpu_adapter_room_finish(struct cpu_program *p)
{
    struct cpu_adapter_room *room = &p->adapter_room;

    release(p, room->x, room->x_width);
    release(p, room->t, room->t_width);
    release(p, room->y, room->y_width);
    free(room->entries);
    free(room->rows);
    free(room->first);
    free(room->next);
    free(room->products);
}
