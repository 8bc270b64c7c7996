/* plugins/cpu/rows_avx2.c - ops on rows with AVX2: two vectors of four doubles are the lanes of a
 * sum. */
#include "plugins/cpu/rows.h"

#include <immintrin.h>
#include <stddef.h>

/* Eight values as doubles: ret (2) */
static inline void widen(const float *x, __m256d *ret)
{
    ret[0] = _mm256_cvtps_pd(_mm_loadu_ps(x));
    ret[1] = _mm256_cvtps_pd(_mm_loadu_ps(x + 4));
}

static double mean_of(const float *x, uint32_t n)
{
    __m256d sums[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    double lanes[CPU_NORM_LANES];
    uint32_t i = 0;

    for (; i + CPU_NORM_LANES <= n; i += CPU_NORM_LANES) {
        __m256d values[2];
        widen(x + i, values);
        sums[0] = _mm256_add_pd(sums[0], values[0]);
        sums[1] = _mm256_add_pd(sums[1], values[1]);
    }
    _mm256_storeu_pd(lanes, sums[0]);
    _mm256_storeu_pd(lanes + 4, sums[1]);
    for (; i < n; i++) {
        lanes[i % CPU_NORM_LANES] += (double)x[i];
    }
    return cpu_norm_add_lanes(lanes) / n;
}

static double sum_of_squares(const float *x, uint32_t n, double mean)
{
    const __m256d means = _mm256_set1_pd(mean);
    __m256d sums[2] = {_mm256_setzero_pd(), _mm256_setzero_pd()};
    double lanes[CPU_NORM_LANES];
    uint32_t i = 0;

    for (; i + CPU_NORM_LANES <= n; i += CPU_NORM_LANES) {
        __m256d values[2];
        widen(x + i, values);
        values[0] = _mm256_sub_pd(values[0], means);
        values[1] = _mm256_sub_pd(values[1], means);
        sums[0] = _mm256_add_pd(sums[0], _mm256_mul_pd(values[0], values[0]));
        sums[1] = _mm256_add_pd(sums[1], _mm256_mul_pd(values[1], values[1]));
    }
    _mm256_storeu_pd(lanes, sums[0]);
    _mm256_storeu_pd(lanes + 4, sums[1]);
    for (; i < n; i++) {
        double d = (double)x[i] - mean;
        lanes[i % CPU_NORM_LANES] += d * d;
    }
    return cpu_norm_add_lanes(lanes);
}

/* Values from first on, fewer than a vector. */
static void norm_tail(const struct cpu_norm *how, const float *x, float *dst, uint32_t first,
                      uint32_t n, float shift, float factor)
{
    for (uint32_t i = first; i < n; i++) {
        float y = (x[i] - shift) * factor;
        y = how->weight != NULL ? y * how->weight[i] : y;
        dst[i] = how->bias != NULL ? y + how->bias[i] : y;
    }
}

static void norm(const struct cpu_norm *how, const float *x, float *dst, uint32_t n)
{
    double mean = how->centred ? mean_of(x, n) : 0.0;
    float factor = cpu_norm_factor(how, sum_of_squares(x, n, mean), n);
    float shift = (float)mean;
    uint32_t i = 0;

    for (; i + 8 <= n; i += 8) {
        __m256 y = _mm256_sub_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(shift));
        y = _mm256_mul_ps(y, _mm256_set1_ps(factor));
        if (how->weight != NULL) {
            y = _mm256_mul_ps(y, _mm256_loadu_ps(how->weight + i));
        }
        if (how->bias != NULL) {
            y = _mm256_add_ps(y, _mm256_loadu_ps(how->bias + i));
        }
        _mm256_storeu_ps(dst + i, y);
    }
    norm_tail(how, x, dst, i, n, shift, factor);
}

static void add(const float *a, const float *b, float scale, float *dst, uint32_t n)
{
    const __m256 scales = _mm256_set1_ps(scale);
    uint32_t i = 0;

    for (; i + 8 <= n; i += 8) {
        __m256 product = _mm256_mul_ps(scales, _mm256_loadu_ps(b + i));
        _mm256_storeu_ps(dst + i, _mm256_add_ps(_mm256_loadu_ps(a + i), product));
    }
    for (; i < n; i++) {
        dst[i] = a[i] + scale * b[i];
    }
}

const struct cpu_row_kernels cpu_rows_avx2 = {.norm = norm, .add = add};
