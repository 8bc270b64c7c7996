/* plugins/cpu/glu.h - activation functions, alone or times a second input.
 *
 *   SILU        x / (1 + exp(-x))
 *   GELU_TANH   x / (1 + exp(-2 u)), u = sqrt(2/pi) (x + 0.044715 x^3): x (1 + tanh u) / 2
 *   GELU        x (1 + erf(x / sqrt 2)) / 2
 *   RELU        max(x, 0)
 *   SWIGLU_OAI  g / (1 + exp(-alpha g)) * (y + 1), g = min(x, limit), y clamped to +-limit
 *
 * float32 throughout, exponentials within two units in the last place. glu_c.c is the reference. */
#ifndef PLUGINS_CPU_GLU_H
#define PLUGINS_CPU_GLU_H

#include "plugins/cpu/isa.h"

#include <stdint.h>

/* dst (n) = act(x) * y, or act(x) where y is NULL. dst may be x or y. */
typedef void (*cpu_glu_fn)(const float *x, const float *y, float *dst, uint32_t n, float alpha,
                           float limit);

#define CPU_GLU_KINDS 5u /* enum gqa_act_kind */

struct cpu_glu_kernels {
    cpu_glu_fn act[CPU_GLU_KINDS];
};

extern const struct cpu_glu_kernels cpu_glu_c, cpu_glu_avx2, cpu_glu_avx512;

/* The level's table; entries that it lacks are the next lower level's. */
void cpu_glu_kernels(enum cpu_isa isa, struct cpu_glu_kernels *ret);

#endif
