/* Every tensor type against golden blocks, bit for bit; then what is quantised here comes back
 * within the bounds of the type's resolution. */
#include "format/types.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define GOLDEN_MAX_BYTES (1 << 20)

/* Reads $GQAD_TEST_GOLDEN/dequant/NAME.SUFFIX; returns its size, 0 when there is none. */
static size_t read_golden(const char *name, const char *suffix, void *dst)
{
    const char *root = getenv("GQAD_TEST_GOLDEN");
    char path[4096];
    snprintf(path, sizeof(path), "%s/dequant/%s.%s", root != NULL ? root : "/nonexistent", name,
             suffix);
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        return 0;
    }
    size_t n = fread(dst, 1, GOLDEN_MAX_BYTES, file);
    fclose(file);
    return n;
}

Test(dequantise, golden_blocks_bit_for_bit)
{
    uint8_t *raw = malloc(GOLDEN_MAX_BYTES + 1);
    uint32_t *expected = malloc(GOLDEN_MAX_BYTES);
    uint32_t *got = malloc(GOLDEN_MAX_BYTES);
    cr_assert(raw != NULL && expected != NULL && got != NULL);
    if (read_golden("F32", "raw", raw) == 0) {
        fprintf(stderr, "SKIPPED: no golden data\n");
        cr_skip_test("no golden data");
    }
    for (size_t i = 0; fmt_type_at(i) != NULL; i++) {
        const struct fmt_type_info *type = fmt_type_at(i);
        size_t n = read_golden(type->name, "f32", expected) / sizeof(float);
        /* At an odd address: rows of blocks are not aligned. */
        size_t raw_bytes = read_golden(type->name, "raw", raw + 1);
        cr_assert(n > 0, "%s: no golden data", type->name);
        cr_assert_eq(raw_bytes, fmt_type_bytes(type, n), "%s: %zu bytes", type->name, raw_bytes);
        cr_assert_not_null(type->dequantise, "%s", type->name);
        type->dequantise(raw + 1, (float *)got, n);
        for (size_t v = 0; v < n; v++) {
            cr_assert_eq(got[v], expected[v], "%s: value %zu is %08x, expected %08x", type->name, v,
                         got[v], expected[v]);
        }
    }
    free(raw);
    free(expected);
    free(got);
}

/* A fixed sequence of numbers, about normally distributed with a deviation of one. */
static float next_normal(uint64_t *state)
{
    float sum = 0.0f;
    for (int i = 0; i < 12; i++) {
        *state = *state * 6364136223846793005u + 1442695040888963407u;
        sum += (float)(*state >> 40) * 0x1p-24f;
    }
    return sum - 6.0f;
}

/* Root of the mean squared error of a round trip, relative to the values' own. */
static double round_trip_error(const struct fmt_type_info *type, const float *x, size_t n)
{
    uint8_t *packed = malloc((size_t)fmt_type_bytes(type, n));
    float *back = malloc(n * sizeof(*back));
    double error = 0, power = 0;
    cr_assert(packed != NULL && back != NULL);
    type->quantise(x, packed, n);
    type->dequantise(packed, back, n);
    for (size_t i = 0; i < n; i++) {
        error += ((double)back[i] - x[i]) * ((double)back[i] - x[i]);
        power += (double)x[i] * x[i];
    }
    free(packed);
    free(back);
    return sqrt(error / power);
}

