/* format/quant.h - the conversions behind the table in types.c; private to format/.
 *
 * dequantise: n values (a multiple of the type's block) from packed blocks to float32.
 * quantise:   the opposite direction; any input is legal, NaN and infinities included, though what
 *             they become is only defined for F16 and BF16.
 *
 * Blocks are read byte by byte: a row may start at any address. Products are formed in the order
 * that the format's authors use, and the project compiles with -ffp-contract=off, because a fused
 * multiply-add would round once where the definition rounds twice. */
#ifndef FORMAT_QUANT_H
#define FORMAT_QUANT_H

#include "format/types.h"

#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "GGUF files are little-endian, and format/ reads them in place"
#endif

#define QUANT_BLOCK   32  /* values per block of the plain types */
#define QUANT_K_BLOCK 256 /* values per block of the K types and of IQ4_XS */

static inline float quant_load_f16(const uint8_t *at)
{
    uint16_t bits;
    memcpy(&bits, at, sizeof(bits));
    return fmt_f16_to_f32(bits);
}

/* Stores value as f16 and returns what a reader will get back. */
static inline float quant_store_f16(uint8_t *at, float value)
{
    uint16_t bits = fmt_f32_to_f16(value);
    memcpy(at, &bits, sizeof(bits));
    return fmt_f16_to_f32(bits);
}

/* Rounds half away from zero into [low, high]; NaN becomes low. */
static inline int quant_round(float x, int low, int high)
{
    if (!(x > (float)low)) {
        return low;
    }
    if (x >= (float)high) {
        return high;
    }
    return x < 0.0f ? (int)(x - 0.5f) : (int)(x + 0.5f);
}

static inline float quant_abs(float x)
{
    return x < 0.0f ? -x : x;
}

/* The value of largest magnitude, with its sign; 0 when all are zero or NaN. */
static inline float quant_peak(const float *x, size_t n)
{
    float peak = 0.0f;
    for (size_t i = 0; i < n; i++) {
        if (quant_abs(x[i]) > quant_abs(peak)) {
            peak = x[i];
        }
    }
    return peak;
}

/* The sixteen levels of IQ4_NL and IQ4_XS. */
extern const int8_t quant_iq4_levels[16];
/* Twice the values of a 4-bit float (sign 1, exponent 2, mantissa 1), so that they are integers. */
extern const int8_t quant_mxfp4_levels[16];
/* 2^(e - 128): half of the E8M0 scale, because the levels are doubled. */
float quant_mxfp4_half_scale(uint8_t e);

void quant_f32_dequantise(const void *src, float *dst, size_t n);
void quant_f32_quantise(const float *src, void *dst, size_t n);
void quant_f16_dequantise(const void *src, float *dst, size_t n);
void quant_f16_quantise(const float *src, void *dst, size_t n);
void quant_bf16_dequantise(const void *src, float *dst, size_t n);
void quant_bf16_quantise(const float *src, void *dst, size_t n);

void quant_q4_0_dequantise(const void *src, float *dst, size_t n);
void quant_q4_0_quantise(const float *src, void *dst, size_t n);
void quant_q4_1_dequantise(const void *src, float *dst, size_t n);
void quant_q5_0_dequantise(const void *src, float *dst, size_t n);
void quant_q5_1_dequantise(const void *src, float *dst, size_t n);
void quant_q8_0_dequantise(const void *src, float *dst, size_t n);
void quant_q8_0_quantise(const float *src, void *dst, size_t n);
void quant_iq4_nl_dequantise(const void *src, float *dst, size_t n);
void quant_iq4_nl_quantise(const float *src, void *dst, size_t n);
void quant_mxfp4_dequantise(const void *src, float *dst, size_t n);
void quant_mxfp4_quantise(const float *src, void *dst, size_t n);

void quant_q2_k_dequantise(const void *src, float *dst, size_t n);
void quant_q2_k_quantise(const float *src, void *dst, size_t n);
void quant_q3_k_dequantise(const void *src, float *dst, size_t n);
void quant_q3_k_quantise(const float *src, void *dst, size_t n);
void quant_q4_k_dequantise(const void *src, float *dst, size_t n);
void quant_q4_k_quantise(const float *src, void *dst, size_t n);
void quant_q5_k_dequantise(const void *src, float *dst, size_t n);
void quant_q6_k_dequantise(const void *src, float *dst, size_t n);
void quant_q6_k_quantise(const float *src, void *dst, size_t n);
void quant_iq4_xs_dequantise(const void *src, float *dst, size_t n);
void quant_iq4_xs_quantise(const float *src, void *dst, size_t n);

#endif
