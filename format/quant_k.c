/* format/quant_k.c - types whose blocks hold 256 values: reading Q2_K .. Q6_K and IQ4_XS.
 *
 *   Q2_K    | 16 x (scale 4, min 4 bits) | 64 bytes of 2-bit q | d f16 | dmin f16 |
 *   Q3_K    | 32 bytes of third bits | 64 bytes of 2-bit q | 16 x 6-bit scale | d f16 |
 *   Q4_K    | d f16 | dmin f16 | 8 x (6-bit scale, 6-bit min) | 128 bytes of nibbles |
 *   Q5_K    | d f16 | dmin f16 | 8 x (6-bit scale, 6-bit min) | 32 bytes of fifth bits | 128 bytes
 * | Q6_K    | 128 bytes of low nibbles | 64 bytes of high 2 bits | 16 x int8 scale | d f16 | IQ4_XS
 * | d f16 | 8 x 2 high scale bits | 8 x 4 low scale bits | 128 bytes of nibbles |
 *
 * 256 values are cut into sub-blocks of 16 (Q2_K, Q3_K, Q6_K) or 32 (the others), each with its
 * own small integer scale (and min); d and dmin scale those. */
#include "format/quant.h"

/* Q2_K and Q3_K interleave alike: bits 2k..2k+1 of the bytes 0..31 of a half are the values
 * 32k..32k+31 of that half's 128. */
void quant_q2_k_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 84) {
        const uint8_t *scales = block;
        const uint8_t *q = block + 16;
        float d = quant_load_f16(block + 80);
        float dmin = quant_load_f16(block + 82);
        for (size_t v = 0; v < QUANT_K_BLOCK; v++) {
            uint8_t scale = scales[v / 16];
            uint8_t byte = q[v / 128 * 32 + v % 32];
            int level = byte >> (v % 128 / 32 * 2) & 3;
            dst[i + v] = d * (float)(scale & 0xf) * (float)level - dmin * (float)(scale >> 4);
        }
    }
}

/* Q3_K's scale of sub-block s (0..15), -32..31. Low nibbles: bytes 0..7, the low halves for s < 8,
 * the high halves after; the top two bits: bytes 8..11, bits 2(s / 4).. of byte s % 4. */
static int q3_k_scale(const uint8_t *packed, size_t s)
{
    int low = s < 8 ? packed[s] & 0xf : packed[s - 8] >> 4;
    int high = packed[8 + s % 4] >> (s / 4 * 2) & 3;
    return (low | high << 4) - 32;
}

void quant_q3_k_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 110) {
        const uint8_t *third_bits = block;
        const uint8_t *q = block + 32;
        const uint8_t *scales = block + 96;
        float d = quant_load_f16(block + 108);
        for (size_t v = 0; v < QUANT_K_BLOCK; v++) {
            float scale = d * (float)q3_k_scale(scales, v / 16);
            int level = q[v / 128 * 32 + v % 32] >> (v % 128 / 32 * 2) & 3;
            int third = third_bits[v % 32] >> (v / 32) & 1;
            dst[i + v] = scale * (float)(level - (third != 0 ? 0 : 4));
        }
    }
}

/* Scale and min of sub-block s (0..7) of Q4_K and Q5_K. Twelve bytes: 0..3 hold the scales 0..3
 * and, in their top two bits, the top bits of the scales 4..7; bytes 4..7 the same of the mins;
 * bytes 8..11 the low nibbles of the scales (low half) and mins (high half) 4..7. */
static void k4_scale_min(const uint8_t *packed, size_t s, int *ret_scale, int *ret_min)
{
    if (s < 4) {
        *ret_scale = packed[s] & 63;
        *ret_min = packed[s + 4] & 63;
    } else {
        *ret_scale = (packed[s + 4] & 0xf) | (packed[s - 4] >> 6) << 4;
        *ret_min = packed[s + 4] >> 4 | (packed[s] >> 6) << 4;
    }
}

/* Q4_K and Q5_K: 32 bytes hold two sub-blocks, one in the low and one in the high nibbles; bit s of
 * fifth_bits[l] is the fifth bit of value l of sub-block s (NULL for Q4_K). */
static void k45_dequantise_block(const uint8_t *block, const uint8_t *fifth_bits,
                                 const uint8_t *nibbles, float *dst)
{
    float d = quant_load_f16(block);
    float dmin = quant_load_f16(block + 2);
    for (size_t s = 0; s < 8; s++) {
        int scale, min;
        k4_scale_min(block + 4, s, &scale, &min);
        float step = d * (float)scale;
        float base = dmin * (float)min;
        for (size_t l = 0; l < 32; l++) {
            int level = nibbles[s / 2 * 32 + l] >> (s % 2 * 4) & 0xf;
            if (fifth_bits != NULL) {
                level |= (fifth_bits[l] >> s & 1) << 4;
            }
            dst[s * 32 + l] = step * (float)level - base;
        }
    }
}

void quant_q4_k_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 144) {
        k45_dequantise_block(block, NULL, block + 16, dst + i);
    }
}

void quant_q5_k_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 176) {
        k45_dequantise_block(block, block + 16, block + 48, dst + i);
    }
}

/* Each half of 128 values: value 32k + l has its low nibble in byte 32(k % 2) + l of the half's 64
 * (low half of the byte for k < 2, high after) and its top two bits in bits 2k.. of byte l. */
void quant_q6_k_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 210) {
        const uint8_t *low_bits = block;
        const uint8_t *high_bits = block + 128;
        const uint8_t *scales = block + 192;
        float d = quant_load_f16(block + 208);
        for (size_t v = 0; v < QUANT_K_BLOCK; v++) {
            size_t half = v / 128, k = v % 128 / 32, l = v % 32;
            int low = low_bits[half * 64 + k % 2 * 32 + l] >> (k / 2 * 4) & 0xf;
            int high = high_bits[half * 32 + l] >> (k * 2) & 3;
            float scale = d * (float)(int8_t)scales[v / 16];
            dst[i + v] = scale * (float)((low | high << 4) - 32);
        }
    }
}

void quant_iq4_xs_dequantise(const void *src, float *dst, size_t n)
{
    const uint8_t *block = src;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 136) {
        float d = quant_load_f16(block);
        uint16_t high_bits;
        memcpy(&high_bits, block + 2, sizeof(high_bits));
        for (size_t s = 0; s < 8; s++) {
            int low = block[4 + s / 2] >> (s % 2 * 4) & 0xf;
            int high = high_bits >> (s * 2) & 3;
            float step = d * (float)((low | high << 4) - 32);
            const uint8_t *nibbles = block + 8 + s * 16;
            for (size_t l = 0; l < 16; l++) {
                dst[i + s * 32 + l] = step * (float)quant_iq4_levels[nibbles[l] & 0xf];
                dst[i + s * 32 + l + 16] = step * (float)quant_iq4_levels[nibbles[l] >> 4];
            }
        }
    }
}
