/* format/quant_k_encode.c - writing Q4_K and Q6_K (layouts: quant_k.c).
 *
 * Every sub-block tries a few step sizes around the one that just covers its range, refits step
 * (and offset) to the chosen integers by least squares, and keeps what leaves the smallest squared
 * error. The steps are then rounded to the block's small integers, and the values are quantised
 * again with the steps that a reader will see. */
#include "format/quant.h"

#define SUB_BLOCK_Q4 32
#define SUB_BLOCK_Q6 16
#define STEP_TRIES   9 /* candidates from -20 % to +20 % of the covering step's inverse */

static float try_factor(int t)
{
    return 0.8f + 0.4f * (float)t / (float)(STEP_TRIES - 1);
}

/* Least squares of x ~ step * q + base for given integers. Returns 0 when q does not vary. */
static int fit_line(const float *x, const int *q, size_t n, float *ret_step, float *ret_base)
{
    double sum_q = 0, sum_qq = 0, sum_x = 0, sum_xq = 0;
    for (size_t i = 0; i < n; i++) {
        sum_q += q[i];
        sum_qq += (double)q[i] * q[i];
        sum_x += x[i];
        sum_xq += (double)x[i] * q[i];
    }
    double det = (double)n * sum_qq - sum_q * sum_q;
    if (!(det > 0)) {
        return 0;
    }
    *ret_step = (float)(((double)n * sum_xq - sum_q * sum_x) / det);
    *ret_base = (float)((sum_qq * sum_x - sum_q * sum_xq) / det);
    return 1;
}

static float squared_error(const float *x, const int *q, size_t n, float step, float base)
{
    float sum = 0.0f;
    for (size_t i = 0; i < n; i++) {
        float e = step * (float)q[i] + base - x[i];
        sum += e * e;
    }
    return sum;
}

/* x ~ step * q - offset with q in 0..15 and offset >= 0, the form of Q4_K. */
static void search_q4(const float *x, float *ret_step, float *ret_offset)
{
    float low = 0.0f, high = 0.0f; /* zero is always representable: offset is never negative */
    for (size_t i = 0; i < SUB_BLOCK_Q4; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    float best_step = (high - low) / 15.0f, best_base = low, best_error = -1.0f;
    if (!(best_step > 0.0f)) {
        *ret_step = 0.0f;
        *ret_offset = 0.0f;
        return;
    }
    float cover = 1.0f / best_step;
    for (int t = 0; t < STEP_TRIES; t++) {
        float inverse = cover * try_factor(t), step = 1.0f / inverse, base = low;
        int q[SUB_BLOCK_Q4];
        for (size_t i = 0; i < SUB_BLOCK_Q4; i++) {
            q[i] = quant_round((x[i] - low) * inverse, 0, 15);
        }
        if (!fit_line(x, q, SUB_BLOCK_Q4, &step, &base) || base > 0.0f || !(step > 0.0f)) {
            step = 1.0f / inverse;
            base = low;
        }
        float error = squared_error(x, q, SUB_BLOCK_Q4, step, base);
        if (best_error < 0.0f || error < best_error) {
            best_error = error;
            best_step = step;
            best_base = base;
        }
    }
    *ret_step = best_step;
    *ret_offset = -best_base;
}

/* The inverse of k4_scale_min() for all eight sub-blocks. */
static void pack_scales_mins(const int *scales, const int *mins, uint8_t *packed)
{
    for (size_t s = 0; s < 4; s++) {
        packed[s] = (uint8_t)(scales[s] | (scales[s + 4] >> 4) << 6);
        packed[s + 4] = (uint8_t)(mins[s] | (mins[s + 4] >> 4) << 6);
        packed[s + 8] = (uint8_t)((scales[s + 4] & 0xf) | (mins[s + 4] & 0xf) << 4);
    }
}

static void q4_k_quantise_block(const float *x, uint8_t *block)
{
    float steps[8], offsets[8], max_step = 0.0f, max_offset = 0.0f;
    for (size_t s = 0; s < 8; s++) {
        search_q4(x + s * SUB_BLOCK_Q4, &steps[s], &offsets[s]);
        max_step = steps[s] > max_step ? steps[s] : max_step;
        max_offset = offsets[s] > max_offset ? offsets[s] : max_offset;
    }
    float d = quant_store_f16(block, max_step / 63.0f);
    float dmin = quant_store_f16(block + 2, max_offset / 63.0f);

    int scales[8], mins[8];
    memset(block + 16, 0, 128);
    for (size_t s = 0; s < 8; s++) {
        scales[s] = d > 0.0f ? quant_round(steps[s] / d, 0, 63) : 0;
        mins[s] = dmin > 0.0f ? quant_round(offsets[s] / dmin, 0, 63) : 0;
        float step = d * (float)scales[s], offset = dmin * (float)mins[s];
        float inverse = step > 0.0f ? 1.0f / step : 0.0f;
        for (size_t l = 0; l < SUB_BLOCK_Q4; l++) {
            int q = quant_round((x[s * SUB_BLOCK_Q4 + l] + offset) * inverse, 0, 15);
            block[16 + s / 2 * 32 + l] |= (uint8_t)(q << (s % 2 * 4));
        }
    }
    pack_scales_mins(scales, mins, block + 4);
}

void quant_q4_k_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *block = dst;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 144) {
        q4_k_quantise_block(src + i, block);
    }
}

