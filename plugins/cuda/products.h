/* plugins/cuda/products.h - the products of a program: activations, laid out once, times matrices.
 *
 * Activations are laid out into the program's one set of buffers (cuda_inputs), which the next
 * product of other rows takes over: all runs on one stream, in order. */
#ifndef PLUGINS_CUDA_PRODUCTS_H
#define PLUGINS_CUDA_PRODUCTS_H

#include "plugins/cuda/context.h"

/* A matrix on the device, or several of one shape, one after the other. Owned by who made it. */
struct cuda_matrix {
    enum cuda_weight_type type;
    uint32_t n_inputs, n_outputs; /* of each */
    CUdeviceptr weight, bias;     /* bias 0: none */
};

/* How activations are laid out for a type of weights: two of them need other ones of their own. */
enum cuda_input_kind { CUDA_INPUT_INT8, CUDA_INPUT_F16, CUDA_INPUT_BF16 };

/* The laid out input of products. */
struct cuda_inputs {
    struct cuda_buffer quants, scales, sums;
};

enum cuda_input_kind cuda_input_kind_of(enum cuda_weight_type type);

/* Room for so many rows of k values of a kind; call it for all before the first step. */
int cuda_inputs_reserve(struct cuda_context *c, struct cuda_inputs *in, enum cuda_input_kind kind,
                        uint64_t n_rows, uint32_t k);
void cuda_inputs_finish(struct cuda_context *c, struct cuda_inputs *in);

/* Lays out args->n_rows rows of args->k values: src, stride and, where they are wanted, slots and
 * act are set; the rest is filled in. */
int cuda_inputs_lay_out(struct cuda_context *c, const struct cuda_inputs *in,
                        enum cuda_input_kind kind, struct cuda_quantise_args *args);

/* dst (n_rows, outputs of m), stride floats from row to row = what is laid out x m^T + bias. */
int cuda_multiply(struct cuda_context *c, const struct cuda_inputs *in, const struct cuda_matrix *m,
                  float *dst, uint64_t stride, uint32_t n_rows);

/* Rows of several matrices: who multiplies what stands in items, on the device. */
struct cuda_product_groups {
    CUdeviceptr items;
    uint32_t n_items;   /* at most; what is not used does nothing */
    uint32_t log_tiles; /* tiles of rows of an item, as a power of two */
    uint32_t n_likely;  /* items that are in use, for the choice of a split */
};
int cuda_multiply_groups(struct cuda_context *c, const struct cuda_inputs *in,
                         const struct cuda_matrix *m, float *dst, uint64_t stride,
                         const struct cuda_product_groups *groups);

#endif
