/* tests/kernels/program_adapters.c - rows with adapters of their own, in one batch: against
 * float64, and against each row alone. */
#include "tests/kernels/program_util.h"

#include "format/types.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 41, N_IN = 64, Q = 48, K = 32, WIDTH = Q + K, RANK_MAX = 20 };
enum { LOW = 7, HIGH = 900 }; /* ids: LOW adapts both matrices, HIGH the first only */

#define FOR_LEVELS(isa)                                            \
    for (enum cpu_isa isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) \
        if (cpu_isa_usable(isa))

/* Two matrices of one input, as q and k are; q has a bias. */
struct model {
    struct test_weight q, k;
    struct test_weight low_q[2], low_k[2], high_q[2]; /* a and b */
    float bias[Q];
    float x[ROWS * N_IN];
    uint32_t ids[ROWS];
};

static const float low_scale = 0.25f, high_scale = -2.0f;

static void model_init(struct model *m, struct test_random *r, uint32_t base_type, uint32_t a_type,
                       uint32_t b_type)
{
    static const uint32_t ids[] = {GQA_NONE, LOW, HIGH};

    test_weight_random(&m->q, r, base_type, Q, N_IN);
    test_weight_random(&m->k, r, base_type, K, N_IN);
    test_weight_random(&m->low_q[0], r, a_type, 4, N_IN);
    test_weight_random(&m->low_q[1], r, b_type, Q, 4);
    test_weight_random(&m->low_k[0], r, a_type, RANK_MAX, N_IN);
    test_weight_random(&m->low_k[1], r, b_type, K, RANK_MAX);
    test_weight_random(&m->high_q[0], r, a_type, 17, N_IN);
    test_weight_random(&m->high_q[1], r, b_type, Q, 17);
    for (uint32_t i = 0; i < Q; i++) {
        m->bias[i] = test_random_normal(r);
    }
    for (uint32_t i = 0; i < ROWS * N_IN; i++) {
        m->x[i] = test_random_normal(r);
    }
    for (uint32_t i = 0; i < ROWS; i++) {
        m->ids[i] = ids[test_random_u64(r) % 3];
    }
}

static void model_finish(struct model *m)
{
    struct test_weight *all[] = {&m->q,        &m->k,        &m->low_q[0],  &m->low_q[1],
                                 &m->low_k[0], &m->low_k[1], &m->high_q[0], &m->high_q[1]};
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        test_weight_finish(all[i]);
    }
}

static void add_adapter(struct test_program *t, uint32_t id, uint32_t weight,
                        const struct test_weight factors[2], float scale)
{
    uint32_t a = test_program_weight(t, &factors[0].weight);
    uint32_t b = test_program_weight(t, &factors[1].weight);
    test_program_adapter(t, id, weight, a, b, scale);
}

/* x: register 0; register 1: q and k side by side, of rows with adapters; register 2: k once more,
 * without. */
static void begin(struct test_program *t, const struct model *m, enum cpu_isa isa,
                  uint32_t n_threads)
{
    test_program_init(t, isa, n_threads, ROWS);
    uint32_t x = test_program_reg(t, N_IN, 0);
    uint32_t y = test_program_reg(t, WIDTH, 0), plain = test_program_reg(t, K, 0);
    uint32_t q = test_program_weight(t, &m->q.weight), k = test_program_weight(t, &m->k.weight);
    uint32_t bias = test_program_floats(t, m->bias, Q, 0);
    const struct gqa_view views[3] = {{y, 0, Q}, {y, Q, K}, {plain, 0, K}};

    for (uint32_t i = 0; i < 3; i++) {
        struct gqa_op *op = test_program_op(t, GQA_OP_LINEAR);
        op->src = test_view(t, x);
        op->dst = views[i];
        op->weight = i == 0 ? q : k;
        op->bias = i == 0 ? bias : GQA_NONE;
        op->u.linear.adapters = i < 2;
    }
    add_adapter(t, HIGH, q, m->high_q, high_scale);
    add_adapter(t, LOW, k, m->low_k, low_scale);
    add_adapter(t, LOW, q, m->low_q, low_scale);
    cr_assert_eq(test_program_prepare(t), 0, "%s", t->reason.text);
}

static void *no_memory(void *data, size_t bytes)
{
    cr_assert_fail("%zu bytes asked for in a step", bytes);
    return NULL;
}

/* Rows [first, first + n) of x with their ids, or without any. */
static void step(struct test_program *t, const struct model *m, const uint32_t *ids, uint32_t first,
                 uint32_t n, float *ret_y, float *ret_plain)
{
    static const int32_t tokens[ROWS];
    struct gqa_batch batch = {.struct_size = sizeof(batch),
                              .n_rows = n,
                              .tokens = tokens,
                              .adapters = ids != NULL ? ids + first : NULL};
    void *(*allocate)(void *data, size_t bytes) = t->host.host.allocate;

    memcpy(test_program_data(t, 0), m->x + first * N_IN, n * N_IN * sizeof(float));
    t->host.host.allocate = no_memory;
    cr_assert_eq(test_program_step(t, &batch), 0);
    t->host.host.allocate = allocate;
    memcpy(ret_y, test_program_data(t, 1), n * WIDTH * sizeof(float));
    memcpy(ret_plain, test_program_data(t, 2), n * K * sizeof(float));
}

