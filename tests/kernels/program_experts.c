/* tests/kernels/program_experts.c - mixtures of experts against float64 and against their parts, in
 * other batches, and what routing does at its edges. */
#include "tests/kernels/experts_util.h"

#include "format/types.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = TEST_EXPERTS_ROWS };

/* Calls body once for every level that runs here. */
#define FOR_LEVELS(isa)                                            \
    for (enum cpu_isa isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) \
        if (cpu_isa_usable(isa))

#define F32 GQA_TYPE_F32

/* As models have them, and what they may have. */
static const struct test_shape shapes[] = {
    {.name = "mixtral",
     .n_in = 64,
     .n_ff = 96,
     .n_out = 64,
     .router_type = F32,
     .gate_type = GQA_TYPE_Q4_0,
     .up_type = GQA_TYPE_Q4_0,
     .down_type = GQA_TYPE_Q5_0,
     .op = {.n_experts = 4, .n_used = 2, .renormalise = 1, .weight_scale = 1.0f}},
    {.name = "qwen3moe",
     .n_in = 256,
     .n_ff = 256,
     .n_out = 256,
     .router_type = F32,
     .gate_type = GQA_TYPE_Q4_K,
     .up_type = GQA_TYPE_Q5_K,
     .down_type = GQA_TYPE_Q6_K,
     .op = {.n_experts = 16, .n_used = 8, .weight_scale = 1.0f}},
    {.name = "gpt-oss",
     .n_in = 64,
     .n_ff = 64,
     .n_out = 64,
     .router_type = F32,
     .gate_type = GQA_TYPE_Q8_0,
     .up_type = GQA_TYPE_Q8_0,
     .down_type = GQA_TYPE_Q4_1,
     .biases = 1,
     .op = {.n_experts = 8,
            .n_used = 4,
            .gating = GQA_GATING_SOFTMAX_CHOSEN,
            .weight_scale = 1.0f,
            .act = GQA_ACT_SWIGLU_OAI,
            .alpha = 1.702f,
            .limit = 0.7f}},
    {.name = "gpt-oss, floats",
     .n_in = 37,
     .n_ff = 29,
     .n_out = 21,
     .router_type = F32,
     .gate_type = F32,
     .up_type = F32,
     .down_type = F32,
     .biases = 1,
     .op = {.n_experts = 5,
            .n_used = 3,
            .gating = GQA_GATING_SOFTMAX_CHOSEN,
            .weight_scale = 1.0f,
            .act = GQA_ACT_SWIGLU_OAI,
            .alpha = 1.702f,
            .limit = 7.0f}},
    {.name = "mixtral, floats",
     .n_in = 40,
     .n_ff = 56,
     .n_out = 40,
     .router_type = F32,
     .gate_type = F32,
     .up_type = F32,
     .down_type = F32,
     .op = {.n_experts = 8, .n_used = 2, .renormalise = 1, .weight_scale = 1.0f}},
    {.name = "not renormalised, floats",
     .n_in = 40,
     .n_ff = 56,
     .n_out = 24,
     .router_type = F32,
     .gate_type = GQA_TYPE_F16,
     .up_type = GQA_TYPE_BF16,
     .down_type = F32,
     .op = {.n_experts = 8, .n_used = 3, .weight_scale = 1.5f}},
    {.name = "sigmoids, the choice moved",
     .n_in = 32,
     .n_ff = 48,
     .n_out = 33,
     .router_type = F32,
     .gate_type = F32,
     .up_type = F32,
     .down_type = GQA_TYPE_F16,
     .moved_choice = 1,
     .op = {.n_experts = 12,
            .n_used = 4,
            .gating = GQA_GATING_SIGMOID,
            .renormalise = 1,
            .weight_scale = 2.5f}},
    {.name = "sigmoids as they are",
     .n_in = 32,
     .n_ff = 48,
     .n_out = 33,
     .router_type = F32,
     .gate_type = F32,
     .up_type = F32,
     .down_type = F32,
     .op = {.n_experts = 12, .n_used = 4, .gating = GQA_GATING_SIGMOID, .weight_scale = 1.0f}},
    {.name = "softmax, the choice moved",
     .n_in = 32,
     .n_ff = 48,
     .n_out = 33,
     .router_type = F32,
     .gate_type = F32,
     .up_type = F32,
     .down_type = F32,
     .moved_choice = 1,
     .op = {.n_experts = 6, .n_used = 2, .weight_scale = 1.0f}},
    {.name = "gate and up in one",
     .n_in = 64,
     .n_ff = 64,
     .n_out = 32,
     .router_type = F32,
     .gate_type = F32,
     .up_type = GQA_TYPE_Q5_1,
     .down_type = GQA_TYPE_F16,
     .biases = 1,
     .op = {.n_experts = 4, .n_used = 2, .renormalise = 1, .weight_scale = 1.0f, .fused = 1}},
    {.name = "no gate, all experts",
     .n_in = 64,
     .n_ff = 32,
     .n_out = 48,
     .router_type = GQA_TYPE_Q8_0,
     .gate_type = F32,
     .up_type = GQA_TYPE_Q8_0,
     .down_type = GQA_TYPE_Q8_0,
     .biases = 1,
     .no_gate = 1,
     .op = {.n_experts = 5, .n_used = 5, .weight_scale = 1.0f, .act = GQA_ACT_RELU}},
};

