/* tests/kernels/linear.c - products of every level against float64, against the reference, and
 * against themselves in other batches. */
#include "tests/kernels/linear_util.h"

#include "format/types.h"

#include <errno.h>
#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const uint32_t outputs[] = {1, 15, 16, 17, 33};
static const uint32_t inputs[] = {32, 64, 224, 256, 2048};
static const uint32_t batches[] = {1, 2, 3, 7, 8, 9, 13, 48, 65};
#define BATCH_MAX 65u

#define COUNT(a) (sizeof(a) / sizeof((a)[0]))

static float *random_floats(struct test_random *r, size_t n)
{
    float *x = malloc(n * sizeof(*x));
    cr_assert_not_null(x);
    for (size_t i = 0; i < n; i++) {
        x[i] = test_random_normal(r);
    }
    return x;
}

static float *new_floats(size_t n)
{
    float *y = calloc(n, sizeof(*y));
    cr_assert_not_null(y);
    return y;
}

static int type_takes(uint32_t type, uint32_t k)
{
    return k % fmt_type_info(type)->n_block == 0;
}

/* Activations of 32 share one scale, peak / 127, and are off by half a step at most: an output is
 * off by sum |w| * step / 2, plus float32's rounding, 2^-24 of sum |w x| per step of the sum. */
static double error_bound(const float *w, const float *x, uint32_t k, int quantised)
{
    double bound = 0.0;

    for (uint32_t b = 0; b < k; b += CPU_BLOCK) {
        double peak = 0.0, weights = 0.0, products = 0.0;
        for (uint32_t i = b; i < b + CPU_BLOCK && i < k; i++) {
            peak = fmax(peak, fabs((double)x[i]));
            weights += fabs((double)w[i]);
            products += fabs((double)w[i] * (double)x[i]);
        }
        bound += quantised ? weights * peak / 127.0 * 0.501 : 0.0;
        bound += products * 0x1p-24 * (quantised ? 64 : 4 + k / 16.0);
        /* Terms of a type with a minimum are larger than the weights that they add up to. */
        bound += quantised ? 40.0 * 1.9 * peak * 32 * 0x1p-24 * 4 : 0.0;
    }
    return bound + 1e-30;
}

/* Compares a level's result with the float64 product of the dequantised weights. */
static void check_truth(const struct test_weight *w, const float *x, const float *bias,
                        uint32_t n_rows, const float *y, const char *level)
{
    uint32_t k = (uint32_t)w->weight.ne[0], n = (uint32_t)w->weight.ne[1];
    int quantised = fmt_type_info(w->weight.type)->n_block != 1;
    float *row = new_floats(k);

    for (uint32_t o = 0; o < n; o++) {
        test_weight_row(w, o, row);
        for (uint32_t r = 0; r < n_rows; r++) {
            double truth = bias != NULL ? (double)bias[o] : 0.0;
            for (uint32_t i = 0; i < k; i++) {
                truth += (double)row[i] * (double)x[(size_t)r * k + i];
            }
            double bound = error_bound(row, x + (size_t)r * k, k, quantised) + fabs(truth) * 1e-6;
            double error = fabs((double)y[(size_t)r * n + o] - truth);
            cr_assert(error <= bound, "%s %s %ux%u row %u output %u: %g, truth %g, bound %g", level,
                      fmt_type_info(w->weight.type)->name, n, k, r, o, (double)y[(size_t)r * n + o],
                      truth, bound);
        }
    }
    free(row);
}

