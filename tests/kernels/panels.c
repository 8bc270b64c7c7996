/* tests/kernels/panels.c - products of class P rows from panels, at every level that has them.
 *
 * The truth is the float64 product of weights and activations that are rounded to bf16 first. Two
 * things differ from it: float32 sums in the unit's order, and a weight whose float32 value the
 * kernel reaches by another rounding than the dequantiser and that then lies on the other side of a
 * tie of bf16. The bound allows a sum 2^-17 of what it adds up, and one such weight of a row, 2^-8
 * of the largest product. */
#include "tests/kernels/linear_util.h"

#include "format/types.h"
#include "plugins/cpu/panels.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ROWS_MAX  70u
#define UNTOUCHED 12345.0f

static float *new_floats(size_t n)
{
    float *x = malloc(n * sizeof(*x));
    cr_assert_not_null(x);
    return x;
}

static double to_bf16(float value)
{
    uint32_t bits;

    memcpy(&bits, &value, sizeof(bits));
    bits += 0x7fff + (bits >> 16 & 1);
    bits &= 0xffff0000;
    memcpy(&value, &bits, sizeof(value));
    return (double)value;
}

struct problem {
    enum cpu_isa isa;
    struct test_weight w;
    struct cpu_matrix matrix;
    uint32_t n, k;
    float *x, *bias;
};

static void run(const struct problem *p, uint32_t n_threads, const float *x,
                const uint8_t *row_class, uint32_t n_rows, float *y)
{
    struct test_host host;
    struct cpu_panels panels;
    struct cpu_matrix matrix = p->matrix;
    struct cpu_product product = {.matrix = &matrix, .dst = y, .dst_stride = p->n};

    matrix.bias = p->bias;
    test_host_init(&host, n_threads);
    cr_assert_eq(cpu_panels_init(&panels, &host.host, p->isa, n_rows, p->k), 0);
    cr_assert(cpu_panels_take(&panels, &matrix));
    cpu_panels_run(&panels, x, p->k, row_class, n_rows, &product, 1);
    cpu_panels_finish(&panels);
}

static void check_truth(const struct problem *p, const float *y, const uint8_t *row_class)
{
    float *w = new_floats(p->k);

    for (uint32_t o = 0; o < p->n; o++) {
        test_weight_row(&p->w, o, w);
        for (uint32_t r = 0; r < ROWS_MAX; r++) {
            double got = (double)y[(size_t)r * p->n + o], truth = (double)p->bias[o];
            double sum = fabs(truth), largest = 0.0;

            if (row_class[r] != GQA_ROW_P) {
                cr_assert_eq(got, (double)UNTOUCHED, "row %u of class D was written", r);
                continue;
            }
            for (uint32_t i = 0; i < p->k; i++) {
                double product = to_bf16(w[i]) * to_bf16(p->x[(size_t)r * p->k + i]);
                truth += product;
                sum += fabs(product);
                largest = fmax(largest, fabs(product));
            }
            double bound = sum * 0x1p-17 + largest * 0x1p-8 + 1e-30;
            cr_assert(fabs(got - truth) <= bound,
                      "%s %s %ux%u row %u output %u: %g, truth %g +- %g", cpu_isa_name(p->isa),
                      fmt_type_info(p->w.weight.type)->name, p->n, p->k, r, o, got, truth, bound);
        }
    }
    free(w);
}

/* Every row alone gives the bits that it has among others. */
static void check_alone(const struct problem *p, const float *y, const uint8_t *row_class)
{
    const uint8_t one = GQA_ROW_P;
    float *alone = new_floats(p->n);

    for (uint32_t r = 0; r < ROWS_MAX; r++) {
        if (row_class[r] == GQA_ROW_P) {
            run(p, 1, p->x + (size_t)r * p->k, &one, 1, alone);
            cr_assert_arr_eq(alone, y + (size_t)r * p->n, p->n * sizeof(*alone),
                             "row %u has other bits alone", r);
        }
    }
    free(alone);
}

static void check_problem(enum cpu_isa isa, uint32_t type, uint32_t n, uint32_t k,
                          struct test_random *random)
{
    struct problem p = {.isa = isa, .n = n, .k = k};
    struct gqa_reason reason;
    uint8_t row_class[ROWS_MAX];
    float *y = new_floats((size_t)ROWS_MAX * n);

    test_weight_random(&p.w, random, type, n, k);
    cr_assert_eq(cpu_matrix_init(&p.matrix, &p.w.weight, &reason), 0, "%s", reason.text);
    p.x = new_floats((size_t)ROWS_MAX * k);
    p.bias = new_floats(n);
    for (uint32_t i = 0; i < ROWS_MAX * k; i++) {
        p.x[i] = test_random_normal(random);
    }
    for (uint32_t i = 0; i < n; i++) {
        p.bias[i] = test_random_normal(random);
    }
    for (uint32_t r = 0; r < ROWS_MAX; r++) {
        row_class[r] = test_random_u64(random) % 4 == 0 ? GQA_ROW_D : GQA_ROW_P;
    }
    for (uint32_t i = 0; i < ROWS_MAX * n; i++) {
        y[i] = UNTOUCHED;
    }
    run(&p, 3, p.x, row_class, ROWS_MAX, y);
    check_truth(&p, y, row_class);
    check_alone(&p, y, row_class);
    test_weight_finish(&p.w);
    free(p.x);
    free(p.bias);
    free(y);
}

static int level_has_panels(enum cpu_isa isa)
{
    struct test_host host;
    struct cpu_panels panels;

    test_host_init(&host, 1);
    cr_assert_eq(cpu_panels_init(&panels, &host.host, isa, 1, CPU_BLOCK), 0);
    int has = panels.kernels != NULL;
    cpu_panels_finish(&panels);
    return has;
}

Test(panels, every_type_on_every_level)
{
    struct test_random random = {test_seed("panels")};
    int levels = 0;

    for (int isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) {
        if (!cpu_isa_usable((enum cpu_isa)isa) || !level_has_panels((enum cpu_isa)isa)) {
            continue;
        }
        levels++;
        for (uint32_t t = 0; t < test_n_quant_types; t++) {
            check_problem((enum cpu_isa)isa, test_quant_types[t], 37, 512, &random);
        }
        check_problem((enum cpu_isa)isa, GQA_TYPE_BF16, 37, 512, &random);
        check_problem((enum cpu_isa)isa, GQA_TYPE_BF16, 16, 77, &random); /* a tail, one strip */
        check_problem((enum cpu_isa)isa, GQA_TYPE_BF16, 3, 5, &random);
    }
    if (levels == 0) {
        fprintf(stderr, "no level with panels runs here natively: they are tested emulated\n");
    }
}
