/* plugins/cpu/glu_c.c - the reference activations, by the C library's functions. */
#include "plugins/cpu/glu.h"

#include <gqa/plugin.h>

#include <math.h>
#include <stddef.h>

/* x times the logistic function of z. Where exp overflows, the quotient is a zero of x's sign. */
static float gated(float x, float z)
{
    return x / (1.0f + expf(-z));
}

static float times(float act, const float *y, uint32_t i)
{
    return y != NULL ? act * y[i] : act;
}

static void silu(const float *x, const float *y, float *dst, uint32_t n, float alpha, float limit)
{
    for (uint32_t i = 0; i < n; i++) {
        dst[i] = times(gated(x[i], x[i]), y, i);
    }
}

static void gelu_tanh(const float *x, const float *y, float *dst, uint32_t n, float alpha,
                      float limit)
{
    const float twice_root = 1.5957691216057308f; /* 2 sqrt(2 / pi) */

    for (uint32_t i = 0; i < n; i++) {
        float z = twice_root * x[i] * (1.0f + 0.044715f * x[i] * x[i]);
        dst[i] = times(gated(x[i], z), y, i);
    }
}

/* The complement keeps its precision where 1 + erf would cancel. */
static void gelu(const float *x, const float *y, float *dst, uint32_t n, float alpha, float limit)
{
    const float minus_root_half = -0.70710678118654752f;

    for (uint32_t i = 0; i < n; i++) {
        dst[i] = times(0.5f * x[i] * erfcf(minus_root_half * x[i]), y, i);
    }
}

static void relu(const float *x, const float *y, float *dst, uint32_t n, float alpha, float limit)
{
    for (uint32_t i = 0; i < n; i++) {
        dst[i] = times(x[i] < 0.0f ? 0.0f : x[i], y, i); /* a NaN stays */
    }
}

/* y is there: prepare sees to it. */
static void swiglu_oai(const float *x, const float *y, float *dst, uint32_t n, float alpha,
                       float limit)
{
    for (uint32_t i = 0; i < n; i++) {
        float gate = x[i] > limit ? limit : x[i];
        float up = y[i] > limit ? limit : y[i];
        up = up < -limit ? -limit : up;
        dst[i] = gated(gate, alpha * gate) * (up + 1.0f);
    }
}

const struct cpu_glu_kernels cpu_glu_c = {
    .act =
        {
            [GQA_ACT_SILU] = silu,
            [GQA_ACT_GELU_TANH] = gelu_tanh,
            [GQA_ACT_GELU] = gelu,
            [GQA_ACT_SWIGLU_OAI] = swiglu_oai,
            [GQA_ACT_RELU] = relu,
        },
};
