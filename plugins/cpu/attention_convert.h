/* plugins/cpu/attention_convert.h - one KV element to float32 and back, in plain C.
 *
 * For the reference, for tails, and for levels whose processor lacks the conversion. Rounding is to
 * nearest even; a NaN stays a NaN (quiet). */
#ifndef PLUGINS_CPU_ATTENTION_CONVERT_H
#define PLUGINS_CPU_ATTENTION_CONVERT_H

#include <gqa/tensor.h>

#include <string.h>

static inline float cpu_bf16_to_f32(uint16_t h)
{
    return gqa_bits_float((uint32_t)h << 16);
}

static inline uint16_t cpu_f32_to_bf16(float f)
{
    uint32_t bits = gqa_float_bits(f);

    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x40u);
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* What K and V of the type must be aligned to. */
static inline uint32_t cpu_kv_type_alignment(uint32_t type)
{
    return type == GQA_TYPE_F32 ? 4 : 2;
}

static inline int cpu_kv_is_quant(uint32_t type)
{
    return type == GQA_TYPE_Q8_0 || type == GQA_TYPE_Q4_0;
}

static inline uint16_t cpu_kv_scale(const void *group, size_t at)
{
    uint16_t scale;

    memcpy(&scale, (const char *)group + at, sizeof(scale));
    return scale;
}

/* Element i of an array of F32, F16 or BF16. */
static inline float cpu_kv_load(uint32_t type, const void *values, size_t i)
{
    switch (type) {
    case GQA_TYPE_F16:
        return gqa_f16_to_f32(((const uint16_t *)values)[i]);
    case GQA_TYPE_BF16:
        return cpu_bf16_to_f32(((const uint16_t *)values)[i]);
    default:
        return ((const float *)values)[i];
    }
}

/* Dimension dim of a block's token in a group's K, of any type; and in its V. */
static inline float cpu_k_load(uint32_t type, const char *k, uint32_t k_dim, uint32_t token,
                               uint32_t dim)
{
    if (!cpu_kv_is_quant(type)) {
        return cpu_kv_load(type, k, gqa_k_index(k_dim, token, dim));
    }
    return gqa_kv_quant_value(type, cpu_kv_scale(k, gqa_k_quant_scale(type, k_dim, token, dim)),
                              (uint8_t)k[gqa_k_quant_byte(type, k_dim, token, dim)],
                              dim % GQA_KV_QUANT_DIMS);
}

static inline float cpu_v_load(uint32_t type, const char *v, uint32_t v_dim, uint32_t token,
                               uint32_t dim)
{
    if (!cpu_kv_is_quant(type)) {
        return cpu_kv_load(type, v, gqa_v_index(v_dim, token, dim));
    }
    return gqa_kv_quant_value(type, cpu_kv_scale(v, gqa_v_quant_scale(type, v_dim, token, dim)),
                              (uint8_t)v[gqa_v_quant_byte(type, v_dim, token, dim)],
                              dim % GQA_KV_QUANT_DIMS);
}

#endif
