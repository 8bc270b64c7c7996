/* plugins/cpu/rows_c.c - the reference of ops on rows. */
#include "plugins/cpu/rows.h"

#include <stddef.h>

static double mean_of(const float *x, uint32_t n)
{
    double lanes[CPU_NORM_LANES] = {0};

    for (uint32_t i = 0; i < n; i++) {
        lanes[i % CPU_NORM_LANES] += (double)x[i];
    }
    return cpu_norm_add_lanes(lanes) / n;
}

static double sum_of_squares(const float *x, uint32_t n, double mean)
{
    double lanes[CPU_NORM_LANES] = {0};

    for (uint32_t i = 0; i < n; i++) {
        double d = (double)x[i] - mean;
        lanes[i % CPU_NORM_LANES] += d * d;
    }
    return cpu_norm_add_lanes(lanes);
}

static void norm(const struct cpu_norm *how, const float *x, float *dst, uint32_t n)
{
    double mean = how->centred ? mean_of(x, n) : 0.0;
    float factor = cpu_norm_factor(how, sum_of_squares(x, n, mean), n);
    float shift = (float)mean;

    for (uint32_t i = 0; i < n; i++) {
        float y = (x[i] - shift) * factor;
        if (how->weight != NULL) {
            y *= how->weight[i];
        }
        dst[i] = how->bias != NULL ? y + how->bias[i] : y;
    }
}

static void add(const float *a, const float *b, float scale, float *dst, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        dst[i] = a[i] + scale * b[i];
    }
}

const struct cpu_row_kernels cpu_rows_c = {.norm = norm, .add = add};
