/* plugins/cpu/attention_convert.h - one KV element to float32 and back, in plain C.
 *
 * For the reference, for tails, and for levels whose processor lacks the conversion. Rounding is to
 * nearest even; a NaN stays a NaN (quiet). */
#ifndef PLUGINS_CPU_ATTENTION_CONVERT_H
#define PLUGINS_CPU_ATTENTION_CONVERT_H

#include <gqa/tensor.h>

#include <string.h>

static inline float cpu_float_of_bits(uint32_t bits)
{
    float f;

    memcpy(&f, &bits, sizeof(f));
    return f;
}

static inline uint32_t cpu_bits_of_float(float f)
{
    uint32_t bits;

    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

static inline float cpu_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t rest = h & 0x7fffu;

    if (rest >= 0x7c00u) { /* infinity or NaN */
        return cpu_float_of_bits(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    }
    if (rest < 0x0400u) { /* zero or subnormal: rest * 2^-24, exactly */
        return cpu_float_of_bits(sign | cpu_bits_of_float((float)rest * 0x1p-24f));
    }
    return cpu_float_of_bits(sign | ((rest << 13) + (112u << 23)));
}

static inline uint16_t cpu_f32_to_f16(float f)
{
    uint32_t bits = cpu_bits_of_float(f);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    uint32_t rest = bits & 0x7fffffffu;

    if (rest > 0x7f800000u) {
        return (uint16_t)(sign | 0x7e00u);
    }
    if (rest >= 0x477ff000u) { /* 65520 and above round to infinity */
        return (uint16_t)(sign | 0x7c00u);
    }
    if (rest < 0x38800000u) { /* below 2^-14: adding 0.5 aligns the result's last bit */
        return (uint16_t)(sign | (cpu_bits_of_float(cpu_float_of_bits(rest) + 0.5f) - 0x3f000000u));
    }
    rest += 0xfffu + (rest >> 13 & 1u);
    return (uint16_t)(sign | ((rest - (112u << 23)) >> 13));
}

static inline float cpu_bf16_to_f32(uint16_t h)
{
    return cpu_float_of_bits((uint32_t)h << 16);
}

static inline uint16_t cpu_f32_to_bf16(float f)
{
    uint32_t bits = cpu_bits_of_float(f);

    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)(bits >> 16 | 0x40u);
    }
    return (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* Bytes of one element, 0 for a type that a KV cache cannot have here. */
static inline uint32_t cpu_kv_type_bytes(uint32_t type)
{
    switch (type) {
    case GQA_TYPE_F32:
        return 4;
    case GQA_TYPE_F16:
    case GQA_TYPE_BF16:
        return 2;
    default:
        return 0;
    }
}

/* Element i of an array of the type. */
static inline float cpu_kv_load(uint32_t type, const void *values, size_t i)
{
    switch (type) {
    case GQA_TYPE_F16:
        return cpu_f16_to_f32(((const uint16_t *)values)[i]);
    case GQA_TYPE_BF16:
        return cpu_bf16_to_f32(((const uint16_t *)values)[i]);
    default:
        return ((const float *)values)[i];
    }
}

#endif
