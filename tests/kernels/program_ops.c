/* tests/kernels/program_ops.c - each op of a program against float64, at every level. */
#include "tests/kernels/program_util.h"

#include "format/types.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { ROWS = 19, WIDTH = 96 };

/* Calls body once for every level that runs here. */
#define FOR_LEVELS(isa)                                            \
    for (enum cpu_isa isa = CPU_ISA_C; isa < CPU_ISA_COUNT; isa++) \
        if (cpu_isa_usable(isa))

static void fill(struct test_random *r, float *x, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++) {
        x[i] = test_random_normal(r) * scale;
    }
}

static const int32_t zero_tokens[ROWS];
static uint32_t positions[ROWS], out_rows[ROWS];

static struct gqa_batch plain_batch(uint32_t n_rows)
{
    for (uint32_t i = 0; i < ROWS; i++) {
        positions[i] = 1000003u * i;
        out_rows[i] = i;
    }
    return (struct gqa_batch){
        .struct_size = sizeof(struct gqa_batch),
        .n_rows = n_rows,
        .n_out = n_rows,
        .tokens = zero_tokens,
        .positions = positions,
        .out_rows = out_rows,
    };
}

static void near(double got, double truth, double relative, double absolute, const char *what)
{
    cr_assert(fabs(got - truth) <= fabs(truth) * relative + absolute, "%s: %.9g, truth %.9g", what,
              got, truth);
}

static void prepare_and_step(struct test_program *t, uint32_t n_rows)
{
    struct gqa_batch batch = plain_batch(n_rows);
    cr_assert_eq(test_program_step(t, &batch), 0);
}

static void must_prepare(struct test_program *t)
{
    int r = test_program_prepare(t);
    cr_assert_eq(r, 0, "%d: %s", r, t->reason.text);
}

static void check_norm(enum cpu_isa isa, uint32_t kind, uint32_t dim, struct test_random *r)
{
    struct test_program t;
    float weight[WIDTH], bias[WIDTH], x[ROWS * WIDTH];

    fill(r, weight, WIDTH, 1.0f);
    fill(r, bias, WIDTH, 1.0f);
    fill(r, x, ROWS * WIDTH, 30.0f);
    test_program_init(&t, isa, 3, ROWS);
    uint32_t src = test_program_reg(&t, WIDTH, 0), dst = test_program_reg(&t, WIDTH, 0);
    struct gqa_op *op = test_program_op(&t, GQA_OP_NORM);
    op->src = test_view(&t, src);
    op->dst = test_view(&t, dst);
    op->weight = test_program_floats(&t, weight, dim, 0);
    op->bias = test_program_floats(&t, bias, dim, 0);
    op->u.norm.kind = kind;
    op->u.norm.dim = dim;
    op->u.norm.eps = 1e-5f;
    must_prepare(&t);
    memcpy(test_program_data(&t, src), x, sizeof(x));
    prepare_and_step(&t, ROWS);
    for (uint32_t g = 0; g < ROWS * WIDTH / dim; g++) {
        const float *in = x + (size_t)g * dim;
        double mean = 0.0, variance = 0.0;
        for (uint32_t i = 0; i < dim && kind == GQA_NORM_LAYER; i++) {
            mean += (double)in[i] / dim;
        }
        for (uint32_t i = 0; i < dim; i++) {
            variance += ((double)in[i] - mean) * ((double)in[i] - mean) / dim;
        }
        for (uint32_t i = 0; i < dim; i++) {
            double y = ((double)in[i] - mean) / sqrt(variance + (double)1e-5f);
            near((double)test_program_data(&t, dst)[(size_t)g * dim + i],
                 y * (double)weight[i] + (double)bias[i], 1e-6, 1e-6, "norm");
        }
    }
    test_program_finish(&t);
}

Test(program_ops, norms_are_right_over_rows_and_heads)
{
    struct test_random r = {test_seed("norm")};

    FOR_LEVELS(isa)
    {
        check_norm(isa, GQA_NORM_RMS, WIDTH, &r);
        check_norm(isa, GQA_NORM_RMS, 32, &r);
        check_norm(isa, GQA_NORM_LAYER, WIDTH, &r);
    }
}

