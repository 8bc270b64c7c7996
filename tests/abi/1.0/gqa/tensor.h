/* gqa/tensor.h - what host and plugins agree on about numbers in memory.
 *
 * Public header of the plugin ABI: C11 and C++11, no other include of ours. */
#ifndef GQA_TENSOR_H
#define GQA_TENSOR_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

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

/* A CUDA compiler makes the functions below for its device too: the same bits there. */
#if defined(__CUDACC__)
#define GQA_INLINE static inline __host__ __device__
#else
#define GQA_INLINE static inline
#endif

/* The KV cache's block: 64 tokens of all layers of one layer class. One layer's part of a block:
 *
 *   K  at k_offset + group * k_head_bytes:  four tiles of 16 tokens, each (k_dim, 16): the 16
 *      tokens' values of one dimension lie side by side, so that one vector load feeds one
 *      multiply-add per query of the group
 *   V  at v_offset + group * v_head_bytes:  (64, v_dim), row-major: one token's values
 *
 * K is stored after RoPE. Types Q8_0 and Q4_0 have the same order, in quants: 32 dimensions of a
 * token with one scale. docs/kv-layout.md draws it. Layout version 2. */
#define GQA_KV_BLOCK_TOKENS   64u
#define GQA_KV_TILE_TOKENS    16u
#define GQA_KV_QUANT_DIMS     32u
#define GQA_KV_LAYOUT_VERSION 2u

/* Index, in elements from a group's K, of dimension dim of the block's token (0..63). F32, F16 and
 * BF16. */
GQA_INLINE size_t gqa_k_index(uint32_t k_dim, uint32_t token, uint32_t dim)
{
    return ((size_t)(token / GQA_KV_TILE_TOKENS) * k_dim + dim) * GQA_KV_TILE_TOKENS +
           token % GQA_KV_TILE_TOKENS;
}

/* Index, in elements from a group's V, of dimension dim of the block's token (0..63). F32, F16 and
 * BF16. */
GQA_INLINE size_t gqa_v_index(uint32_t v_dim, uint32_t token, uint32_t dim)
{
    return (size_t)token * v_dim + dim;
}

/* Bytes that one token's K or V of one group takes; 0 for a type that no cache has. */
GQA_INLINE size_t gqa_kv_token_bytes(uint32_t type, uint32_t dim)
{
    size_t n_quants = (dim + GQA_KV_QUANT_DIMS - 1) / GQA_KV_QUANT_DIMS;

    switch (type) {
    case GQA_TYPE_F32:
        return (size_t)dim * 4;
    case GQA_TYPE_F16:
    case GQA_TYPE_BF16:
        return (size_t)dim * 2;
    case GQA_TYPE_Q8_0:
        return n_quants * 34;
    case GQA_TYPE_Q4_0:
        return n_quants * 18;
    default:
        return 0;
    }
}

/* Of the block's 64 tokens: what k_head_bytes or v_head_bytes is at least. */
GQA_INLINE size_t gqa_kv_head_bytes(uint32_t type, uint32_t dim)
{
    return GQA_KV_BLOCK_TOKENS * gqa_kv_token_bytes(type, dim);
}

/* ---- half precision ---------------------------------------------------------------------- */

GQA_INLINE uint32_t gqa_float_bits(float f)
{
    uint32_t bits;

    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

GQA_INLINE float gqa_bits_float(uint32_t bits)
{
    float f;

    memcpy(&f, &bits, sizeof(f));
    return f;
}

GQA_INLINE float gqa_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t rest = h & 0x7fffu;

    if (rest >= 0x7c00u) { /* infinity or NaN */
        return gqa_bits_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    }
    if (rest < 0x0400u) { /* zero or subnormal: rest * 2^-24, exactly */
        return gqa_bits_float(sign | gqa_float_bits((float)rest * 5.9604644775390625e-8f));
    }
    return gqa_bits_float(sign | ((rest << 13) + (112u << 23)));
}

/* Rounded to nearest even; a NaN becomes a quiet one. */
GQA_INLINE uint16_t gqa_f32_to_f16(float f)
{
    uint32_t bits = gqa_float_bits(f);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    uint32_t rest = bits & 0x7fffffffu;

    if (rest > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u);
    }
    if (rest >= 0x477ff000u) { /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (rest < 0x38800000u) { /* below 2^-14: adding 0.5 aligns the result's last bit */
        return (uint16_t)(sign | (gqa_float_bits(gqa_bits_float(rest) + 0.5f) - 0x3f000000u));
    }
    rest += 0xfffu + (rest >> 13 & 1u);
    return (uint16_t)(sign | ((rest - (112u << 23)) >> 13));
}

