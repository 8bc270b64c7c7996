/* plugins/cpu/glu_avx512.c - activations with AVX-512; the exponential is attention's. */
#include "plugins/cpu/exp_avx512.h"
#include "plugins/cpu/glu.h"
#include "plugins/cpu/unroll.h"

#include <gqa/plugin.h>

#include <immintrin.h>
#include <stddef.h>

#define LANES 16u

/* x times the logistic function of z, by exp(-|z|), which cannot overflow. */
CPU_SPECIALISE __m512 gated(__m512 x, __m512 z)
{
    __m512 e = exp_negative(_mm512_or_ps(z, _mm512_set1_ps(-0.0f)));
    __mmask16 negative = _mm512_cmp_ps_mask(z, _mm512_setzero_ps(), _CMP_LT_OQ);
    __m512 numerator = _mm512_mask_mul_ps(x, negative, x, e);
    return _mm512_div_ps(numerator, _mm512_add_ps(e, _mm512_set1_ps(1.0f)));
}

CPU_SPECIALISE __m512 activate(const enum gqa_act_kind kind, __m512 x, __m512 y, __m512 alpha,
                               __m512 limit)
{
    const __m512 one = _mm512_set1_ps(1.0f);

    if (kind == GQA_ACT_SILU) {
        return _mm512_mul_ps(gated(x, x), y);
    }
    if (kind == GQA_ACT_GELU_TANH) {
        __m512 square = _mm512_mul_ps(x, x);
        __m512 z = _mm512_mul_ps(x, _mm512_set1_ps(1.5957691216057308f)); /* 2 sqrt(2 / pi) */
        z = _mm512_mul_ps(z, _mm512_fmadd_ps(square, _mm512_set1_ps(0.044715f), one));
        return _mm512_mul_ps(gated(x, z), y);
    }
    /* SWIGLU_OAI. The second operand of min and max is the one that a NaN survives in. */
    __m512 gate = _mm512_min_ps(limit, x);
    __m512 up = _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), limit), _mm512_min_ps(limit, y));
    return _mm512_mul_ps(gated(gate, _mm512_mul_ps(alpha, gate)), _mm512_add_ps(up, one));
}

CPU_SPECIALISE void run(const enum gqa_act_kind kind, const float *x, const float *y, float *dst,
                        uint32_t n, float alpha, float limit)
{
    const __m512 alphas = _mm512_set1_ps(alpha), limits = _mm512_set1_ps(limit);

    for (uint32_t i = 0; i < n; i += LANES) {
        __mmask16 mask = n - i < LANES ? (__mmask16)((1u << (n - i)) - 1) : 0xffff;
        __m512 other = y != NULL ? _mm512_maskz_loadu_ps(mask, y + i) : _mm512_set1_ps(1.0f);
        __m512 value = _mm512_maskz_loadu_ps(mask, x + i);
        _mm512_mask_storeu_ps(dst + i, mask, activate(kind, value, other, alphas, limits));
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

const struct cpu_glu_kernels cpu_glu_avx512 = {
    .act =
        {
            [GQA_ACT_SILU] = silu,
            [GQA_ACT_GELU_TANH] = gelu_tanh,
            [GQA_ACT_SWIGLU_OAI] = swiglu_oai,
        },
};