static void check_rope(enum cpu_isa isa, uint32_t kind, uint32_t n_rot, struct test_random *r)
{
    enum { HEAD = 32, HEADS = 3 };
    struct test_program t;
    double freqs[HEAD / 2];
    float x[ROWS * WIDTH];

    for (uint32_t i = 0; i < n_rot / 2; i++) {
        freqs[i] = pow(10000.0, -2.0 * i / n_rot);
    }
    fill(r, x, ROWS * WIDTH, 1.0f);
    test_program_init(&t, isa, 3, ROWS);
    t.ropes[0] = (struct gqa_rope_table){n_rot / 2, freqs, 1.25f};
    t.desc.n_rope_tables = 1;
    uint32_t reg = test_program_reg(&t, WIDTH, 0);
    struct gqa_op *op = test_program_op(&t, GQA_OP_ROPE);
    op->src = op->dst = test_view(&t, reg);
    op->u.rope.kind = kind;
    op->u.rope.head_dim = HEAD;
    op->u.rope.n_rot = n_rot;
    must_prepare(&t);
    memcpy(test_program_data(&t, reg), x, sizeof(x));
    prepare_and_step(&t, ROWS);
    for (uint32_t h = 0; h < ROWS * HEADS; h++) {
        const float *in = x + (size_t)h * HEAD, *out = test_program_data(&t, reg) + h * HEAD;
        for (uint32_t i = 0; i < n_rot / 2; i++) {
            uint32_t a = kind == GQA_ROPE_HALF ? i : 2 * i;
            uint32_t b = kind == GQA_ROPE_HALF ? i + n_rot / 2 : 2 * i + 1;
            double angle = (double)positions[h / HEADS] * freqs[i];
            double c = 1.25 * cos(angle), s = 1.25 * sin(angle);
            near((double)out[a], (double)in[a] * c - (double)in[b] * s, 0.0, 2e-6, "rope a");
            near((double)out[b], (double)in[a] * s + (double)in[b] * c, 0.0, 2e-6, "rope b");
        }
        cr_assert_arr_eq(out + n_rot, in + n_rot, (HEAD - n_rot) * sizeof(*in));
    }
    test_program_finish(&t);
}

Test(program_ops, rope_turns_both_pairings_and_leaves_the_rest)
{
    struct test_random r = {test_seed("rope")};

    FOR_LEVELS(isa)
    {
        check_rope(isa, GQA_ROPE_HALF, 32, &r);
        check_rope(isa, GQA_ROPE_HALF, 24, &r);
        check_rope(isa, GQA_ROPE_NEIGHBOUR, 32, &r);
        check_rope(isa, GQA_ROPE_NEIGHBOUR, 8, &r);
    }
}

static double true_act(uint32_t kind, double x, double y)
{
    double gate = fmin(x, 7.0), up = fmax(fmin(y, 7.0), -7.0);

    switch (kind) {
    case GQA_ACT_SILU:
        return x / (1.0 + exp(-x)) * y;
    case GQA_ACT_GELU_TANH:
        /* x (1 + tanh u) / 2, without the cancellation. */
        return x / (1.0 + exp(-2.0 * sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x))) * y;
    case GQA_ACT_GELU:
        return 0.5 * x * erfc(-x / sqrt(2.0)) * y;
    case GQA_ACT_RELU:
        return fmax(x, 0.0) * y;
    default:
        return gate / (1.0 + exp(-1.702 * gate)) * (up + 1.0);
    }
}

static void check_glu(enum cpu_isa isa, uint32_t kind, int gated, uint32_t width,
                      struct test_random *r)
{
    static const float odd[] = {0.0f,   -0.0f,  1e-40f,  -1e-20f, 88.0f,
                                -88.0f, 103.9f, -104.0f, 1e30f,   -1e30f};
    struct test_program t;
    float x[ROWS * WIDTH], y[ROWS * WIDTH];

    fill(r, x, ROWS * width, 5.0f);
    fill(r, y, ROWS * width, 5.0f);
    for (uint32_t i = 0; i < sizeof(odd) / sizeof(odd[0]) && i < width; i++) {
        x[i] = odd[i];
    }
    test_program_init(&t, isa, 3, ROWS);
    uint32_t a = test_program_reg(&t, width, 0), b = test_program_reg(&t, width, 0);
    struct gqa_op *op = test_program_op(&t, GQA_OP_GLU);
    op->src = op->dst = test_view(&t, a);
    if (gated) {
        op->src2 = test_view(&t, b);
    }
    op->u.glu.kind = kind;
    op->u.glu.alpha = 1.702f;
    op->u.glu.limit = 7.0f;
    must_prepare(&t);
    memcpy(test_program_data(&t, a), x, ROWS * width * sizeof(*x));
    memcpy(test_program_data(&t, b), y, ROWS * width * sizeof(*x));
    prepare_and_step(&t, ROWS);
    for (uint32_t i = 0; i < ROWS * width; i++) {
        double truth = true_act(kind, (double)x[i], gated ? (double)y[i] : 1.0);
        /* An exponent rounded to float32 is off by |z| 2^-24, and so is its exponential. */
        double bound =
            6e-7 * (1.0 + 0.5 * fmin(fabs((double)x[i]), 90.0) *
                              (kind == GQA_ACT_GELU || kind == GQA_ACT_GELU_TANH ? 8 : 1));
        near((double)test_program_data(&t, a)[i], truth, bound, 1e-35, "glu");
    }
    test_program_finish(&t);
}

