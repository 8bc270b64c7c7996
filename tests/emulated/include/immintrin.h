/* tests/emulated/include/immintrin.h - AVX-512 and AVX-VNNI in portable C, for sources that include
 * <immintrin.h>: SIMDe's functions under their native names, and those that SIMDe lacks or computes
 * otherwise than the processor does.
 *
 * Nothing here is native, whatever the compiler is told to build for. Not in SIMDe 0.7.4: a
 * multiply-add that rounds once, a scale by powers of two without exp2(), a rounding to nearest
 * that leaves infinities alone, conversions, masked loads and stores of 16-bit lanes. Lanes outside
 * a mask are neither read nor written. Rounding is to nearest even. */
#ifndef TESTS_EMULATED_IMMINTRIN_H
#define TESTS_EMULATED_IMMINTRIN_H

#define SIMDE_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include "format/types.h"

#include "tiles.h"

#include <assert.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef simde__mmask16 __mmask16;

#define _MM_FROUND_TO_NEAREST_INT SIMDE_MM_FROUND_TO_NEAREST_INT
#define _MM_FROUND_NO_EXC         SIMDE_MM_FROUND_NO_EXC

/* One type with all views of a register's lanes, and a way in and out. */
#define EMULATED_LANES(name, type, bytes)                 \
    union name {                                          \
        float f32[(bytes) / 4];                           \
        int32_t i32[(bytes) / 4];                         \
        uint16_t u16[(bytes) / 2];                        \
        int8_t i8[bytes];                                 \
        uint8_t u8[bytes];                                \
    };                                                    \
    static inline union name name##_of(type a)            \
    {                                                     \
        union name lanes;                                 \
        memcpy(&lanes, &a, sizeof(lanes));                \
        return lanes;                                     \
    }                                                     \
    static inline type name##_to_##type(union name lanes) \
    {                                                     \
        type a;                                           \
        memcpy(&a, &lanes, sizeof(a));                    \
        return a;                                         \
    }

EMULATED_LANES(lanes16, __m128i, 16)
EMULATED_LANES(lanes32, __m256i, 32)
EMULATED_LANES(lanes64, __m512, 64)

static inline __m512i lanes64_to_int(union lanes64 lanes)
{
    __m512i a;
    memcpy(&a, &lanes, sizeof(a));
    return a;
}

static inline union lanes64 lanes64_of_int(__m512i a)
{
    union lanes64 lanes;
    memcpy(&lanes, &a, sizeof(lanes));
    return lanes;
}

/* ---- arithmetic -------------------------------------------------------------------------- */

/* a b + c, rounded once. The product of two floats is exact in double; so is the error of a sum of
 * doubles. If there is one, the sum's last bit is made odd (towards the error where it was even),
 * and rounding that to float is as good as rounding the exact sum: the double has more than twice
 * the float's bits. */
static inline float emulated_fma(float a, float b, float c)
{
    double product = (double)a * (double)b, sum = product + (double)c;
    double part = sum - product, error = (product - (sum - part)) + ((double)c - part);
    int64_t bits;

    memcpy(&bits, &sum, sizeof(bits));
    if ((error > 0.0 || error < 0.0) && (bits & 1) == 0) { /* neither for infinities and NaN */
        bits += (error > 0.0) == (sum > 0.0) ? 1 : -1;
    }
    memcpy(&sum, &bits, sizeof(sum));
    return (float)sum;
}

/* The same for all lanes, c's changed in place. Nearly always the sum in double rounds to the right
 * float: all that it could hide from the second rounding is on which side of a tie it was, and ties
 * look the same but for subnormal results. */
