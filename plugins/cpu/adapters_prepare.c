/* plugins/cpu/adapters_prepare.c - builds a program's adapters, and the room for them. */
#include "plugins/cpu/program.h"

#include <errno.h>
#include <stdlib.h>

int cpu_adapters_init(struct cpu_adapter_list *ret, const struct gqa_program_desc *desc,
                      struct gqa_reason *reason)
{
    int r = plugin_adapters_init(&ret->all, desc, reason);

    if (r < 0 || ret->all.n == 0) {
        return r;
    }
    ret->adapters = calloc(ret->all.n, sizeof(*ret->adapters));
    if (ret->adapters == NULL) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; r == 0 && i < ret->all.n; i++) {
        const struct gqa_adapter *from = &ret->all.all[i];
        struct cpu_adapter *to = &ret->adapters[i];
        to->id = from->id;
        to->scale = from->scale;
        r = cpu_matrix_init(&to->a, &desc->weights[from->a], reason);
        r = r < 0 ? r : cpu_matrix_init(&to->b, &desc->weights[from->b], reason);
    }
    return r;
}

void cpu_adapters_finish(struct cpu_adapter_list *list)
{
    free(list->adapters);
    plugin_adapters_finish(&list->all);
    *list = (struct cpu_adapter_list){0};
}

int cpu_adapters_have(const struct cpu_adapter_list *list, uint32_t id)
{
    return plugin_adapters_find(&list->all, id) != GQA_NONE;
}

const struct cpu_adapter *cpu_adapters_of(const struct cpu_adapter_list *list, uint32_t weight,
                                          uint32_t *ret_n)
{
    uint32_t first = plugin_adapters_of(&list->all, weight, ret_n);
    return *ret_n > 0 ? &list->adapters[first] : NULL;
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