#define N_SHAPES (sizeof(shapes) / sizeof(shapes[0]))

static int all_floats(const struct test_shape *s)
{
    return s->op.act != GQA_ACT_RELU && cpu_layout_of(s->gate_type) == CPU_LAYOUT_COUNT &&
           cpu_layout_of(s->up_type) == CPU_LAYOUT_COUNT &&
           cpu_layout_of(s->down_type) == CPU_LAYOUT_COUNT;
}

static double largest_of(const double *x, size_t n)
{
    double largest = 0.0;
    for (size_t i = 0; i < n; i++) {
        largest = fmax(largest, fabs(x[i]));
    }
    return largest;
}

/* Of float weights three products and an activation in float32, of quantised ones activations of
 * eight bits: half a step of 1/127 of the peak of 32 values, twice. */
static void check_truth(const struct test_mixture *m, enum cpu_isa isa)
{
    static float got[ROWS * TEST_WIDTH_MAX];
    static double truth[ROWS * TEST_WIDTH_MAX];
    uint32_t n_out = m->shape.n_out;
    double worst = 0.0, bound = all_floats(&m->shape) ? 3e-6 : 2e-2;

    test_mixture_run(m, isa, 2, got);
    for (uint32_t row = 0; row < ROWS; row++) {
        test_mixture_truth(m, isa, row, truth + (size_t)row * n_out);
    }
    for (size_t i = 0; i < (size_t)ROWS * n_out; i++) {
        worst = fmax(worst, fabs((double)got[i] - truth[i]));
    }
    double largest = largest_of(truth, (size_t)ROWS * n_out);
    fprintf(stderr, "%s, %s: off by %.2e of %.2e\n", m->shape.name, cpu_isa_name(isa), worst,
            largest);
    cr_assert(worst <= bound * largest, "%s, %s: off by %g of %g", m->shape.name, cpu_isa_name(isa),
              worst, largest);
}

Test(experts, are_what_float64_says)
{
    struct test_random r = {test_seed("experts in float64")};

    for (size_t i = 0; i < N_SHAPES; i++) {
        struct test_mixture m;
        test_mixture_init(&m, &shapes[i], &r);
        FOR_LEVELS(isa)
        {
            check_truth(&m, isa);
        }
        test_mixture_finish(&m);
    }
}

/* The same products and activations, row by row and expert by expert: only the weights, which
 * begin from logits in float64, differ by roundings. */
