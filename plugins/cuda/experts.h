/* plugins/cuda/experts.h - mixtures of experts on the device: GQA_OP_EXPERTS.
 *
 * A row and one of the experts that it chose are a slot. A step routes all rows, sorts the choices
 * by expert, each expert's slots beginning a tile of rows, and multiplies all experts by one launch
 * for each of their matrices, whose blocks find in a list which expert and tiles are theirs:
 *
 *   route    chosen (n_rows, n_used) ascending, weights       from the router's logits
 *   sort     slots (n_rows, n_used), items                    | 0 2 . . . . . . | 0 1 3 . . . . . |
 *   lay out  the slots' rows of src                           | expert 0's tile | expert 1's tile |
 *   gate, up hidden (slots, 2 n_ff)     where both have one type and whole strips: in one product
 *   lay out  act(gate) * up
 *   down     hidden (slots, n_out)
 *   combine  dst = sum over a row's experts, ascending, of weight * hidden[slot], from zero
 *
 * The host waits for none of it: grids and buffers have room for any choice, so that a graph
 * replays whatever rows choose. Blocks beyond what was chosen end at once. An expert's weights are
 * read once for each item, which is all of its rows as long as they are about evenly spread.
 *
 * Numerics: logits have the precision of float32, in any router type; scores and weights are
 * double, rounded once; products are product.cuh's. A row's result depends on its own inputs only.
 */
#ifndef PLUGINS_CUDA_EXPERTS_H
#define PLUGINS_CUDA_EXPERTS_H

#include "plugins/cuda/products.h"

struct cuda_op;
struct cuda_program;

/* An op's weights. */
struct cuda_mixture {
    uint32_t n_ff;
    bool gated;
    /* The router has 2 n_experts outputs, the halves of kernels.h, and no bias. */
    struct cuda_matrix router;
    /* Of each expert. up has gate's outputs in front where they are in one; else gate is by itself,
     * or there is none (weight 0). */
    struct cuda_matrix gate, up, down;
    struct cuda_buffer router_bias, selection_bias;
    struct cuda_buffer memory[7]; /* of the matrices and their biases */
};

/* What the mixtures of a program share: room for the largest of them. */
struct cuda_mixture_room {
    struct cuda_buffer logits;  /* (max_rows, 2 n_experts) */
    struct cuda_buffer chosen;  /* (max_rows, n_used) */
    struct cuda_buffer weights; /* (max_rows, n_used) */
    struct cuda_buffer slots;   /* (max_rows, n_used) */
    struct cuda_buffer items;
    struct cuda_buffer hidden; /* (slots, width): gate's and up's outputs, then down's */
};

/* Floats of a row of hidden. */
static inline uint32_t cuda_mixture_width(const struct cuda_mixture *m)
{
    uint32_t width = m->gated ? 2 * m->n_ff : m->n_ff;
    return width > m->down.n_outputs ? width : m->down.n_outputs;
}

/* At most so many items has a step of up to max_rows rows. */
uint64_t cuda_mixture_items_max(uint32_t max_rows, uint32_t n_experts, uint32_t n_used);

/* Puts the mixture of an op that has been checked on the device. In both cases what is there is to
 * be finished, and *ret, which may be NULL, freed. The context is current in all of these. */
int cuda_mixture_create(struct cuda_program *p, const struct gqa_program_desc *desc, uint32_t index,
                        struct cuda_mixture **ret);
void cuda_mixture_finish(struct cuda_context *c, struct cuda_mixture *m);

/* Room for all mixtures of the program's ops, their inputs too. To be finished in both cases. */
int cuda_mixture_room_init(struct cuda_program *p);
void cuda_mixture_room_finish(struct cuda_context *c, struct cuda_mixture_room *room);

int cuda_experts_run(struct cuda_program *p, const struct cuda_op *op);

/* Tiles of rows of an item, as a power of two, in a step of n choices: twice what experts get on
 * average, so that few of them need a second item. */
static inline uint32_t cuda_mixture_log_tiles(uint64_t n, uint32_t n_experts)
{
    uint32_t log_tiles = 0;

    while (log_tiles < CUDA_PRODUCT_TILES - 1 &&
           (uint64_t)CUDA_TILE << log_tiles < 2 * n / n_experts) {
        log_tiles++;
    }
    return log_tiles;
}

#endif
