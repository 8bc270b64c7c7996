/* tests/kernels/experts_util.h - random mixtures of experts, run as a program, and what they should
 * give. */
#ifndef TESTS_KERNELS_EXPERTS_UTIL_H
#define TESTS_KERNELS_EXPERTS_UTIL_H

#include "tests/kernels/program_util.h"

#define TEST_EXPERTS_ROWS 48u
#define TEST_WIDTH_MAX    512u

/* What a mixture is like. Types: enum gqa_type. */
struct test_shape {
    const char *name;
    uint32_t n_in, n_ff, n_out;
    uint32_t router_type, gate_type, up_type, down_type;
    uint32_t biases, moved_choice; /* all five biases; a selection bias */
    uint32_t no_gate;
    struct gqa_op_experts op; /* the weights' indices are set by test_mixture_program */
};

struct test_mixture {
    struct test_shape shape;
    struct test_weight router, gate, up, down;
    float *biases; /* what the next five point into */
    float *router_bias, *selection_bias, *gate_bias, *up_bias, *down_bias;
    float *x; /* (TEST_EXPERTS_ROWS, n_in) */
};

void test_mixture_init(struct test_mixture *m, const struct test_shape *shape,
                       struct test_random *r);
void test_mixture_finish(struct test_mixture *m);

/* A prepared program of the one op: register 0 is src, register 1 dst. */
void test_mixture_program(struct test_program *t, const struct test_mixture *m, enum cpu_isa isa,
                          uint32_t n_threads, uint32_t max_rows);
/* One step over rows [first, first + n_rows) of x; y (n_rows, n_out). No memory may be asked for.
 */
void test_mixture_step(struct test_program *t, const struct test_mixture *m, uint32_t first,
                       uint32_t n_rows, float *ret_y);
/* All rows' results at a level, in one batch: y (TEST_EXPERTS_ROWS, n_out). */
void test_mixture_run(const struct test_mixture *m, enum cpu_isa isa, uint32_t n_threads,
                      float *ret_y);

/* Row's logits in float64; of a quantised router as the level's kernel gives them. */
void test_mixture_logits(const struct test_mixture *m, enum cpu_isa isa, uint32_t row,
                         double *ret_logits);
/* The chosen, ids ascending, and their weights, from logits in float64: by sorting all. */
void test_mixture_route(const struct test_mixture *m, const double *logits, uint32_t *ret_ids,
                        double *ret_weights);
/* Row's result in float64. */
void test_mixture_truth(const struct test_mixture *m, enum cpu_isa isa, uint32_t row,
                        double *ret_y);
/* Row's result from the level's own products of single rows and single experts, and activations. */
void test_mixture_by_parts(const struct test_mixture *m, enum cpu_isa isa, uint32_t row,
                           float *ret_y);

#endif
