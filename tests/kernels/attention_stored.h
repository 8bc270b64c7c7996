/* tests/kernels/attention_stored.h - what a cache makes of K and V: docs/kv-layout.md by a
 * stranger, who has not looked at gqa/tensor.h's functions. */
#ifndef TESTS_KERNELS_ATTENTION_STORED_H
#define TESTS_KERNELS_ATTENTION_STORED_H

#include <gqa/plugin.h>

/* Bytes of one token's K or V of one group. */
size_t attn_token_bytes(uint32_t type, uint32_t dim);

/* A token's values as the cache has them; rotated: after the rotation, and still rotated. */
void attn_as_stored(uint32_t type, int rotated, const float *x, uint32_t dim, double *out);

/* Puts one token's K and V of type Q8_0 or Q4_0 where a group's part of a block has them. */
void attn_store_k(uint32_t type, const float *x, uint32_t dim, uint32_t token, unsigned char *k);
void attn_store_v(uint32_t type, const float *x, uint32_t dim, uint32_t token, unsigned char *v);

/* How many values are rotated together, and the rotation in float64. */
uint32_t attn_rotation_size(uint32_t dim);
void attn_rotate(double *x, uint32_t dim);

#endif
