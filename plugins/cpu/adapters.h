/* plugins/cpu/adapters.h - low-rank changes (LoRA) that rows of a batch carry by id.
 *
 * After a LINEAR's product, the rows that carry an adapter of its weight are gathered, adapter by
 * adapter, and each adapter is multiplied with all of its rows:
 *
 *   x (n_slots, n_in)    the rows' inputs
 *   t (n_slots, rank)    a x
 *   y (n_slots, n_out)   b t
 *   dst[row] += scale * y[slot]
 *
 * The products are float32 and row-invariant (linear.h), and a row has one adapter at most: nothing
 * depends on what the other rows carry. */
#ifndef PLUGINS_CPU_ADAPTERS_H
#define PLUGINS_CPU_ADAPTERS_H

#include "plugins/common/adapters.h"
#include "plugins/cpu/linear.h"

#include <gqa/plugin.h>

struct cpu_op;
struct cpu_program;

struct cpu_adapter {
    uint32_t id;
    float scale;
    struct cpu_matrix a, b;
};

/* A program's adapters, in their order, and what is run of each. */
struct cpu_adapter_list {
    struct plugin_adapters all;
    struct cpu_adapter *adapters;
};

/* What the LINEARs of a program share: room for the largest that has adapters. */
struct cpu_adapter_room {
    uint32_t x_width, t_width, y_width;
    uint32_t *entries;      /* (max_rows) which of the op's adapters a row carries, or GQA_NONE */
    uint32_t *rows;         /* (max_rows) the row of each slot */
    uint32_t *first, *next; /* (n_adapters + 1): one's first slot; the next to give away */
    struct cpu_product *products; /* (n_adapters) */
    float *x, *t, *y;             /* (max_rows, width) each */
};

/* Checks the description's adapters and builds them. 0 or -errno; where the reason stays empty
 * there was no memory. To be finished in both cases. */
int cpu_adapters_init(struct cpu_adapter_list *ret, const struct gqa_program_desc *desc,
                      struct gqa_reason *reason);
void cpu_adapters_finish(struct cpu_adapter_list *list);

/* Whether any adapter has the id. */
int cpu_adapters_have(const struct cpu_adapter_list *list, uint32_t id);

/* Those of a weight: the first, and *ret_n. */
const struct cpu_adapter *cpu_adapters_of(const struct cpu_adapter_list *list, uint32_t weight,
                                          uint32_t *ret_n);

/* Room for the LINEARs of the program's ops. 0 or -ENOMEM; to be finished in both cases. */
int cpu_adapter_room_init(struct cpu_program *p);
void cpu_adapter_room_finish(struct cpu_program *p);

/* Adds to a LINEAR's result what the rows' adapters change. */
void cpu_adapters_run(struct cpu_program *p, const struct cpu_op *op);

#endif
