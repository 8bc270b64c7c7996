/* format/f16.c - float32, float16 and bfloat16 by integer arithmetic: the same bits on every CPU.
 */
#include "format/quant.h"

static float f32_of_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static uint32_t bits_of_f32(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

/* float16: sign 1, exponent 5 (bias 15), mantissa 10. float32: 1, 8 (bias 127), 23. */
float fmt_f16_to_f32(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t exponent = (h >> 10) & 0x1f;
    uint32_t mantissa = h & 0x3ff;

    if (exponent == 0x1f) {
        /* Infinity stays; a NaN keeps its payload and becomes quiet, as the hardware does it. */
        uint32_t quiet = mantissa != 0 ? 0x400000 : 0;
        return f32_of_bits(sign | 0x7f800000 | quiet | mantissa << 13);
    }
    if (exponent != 0) {
        return f32_of_bits(sign | (exponent + 112) << 23 | mantissa << 13);
    }
    /* Zero or subnormal: mantissa * 2^-24, exact in float32. */
    float magnitude = (float)mantissa * 0x1p-24f;
    return f32_of_bits(sign | bits_of_f32(magnitude));
}

uint16_t fmt_f32_to_f16(float f)
{
    uint32_t bits = bits_of_f32(f);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    uint32_t magnitude = bits & 0x7fffffff;

    if (magnitude > 0x7f800000) {
        return (uint16_t)(sign | 0x7e00 | (magnitude >> 13 & 0x1ff));
    }
    if (magnitude >= 0x47800000) { /* 65536 and more; 65520..65535 reach infinity by rounding */
        return (uint16_t)(sign | 0x7c00);
    }
    if (magnitude >= 0x38800000) { /* 2^-14 and more: normal */
        uint32_t odd = magnitude >> 13 & 1;
        return (uint16_t)(sign | ((magnitude - (112u << 23) + 0xfff + odd) >> 13));
    }
    if (magnitude < 0x33000000) { /* below 2^-25: nearest is zero */
        return sign;
    }
    /* Subnormal: the result counts units of 2^-24; shift the full mantissa there and round. */
    uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
    uint32_t shift = 126 - (magnitude >> 23);
    uint32_t kept = mantissa >> shift;
    uint32_t rest = mantissa & ((1u << shift) - 1);
    uint32_t half = 1u << (shift - 1);
    if (rest > half || (rest == half && (kept & 1) != 0)) {
        kept++;
    }
    return (uint16_t)(sign | kept);
}

float fmt_bf16_to_f32(uint16_t h)
{
    return f32_of_bits((uint32_t)h << 16);
}

uint16_t fmt_f32_to_bf16(float f)
{
    uint32_t bits = bits_of_f32(f);
    if ((bits & 0x7fffffff) > 0x7f800000) {
        return (uint16_t)(bits >> 16 |
                          0x40); /* quiet, so that a payload in the low half survives */
    }
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

void quant_f32_dequantise(const void *src, float *dst, size_t n)
{
    memcpy(dst, src, n * sizeof(*dst));
}

void quant_f32_quantise(const float *src, void *dst, size_t n)
{
    memcpy(dst, src, n * sizeof(*src));
}

void quant_f16_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *at = src;
    for (size_t i = 0; i < n; i++) {
        dst[i] = quant_load_f16(at + i * sizeof(uint16_t));
    }
}

void quant_f16_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *at = dst;
    for (size_t i = 0; i < n; i++) {
        quant_store_f16(at + i * sizeof(uint16_t), src[i]);
    }
}

void quant_bf16_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *at = src;
    for (size_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, at + i * sizeof(bits), sizeof(bits));
        dst[i] = fmt_bf16_to_f32(bits);
    }
}

void quant_bf16_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *at = dst;
    for (size_t i = 0; i < n; i++) {
        uint16_t bits = fmt_f32_to_bf16(src[i]);
        memcpy(at + i * sizeof(bits), &bits, sizeof(bits));
    }
}
