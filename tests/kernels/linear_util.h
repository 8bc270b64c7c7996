/* tests/kernels/linear_util.h - weights, activations and a host for tests of the products. */
#ifndef TESTS_KERNELS_LINEAR_UTIL_H
#define TESTS_KERNELS_LINEAR_UTIL_H

#include "plugins/cpu/linear.h"

#include <gqa/plugin.h>

#include <stdint.h>

/* SplitMix64: the same numbers from the same seed everywhere. */
struct test_random {
    uint64_t state;
};

uint64_t test_random_u64(struct test_random *r);
/* Roughly normal: mean 0, deviation 1. */
float test_random_normal(struct test_random *r);

/* The seed of a test: GQAD_TEST_SEED, or fixed; printed to stderr. */
uint64_t test_seed(const char *test);

/* A host whose parallel() runs its tasks on n_threads, or, with one thread, in reverse order. */
struct test_host {
    struct gqa_host host;
};

void test_host_init(struct test_host *h, uint32_t n_threads);

/* A weight of n outputs x k inputs, its file bytes and its packed form. */
struct test_weight {
    struct gqa_weight weight;
    void *file, *packed;
};

/* Sets the numbers that a block's values are multiplied with: f16, or the power of two at or below
 * scale. 0 for a scale that the type cannot hold. */
int test_block_set_scales(uint32_t type, uint8_t *block, float scale, float min);

/* Valid random blocks of any type: small random f16 scales, all other bits random. */
void test_weight_random(struct test_weight *w, struct test_random *r, uint32_t type, uint32_t n,
                        uint32_t k);
/* The same of n_experts matrices, one after the other. */
void test_weight_experts(struct test_weight *w, struct test_random *r, uint32_t type, uint32_t n,
                         uint32_t k, uint32_t n_experts);
/* One expert's matrix, packed on its own; the caller frees packed, and nothing else of it. */
struct test_weight test_weight_expert(const struct test_weight *w, uint32_t expert);
/* Packs as the host does, in ranges of pack_rows. */
void test_weight_pack(struct test_weight *w);
void test_weight_finish(struct test_weight *w);
/* Output o's k values as float32. */
void test_weight_row(const struct test_weight *w, uint32_t o, float *ret);

/* y (n_rows, n) = x (n_rows, k) x w^T by cpu_linear_run at a level. */
void test_linear_run(const struct test_weight *w, enum cpu_isa isa, uint32_t n_threads,
                     const float *x, uint32_t n_rows, const float *bias, float *y);

/* The types with a product, for loops. */
extern const uint32_t test_quant_types[];
extern const uint32_t test_n_quant_types;
extern const uint32_t test_float_types[];
extern const uint32_t test_n_float_types;

#endif