Test(program_ops, activations_are_right_alone_and_gated)
{
    struct test_random r = {test_seed("glu")};

    FOR_LEVELS(isa)
    {
        for (uint32_t kind = GQA_ACT_SILU; kind <= GQA_ACT_RELU; kind++) {
            check_glu(isa, kind, 1, WIDTH, &r);
            check_glu(isa, kind, 1, 13, &r);
            if (kind != GQA_ACT_SWIGLU_OAI) {
                check_glu(isa, kind, 0, 33, &r);
            }
        }
    }
}

Test(program_ops, activations_keep_a_nan)
{
    FOR_LEVELS(isa)
    {
        struct cpu_glu_kernels kernels;
        cpu_glu_kernels(isa, &kernels);
        for (uint32_t kind = GQA_ACT_SILU; kind <= GQA_ACT_RELU; kind++) {
            float x[40], y[40];
            for (uint32_t i = 0; i < 40; i++) {
                x[i] = i == 35 ? NAN : 1.0f;
                y[i] = 2.0f;
            }
            kernels.act[kind](x, y, x, 40, 1.702f, 7.0f);
            for (uint32_t i = 0; i < 40; i++) {
                cr_assert_eq(isnan(x[i]) != 0, i == 35, "%s kind %u at %u", cpu_isa_name(isa), kind,
                             i);
            }
        }
    }
}

Test(program_ops, add_scale_and_softcap_work_on_columns)
{
    struct test_random r = {test_seed("elementwise")};
    struct test_program t;
    float x[ROWS * WIDTH];

    fill(&r, x, ROWS * WIDTH, 20.0f);
    test_program_init(&t, CPU_ISA_C, 3, ROWS);
    uint32_t a = test_program_reg(&t, WIDTH, 0);
    struct gqa_op *add = test_program_op(&t, GQA_OP_ADD);
    add->src = add->dst = (struct gqa_view){a, 0, 32};
    add->src2 = (struct gqa_view){a, 32, 32};
    add->scale = 0.25f;
    struct gqa_op *scale = test_program_op(&t, GQA_OP_SCALE);
    scale->src = scale->dst = (struct gqa_view){a, 32, 32};
    scale->scale = -3.0f;
    struct gqa_op *cap = test_program_op(&t, GQA_OP_SOFTCAP);
    cap->src = cap->dst = (struct gqa_view){a, 64, 32};
    cap->scale = 30.0f;
    must_prepare(&t);
    memcpy(test_program_data(&t, a), x, sizeof(x));
    prepare_and_step(&t, ROWS);
    for (uint32_t i = 0; i < ROWS * WIDTH; i++) {
        double in = (double)x[i], got = (double)test_program_data(&t, a)[i];
        uint32_t column = i % WIDTH;
        if (column < 32) {
            near(got, in + 0.25 * (double)x[i + 32], 1e-6, 1e-6, "add");
        } else if (column < 64) {
            near(got, -3.0 * in, 1e-7, 0.0, "scale");
        } else {
            near(got, 30.0 * tanh(in / 30.0), 1e-6, 1e-7, "softcap");
        }
    }
    test_program_finish(&t);
}