static inline void emulated_fma_lanes(const float *a, const float *b, float *c)
{
    uint32_t low[16], is_tie = 0;
    double sum[16];
    float result[16];

    for (int i = 0; i < 16; i++) {
        sum[i] = (double)a[i] * (double)b[i] + (double)c[i];
        result[i] = (float)sum[i];
    }
    for (int i = 0; i < 16; i++) {
        memcpy(&low[i], &sum[i], sizeof(low[i])); /* the 29 bits that a float does not have */
        is_tie |= (low[i] & 0x1fffffffu) == 0x10000000u;
        is_tie |= (fabsf(result[i]) < 0x1p-126f) & (sum[i] != 0.0);
    }
    for (int i = 0; is_tie && i < 16; i++) {
        result[i] = emulated_fma(a[i], b[i], c[i]);
    }
    memcpy(c, result, sizeof(result));
}

#undef _mm512_fmadd_ps
static inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c)
{
    union lanes64 x = lanes64_of(a), y = lanes64_of(b), z = lanes64_of(c);
    emulated_fma_lanes(x.f32, y.f32, z.f32);
    return lanes64_to___m512(z);
}

#undef _mm256_fmadd_ps
static inline __m256 _mm256_fmadd_ps(__m256 a, __m256 b, __m256 c)
{
    float x[16] = {0}, y[16] = {0}, z[16] = {0};
    __m256 r;
    memcpy(x, &a, sizeof(a));
    memcpy(y, &b, sizeof(b));
    memcpy(z, &c, sizeof(c));
    emulated_fma_lanes(x, y, z);
    memcpy(&r, z, sizeof(r));
    return r;
}

#undef _mm512_fnmadd_ps
static inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c)
{
    union lanes64 x = lanes64_of(a), y = lanes64_of(b), z = lanes64_of(c);
    for (int i = 0; i < 16; i++) {
        x.f32[i] = -x.f32[i];
    }
    emulated_fma_lanes(x.f32, y.f32, z.f32);
    return lanes64_to___m512(z);
}

/* a times 2 to the power of b rounded down. */
static inline float emulated_scale(float a, float b)
{
    if (isnan(a) || isnan(b)) {
        return a + b;
    }
    if (isinf(b)) {
        return b > 0.0f ? a * INFINITY : (isinf(a) ? NAN : copysignf(0.0f, a));
    }
    b = floorf(b);
    return ldexpf(a, b > 1000.0f ? 1000 : (b < -1000.0f ? -1000 : (int)b));
}

#undef _mm512_maskz_scalef_ps
static inline __m512 _mm512_maskz_scalef_ps(__mmask16 mask, __m512 a, __m512 b)
{
    union lanes64 x = lanes64_of(a), y = lanes64_of(b);
    for (int i = 0; i < 16; i++) {
        x.f32[i] = (mask >> i & 1) != 0 ? emulated_scale(x.f32[i], y.f32[i]) : 0.0f;
    }
    return lanes64_to___m512(x);
}

#undef _mm512_scalef_ps
static inline __m512 _mm512_scalef_ps(__m512 a, __m512 b)
{
    return _mm512_maskz_scalef_ps(0xffff, a, b);
}

/* Only to the nearest integer: no fraction is kept, no other way of rounding chosen. */
#undef _mm512_roundscale_ps
static inline __m512 _mm512_roundscale_ps(__m512 a, int how)
{
    union lanes64 x = lanes64_of(a);
    assert((how & ~_MM_FROUND_NO_EXC) == _MM_FROUND_TO_NEAREST_INT);
    for (int i = 0; i < 16; i++) {
        x.f32[i] = rintf(x.f32[i]);
    }
    return lanes64_to___m512(x);
}

static inline int32_t _mm512_reduce_add_epi32(__m512i a)
{
    union lanes64 x = lanes64_of_int(a);
    uint32_t sum = 0;
    for (int i = 0; i < 16; i++) {
        sum += (uint32_t)x.i32[i];
    }
    return (int32_t)sum;
}

static inline int32_t _mm512_reduce_max_epi32(__m512i a)
{
    union lanes64 x = lanes64_of_int(a);
    int32_t max = x.i32[0];
    for (int i = 1; i < 16; i++) {
        max = x.i32[i] > max ? x.i32[i] : max;
    }
    return max;
}

/* ---- conversions ------------------------------------------------------------------------- */