/* y (n) = weight x */
static void true_product(const struct test_weight *w, const double *x, double *y)
{
    float row[N_IN];

    for (uint32_t o = 0; o < w->weight.ne[1]; o++) {
        test_weight_row(w, o, row);
        y[o] = 0.0;
        for (uint32_t i = 0; i < w->weight.ne[0]; i++) {
            y[o] += (double)row[i] * x[i];
        }
    }
}

/* What the row's adapter adds: (WIDTH) */
static void true_change(const struct model *m, uint32_t row, double *ret)
{
    double x[N_IN], t[RANK_MAX];

    for (uint32_t i = 0; i < N_IN; i++) {
        x[i] = (double)m->x[row * N_IN + i];
    }
    memset(ret, 0, WIDTH * sizeof(*ret));
    if (m->ids[row] == GQA_NONE) {
        return;
    }
    int low = m->ids[row] == LOW;
    true_product(low ? &m->low_q[0] : &m->high_q[0], x, t);
    true_product(low ? &m->low_q[1] : &m->high_q[1], t, ret);
    if (low) {
        true_product(&m->low_k[0], x, t);
        true_product(&m->low_k[1], t, ret + Q);
    }
    for (uint32_t i = 0; i < WIDTH; i++) {
        ret[i] *= (double)(low ? low_scale : high_scale);
    }
}

static const uint32_t factor_types[][2] = {{GQA_TYPE_F32, GQA_TYPE_F32},
                                           {GQA_TYPE_F16, GQA_TYPE_F16},
                                           {GQA_TYPE_BF16, GQA_TYPE_BF16},
                                           {GQA_TYPE_F32, GQA_TYPE_F16}};

/* Over the base's own result, which tests of the products cover. Float32 sums of 64 and of 20
 * terms: a few 2^-24 of the largest. */
static void check_change(struct model *m, enum cpu_isa isa)
{
    struct test_program t;
    static float y[ROWS * WIDTH], base[ROWS * WIDTH], plain[ROWS * K], base_plain[ROWS * K];
    double change[WIDTH], worst = 0.0, largest = 0.0;

    begin(&t, m, isa, 2);
    step(&t, m, NULL, 0, ROWS, base, base_plain);
    step(&t, m, m->ids, 0, ROWS, y, plain);
    cr_assert_arr_eq(plain, base_plain, sizeof(plain), "a LINEAR without adapters");
    for (uint32_t row = 0; row < ROWS; row++) {
        const float *got = y + row * WIDTH, *from = base + row * WIDTH;
        true_change(m, row, change);
        for (uint32_t i = 0; i < WIDTH; i++) {
            worst = fmax(worst, fabs((double)got[i] - (double)from[i] - change[i]));
            largest = fmax(largest, fabs(change[i]));
            cr_assert(change[i] != 0.0 || got[i] == from[i], "row %u has no adapter", row);
        }
    }
    fprintf(stderr, "%s: off by %.2e of %.2e\n", cpu_isa_name(isa), worst, largest);
    cr_assert(worst <= 1e-6 * largest, "%s: off by %g of %g", cpu_isa_name(isa), worst, largest);
    test_program_finish(&t);
}

Test(adapters, rows_of_two_and_of_none_share_a_batch)
{
    struct test_random r = {test_seed("adapters")};
    static struct model m;

    for (size_t i = 0; i < sizeof(factor_types) / sizeof(factor_types[0]); i++) {
        uint32_t base = i % 2 == 0 ? GQA_TYPE_F32 : GQA_TYPE_Q8_0;
        model_init(&m, &r, base, factor_types[i][0], factor_types[i][1]);
        FOR_LEVELS(isa)
        {
            check_change(&m, isa);
        }
        model_finish(&m);
    }
}

