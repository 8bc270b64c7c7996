/* plugins/cpu/rows.c - chooses a level's ops on rows. Vectors of eight floats keep up with the
 * second-level cache, so there are no wider ones. */
#include "plugins/cpu/rows.h"

#include <math.h>

double cpu_norm_add_lanes(const double *lanes)
{
    double sum = 0.0;

    for (uint32_t i = 0; i < CPU_NORM_LANES; i++) {
        sum += lanes[i];
    }
    return sum;
}

float cpu_norm_factor(const struct cpu_norm *norm, double sum_of_squares, uint32_t n)
{
    return (float)(1.0 / sqrt(sum_of_squares / n + (double)norm->eps));
}

const struct cpu_row_kernels *cpu_row_kernels(enum cpu_isa isa)
{
#if defined(__x86_64__)
    if (isa >= CPU_ISA_AVX2) {
        return &cpu_rows_avx2;
    }
#endif
    return &cpu_rows_c;
}