static inline __m512 _mm512_cvtepi32_ps(__m512i a)
{
    union lanes64 x = lanes64_of_int(a);
    for (int i = 0; i < 16; i++) {
        x.f32[i] = (float)x.i32[i];
    }
    return lanes64_to___m512(x);
}

/* What does not fit, NaN included, becomes the least integer. */
static inline __m512i _mm512_cvtps_epi32(__m512 a)
{
    union lanes64 x = lanes64_of(a);
    for (int i = 0; i < 16; i++) {
        float rounded = rintf(x.f32[i]);
        x.i32[i] = rounded >= -0x1p31f && rounded < 0x1p31f ? (int32_t)rounded : INT32_MIN;
    }
    return lanes64_to_int(x);
}

static inline __m512i _mm512_cvtepi8_epi32(__m128i a)
{
    union lanes16 x = lanes16_of(a);
    union lanes64 r;
    for (int i = 0; i < 16; i++) {
        r.i32[i] = x.i8[i];
    }
    return lanes64_to_int(r);
}

static inline __m512i _mm512_cvtepu8_epi32(__m128i a)
{
    union lanes16 x = lanes16_of(a);
    union lanes64 r;
    for (int i = 0; i < 16; i++) {
        r.i32[i] = x.u8[i];
    }
    return lanes64_to_int(r);
}

static inline __m512i _mm512_cvtepu16_epi32(__m256i a)
{
    union lanes32 x = lanes32_of(a);
    union lanes64 r;
    for (int i = 0; i < 16; i++) {
        r.i32[i] = x.u16[i];
    }
    return lanes64_to_int(r);
}

static inline __m128i _mm512_cvtepi32_epi8(__m512i a)
{
    union lanes64 x = lanes64_of_int(a);
    union lanes16 r;
    for (int i = 0; i < 16; i++) {
        r.u8[i] = (uint8_t)x.i32[i];
    }
    return lanes16_to___m128i(r);
}

static inline __m256i _mm512_cvtepi32_epi16(__m512i a)
{
    union lanes64 x = lanes64_of_int(a);
    union lanes32 r;
    for (int i = 0; i < 16; i++) {
        r.u16[i] = (uint16_t)x.i32[i];
    }
    return lanes32_to___m256i(r);
}

#undef _mm256_cvtph_ps
static inline __m256 _mm256_cvtph_ps(__m128i a)
{
    union lanes16 x = lanes16_of(a);
    float r[8];
    __m256 v;
    for (int i = 0; i < 8; i++) {
        r[i] = fmt_f16_to_f32(x.u16[i]);
    }
    memcpy(&v, r, sizeof(v));
    return v;
}

static inline __m512 _mm512_cvtph_ps(__m256i a)
{
    union lanes32 x = lanes32_of(a);
    union lanes64 r;
    for (int i = 0; i < 16; i++) {
        r.f32[i] = fmt_f16_to_f32(x.u16[i]);
    }
    return lanes64_to___m512(r);
}

static inline __m256i _mm512_cvtps_ph(__m512 a, int how)
{
    union lanes64 x = lanes64_of(a);
    union lanes32 r;
    assert((how & ~_MM_FROUND_NO_EXC) == _MM_FROUND_TO_NEAREST_INT);
    for (int i = 0; i < 16; i++) {
        r.u16[i] = fmt_f32_to_f16(x.f32[i]);
    }
    return lanes32_to___m256i(r);
}

/* ---- AVX-VNNI: the same products as AVX-512 VNNI's, of fewer lanes -------------------------- */

static inline __m256i _mm256_dpbusd_avx_epi32(__m256i start, __m256i a, __m256i b)
{
    union lanes32 x = lanes32_of(a), y = lanes32_of(b), r = lanes32_of(start);
    for (int i = 0; i < 32; i++) {
        r.i32[i / 4] += x.u8[i] * y.i8[i];
    }
    return lanes32_to___m256i(r);
}

/* ---- lanes ------------------------------------------------------------------------------- */

