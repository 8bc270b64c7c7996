/* plugins/cpu/rows.h - ops on a row of plain float32 values that are the same bits on every level.
 *
 * norm: sums are double, in CPU_NORM_LANES lanes, lane i % CPU_NORM_LANES, ascending i, then added
 * in order; no step is fused with another. With a variance v of the values' distances from their
 * mean (centred) or from zero, f = (float)(1 / sqrt(v + eps)) and s = (float)mean:
 *
 *     dst[i] = (x[i] - s) * f * weight[i] + bias[i]
 *
 * add: dst[i] = a[i] + scale * b[i], rounded twice. rows_c.c is the reference. */
#ifndef PLUGINS_CPU_ROWS_H
#define PLUGINS_CPU_ROWS_H

#include "plugins/cpu/isa.h"

#include <stdint.h>

#define CPU_NORM_LANES 8u

struct cpu_norm {
    int centred;
    float eps;
    const float *weight, *bias; /* (n) or NULL */
};

/* From the lanes of sums to the row's variance and result: for levels to share. */
double cpu_norm_add_lanes(const double *lanes);
float cpu_norm_factor(const struct cpu_norm *norm, double sum_of_squares, uint32_t n);

struct cpu_row_kernels {
    /* dst (n) may be x. */
    void (*norm)(const struct cpu_norm *norm, const float *x, float *dst, uint32_t n);
    /* dst (n) may be a or b. */
    void (*add)(const float *a, const float *b, float scale, float *dst, uint32_t n);
};

extern const struct cpu_row_kernels cpu_rows_c, cpu_rows_avx2;

/* The level's table: of the highest level up to it that has one. */
const struct cpu_row_kernels *cpu_row_kernels(enum cpu_isa isa);

#endif