Test(experts, are_what_their_parts_give)
{
    struct test_random r = {test_seed("experts by parts")};
    static float got[ROWS * TEST_WIDTH_MAX], parts[TEST_WIDTH_MAX];

    for (size_t i = 0; i < N_SHAPES; i++) {
        struct test_mixture m;
        test_mixture_init(&m, &shapes[i], &r);
        FOR_LEVELS(isa)
        {
            test_mixture_run(&m, isa, 1, got);
            for (uint32_t row = 0; row < ROWS; row++) {
                test_mixture_by_parts(&m, isa, row, parts);
                const float *y = got + (size_t)row * m.shape.n_out;
                float largest = 0.0f;
                for (uint32_t j = 0; j < m.shape.n_out; j++) {
                    largest = fmaxf(largest, fabsf(parts[j]));
                }
                for (uint32_t j = 0; j < m.shape.n_out; j++) {
                    cr_assert(fabsf(y[j] - parts[j]) <= 4e-6f * largest,
                              "%s, %s, row %u, %u: %.9g, parts %.9g", m.shape.name,
                              cpu_isa_name(isa), row, j, (double)y[j], (double)parts[j]);
                }
            }
        }
        test_mixture_finish(&m);
    }
}

/* Chunks of any size, room for more or fewer rows, any number of workers: the same bits. */
Test(experts, rows_do_not_depend_on_the_batch)
{
    static const uint32_t chunks[][ROWS] = {{1, 47}, {17, 16, 15}, {5, 40, 1, 2}, {32, 7, 9}};
    static const uint32_t rooms[] = {47, 17, 40, 200};
    struct test_random r = {test_seed("experts in chunks")};
    static float first[ROWS * TEST_WIDTH_MAX], got[ROWS * TEST_WIDTH_MAX];

    for (size_t i = 0; i < N_SHAPES; i++) {
        struct test_mixture m;
        test_mixture_init(&m, &shapes[i], &r);
        size_t bytes = (size_t)ROWS * m.shape.n_out * sizeof(float);
        FOR_LEVELS(isa)
        {
            test_mixture_run(&m, isa, 1, first);
            test_mixture_run(&m, isa, 2, got);
            cr_assert_arr_eq(got, first, bytes, "%s, %s: two workers", m.shape.name,
                             cpu_isa_name(isa));
            for (uint32_t c = 0; c < sizeof(chunks) / sizeof(chunks[0]); c++) {
                struct test_program t;
                test_mixture_program(&t, &m, isa, c % 3 + 1, rooms[c]);
                for (uint32_t at = 0, j = 0; at < ROWS; at += chunks[c][j++]) {
                    test_mixture_step(&t, &m, at, chunks[c][j], got + (size_t)at * m.shape.n_out);
                }
                cr_assert_arr_eq(got, first, bytes, "%s, %s, chunks %u", m.shape.name,
                                 cpu_isa_name(isa), c);
                test_program_finish(&t);
            }
        }
        test_mixture_finish(&m);
    }
}

/* Every number of rows, each against the batch of all. */
Test(experts, batches_of_every_size_are_the_same)
{
    struct test_random r = {test_seed("experts, sizes")};
    static float all[ROWS * TEST_WIDTH_MAX], got[ROWS * TEST_WIDTH_MAX];
    struct test_mixture m;

    test_mixture_init(&m, &shapes[0], &r);
    FOR_LEVELS(isa)
    {
        struct test_program t;
        test_mixture_run(&m, isa, 2, all);
        test_mixture_program(&t, &m, isa, 2, ROWS);
        for (uint32_t n = 1; n <= ROWS; n++) {
            test_mixture_step(&t, &m, ROWS - n, n, got);
            cr_assert_arr_eq(got, all + (size_t)(ROWS - n) * m.shape.n_out,
                             n * m.shape.n_out * sizeof(float), "%s, %u rows", cpu_isa_name(isa),
                             n);
        }
        test_program_finish(&t);
    }
    test_mixture_finish(&m);
}

/* Quantised weights only, and an activation that all levels share: what linear.h promises of
 * products holds for the mixture. */
