/* tests/kernels/program_util.h - runs small programs on a context of the cpu backend. */
#ifndef TESTS_KERNELS_PROGRAM_UTIL_H
#define TESTS_KERNELS_PROGRAM_UTIL_H

#include "tests/kernels/linear_util.h"

#include "plugins/cpu/program.h"

#define TEST_OPS_MAX      32u
#define TEST_REGS_MAX     32u
#define TEST_ADAPTERS_MAX 8u

/* A description under construction, and then a prepared program. */
struct test_program {
    struct test_host host;
    struct cpu_context context;
    struct gqa_program_desc desc;
    struct gqa_op ops[TEST_OPS_MAX];
    struct gqa_reg regs[TEST_REGS_MAX];
    struct gqa_weight weights[TEST_REGS_MAX];
    struct gqa_rope_table ropes[2];
    struct gqa_adapter adapters[TEST_ADAPTERS_MAX];
    void *program;
    struct gqa_reason reason;
};

void test_program_init(struct test_program *t, enum cpu_isa isa, uint32_t n_threads,
                       uint32_t max_rows);
/* Their indices. */
uint32_t test_program_reg(struct test_program *t, uint32_t width, uint32_t flags);
uint32_t test_program_weight(struct test_program *t, const struct gqa_weight *weight);
/* A float32 weight of n values, or n x k with k > 0 inputs. */
uint32_t test_program_floats(struct test_program *t, const float *values, uint32_t n, uint32_t k);
/* A new op of a kind: all views absent, layer, weight and bias GQA_NONE, scale 1. */
struct gqa_op *test_program_op(struct test_program *t, uint32_t kind);
/* What adapter id changes in a weight: a new entry of the description. */
struct gqa_adapter *test_program_adapter(struct test_program *t, uint32_t id, uint32_t weight,
                                         uint32_t a, uint32_t b, float scale);
/* All of a register. */
struct gqa_view test_view(const struct test_program *t, uint32_t reg);

/* prepare's result; the reason stays in t. */
int test_program_prepare(struct test_program *t);
float *test_program_data(const struct test_program *t, uint32_t reg);
/* begin, run over all ops, end. */
int test_program_step(const struct test_program *t, const struct gqa_batch *batch);
void test_program_finish(struct test_program *t);

#endif