Test(program_ops, embed_reads_any_type_and_given_rows)
{
    struct test_random r = {test_seed("embed")};
    enum { VOCABULARY = 7, WIDE = 256, N = 3 };
    const int32_t tokens[N] = {6, 0, 3};
    float given[N * WIDE], truth[WIDE];

    fill(&r, given, N * WIDE, 1.0f);
    for (size_t i = 0; fmt_type_at(i) != NULL; i++) {
        const struct fmt_type_info *info = fmt_type_at(i);
        size_t bytes = fmt_type_bytes(info, WIDE) * VOCABULARY;
        uint8_t *file = malloc(bytes);
        struct test_program t;

        cr_assert_not_null(file);
        for (size_t j = 0; j < bytes; j++) {
            file[j] = (uint8_t)test_random_u64(&r) & 0x3f; /* no NaN in any type */
        }
        struct gqa_weight w = {.name = "token_embd",
                               .type = info->type,
                               .n_dims = 2,
                               .ne = {WIDE, VOCABULARY, 1, 1},
                               .data = file};
        test_program_init(&t, CPU_ISA_C, 1, N);
        uint32_t reg = test_program_reg(&t, WIDE, 0);
        struct gqa_op *op = test_program_op(&t, GQA_OP_EMBED);
        op->dst = test_view(&t, reg);
        op->weight = test_program_weight(&t, &w);
        op->scale = 2.0f;
        must_prepare(&t);
        struct gqa_batch batch = plain_batch(N);
        batch.tokens = tokens;
        cr_assert_eq(test_program_step(&t, &batch), 0);
        for (uint32_t row = 0; row < N; row++) {
            info->dequantise(file + (size_t)tokens[row] * bytes / VOCABULARY, truth, WIDE);
            for (uint32_t j = 0; j < WIDE; j++) {
                cr_assert_eq(test_program_data(&t, reg)[row * WIDE + j], truth[j] * 2.0f);
            }
        }
        batch.embeddings = given;
        batch.tokens = NULL;
        cr_assert_eq(test_program_step(&t, &batch), 0);
        cr_assert_arr_eq(test_program_data(&t, reg), given, sizeof(given));
        test_program_finish(&t);
        free(file);
    }
}

/* Positions and the first row index tables of their own, also where the tokens' rows are given. */
Test(program_ops, embed_takes_rows_by_position_and_the_first)
{
    struct test_random r = {test_seed("embed rows")};
    enum { TABLE = 5, N = 3 };
    const int32_t tokens[N] = {1, 1, 1};
    uint32_t places[N] = {4, 0, 2};
    float table[TABLE * WIDTH], given[N * WIDTH];

    fill(&r, table, TABLE * WIDTH, 1.0f);
    fill(&r, given, N * WIDTH, 1.0f);
    for (uint32_t by = GQA_EMBED_POSITION; by <= GQA_EMBED_FIRST; by++) {
        struct test_program t;
        struct gqa_batch batch = plain_batch(N);
        test_program_init(&t, CPU_ISA_C, 1, N);
        uint32_t reg = test_program_reg(&t, WIDTH, 0);
        struct gqa_op *op = test_program_op(&t, GQA_OP_EMBED);
        op->dst = test_view(&t, reg);
        op->weight = test_program_floats(&t, table, TABLE, WIDTH);
        op->scale = 1.0f;
        op->u.embed.row = by;
        must_prepare(&t);
        batch.tokens = tokens;
        batch.positions = places;
        for (int with = 0; with < 2; with++) {
            batch.embeddings = with ? given : NULL;
            cr_assert_eq(test_program_step(&t, &batch), 0);
            for (uint32_t row = 0; row < N; row++) {
                const float *truth = table + (by == GQA_EMBED_FIRST ? 0 : places[row]) * WIDTH;
                cr_assert_arr_eq(test_program_data(&t, reg) + row * WIDTH, truth,
                                 WIDTH * sizeof(*truth));
            }
        }
        places[1] = TABLE;
        cr_assert_eq(test_program_step(&t, &batch), by == GQA_EMBED_POSITION ? -EINVAL : 0);
        places[1] = 0;
        test_program_finish(&t);
    }
}

Test(program_ops, gather_takes_the_output_rows)
{
    struct test_random r = {test_seed("gather")};
    const uint32_t wanted[3] = {0, 4, 18};
    struct test_program t;
    float x[ROWS * WIDTH];

    fill(&r, x, ROWS * WIDTH, 1.0f);
    test_program_init(&t, CPU_ISA_C, 3, ROWS);
    uint32_t src = test_program_reg(&t, WIDTH, 0), dst = test_program_reg(&t, WIDTH, GQA_REG_OUT);
    struct gqa_op *op = test_program_op(&t, GQA_OP_GATHER);
    op->src = test_view(&t, src);
    op->dst = test_view(&t, dst);
    must_prepare(&t);
    memcpy(test_program_data(&t, src), x, sizeof(x));
    struct gqa_batch batch = plain_batch(ROWS);
    batch.out_rows = wanted;
    batch.n_out = 3;
    cr_assert_eq(test_program_step(&t, &batch), 0);
    for (uint32_t i = 0; i < 3; i++) {
        cr_assert_arr_eq(test_program_data(&t, dst) + i * WIDTH, x + wanted[i] * WIDTH,
                         WIDTH * sizeof(*x));
    }
    batch.n_out = 0;
    cr_assert_eq(test_program_step(&t, &batch), 0);
    test_program_finish(&t);
}
