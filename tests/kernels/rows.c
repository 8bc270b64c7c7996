/* tests/kernels/rows.c - every level's ops on rows against the reference: the same bits. */
#include "plugins/cpu/rows.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define N_MAX 2053u

static const uint32_t lengths[] = {1, 2, 7, 8, 9, 15, 16, 17, 64, 100, 2048, N_MAX};

static float x[N_MAX], y[N_MAX], weight[N_MAX], bias[N_MAX];

/* Values of both signs and many magnitudes, so that the order of a sum shows. */
static void fill(float *values, uint32_t seed)
{
    for (uint32_t i = 0; i < N_MAX; i++) {
        seed = seed * 1664525u + 1013904223u;
        float sign = seed & 256 ? -1.0f : 1.0f;
        values[i] = sign * ldexpf(1.0f + (float)(seed >> 16) / 65536.0f, (int)(seed >> 9) % 12 - 6);
    }
}

static void fill_all(void)
{
    fill(x, 1);
    fill(y, 2);
    fill(weight, 3);
    fill(bias, 4);
}

static void compare_norm(const struct cpu_row_kernels *k, const struct cpu_norm *norm, uint32_t n,
                         const char *level)
{
    float expected[N_MAX], got[N_MAX + 1], in_place[N_MAX];

    got[n] = 42.0f;
    memcpy(in_place, x, n * sizeof(*x));
    cpu_rows_c.norm(norm, x, expected, n);
    k->norm(norm, x, got, n);
    k->norm(norm, in_place, in_place, n);
    cr_assert_eq(memcmp(got, expected, n * sizeof(*got)), 0,
                 "%s: norm of %u values, centred %d, weight %d, bias %d: other bits", level, n,
                 norm->centred, norm->weight != NULL, norm->bias != NULL);
    cr_assert_eq(memcmp(in_place, expected, n * sizeof(*got)), 0, "%s: %u in place", level, n);
    cr_assert_eq(got[n], 42.0f, "%s: wrote past the end", level);
}

static void check_norms(const struct cpu_row_kernels *k, const char *level)
{
    for (uint32_t form = 0; form < 8; form++) {
        const struct cpu_norm norm = {.centred = form & 1,
                                      .eps = 1e-5f,
                                      .weight = form & 2 ? weight : NULL,
                                      .bias = form & 4 ? bias : NULL};
        for (uint32_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
            compare_norm(k, &norm, lengths[i], level);
        }
    }
}

static void check_adds(const struct cpu_row_kernels *k, const char *level)
{
    static const float scales[] = {1.0f, 0.1f, -3.7f};

    for (uint32_t form = 0; form < 3; form++) {
        for (uint32_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
            uint32_t n = lengths[i];
            float expected[N_MAX], got[N_MAX + 1];

            memcpy(got, x, n * sizeof(*got));
            got[n] = 42.0f;
            cpu_rows_c.add(x, y, scales[form], expected, n);
            k->add(got, y, scales[form], got, n);
            cr_assert_eq(memcmp(got, expected, n * sizeof(*got)), 0,
                         "%s: add of %u values times %g: other bits", level, n,
                         (double)scales[form]);
            cr_assert_eq(got[n], 42.0f, "%s: wrote past the end", level);
        }
    }
}

Test(rows, levels_have_the_reference_s_bits)
{
    fill_all();
    for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
        if (!cpu_isa_usable((enum cpu_isa)isa)) {
            fprintf(stderr, "%s: not on this processor\n", cpu_isa_name((enum cpu_isa)isa));
            continue;
        }
        check_norms(cpu_row_kernels((enum cpu_isa)isa), cpu_isa_name((enum cpu_isa)isa));
        check_adds(cpu_row_kernels((enum cpu_isa)isa), cpu_isa_name((enum cpu_isa)isa));
    }
}

/* Against plain double arithmetic, within float32's rounding. */
Test(rows, the_reference_is_right)
{
    const struct cpu_norm norm = {.centred = 1, .eps = 1e-5f, .weight = weight, .bias = bias};
    double mean = 0.0, variance = 0.0;
    float got[N_MAX];

    fill_all();
    for (uint32_t i = 0; i < N_MAX; i++) {
        mean += (double)x[i] / N_MAX;
    }
    for (uint32_t i = 0; i < N_MAX; i++) {
        variance += ((double)x[i] - mean) * ((double)x[i] - mean) / N_MAX;
    }
    cpu_rows_c.norm(&norm, x, got, N_MAX);
    for (uint32_t i = 0; i < N_MAX; i++) {
        double scaled = ((double)x[i] - mean) / sqrt(variance + 1e-5) * (double)weight[i];
        double right = scaled + (double)bias[i];
        cr_assert_float_eq((double)got[i], right,
                           1e-6 * (fabs(scaled) + fabs((double)bias[i]) + fabs((double)weight[i])),
                           "value %u", i);
    }
}

/* A NaN or an infinity spoils its own row's result on every level alike. */
Test(rows, what_is_not_finite)
{
    const struct cpu_norm norm = {.eps = 1e-5f, .weight = weight};
    static const float bad[] = {NAN, INFINITY, -INFINITY};

    for (uint32_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
            float got[17], expected[17];
            if (!cpu_isa_usable((enum cpu_isa)isa)) {
                continue;
            }
            fill_all();
            x[11] = bad[i];
            cpu_rows_c.norm(&norm, x, expected, 17);
            cpu_row_kernels((enum cpu_isa)isa)->norm(&norm, x, got, 17);
            for (uint32_t k = 0; k < 17; k++) {
                cr_assert_eq(isnan(got[k]), isnan(expected[k]));
                cr_assert(isnan(got[k]) || got[k] == expected[k]);
            }
        }
    }
}