/* ---- quants ------------------------------------------------------------------------------ */

/* 32 dimensions of one token. Value i is scale * code, exactly, in float32:
 *   Q8_0   code = q[i], two's complement, -127..127
 *   Q4_0   code = (i < 16 ? q[i] & 15 : q[i - 16] >> 4) - 8 */
struct gqa_kv_quant {
    uint16_t scale; /* F16 */
    uint8_t q[32];  /* Q4_0: 16 of them */
};

/* Rounds to nearest, ties to even; |x| < 2^22. */
GQA_INLINE int32_t gqa_round(float x)
{
    return (int32_t)(gqa_float_bits(x + 12582912.0f) - 0x4b400000u);
}

/* x * inverse, rounded, in [least, most]. */
GQA_INLINE int32_t gqa_kv_code(float x, float inverse, float least, float most)
{
    float y = x * inverse;

    return gqa_round(y < least ? least : y > most ? most : y);
}

/* The bytes of n (1..32) values, those missing to 32 as zeros. Every step is one rounding of
 * float32 or F16, so that all backends make the same bytes: see docs/kv-layout.md. A value that is
 * not finite makes the scale NaN and the codes 0. */
GQA_INLINE void gqa_kv_quantise(uint32_t type, const float *x, uint32_t n, struct gqa_kv_quant *ret)
{
    uint32_t largest = 0, bits;
    float peak = 0.0f; /* the first of the largest, with its sign */

    for (uint32_t i = 0; i < n; i++) {
        bits = gqa_float_bits(x[i]) & 0x7fffffffu;
        peak = bits > largest ? x[i] : peak;
        largest = bits > largest ? bits : largest;
    }
    memset(ret->q, type == GQA_TYPE_Q8_0 ? 0 : 0x88, sizeof(ret->q));
    if (largest >= 0x7f800000u) {
        ret->scale = 0x7e00u;
        return;
    }
    ret->scale =
        gqa_f32_to_f16(type == GQA_TYPE_Q8_0 ? gqa_bits_float(largest) / 127.0f : peak / -8.0f);
    if ((ret->scale & 0x7fffu) > 0x7bffu) { /* no infinity: the largest number */
        ret->scale = (uint16_t)((ret->scale & 0x8000u) | 0x7bffu);
    }
    if ((ret->scale & 0x7fffu) == 0) { /* values too small for F16: zeros */
        ret->scale = 0;
        return;
    }
    float inverse = 1.0f / gqa_f16_to_f32(ret->scale);
    if (type == GQA_TYPE_Q8_0) {
        for (uint32_t i = 0; i < n; i++) {
            ret->q[i] = (uint8_t)gqa_kv_code(x[i], inverse, -127.0f, 127.0f);
        }
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t code = (uint32_t)(gqa_kv_code(x[i], inverse, -8.0f, 7.0f) + 8);
        uint32_t shift = i < 16 ? 0 : 4;
        ret->q[i % 16] = (uint8_t)((ret->q[i % 16] & ~(15u << shift)) | code << shift);
    }
}

/* Value i of a quant whose scale and bytes (those of its type) lie anywhere. */
GQA_INLINE float gqa_kv_quant_value(uint32_t type, uint16_t scale, uint8_t byte, uint32_t i)
{
    int32_t code = type == GQA_TYPE_Q8_0 ? (int32_t)(int8_t)byte
                                         : (int32_t)(i < 16 ? byte & 15 : byte >> 4) - 8;

    return gqa_f16_to_f32(scale) * (float)code;
}

/* Bytes from a group's K to a token's scale for the quant of dimension dim; that quant's byte for
 * dim follows at gqa_k_quant_byte(). */
GQA_INLINE size_t gqa_k_quant_scale(uint32_t type, uint32_t k_dim, uint32_t token, uint32_t dim)
{
    size_t tile_bytes = GQA_KV_TILE_TOKENS * gqa_kv_token_bytes(type, k_dim);
    size_t quant_bytes = GQA_KV_TILE_TOKENS * gqa_kv_token_bytes(type, GQA_KV_QUANT_DIMS);

    return token / GQA_KV_TILE_TOKENS * tile_bytes + dim / GQA_KV_QUANT_DIMS * quant_bytes +
           token % GQA_KV_TILE_TOKENS * 2;
}