Test(experts, quantised_mixtures_are_the_same_at_all_levels)
{
    struct test_random r = {test_seed("experts, levels")};
    static float truth[ROWS * TEST_WIDTH_MAX], got[ROWS * TEST_WIDTH_MAX];

    for (uint32_t i = 0; i < 2 * test_n_quant_types; i++) {
        struct test_shape s = shapes[i < test_n_quant_types ? 1 : N_SHAPES - 1];
        struct test_mixture m;

        s.n_in = s.n_ff = s.n_out = 256;
        s.router_type = s.gate_type = s.up_type = s.down_type =
            test_quant_types[i % test_n_quant_types];
        s.op.act = i % 2 == 0 ? GQA_ACT_RELU : GQA_ACT_GELU;
        test_mixture_init(&m, &s, &r);
        test_mixture_run(&m, CPU_ISA_C, 1, truth);
        FOR_LEVELS(isa)
        {
            test_mixture_run(&m, isa, 2, got);
            cr_assert_arr_eq(got, truth, (size_t)ROWS * s.n_out * sizeof(float), "%s, %s, type %u",
                             s.name, cpu_isa_name(isa), s.up_type);
        }
        test_mixture_finish(&m);
    }
}

/* One row reads the router and the experts that it chose; many rows all of them, at most once. */
Test(experts, bytes_that_are_read_are_counted)
{
    struct test_random r = {test_seed("bytes")};
    for (size_t s = 0; s < N_SHAPES; s++) {
        struct test_mixture m;
        struct test_program t;
        struct gqa_op_time time;
        static float y[ROWS * TEST_WIDTH_MAX];
        test_mixture_init(&m, &shapes[s], &r);
        test_mixture_program(&t, &m, CPU_ISA_C, 1, ROWS);
        const uint32_t n_experts = shapes[s].op.n_experts, n_used = shapes[s].op.n_used;
        uint64_t router = cpu_weight_read_bytes(&m.router.weight);
        uint64_t all =
            cpu_weight_read_bytes(&m.up.weight) + cpu_weight_read_bytes(&m.down.weight) +
            (shapes[s].no_gate || shapes[s].op.fused ? 0 : cpu_weight_read_bytes(&m.gate.weight));
        test_mixture_step(&t, &m, 0, 1, y);
        cr_assert_eq(cpu_program_op_times(&t.context, t.program, &time, 1), 1);
        cr_expect_eq(time.kind, GQA_OP_EXPERTS);
        cr_expect_eq(time.bytes, router + all / n_experts * n_used, "%s", shapes[s].name);
        test_mixture_step(&t, &m, 0, ROWS, y);
        cpu_program_op_times(&t.context, t.program, &time, 1);
        cr_expect(time.bytes <= 2 * router + all / n_experts * n_used + all, "%s", shapes[s].name);
        test_program_finish(&t);
        test_mixture_finish(&m);
    }
}

/* Experts 1 and 6 are never chosen, 3 always. */
Test(experts, may_have_no_rows_or_all)
{
    struct test_random r = {test_seed("experts without rows")};
    struct test_shape s = shapes[2];
    struct test_mixture m;

    test_mixture_init(&m, &s, &r);
    m.router_bias[1] = m.router_bias[6] = -1e3f;
    m.router_bias[3] = 50.0f;
    for (uint32_t row = 0; row < ROWS; row++) {
        double logits[TEST_WIDTH_MAX], weights[TEST_WIDTH_MAX];
        uint32_t ids[TEST_WIDTH_MAX], seen = 0;
        test_mixture_logits(&m, CPU_ISA_C, row, logits);
        test_mixture_route(&m, logits, ids, weights);
        for (uint32_t i = 0; i < s.op.n_used; i++) {
            cr_assert(ids[i] != 1 && ids[i] != 6);
            seen += ids[i] == 3;
        }
        cr_assert_eq(seen, 1u);
    }
    FOR_LEVELS(isa)
    {
        check_truth(&m, isa);
    }
    test_mixture_finish(&m);
}

