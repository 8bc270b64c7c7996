/* format/quant_legacy.c - types whose blocks hold 32 values: Q4_0 .. Q8_0, IQ4_NL, MXFP4.
 *
 *   Q4_0    | d f16 | 16 bytes of nibbles |                        value = (q - 8) * d
 *   Q4_1    | d f16 | m f16 | 16 bytes of nibbles |                value = q * d + m
 *   Q5_0    | d f16 | 32 fifth bits | 16 bytes of nibbles |        value = (q - 16) * d
 *   Q5_1    | d f16 | m f16 | 32 fifth bits | 16 bytes |           value = q * d + m
 *   Q8_0    | d f16 | 32 int8 |                                    value = q * d
 *   IQ4_NL  | d f16 | 16 bytes of nibbles |                        value = level[q] * d
 *   MXFP4   | e u8  | 16 bytes of nibbles |                        value = level[q] * 2^(e-127) / 2
 *
 * Nibbles: byte j holds value j in its low half and value j + 16 in its high half. Fifth bit i of
 * the 32 belongs to value i. */
#include "format/quant.h"

#define HALF_BLOCK (QUANT_BLOCK / 2)

const int8_t quant_iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                     1,    13,   25,  38,  53,  69,  89,  113};

const int8_t quant_mxfp4_levels[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

void quant_q4_0_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 18) {
        float d = quant_load_f16(block);
        for (size_t j = 0; j < HALF_BLOCK; j++) {
            uint8_t pair = block[2 + j];
            dst[i + j] = (float)((pair & 0xf) - 8) * d;
            dst[i + j + HALF_BLOCK] = (float)((pair >> 4) - 8) * d;
        }
    }
}

void quant_q4_1_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 20) {
        float d = quant_load_f16(block);
        float m = quant_load_f16(block + 2);
        for (size_t j = 0; j < HALF_BLOCK; j++) {
            uint8_t pair = block[4 + j];
            dst[i + j] = (float)(pair & 0xf) * d + m;
            dst[i + j + HALF_BLOCK] = (float)(pair >> 4) * d + m;
        }
    }
}

/* The five-bit values j and j + 16 of a block. */
static void unpack_five(const uint8_t *fifth_bits, const uint8_t *nibbles, size_t j, int *ret_low,
                        int *ret_high)
{
    uint32_t fifth;
    memcpy(&fifth, fifth_bits, sizeof(fifth));
    *ret_low = (int)((nibbles[j] & 0xf) | (fifth >> j & 1) << 4);
    *ret_high = (int)((uint32_t)(nibbles[j] >> 4) | (fifth >> (j + HALF_BLOCK) & 1) << 4);
}

void quant_q5_0_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 22) {
        float d = quant_load_f16(block);
        for (size_t j = 0; j < HALF_BLOCK; j++) {
            int low, high;
            unpack_five(block + 2, block + 6, j, &low, &high);
            dst[i + j] = (float)(low - 16) * d;
            dst[i + j + HALF_BLOCK] = (float)(high - 16) * d;
        }
    }
}

void quant_q5_1_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 24) {
        float d = quant_load_f16(block);
        float m = quant_load_f16(block + 2);
        for (size_t j = 0; j < HALF_BLOCK; j++) {
            int low, high;
            unpack_five(block + 4, block + 8, j, &low, &high);
            dst[i + j] = (float)low * d + m;
            dst[i + j + HALF_BLOCK] = (float)high * d + m;
        }
    }
}

void quant_q8_0_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 34) {
        float d = quant_load_f16(block);
        for (size_t j = 0; j < QUANT_BLOCK; j++) {
            dst[i + j] = (float)(int8_t)block[2 + j] * d;
        }
    }
}

void quant_iq4_nl_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 18) {
        float d = quant_load_f16(block);
        for (size_t j = 0; j < HALF_BLOCK; j++) {
            uint8_t pair = block[2 + j];
            dst[i + j] = d * (float)quant_iq4_levels[pair & 0xf];
            dst[i + j + HALF_BLOCK] = d * (float)quant_iq4_levels[pair >> 4];
        }
    }
}

/* The smallest two results are subnormal. */
float quant_mxfp4_half_scale(uint8_t e)
{
    uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    return scale;
}

void quant_mxfp4_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 17) {
        float d = quant_mxfp4_half_scale(block[0]);
        for (size_t j = 0; j < HALF_BLOCK; j++) {
            uint8_t pair = block[1 + j];
            dst[i + j] = (float)quant_mxfp4_levels[pair & 0xf] * d;
            dst[i + j + HALF_BLOCK] = (float)quant_mxfp4_levels[pair >> 4] * d;
        }
    }
}

/* The value of largest magnitude becomes -8, the one level without an opposite, so that the whole
 * range of the four bits is used. */
void quant_q4_0_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *block = dst;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 18) {
        float d = quant_peak(src + i, QUANT_BLOCK) / -8.0f;
        float inverse = d != 0.0f ? 1.0f / d : 0.0f;
        quant_store_f16(block, d);
        for (size_t j = 0; j < HALF_BLOCK; j++) {
            int low = quant_round(src[i + j] * inverse + 8.0f, 0, 15);
            int high = quant_round(src[i + j + HALF_BLOCK] * inverse + 8.0f, 0, 15);
            block[2 + j] = (uint8_t)(low | high << 4);
        }
    }
}

void quant_q8_0_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *block = dst;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 34) {
        float d = quant_abs(quant_peak(src + i, QUANT_BLOCK)) / 127.0f;
        float inverse = d != 0.0f ? 1.0f / d : 0.0f;
        quant_store_f16(block, d);
        for (size_t j = 0; j < QUANT_BLOCK; j++) {
            block[2 + j] = (uint8_t)(int8_t)quant_round(src[i + j] * inverse, -127, 127);
        }
    }
}
