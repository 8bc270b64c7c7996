/* gqa/tensor.h - what host and plugins agree on about numbers in memory.
 *
 * Public header of the plugin ABI: C11 and C++11, no other include of ours. */
#ifndef GQA_TENSOR_H
#define GQA_TENSOR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Element types; the numbers are GGUF's. */
enum gqa_type {
    GQA_TYPE_F32 = 0,
    GQA_TYPE_F16 = 1,
    GQA_TYPE_Q4_0 = 2,
    GQA_TYPE_Q4_1 = 3,
    GQA_TYPE_Q5_0 = 6,
    GQA_TYPE_Q5_1 = 7,
    GQA_TYPE_Q8_0 = 8,
    GQA_TYPE_Q2_K = 10,
    GQA_TYPE_Q3_K = 11,
    GQA_TYPE_Q4_K = 12,
    GQA_TYPE_Q5_K = 13,
    GQA_TYPE_Q6_K = 14,
    GQA_TYPE_IQ4_NL = 20,
    GQA_TYPE_IQ4_XS = 23,
    GQA_TYPE_BF16 = 30,
    GQA_TYPE_MXFP4 = 39
};

/* The KV cache's block: 64 tokens of all layers of one layer class. One layer's part of a block:
 *
 *   K  at k_offset + group * k_head_bytes:  four tiles of 16 tokens, each (k_dim, 16): the 16
 *      tokens' values of one dimension lie side by side, so that one vector load feeds one
 *      multiply-add per query of the group
 *   V  at v_offset + group * v_head_bytes:  (64, v_dim), row-major: one token's values
 *
 * K is stored after RoPE. docs/kv-layout.md draws it. Layout version 1. */
#define GQA_KV_BLOCK_TOKENS   64u
#define GQA_KV_TILE_TOKENS    16u
#define GQA_KV_LAYOUT_VERSION 1u

/* Index, in elements from a group's K, of dimension dim of the block's token (0..63). */
static inline size_t gqa_k_index(uint32_t k_dim, uint32_t token, uint32_t dim)
{
    return ((size_t)(token / GQA_KV_TILE_TOKENS) * k_dim + dim) * GQA_KV_TILE_TOKENS +
           token % GQA_KV_TILE_TOKENS;
}

/* Index, in elements from a group's V, of dimension dim of the block's token (0..63). */
static inline size_t gqa_v_index(uint32_t v_dim, uint32_t token, uint32_t dim)
{
    return (size_t)token * v_dim + dim;
}

#ifdef __cplusplus
}
#endif

#endif
