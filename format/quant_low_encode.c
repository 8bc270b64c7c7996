/* format/quant_low_encode.c - writing Q2_K, Q3_K, IQ4_NL, IQ4_XS and MXFP4 (layouts: quant_k.c,
 * quant_legacy.c) by rounding to the nearest.
 *
 * A block's step is the one that just covers its range; it is rounded to what the block can store,
 * and the values are quantised with the step that a reader will see. */
#include "format/quant.h"

#define SUB_BLOCK 16 /* of Q2_K and Q3_K */
#define HALF      16 /* of a block of 32: its values share bytes with those of the other half */

/* The inverse of a step, or zero for a step of zero. */
static float inverse_of(float step)
{
    return step != 0.0f ? 1.0f / step : 0.0f;
}

/* Index of the nearest of sixteen levels; NaN gives the first. */
static uint32_t nearest_level(const int8_t *levels, float x)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < 16; i++) {
        if (quant_abs(x - (float)levels[i]) < quant_abs(x - (float)levels[best])) {
            best = i;
        }
    }
    return best;
}

/* 32 values as nibbles: byte j holds values j and j + 16. */
static void store_levels(const int8_t *levels, const float *x, float inverse, uint8_t *nibbles)
{
    for (size_t j = 0; j < HALF; j++) {
        uint32_t low = nearest_level(levels, x[j] * inverse);
        uint32_t high = nearest_level(levels, x[j + HALF] * inverse);
        nibbles[j] = (uint8_t)(low | high << 4);
    }
}

/* The value of largest magnitude becomes the largest level, which is negative. */
static float iq4_step(const float *x)
{
    return quant_peak(x, QUANT_BLOCK) / (float)quant_iq4_levels[0];
}

void quant_iq4_nl_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *block = dst;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 18) {
        float d = quant_store_f16(block, iq4_step(src + i));
        store_levels(quant_iq4_levels, src + i, inverse_of(d), block + 2);
    }
}

void quant_iq4_xs_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *block = dst;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 136) {
        float steps[8];
        uint16_t high_bits = 0;
        for (size_t s = 0; s < 8; s++) {
            steps[s] = iq4_step(src + i + s * QUANT_BLOCK);
        }
        float d = quant_store_f16(block, quant_peak(steps, 8) / -32.0f);
        memset(block + 4, 0, 4);
        for (size_t s = 0; s < 8; s++) {
            int scale = d != 0.0f ? quant_round(steps[s] / d, -32, 31) : 0;
            uint32_t stored = (uint32_t)(scale + 32);
            block[4 + s / 2] |= (uint8_t)((stored & 0xf) << (s % 2 * 4));
            high_bits |= (uint16_t)((stored >> 4) << (s * 2));
            store_levels(quant_iq4_levels, src + i + s * QUANT_BLOCK, inverse_of(d * (float)scale),
                         block + 8 + s * 16);
        }
        memcpy(block + 2, &high_bits, sizeof(high_bits));
    }
}

/* The exponent with which the peak rounds to 6, the largest level, at most: it is below 7 times the
 * scale 2^(e - 127). At least 2, so that the scale has an inverse in float. */
static uint8_t mxfp4_exponent(float peak)
{
    uint32_t bits, e;
    memcpy(&bits, &peak, sizeof(bits));
    e = bits >> 23; /* peak is in [1, 2) times 2^(e - 127), and so in [4, 8) times 2^(e - 129) */
    e += (bits & 0x7fffff) >= 0x600000 ? 1 : 0;
    return (uint8_t)(e < 4 ? 2 : e - 2);
}

void quant_mxfp4_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *block = dst;
    for (size_t i = 0; i < n; i += QUANT_BLOCK, block += 17) {
        block[0] = mxfp4_exponent(quant_abs(quant_peak(src + i, QUANT_BLOCK)));
        store_levels(quant_mxfp4_levels, src + i, inverse_of(quant_mxfp4_half_scale(block[0])),
                     block + 1);
    }
}

/* x ~ step * q - offset with q in 0..3 and offset >= 0, the form of Q2_K. */
static void cover_q2(const float *x, float *ret_step, float *ret_offset)
{
    float low = 0.0f, high = 0.0f;
    for (size_t j = 0; j < SUB_BLOCK; j++) {
        low = x[j] < low ? x[j] : low;
        high = x[j] > high ? x[j] : high;
    }
    *ret_step = (high - low) / 3.0f;
    *ret_offset = -low;
}

/* Adds value v's two bits to the 64 bytes that Q2_K and Q3_K keep them in. */
static void store_pair(uint8_t *pairs, size_t v, int q)
{
    pairs[v / 128 * 32 + v % 32] |= (uint8_t)((q & 3) << (v % 128 / 32 * 2));
}

static void q2_k_quantise_block(const float *x, uint8_t *block)
{
    float steps[16], offsets[16];
    for (size_t s = 0; s < 16; s++) {
        cover_q2(x + s * SUB_BLOCK, &steps[s], &offsets[s]);
    }
    memset(block, 0, 80);
    float d = quant_store_f16(block + 80, quant_peak(steps, 16) / 15.0f);
    float dmin = quant_store_f16(block + 82, quant_peak(offsets, 16) / 15.0f);
    for (size_t s = 0; s < 16; s++) {
        int scale = d > 0.0f ? quant_round(steps[s] / d, 0, 15) : 0;
        int min = dmin > 0.0f ? quant_round(offsets[s] / dmin, 0, 15) : 0;
        float inverse = inverse_of(d * (float)scale), offset = dmin * (float)min;
        block[s] = (uint8_t)(scale | min << 4);
        for (size_t v = s * SUB_BLOCK; v < (s + 1) * SUB_BLOCK; v++) {
            store_pair(block + 16, v, quant_round((x[v] + offset) * inverse, 0, 3));
        }
    }
}

void quant_q2_k_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *block = dst;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 84) {
        q2_k_quantise_block(src + i, block);
    }
}

/* The inverse of q3_k_scale(): packed starts as zeros. */
static void store_q3_scale(uint8_t *packed, size_t s, int scale)
{
    uint32_t stored = (uint32_t)(scale + 32);
    packed[s % 8] |= (uint8_t)((stored & 0xf) << (s / 8 * 4));
    packed[8 + s % 4] |= (uint8_t)((stored >> 4) << (s / 4 * 2));
}

static void q3_k_quantise_block(const float *x, uint8_t *block)
{
    float steps[16];
    for (size_t s = 0; s < 16; s++) {
        steps[s] = quant_peak(x + s * SUB_BLOCK, SUB_BLOCK) / -4.0f;
    }
    memset(block, 0, 108);
    float d = quant_store_f16(block + 108, quant_peak(steps, 16) / -32.0f);
    for (size_t s = 0; s < 16; s++) {
        int scale = d != 0.0f ? quant_round(steps[s] / d, -32, 31) : 0;
        float inverse = inverse_of(d * (float)scale);
        store_q3_scale(block + 96, s, scale);
        for (size_t v = s * SUB_BLOCK; v < (s + 1) * SUB_BLOCK; v++) {
            int q = quant_round(x[v] * inverse, -4, 3) + 4;
            store_pair(block + 32, v, q);
            block[v % 32] |= (uint8_t)((q >> 2) << (v / 32));
        }
    }
}

void quant_q3_k_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *block = dst;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 110) {
        q3_k_quantise_block(src + i, block);
    }
}
