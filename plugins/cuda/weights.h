/* plugins/cuda/weights.h - weights in the layout of kernels.h: pack id "cuda-2".
 *
 * Q4_0, Q8_0, Q4_K, Q6_K and MXFP4 stay as they are, value for value; BF16 and F16 too. Matrices of
 * other types are dequantised to F16 while they are packed. The matrices of a mixture's experts are
 * packed as one: what row of it an output has, the matrix counts on from expert to expert. */
#ifndef PLUGINS_CUDA_WEIGHTS_H
#define PLUGINS_CUDA_WEIGHTS_H

#include "plugins/cuda/kernels.h"

#include <gqa/plugin.h>

#define CUDA_PACK_ID "cuda-2"

enum cuda_weight_type cuda_weight_type_of(uint32_t type);

/* Bytes of 32 outputs x 32 k. */
uint32_t cuda_block_bytes(enum cuda_weight_type type);

/* And of 32 outputs of this weight. */
uint64_t cuda_strip_bytes(const struct gqa_weight *w);

/* Outputs, of all its matrices: those of several lie one after the other, so that a strip may hold
 * the end of one and the beginning of the next. */
uint64_t cuda_weights_rows(const struct gqa_weight *w);

/* Bytes of the packed weight; 0: not a matrix, of no known type, or no size that fits. */
uint64_t cuda_weights_packed_bytes(const struct gqa_weight *w);

/* Packs outputs [first_row, first_row + n_rows): from a multiple of 32, to one or to the end. */
int cuda_weights_pack(const struct gqa_weight *w, uint64_t first_row, uint64_t n_rows, void *dst);

/* The packed weight: the host's, or one that is made here. *ret_made, which may be NULL, is to be
 * freed in any case. */
int cuda_weights_packed(const struct gqa_weight *w, const void **ret, void **ret_made);

#endif