static void check_type_at(uint32_t type, uint32_t n, uint32_t k, struct test_random *r)
{
    struct test_weight w;
    float *x = random_floats(r, (size_t)BATCH_MAX * k);
    float *bias = random_floats(r, n);
    float *reference = new_floats((size_t)BATCH_MAX * n);
    float *y = new_floats((size_t)BATCH_MAX * n);
    int quantised = fmt_type_info(type)->n_block != 1;

    test_weight_random(&w, r, type, n, k);
    test_linear_run(&w, CPU_ISA_C, 1, x, BATCH_MAX, bias, reference);
    check_truth(&w, x, bias, BATCH_MAX, reference, "c");
    for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
        if (!cpu_isa_usable((enum cpu_isa)isa)) {
            continue;
        }
        if (!quantised) {
            test_linear_run(&w, (enum cpu_isa)isa, 1, x, BATCH_MAX, bias, reference);
            check_truth(&w, x, bias, BATCH_MAX, reference, cpu_isa_name((enum cpu_isa)isa));
        }
        for (size_t b = 0; b < COUNT(batches); b++) {
            uint32_t n_threads = b % 2 == 0 ? 1 : 3;
            memset(y, 0, (size_t)BATCH_MAX * n * sizeof(*y));
            test_linear_run(&w, (enum cpu_isa)isa, n_threads, x, batches[b], bias, y);
            cr_assert_arr_eq(y, reference, (size_t)batches[b] * n * sizeof(*y),
                             "%s %s %ux%u, %u rows: other bits than the reference",
                             cpu_isa_name((enum cpu_isa)isa), fmt_type_info(type)->name, n, k,
                             batches[b]);
        }
    }
    test_weight_finish(&w);
    free(x);
    free(bias);
    free(reference);
    free(y);
}

static void check_types(const char *test, const uint32_t *types, uint32_t n_types)
{
    struct test_random r = {test_seed(test)};

    for (uint32_t t = 0; t < n_types; t++) {
        for (size_t i = 0; i < COUNT(outputs); i++) {
            for (size_t j = 0; j < COUNT(inputs); j++) {
                if (type_takes(types[t], inputs[j])) {
                    check_type_at(types[t], outputs[i], inputs[j], &r);
                }
            }
        }
    }
}

/* All levels, batches and worker counts give the reference's bits; the reference is right. */
Test(linear, quantised_types_are_the_same_bits_everywhere)
{
    check_types("quantised", test_quant_types, test_n_quant_types);
}

/* So many outputs that workers quantise few rows each for itself. */
Test(linear, workers_that_quantise_for_themselves_give_the_same_bits)
{
    struct test_random r = {test_seed("by each")};

    check_type_at(GQA_TYPE_Q4_0, 801, 256, &r);
    check_type_at(GQA_TYPE_Q6_K, 801, 256, &r);
}

/* Each level is right, and gives the same bits in any batch. */
Test(linear, float_types_are_right_and_do_not_depend_on_the_batch)
{
    check_types("floats", test_float_types, test_n_float_types);
}

/* k that is no multiple of a vector, and rows that are not aligned. */
Test(linear, float_types_take_any_k)
{
    struct test_random r = {test_seed("any k")};

    for (uint32_t t = 0; t < test_n_float_types; t++) {
        for (uint32_t k = 1; k < 70; k += 3) {
            check_type_at(test_float_types[t], 5, k, &r);
        }
    }
}

/* The extremes of every stored value and of every activation: where 16-bit sums would saturate. In
 * few rows and in several groups of them, which kernels may take in other ways. */
Test(linear, extreme_values_do_not_saturate)
{
    struct test_random r = {test_seed("extremes")};
    enum { N = 16, K = 256, ROWS = 9 };
    float x[ROWS * K], y[ROWS * N], reference[ROWS * N];

    for (uint32_t i = 0; i < ROWS * K; i++) {
        float sign = i / K % 3 == 0 ? 1.0f : (i / K % 3 == 1 ? -1.0f : (i % 2 == 0 ? 1.0f : -1.0f));
        x[i] = 127.0f * sign;
    }
    for (uint32_t t = 0; t < test_n_quant_types; t++) {
        for (int fill = 0; fill < 3; fill++) {
            struct test_weight w;
            static const uint8_t bytes[3] = {0xff, 0x00, 0x80};
            uint32_t type = test_quant_types[t];
            const struct fmt_type_info *info = fmt_type_info(type);

            test_weight_random(&w, &r, type, N, K);
            memset(w.file, bytes[fill], fmt_type_bytes(info, K) * N);
            /* Scales of one, so that nothing is NaN. */
            for (uint64_t at = 0; at < fmt_type_bytes(info, K) * N; at += info->block_bytes) {
                test_block_set_scales(type, (uint8_t *)w.file + at, 1.0f, 1.0f);
            }
            test_weight_pack(&w);
            test_linear_run(&w, CPU_ISA_C, 1, x, ROWS, NULL, reference);
            for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
                for (uint32_t rows = 3; cpu_isa_usable((enum cpu_isa)isa) && rows <= ROWS;
                     rows += 6) {
                    test_linear_run(&w, (enum cpu_isa)isa, 1, x, rows, NULL, y);
                    cr_assert_arr_eq(y, reference, rows * N * sizeof(*y), "%s %s byte %02x",
                                     cpu_isa_name((enum cpu_isa)isa), info->name, bytes[fill]);
                }
            }
            /* These activations are exact in int8, and so are the products in float32. */
            float row[K];
            double truth = 0.0;
            test_weight_row(&w, 0, row);
            for (uint32_t i = 0; i < K; i++) {
                truth += (double)row[i] * (double)x[i];
            }
            cr_assert_float_eq((double)reference[0], truth, fabs(truth) * 1e-5 + 1e-3);
            test_weight_finish(&w);
        }
    }
}

