/* plugins/cuda/adapters.h - low-rank changes (LoRA) that rows of a batch carry by id.
 *
 * begin sorts the batch's rows by adapter on the host, which knows the ids, and uploads the order:
 * once for all LINEARs of a step. After a LINEAR's product two kernels add what its adapters change
 * (adapters.cu); a step in which no row carries one launches neither. Grids have room for any ids,
 * so that a graph replays whatever rows carry. */
#ifndef PLUGINS_CUDA_ADAPTERS_H
#define PLUGINS_CUDA_ADAPTERS_H

#include "plugins/cuda/context.h"

#include "plugins/common/adapters.h"

struct cuda_op;
struct cuda_program;

/* Rows by adapter, and tiles of up to CUDA_TILE of them. */
struct cuda_adapter_order {
    struct cuda_buffer rows, tiles;
    uint32_t n_tiles; /* of this batch's grids */
};

/* A program's adapters, and what its LINEARs share. */
struct cuda_adapters {
    struct plugin_adapters all;
    struct cuda_buffer *factors;              /* (n, 2): a as it is, b transposed */
    struct cuda_buffer low;                   /* (max_rows, low_width) */
    struct cuda_adapter_order rows, out_rows; /* of the batch, and of its output rows */
    uint32_t low_width;
};

/* The adapters of an op's weight: (n_ids) struct cuda_adapter, on the device. */
struct cuda_adapter_table {
    struct cuda_buffer entries;
    uint32_t rank; /* the largest; 0: there are none */
};

/* Puts adapters on the device that have been checked (all). The context is current. finish takes
 * what is on the device; it is to be called in any case. */
int cuda_adapters_init(struct cuda_program *p, const struct gqa_program_desc *desc);
void cuda_adapters_finish(struct cuda_program *p);

/* The table of a LINEAR whose rows may carry adapters. */
int cuda_adapters_table(struct cuda_program *p, const struct gqa_program_desc *desc,
                        uint32_t weight, struct cuda_adapter_table *ret);

/* Takes the batch's ids, which have been checked, to the device. *ret: some row carries one. */
int cuda_adapters_begin(struct cuda_program *p, const struct gqa_batch *batch, bool *ret);

/* Adds to a LINEAR's result what the rows' adapters change. */
int cuda_adapters_run(struct cuda_program *p, const struct cuda_op *op);

#endif