Test(quantise, error_of_normal_values_is_within_the_types_resolution)
{
    /* Measured 1.5 times lower: a uniform step over the range of a block gives about these. */
    static const struct {
        uint32_t type;
        double bound;
    } rows[] = {
        {FMT_TYPE_F32, 0.0},     {FMT_TYPE_F16, 3e-4},    {FMT_TYPE_BF16, 2.5e-3},
        {FMT_TYPE_Q8_0, 8e-3},   {FMT_TYPE_Q4_0, 0.11},   {FMT_TYPE_Q4_K, 0.10},
        {FMT_TYPE_Q6_K, 0.03},   {FMT_TYPE_Q2_K, 0.49},   {FMT_TYPE_Q3_K, 0.23},
        {FMT_TYPE_IQ4_NL, 0.12}, {FMT_TYPE_IQ4_XS, 0.12}, {FMT_TYPE_MXFP4, 0.17},
    };
    enum { N = 64 * 256 };
    float *x = malloc(N * sizeof(*x));
    uint64_t state = 1;
    cr_assert_not_null(x);
    for (size_t i = 0; i < N; i++) {
        x[i] = next_normal(&state);
    }
    for (size_t r = 0; r < sizeof(rows) / sizeof(rows[0]); r++) {
        const struct fmt_type_info *type = fmt_type_info(rows[r].type);
        double error = round_trip_error(type, x, N);
        cr_expect(error <= rows[r].bound, "%s: relative error %g", type->name, error);
        cr_log_info("%s: relative error %g", type->name, error);
    }
    free(x);
}

Test(quantise, zeros_constants_and_extremes_stay_in_range)
{
    static const float fills[] = {0.0f, 1.0f, -1.0f, 1e-30f, -6e4f, INFINITY, -INFINITY, NAN};
    float x[256], back[256];
    uint8_t packed[1024 + 1];
    for (size_t t = 0; fmt_type_at(t) != NULL; t++) {
        const struct fmt_type_info *type = fmt_type_at(t);
        if (type->quantise == NULL) {
            continue;
        }
        for (size_t f = 0; f < sizeof(fills) / sizeof(fills[0]); f++) {
            for (size_t i = 0; i < 256; i++) {
                x[i] = fills[f];
            }
            memset(packed, 0xa5, sizeof(packed));
            type->quantise(x, packed, 256);
            cr_assert_eq(packed[fmt_type_bytes(type, 256)], 0xa5, "%s wrote too far", type->name);
            type->dequantise(packed, back, 256);
            for (size_t i = 0; i < 256 && fabsf(fills[f]) <= 1e-4f; i++) {
                cr_assert_float_eq(back[i], fills[f], 1e-4f, "%s: %g", type->name, back[i]);
            }
            for (size_t i = 0; i < 256 && isfinite(fills[f]); i++) {
                /* MXFP4's levels 4 and 6 are the farthest apart. */
                float relative = type->type == FMT_TYPE_MXFP4 ? 0.2f : 0.02f;
                cr_assert_float_eq(back[i], fills[f], fabsf(fills[f]) * relative + 1e-4f,
                                   "%s: %g became %g", type->name, fills[f], back[i]);
            }
        }
    }
}

Test(types, names_and_numbers_find_each_other)
{
    for (size_t i = 0; fmt_type_at(i) != NULL; i++) {
        const struct fmt_type_info *type = fmt_type_at(i);
        cr_expect_eq(fmt_type_info(type->type), type, "%s", type->name);
        cr_expect_eq(fmt_type_by_name(type->name), type, "%s", type->name);
    }
    cr_expect_eq(fmt_type_by_name("q4_k"), fmt_type_info(FMT_TYPE_Q4_K));
    cr_expect_null(fmt_type_by_name("q4_k_m"));
    cr_expect_null(fmt_type_info(4));
}

Test(types, sizes_are_whole_blocks_without_overflow)
{
    const struct fmt_type_info *f32 = fmt_type_info(FMT_TYPE_F32);
    const struct fmt_type_info *q6_k = fmt_type_info(FMT_TYPE_Q6_K);
    cr_expect_eq(fmt_type_bytes(q6_k, 512), 420);
    cr_expect_eq(fmt_type_bytes(q6_k, 511), 0);
    cr_expect_eq(fmt_type_bytes(f32, UINT64_MAX / 4), UINT64_MAX / 4 * 4);
    cr_expect_eq(fmt_type_bytes(f32, UINT64_MAX / 4 + 1), 0);
}