/* Rows of zeros, of denormals, of huge values, with an infinity, with a NaN. */
Test(linear, odd_activations_give_the_same_bits_everywhere)
{
    struct test_random r = {test_seed("odd activations")};
    enum { N = 17, K = 256, ROWS = 5 };
    float *x = random_floats(&r, ROWS * K);
    float y[ROWS * N], reference[ROWS * N];

    for (uint32_t i = 0; i < K; i++) {
        x[i] = 0.0f;
        x[K + i] *= 1e-41f;
        x[2 * K + i] *= 1e33f;
    }
    x[3 * K + 40] = INFINITY;
    x[4 * K + 255] = NAN;
    for (uint32_t t = 0; t < test_n_quant_types; t++) {
        struct test_weight w;
        test_weight_random(&w, &r, test_quant_types[t], N, K);
        test_linear_run(&w, CPU_ISA_C, 1, x, ROWS, NULL, reference);
        for (uint32_t o = 0; o < N; o++) {
            cr_assert(reference[o] == 0.0f && reference[N + o] == 0.0f);
            cr_assert(isfinite(reference[2 * N + o]));
            cr_assert(isnan(reference[3 * N + o]) && isnan(reference[4 * N + o]));
        }
        for (int isa = CPU_ISA_AVX2; isa < CPU_ISA_COUNT; isa++) {
            if (cpu_isa_usable((enum cpu_isa)isa)) {
                test_linear_run(&w, (enum cpu_isa)isa, 1, x, ROWS, NULL, y);
                cr_assert_arr_eq(y, reference, 3 * N * sizeof(*y));
                for (uint32_t o = 3 * N; o < ROWS * N; o++) {
                    cr_assert(isnan(y[o]));
                }
            }
        }
        test_weight_finish(&w);
    }
    free(x);
}

/* Scales that are NaN or infinite spoil their output only. */
Test(linear, a_bad_weight_spoils_one_output)
{
    struct test_random r = {test_seed("bad weights")};
    enum { N = 20, K = 256 };
    float *x = random_floats(&r, K);
    float y[N];

    for (uint32_t t = 0; t < test_n_quant_types; t++) {
        const struct fmt_type_info *info = fmt_type_info(test_quant_types[t]);
        struct test_weight w;

        test_weight_random(&w, &r, info->type, N, K);
        if (!test_block_set_scales(info->type, (uint8_t *)w.file + 18 * fmt_type_bytes(info, K),
                                   NAN, 0.0f)) {
            test_weight_finish(&w);
            continue;
        }
        test_weight_pack(&w);
        for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
            if (cpu_isa_usable((enum cpu_isa)isa)) {
                test_linear_run(&w, (enum cpu_isa)isa, 1, x, 1, NULL, y);
                for (uint32_t o = 0; o < N; o++) {
                    cr_assert_eq(isnan(y[o]) != 0, o == 18, "%s %s output %u: %g",
                                 cpu_isa_name((enum cpu_isa)isa), info->name, o, (double)y[o]);
                }
            }
        }
        test_weight_finish(&w);
    }
    free(x);
}

/* Every exponent of MXFP4, also those whose scale is no normal number: output e's is e. The truth
 * comes from exponents in the middle, since float32 does not hold all values of the last ones. */