/* Alone, in chunks, with other neighbours, by any number of workers: the same bits. */
Test(adapters, rows_do_not_depend_on_what_others_carry)
{
    struct test_random r = {test_seed("adapters in batches")};
    static struct model m;
    static float all[ROWS * WIDTH], got[ROWS * WIDTH], plain[ROWS * K];
    uint32_t others[ROWS];

    model_init(&m, &r, GQA_TYPE_Q4_0, GQA_TYPE_F32, GQA_TYPE_F16);
    FOR_LEVELS(isa)
    {
        struct test_program t;
        begin(&t, &m, isa, 1);
        step(&t, &m, m.ids, 0, ROWS, all, plain);
        for (uint32_t row = 0; row < ROWS; row++) {
            step(&t, &m, m.ids, row, 1, got, plain);
            cr_assert_arr_eq(got, all + row * WIDTH, WIDTH * sizeof(float), "%s, row %u alone",
                             cpu_isa_name(isa), row);
        }
        for (uint32_t row = 0; row < ROWS; row++) {
            others[row] = row % 5 == 0 ? m.ids[row] : row % 2 == 0 ? LOW : GQA_NONE;
        }
        step(&t, &m, others, 0, ROWS, got, plain);
        for (uint32_t row = 0; row < ROWS; row += 5) {
            cr_assert_arr_eq(got + row * WIDTH, all + row * WIDTH, WIDTH * sizeof(float),
                             "%s, row %u among others", cpu_isa_name(isa), row);
        }
        test_program_finish(&t);
        begin(&t, &m, isa, 3);
        step(&t, &m, m.ids, 0, 19, got, plain);
        step(&t, &m, m.ids, 19, ROWS - 19, got + 19 * WIDTH, plain);
        cr_assert_arr_eq(got, all, sizeof(all), "%s, two chunks", cpu_isa_name(isa));
        test_program_finish(&t);
    }
    model_finish(&m);
}

/* An output row carries the id of the row that it was. */
Test(adapters, output_rows_keep_their_ids)
{
    struct test_random r = {test_seed("adapters of output rows")};
    static struct model m;
    static float all[ROWS * WIDTH], plain[ROWS * K];
    static const int32_t tokens[ROWS];
    const uint32_t out_rows[4] = {2, 3, 17, 40};
    struct test_program t;

    model_init(&m, &r, GQA_TYPE_F32, GQA_TYPE_F32, GQA_TYPE_F32);
    m.ids[2] = HIGH;
    m.ids[3] = LOW;
    m.ids[17] = GQA_NONE;
    begin(&t, &m, CPU_ISA_C, 2);
    step(&t, &m, m.ids, 0, ROWS, all, plain);
    test_program_finish(&t);

    test_program_init(&t, CPU_ISA_C, 2, ROWS);
    uint32_t x = test_program_reg(&t, N_IN, 0), last = test_program_reg(&t, N_IN, GQA_REG_OUT);
    uint32_t y = test_program_reg(&t, Q, GQA_REG_OUT);
    uint32_t q = test_program_weight(&t, &m.q.weight);
    struct gqa_op *op = test_program_op(&t, GQA_OP_GATHER);
    op->src = test_view(&t, x);
    op->dst = test_view(&t, last);
    op = test_program_op(&t, GQA_OP_LINEAR);
    op->src = test_view(&t, last);
    op->dst = test_view(&t, y);
    op->weight = q;
    op->bias = test_program_floats(&t, m.bias, Q, 0);
    op->u.linear.adapters = 1;
    add_adapter(&t, LOW, q, m.low_q, low_scale);
    add_adapter(&t, HIGH, q, m.high_q, high_scale);
    cr_assert_eq(test_program_prepare(&t), 0, "%s", t.reason.text);
    memcpy(test_program_data(&t, x), m.x, sizeof(m.x));
    struct gqa_batch batch = {.struct_size = sizeof(batch),
                              .n_rows = ROWS,
                              .n_out = 4,
                              .tokens = tokens,
                              .out_rows = out_rows,
                              .adapters = m.ids};
    cr_assert_eq(test_program_step(&t, &batch), 0);
    for (uint32_t i = 0; i < 4; i++) {
        cr_assert_arr_eq(test_program_data(&t, y) + i * Q, all + out_rows[i] * WIDTH,
                         Q * sizeof(float), "output row %u", i);
    }
    batch.n_out = 0;
    cr_assert_eq(test_program_step(&t, &batch), 0);
    test_program_finish(&t);
    model_finish(&m);
}

Test(adapters, an_id_that_no_entry_has_is_refused)
{
    struct test_random r = {test_seed("adapters, ids")};
    static struct model m;
    static const int32_t tokens[ROWS];
    struct gqa_batch batch = {
        .struct_size = sizeof(batch), .n_rows = ROWS, .tokens = tokens, .adapters = m.ids};
    struct test_program t;

    model_init(&m, &r, GQA_TYPE_F32, GQA_TYPE_F32, GQA_TYPE_F32);
    begin(&t, &m, CPU_ISA_C, 1);
    m.ids[ROWS - 1] = LOW + 1;
    cr_assert_eq(test_program_step(&t, &batch), -EINVAL);
    m.ids[ROWS - 1] = 0;
    cr_assert_eq(test_program_step(&t, &batch), -EINVAL);
    m.ids[ROWS - 1] = HIGH;
    cr_assert_eq(test_program_step(&t, &batch), 0);
    test_program_finish(&t);
    model_finish(&m);
}