/* A row of NaN gives NaN, reads nothing outside, and leaves its neighbours alone. */
Test(experts, not_a_number_stays_in_its_row)
{
    struct test_random r = {test_seed("experts, NaN")};
    static float clean[ROWS * TEST_WIDTH_MAX], got[ROWS * TEST_WIDTH_MAX];

    for (size_t i = 0; i < N_SHAPES; i++) {
        struct test_mixture m;
        test_mixture_init(&m, &shapes[i], &r);
        uint32_t n_out = m.shape.n_out;
        FOR_LEVELS(isa)
        {
            float kept = m.x[7 * m.shape.n_in + 3];
            test_mixture_run(&m, isa, 2, clean);
            m.x[7 * m.shape.n_in + 3] = NAN;
            test_mixture_run(&m, isa, 2, got);
            m.x[7 * m.shape.n_in + 3] = kept;
            for (uint32_t j = 0; j < n_out; j++) {
                cr_assert(isnan(got[7 * n_out + j]), "%s, %s: column %u is %g", m.shape.name,
                          cpu_isa_name(isa), j, (double)got[7 * n_out + j]);
            }
            memcpy(got + 7 * n_out, clean + 7 * n_out, n_out * sizeof(float));
            cr_assert_arr_eq(got, clean, (size_t)ROWS * n_out * sizeof(float), "%s", m.shape.name);
        }
        test_mixture_finish(&m);
    }
}

/* ---- routing ----------------------------------------------------------------------------- */

static void chosen(const struct gqa_op_experts *op, const float *logits, const float *bias,
                   const uint32_t *ids, const float *weights)
{
    uint32_t got_ids[8];
    float got_weights[8];

    cpu_experts_route(op, logits, bias, got_ids, got_weights);
    for (uint32_t i = 0; i < op->n_used; i++) {
        cr_expect_eq(got_ids[i], ids[i], "%u: expert %u instead of %u", i, got_ids[i], ids[i]);
        if (weights != NULL) {
            cr_expect(fabsf(got_weights[i] - weights[i]) <= 1e-7f, "%u: weight %.9g, not %.9g", i,
                      (double)got_weights[i], (double)weights[i]);
        }
    }
}

Test(routing, of_equals_the_lowest_is_chosen)
{
    struct gqa_op_experts op = {
        .n_experts = 6, .n_used = 3, .renormalise = 1, .weight_scale = 1.0f};
    const float third = 1.0f / 3.0f;

    chosen(&op, (float[]){1, 1, 1, 1, 1, 1}, NULL, (uint32_t[]){0, 1, 2},
           (float[]){third, third, third});
    chosen(&op, (float[]){0, 2, 0, 2, 2, 2}, NULL, (uint32_t[]){1, 3, 4},
           (float[]){third, third, third});
    chosen(&op, (float[]){5, 5, 7, 5, 5, 7}, NULL, (uint32_t[]){0, 2, 5}, NULL);
    op.gating = GQA_GATING_SIGMOID;
    chosen(&op, (float[]){1, 2, 2, 2, 2, 3}, NULL, (uint32_t[]){1, 2, 5}, NULL);
}

Test(routing, logits_that_round_to_equal_scores_keep_their_order)
{
    struct gqa_op_experts op = {.n_experts = 4, .n_used = 1, .weight_scale = 1.0f};
    const float close[4] = {-200.0f, -199.0f, -198.0f, -200.0f};
    const float far[4] = {90.0f, 91.0f, 40.0f, 92.0f};

    chosen(&op, close, NULL, (uint32_t[]){2}, NULL);
    op.gating = GQA_GATING_SIGMOID;
    chosen(&op, far, NULL, (uint32_t[]){3}, (float[]){1.0f});
}

Test(routing, the_bias_moves_the_choice_and_not_the_weights)
{
    struct gqa_op_experts op = {
        .n_experts = 3, .n_used = 1, .gating = GQA_GATING_SIGMOID, .weight_scale = 2.0f};

    chosen(&op, (float[]){0, 4, -4}, (float[]){0.1f, 0, 2}, (uint32_t[]){2},
           (float[]){2.0f / (1.0f + expf(4.0f))});
    op.gating = GQA_GATING_SOFTMAX;
    chosen(&op, (float[]){0, 0, -INFINITY}, (float[]){0, 0, 1}, (uint32_t[]){2}, (float[]){0.0f});
}

