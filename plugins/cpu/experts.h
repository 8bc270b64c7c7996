/* plugins/cpu/experts.h - mixtures of experts: GQA_OP_EXPERTS.
 *
 * A step routes all rows, sorts them by expert, and multiplies each expert with all rows that chose
 * it. Experts go in waves of ascending id, as many as find room for their rows:
 *
 *   rows  0 1 2 3                    slots, expert by expert     wave of experts 0..2   wave of 3
 *   row 0 chose 0 and 3              | 0 2 | 0 1 3 | . | 1 2 3 |
 *   ...                                e 0    e 1   e 2   e 3
 *
 *   gather   x (n_slots, n_in)            the slots' rows of src
 *   gate, up hidden (n_slots, 2 n_ff)     one set of tasks for all experts of the wave
 *   act      hidden (n_slots, n_ff)
 *   down     x (n_slots, n_out)
 *   scatter  dst[row] += weight * x[slot]
 *
 * A row's dst starts from zero and adds its experts in ascending id, each rounded to float32 after
 * the product and after the sum. Products are row-invariant (linear.h), so nothing in a row's
 * result depends on who shares its experts, on waves, or on threads.
 *
 * Routing is in double from the float32 logits and the same at all levels; the logits are
 * linear.h's. Results are the same bits at every level where all weights, the router's too, are
 * quantised and the activation has no exponential of a level's own (RELU, GELU). */
#ifndef PLUGINS_CPU_EXPERTS_H
#define PLUGINS_CPU_EXPERTS_H

#include "plugins/cpu/linear.h"

#include <gqa/plugin.h>

/* Slots that a wave has room for at least, so that a few rows' experts are one wave. */
#define CPU_WAVE_SLOTS 128u

struct cpu_op;
struct cpu_program;

/* An op's weights. */
struct cpu_mixture {
    uint32_t n_in, n_ff, n_out;
    struct cpu_matrix router;
    /* (n_experts) each, in one array that gate or, without it, up begins; gate NULL: none. */
    struct cpu_matrix *gate, *up, *down;
    /* As float32, or NULL: (n_experts) and (n_experts, outputs). Matrices point into them. */
    float *router_bias, *selection_bias;
    float *gate_bias, *up_bias, *down_bias;
    uint64_t router_bytes, expert_bytes; /* as they are read; of one expert */
};

/* What the mixtures of a program share: room for the largest of them. */
struct cpu_mixture_room {
    uint32_t n_slots;          /* of a wave */
    uint32_t x_width, h_width; /* floats from row to row of x and hidden */
    float *logits;             /* (max_rows, n_experts) */
    uint32_t *chosen;          /* (max_rows, n_used) ascending */
    float *weights;            /* (max_rows, n_used) */
    uint32_t *slots;           /* (max_rows, n_used): each choice's place among all experts' rows */
    uint32_t *rows;            /* (max_rows * n_used): each place's row */
    uint32_t *first, *next;    /* (n_experts + 1): an expert's first place; the next to give away */
    struct cpu_product *products; /* (2 * n_experts) */
    float *x, *hidden;            /* (n_slots, x_width), (n_slots, h_width) */
};

/* Builds the mixture of an op that has been checked. 0 or -errno with a reason; *ret is to be
 * destroyed in both cases. */
int cpu_mixture_create(const struct gqa_program_desc *desc, uint32_t index,
                       struct cpu_mixture **ret, struct gqa_reason *reason);
void cpu_mixture_destroy(struct cpu_mixture *m);
/* The widest input of its quantised matrices; 0: none. */
uint32_t cpu_mixture_quantised_k(const struct cpu_mixture *m);

/* Room for all mixtures of the program's ops. 0 or -ENOMEM; to be finished in both cases. */
int cpu_mixture_room_init(struct cpu_program *p);
void cpu_mixture_room_finish(struct cpu_program *p);

/* Chooses a row's experts: ids ascending, and their weights. logits (n_experts); ids and weights
 * (n_used). selection_bias (n_experts) or NULL. */
void cpu_experts_route(const struct gqa_op_experts *op, const float *logits,
                       const float *selection_bias, uint32_t *ret_ids, float *ret_weights);

/* Returns the bytes of weights that it read: the router, and each expert that a row has chosen. */
uint64_t cpu_experts_run(struct cpu_program *p, const struct cpu_op *op);

#endif