Test(linear, exponents_at_both_ends)
{
    struct test_random r = {test_seed("exponents")};
    enum { N = 256, K = 96, ROWS = 2 };
    const struct fmt_type_info *info = fmt_type_info(GQA_TYPE_MXFP4);
    struct test_weight w, middle;
    float *x = random_floats(&r, ROWS * K);
    float y[ROWS * N], reference[ROWS * N], row[K];

    for (uint32_t i = 0; i < ROWS * K; i++) {
        x[i] *= i < K ? 0x1p30f : 0x1p-30f; /* small ones meet large exponents, and the reverse */
    }
    test_weight_random(&middle, &r, GQA_TYPE_MXFP4, N, K);
    test_weight_random(&w, &r, GQA_TYPE_MXFP4, N, K);
    memcpy(w.file, middle.file, fmt_type_bytes(info, K) * N);
    for (uint32_t b = 0; b < N * K / CPU_BLOCK; b++) {
        ((uint8_t *)w.file)[b * info->block_bytes] = (uint8_t)(b / (K / CPU_BLOCK));
        ((uint8_t *)middle.file)[b * info->block_bytes] = 127;
    }
    test_weight_pack(&w);
    test_linear_run(&w, CPU_ISA_C, 1, x, ROWS, NULL, reference);
    for (uint32_t e = 0; e < N; e++) {
        const uint32_t at = e < 128 ? 0 : 1;
        double truth = 0.0;
        test_weight_row(&middle, e, row);
        for (uint32_t i = 0; i < K; i++) {
            truth += (double)row[i] * (double)x[at * K + i];
        }
        double error = fabs(ldexp((double)reference[at * N + e], 127 - (int)e) - truth);
        cr_assert(error <= error_bound(row, x + at * K, K, 1), "exponent %u: off by %g of %g", e,
                  error, truth);
    }
    for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
        if (cpu_isa_usable((enum cpu_isa)isa)) {
            test_linear_run(&w, (enum cpu_isa)isa, 1, x, ROWS, NULL, y);
            for (uint32_t i = 0; i < ROWS * N; i++) {
                cr_assert(isnan(y[i]) ? isnan(reference[i]) : y[i] == reference[i],
                          "%s: exponent %u gives %g instead of %g", cpu_isa_name((enum cpu_isa)isa),
                          i % N, (double)y[i], (double)reference[i]);
            }
        }
    }
    test_weight_finish(&w);
    test_weight_finish(&middle);
    free(x);
}

Test(linear, pack_refuses_what_does_not_fit)
{
    struct test_random r = {test_seed("refusals")};
    struct test_weight w;
    struct cpu_matrix m;
    struct gqa_reason reason = {""};

    test_weight_random(&w, &r, GQA_TYPE_Q4_0, 33, 64);
    cr_assert_eq(cpu_weights_pack(&w.weight, 8, 16, w.packed), -EINVAL);
    cr_assert_eq(cpu_weights_pack(&w.weight, 0, 17, w.packed), -EINVAL);
    cr_assert_eq(cpu_weights_pack(&w.weight, 32, 2, w.packed), -EINVAL);
    cr_assert_eq(cpu_weights_pack(&w.weight, 48, 0, w.packed), -EINVAL);
    cr_assert_eq(w.weight.packed_bytes, 3 * 2 * 288);
    w.weight.packed_bytes--;
    cr_assert_eq(cpu_matrix_init(&m, &w.weight, &reason), -EINVAL);
    w.weight.packed = NULL;
    cr_assert_eq(cpu_matrix_init(&m, &w.weight, &reason), -EINVAL);
    w.weight.ne[0] = 48;
    cr_assert_eq(cpu_weights_packed_bytes(&w.weight), 0);
    w.weight.ne[0] = 1ull << 40;
    w.weight.ne[1] = 1ull << 40;
    cr_assert_eq(cpu_weights_packed_bytes(&w.weight), 0);
    w.weight.type = 9; /* Q8_1: known to the format's authors, in no file */
    w.weight.ne[0] = 64;
    w.weight.ne[1] = 33;
    cr_assert_eq(cpu_weights_packed_bytes(&w.weight), 0);
    cr_assert_eq(cpu_matrix_init(&m, &w.weight, &reason), -ENOTSUP);
    test_weight_finish(&w);
}