Test(routing, extreme_logits_stay_in_bounds)
{
    struct gqa_op_experts op = {
        .n_experts = 5, .n_used = 3, .renormalise = 1, .weight_scale = 1.0f};

    for (uint32_t gating = 0; gating <= GQA_GATING_SOFTMAX_CHOSEN; gating++) {
        op.gating = gating;
        chosen(&op, (float[]){NAN, 1, NAN, 3, NAN}, NULL, (uint32_t[]){0, 1, 3}, NULL);
        chosen(&op, (float[]){NAN, NAN, NAN, NAN, NAN}, NULL, (uint32_t[]){0, 1, 2}, NULL);
        chosen(&op, (float[]){NAN, -INFINITY, 0, INFINITY, -1}, NULL, (uint32_t[]){2, 3, 4}, NULL);
        chosen(&op, (float[]){1, 2, 3, 4, 5}, (float[]){NAN, NAN, NAN, NAN, NAN},
               (uint32_t[]){0, 1, 2}, NULL);
    }
    op.gating = GQA_GATING_SOFTMAX;
    chosen(&op, (float[]){3e38f, -3e38f, 3e38f, -3e38f, 0}, NULL, (uint32_t[]){0, 2, 4},
           (float[]){0.5f, 0.5f, 0.0f});
    op.gating = GQA_GATING_SIGMOID;
    chosen(&op, (float[]){-3e38f, -3e38f, -3e38f, -3e38f, -3e38f}, NULL, (uint32_t[]){0, 1, 2},
           (float[]){0.0f, 0.0f, 0.0f});
}

/* ---- packing ----------------------------------------------------------------------------- */

/* In ranges that do not stop at experts. */
Test(packing, experts_lie_one_after_the_other)
{
    struct test_random r = {test_seed("packed experts")};

    for (uint32_t i = 0; i < test_n_quant_types; i++) {
        struct test_weight all;
        test_weight_experts(&all, &r, test_quant_types[i], 48, 256, 3);
        uint64_t bytes = all.weight.packed_bytes / 3;
        cr_assert_gt(bytes, 0);
        for (uint32_t e = 0; e < 3; e++) {
            struct test_weight one = test_weight_expert(&all, e);
            cr_assert_eq(one.weight.packed_bytes, bytes);
            cr_assert_arr_eq((uint8_t *)all.packed + e * bytes, one.packed, bytes);
            free(one.packed);
        }
        memset(all.packed, 0x5a, 3 * bytes);
        cr_assert_eq(cpu_weights_pack(&all.weight, 0, 64, all.packed), 0);
        cr_assert_eq(cpu_weights_pack(&all.weight, 64, 80, all.packed), 0);
        struct test_weight last = test_weight_expert(&all, 2);
        cr_assert_arr_eq((uint8_t *)all.packed + 2 * bytes, last.packed, bytes);
        free(last.packed);
        cr_assert_lt(cpu_weights_pack(&all.weight, 64, 96, all.packed), 0, "past the last");
        test_weight_finish(&all);
    }
}

Test(packing, strips_do_not_hold_two_experts)
{
    struct gqa_weight w = {
        .name = "w", .type = GQA_TYPE_Q8_0, .n_dims = 3, .ne = {64, 24, 4, 1}, .data = &w};

    cr_assert_eq(cpu_weights_packed_bytes(&w), 0);
    cr_assert_lt(cpu_weights_pack(&w, 0, 16, &w), 0);
    w.ne[1] = 32;
    cr_assert_gt(cpu_weights_packed_bytes(&w), 0);
    w.ne[2] = UINT64_MAX / 2;
    cr_assert_eq(cpu_weights_packed_bytes(&w), 0);
    w.ne[2] = 0;
    cr_assert_eq(cpu_weights_packed_bytes(&w), 0);
    w.n_dims = 4;
    w.ne[2] = 4;
    cr_assert_eq(cpu_weights_packed_bytes(&w), 0);
}