GQA_INLINE size_t gqa_k_quant_byte(uint32_t type, uint32_t k_dim, uint32_t token, uint32_t dim)
{
    uint32_t row = dim % (type == GQA_TYPE_Q8_0 ? 32u : 16u);

    return gqa_k_quant_scale(type, k_dim, token, dim) - token % GQA_KV_TILE_TOKENS * 2 +
           2 * GQA_KV_TILE_TOKENS + row * GQA_KV_TILE_TOKENS + token % GQA_KV_TILE_TOKENS;
}

/* Bytes from a group's V to a token's scale and to its byte for dimension dim. */
GQA_INLINE size_t gqa_v_quant_scale(uint32_t type, uint32_t v_dim, uint32_t token, uint32_t dim)
{
    return token * gqa_kv_token_bytes(type, v_dim) +
           dim / GQA_KV_QUANT_DIMS * gqa_kv_token_bytes(type, GQA_KV_QUANT_DIMS);
}

GQA_INLINE size_t gqa_v_quant_byte(uint32_t type, uint32_t v_dim, uint32_t token, uint32_t dim)
{
    return gqa_v_quant_scale(type, v_dim, token, dim) + 2 +
           dim % (type == GQA_TYPE_Q8_0 ? 32u : 16u);
}

/* Stores a token's K (k_dim) or V (v_dim) of type Q8_0 or Q4_0 in its group's part of a block;
 * writes the token's own bytes only. Q4_0 wants it rotated: gqa_kv_rotate(). */
GQA_INLINE void gqa_k_store_quants(uint32_t type, void *k, uint32_t k_dim, uint32_t token,
                                   const float *values)
{
    for (uint32_t d = 0; d < k_dim; d += GQA_KV_QUANT_DIMS) {
        uint32_t n = k_dim - d < GQA_KV_QUANT_DIMS ? k_dim - d : GQA_KV_QUANT_DIMS;
        uint8_t *to = (uint8_t *)k + gqa_k_quant_byte(type, k_dim, token, d);
        struct gqa_kv_quant quant;

        gqa_kv_quantise(type, values + d, n, &quant);
        memcpy((char *)k + gqa_k_quant_scale(type, k_dim, token, d), &quant.scale, 2);
        for (uint32_t i = 0; i < (type == GQA_TYPE_Q8_0 ? 32u : 16u); i++) {
            to[i * GQA_KV_TILE_TOKENS] = quant.q[i];
        }
    }
}

GQA_INLINE void gqa_v_store_quants(uint32_t type, void *v, uint32_t v_dim, uint32_t token,
                                   const float *values)
{
    for (uint32_t d = 0; d < v_dim; d += GQA_KV_QUANT_DIMS) {
        uint32_t n = v_dim - d < GQA_KV_QUANT_DIMS ? v_dim - d : GQA_KV_QUANT_DIMS;
        char *to = (char *)v + gqa_v_quant_scale(type, v_dim, token, d);
        struct gqa_kv_quant quant;

        gqa_kv_quantise(type, values + d, n, &quant);
        memcpy(to, &quant.scale, 2);
        memcpy(to + 2, quant.q, type == GQA_TYPE_Q8_0 ? 32 : 16);
    }
}

/* ---- rotation ---------------------------------------------------------------------------- */

/* Whether a cache of the type holds rotated K or V. The query is then rotated before its scores, or
 * the output after its sum: the rotation is its own inverse. */
GQA_INLINE int gqa_kv_rotates(uint32_t type)
{
    return type == GQA_TYPE_Q4_0;
}

/* Multiplies each run of n values by the Hadamard matrix of order n over sqrt(n), n the largest
 * power of two that divides dim: it spreads what sticks out of one dimension over all of them, so
 * that one scale fits. Butterflies at distance 1, 2, 4, ... (the lower gets the sum, the upper the
 * difference), then one product each: in this order, for the same bits everywhere. */
GQA_INLINE void gqa_kv_rotate(float *x, uint32_t dim)
{
    uint32_t n = dim & (~dim + 1), odd = 0;
    float norm = 1.0f;

    for (uint32_t i = 1; i < n; i *= 2, odd ^= 1) {
        norm *= odd ? 1.0f : 0.5f; /* 2^-ceil(log2(n) / 2), and the rest below */
        for (uint32_t first = 0; first < dim; first += 2 * i) {
            for (uint32_t j = first; j < first + i; j++) {
                float a = x[j], b = x[j + i];
                x[j] = a + b;
                x[j + i] = a - b;
            }
        }
    }
    norm *= odd ? 1.41421356f : 1.0f;
    for (uint32_t j = 0; j < dim; j++) {
        x[j] *= norm;
    }
}

#ifdef __cplusplus
}
#endif

#endif