static inline float _mm512_cvtss_f32(__m512 a)
{
    return lanes64_of(a).f32[0];
}

/* In each 128 bits, lane i is the one that bits 2i, 2i + 1 of which name. */
static inline __m512 _mm512_permute_ps(__m512 a, int which)
{
    union lanes64 x = lanes64_of(a), r;
    for (int i = 0; i < 16; i++) {
        r.f32[i] = x.f32[i / 4 * 4 + (which >> i % 4 * 2 & 3)];
    }
    return lanes64_to___m512(r);
}

/* Quarters 0 and 1 are a's, 2 and 3 b's; bits 2i, 2i + 1 say which for quarter i. */
static inline __m512 _mm512_shuffle_f32x4(__m512 a, __m512 b, int which)
{
    union lanes64 x = lanes64_of(a), y = lanes64_of(b), r;
    for (int i = 0; i < 4; i++) {
        const float *from = i < 2 ? x.f32 : y.f32;
        memcpy(r.f32 + 4 * i, from + 4 * (which >> 2 * i & 3), 4 * sizeof(*from));
    }
    return lanes64_to___m512(r);
}

static inline __m256 _mm512_extractf32x8_ps(__m512 a, int half)
{
    union lanes64 x = lanes64_of(a);
    __m256 r;
    memcpy(&r, x.f32 + 8 * half, sizeof(r));
    return r;
}

/* ---- memory ------------------------------------------------------------------------------ */

static inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void *from)
{
    union lanes64 r;
    memset(&r, 0, sizeof(r));
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) {
            memcpy(&r.f32[i], (const float *)from + i, sizeof(r.f32[i]));
        }
    }
    return lanes64_to___m512(r);
}

static inline void _mm512_mask_storeu_ps(void *to, __mmask16 mask, __m512 a)
{
    union lanes64 x = lanes64_of(a);
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) {
            memcpy((float *)to + i, &x.f32[i], sizeof(x.f32[i]));
        }
    }
}

static inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void *from)
{
    union lanes32 r;
    memset(&r, 0, sizeof(r));
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) {
            memcpy(&r.u16[i], (const uint16_t *)from + i, sizeof(r.u16[i]));
        }
    }
    return lanes32_to___m256i(r);
}

static inline void _mm256_mask_storeu_epi16(void *to, __mmask16 mask, __m256i a)
{
    union lanes32 x = lanes32_of(a);
    for (int i = 0; i < 16; i++) {
        if (mask >> i & 1) {
            memcpy((uint16_t *)to + i, &x.u16[i], sizeof(x.u16[i]));
        }
    }
}

/* Shifts in copies of the sign; all of it for counts above 31. */
static inline __m512i _mm512_srai_epi32(__m512i a, unsigned count)
{
    union lanes64 x = lanes64_of_int(a);
    for (int i = 0; i < 16; i++) {
        x.i32[i] >>= count < 31 ? count : 31;
    }
    return lanes64_to_int(x);
}

/* ---- bf16 -------------------------------------------------------------------------------- */

/* Nearest even; subnormal numbers are zeros to these instructions, NaN stays one. */
static inline uint16_t emulated_round_bf16(float value)
{
    uint32_t bits;

    if (isnan(value)) {
        value = NAN;
    }
    value = emulated_flush(value);
    memcpy(&bits, &value, sizeof(bits));
    if (isfinite(value)) {
        bits += 0x7fff + (bits >> 16 & 1);
    }
    return (uint16_t)(bits >> 16);
}

/* b's in the low half. */
static inline __m512bh _mm512_cvtne2ps_pbh(__m512 a, __m512 b)
{
    union lanes64 x = lanes64_of(a), y = lanes64_of(b), r;
    for (int i = 0; i < 16; i++) {
        r.u16[i] = emulated_round_bf16(y.f32[i]);
        r.u16[16 + i] = emulated_round_bf16(x.f32[i]);
    }
    __m512bh both;
    memcpy(&both, &r, sizeof(both));
    return both;
}

#endif
