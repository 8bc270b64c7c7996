/* plugins/cpu/glu_avx2.c - activations with AVX2 and FMA; the exponential is attention's. */
#include "plugins/cpu/exp_avx2.h"
#include "plugins/cpu/glu.h"
#include "plugins/cpu/unroll.h"

#include <gqa/plugin.h>

#include <immintrin.h>
#include <stddef.h>
#include <string.h>

#define LANES 8u

/* x times the logistic function of z, by exp(-|z|), which cannot overflow. */
CPU_SPECIALISE __m256 gated(__m256 x, __m256 z)
{
    __m256 e = exp_negative(_mm256_or_ps(z, _mm256_set1_ps(-0.0f)));
    __m256 negative = _mm256_cmp_ps(z, _mm256_setzero_ps(), _CMP_LT_OQ);
    __m256 numerator = _mm256_blendv_ps(x, _mm256_mul_ps(x, e), negative);
    return _mm256_div_ps(numerator, _mm256_add_ps(e, _mm256_set1_ps(1.0f)));
}

CPU_SPECIALISE __m256 activate(const enum gqa_act_kind kind, __m256 x, __m256 y, __m256 alpha,
                               __m256 limit)
{
    const __m256 one = _mm256_set1_ps(1.0f);

    if (kind == GQA_ACT_SILU) {
        return _mm256_mul_ps(gated(x, x), y);
    }
    if (kind == GQA_ACT_GELU_TANH) {
        __m256 square = _mm256_mul_ps(x, x);
        __m256 z = _mm256_mul_ps(x, _mm256_set1_ps(1.5957691216057308f)); /* 2 sqrt(2 / pi) */
        z = _mm256_mul_ps(z, _mm256_fmadd_ps(square, _mm256_set1_ps(0.044715f), one));
        return _mm256_mul_ps(gated(x, z), y);
    }
    /* SWIGLU_OAI. The second operand of min and max is the one that a NaN survives in. */
    __m256 gate = _mm256_min_ps(limit, x);
    __m256 up = _mm256_max_ps(_mm256_sub_ps(_mm256_setzero_ps(), limit), _mm256_min_ps(limit, y));
    return _mm256_mul_ps(gated(gate, _mm256_mul_ps(alpha, gate)), _mm256_add_ps(up, one));
}

CPU_SPECIALISE void run(const enum gqa_act_kind kind, const float *x, const float *y, float *dst,
                        uint32_t n, float alpha, float limit)
{
    const __m256 alphas = _mm256_set1_ps(alpha), limits = _mm256_set1_ps(limit);
    uint32_t i = 0;

    for (; n - i >= LANES; i += LANES) {
        __m256 other = y != NULL ? _mm256_loadu_ps(y + i) : _mm256_set1_ps(1.0f);
        __m256 value = _mm256_loadu_ps(x + i);
        _mm256_storeu_ps(dst + i, activate(kind, value, other, alphas, limits));
    }
    if (i < n) {
        float x_copy[LANES] = {0}, y_copy[LANES] = {1, 1, 1, 1, 1, 1, 1, 1};
        memcpy(x_copy, x + i, (n - i) * sizeof(*x));
        if (y != NULL) {
            memcpy(y_copy, y + i, (n - i) * sizeof(*y));
        }
        _mm256_storeu_ps(x_copy, activate(kind, _mm256_loadu_ps(x_copy), _mm256_loadu_ps(y_copy),
                                          alphas, limits));
        memcpy(dst + i, x_copy, (n - i) * sizeof(*dst));
    }
}

static void silu(const float *x, const float *y, float *dst, uint32_t n, float alpha, float limit)
{
    run(GQA_ACT_SILU, x, y, dst, n, alpha, limit);
}

static void gelu_tanh(const float *x, const float *y, float *dst, uint32_t n, float alpha,
                      float limit)
{
    run(GQA_ACT_GELU_TANH, x, y, dst, n, alpha, limit);
}

static void swiglu_oai(const float *x, const float *y, float *dst, uint32_t n, float alpha,
                       float limit)
{
    run(GQA_ACT_SWIGLU_OAI, x, y, dst, n, alpha, limit);
}

const struct cpu_glu_kernels cpu_glu_avx2 = {
    .act =
        {
            [GQA_ACT_SILU] = silu,
            [GQA_ACT_GELU_TANH] = gelu_tanh,
            [GQA_ACT_SWIGLU_OAI] = swiglu_oai,
        },
};