/* x ~ step * q with q in -32..31, the form of Q6_K; step carries the sign that gives the largest
 * value the level -32. */
static float search_q6(const float *x)
{
    float peak = quant_peak(x, SUB_BLOCK_Q6);
    if (peak == 0.0f) {
        return 0.0f;
    }
    float best_step = peak / -32.0f, best_error = -1.0f;
    float cover = 1.0f / best_step;
    for (int t = 0; t < STEP_TRIES; t++) {
        float inverse = cover * try_factor(t), xq = 0.0f, qq = 0.0f;
        int q[SUB_BLOCK_Q6];
        for (size_t i = 0; i < SUB_BLOCK_Q6; i++) {
            q[i] = quant_round(x[i] * inverse, -32, 31);
            xq += x[i] * (float)q[i];
            qq += (float)(q[i] * q[i]);
        }
        if (!(qq > 0.0f)) {
            continue;
        }
        float step = xq / qq;
        float error = squared_error(x, q, SUB_BLOCK_Q6, step, 0.0f);
        if (best_error < 0.0f || error < best_error) {
            best_error = error;
            best_step = step;
        }
    }
    return best_step;
}

static void q6_k_quantise_block(const float *x, uint8_t *block)
{
    float steps[16];
    for (size_t s = 0; s < 16; s++) {
        steps[s] = search_q6(x + s * SUB_BLOCK_Q6);
    }
    memset(block, 0, 192);
    float d = quant_store_f16(block + 208, quant_peak(steps, 16) / -128.0f);
    for (size_t s = 0; s < 16; s++) {
        int scale = d != 0.0f ? quant_round(steps[s] / d, -128, 127) : 0;
        block[192 + s] = (uint8_t)(int8_t)scale;
        float step = d * (float)scale;
        float inverse = step != 0.0f ? 1.0f / step : 0.0f;
        for (size_t j = 0; j < SUB_BLOCK_Q6; j++) {
            size_t v = s * SUB_BLOCK_Q6 + j, half = v / 128, k = v % 128 / 32, l = v % 32;
            int q = quant_round(x[v] * inverse, -32, 31) + 32;
            block[half * 64 + k % 2 * 32 + l] |= (uint8_t)((q & 0xf) << (k / 2 * 4));
            block[128 + half * 32 + l] |= (uint8_t)((q >> 4) << (k * 2));
        }
    }
}

void quant_q6_k_quantise(const float *src, void *dst, size_t n)
{
    uint8_t *block = dst;
    for (size_t i = 0; i < n; i += QUANT_K_BLOCK, block += 210) {
        q6_k_quantise_block(src + i, block);
    }
}
