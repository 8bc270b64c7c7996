/* tests/kernels/experts_util.c - see experts_util.h. */
#include "tests/kernels/experts_util.h"

#include "format/types.h"

#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

static void fill(struct test_random *r, float *x, size_t n, float scale)
{
    for (size_t i = 0; i < n; i++) {
        x[i] = test_random_normal(r) * scale;
    }
}

void test_mixture_init(struct test_mixture *m, const struct test_shape *shape,
                       struct test_random *r)
{
    const struct test_shape *s = shape;
    uint32_t n_experts = s->op.n_experts, n_up = s->op.fused ? 2 * s->n_ff : s->n_ff;
    size_t n_biases = (size_t)n_experts * (2 + s->n_ff + n_up + s->n_out);

    cr_assert(s->n_in <= TEST_WIDTH_MAX && s->n_out <= TEST_WIDTH_MAX && n_up <= TEST_WIDTH_MAX);
    memset(m, 0, sizeof(*m));
    m->shape = *shape;
    test_weight_random(&m->router, r, s->router_type, n_experts, s->n_in);
    test_weight_experts(&m->gate, r, s->gate_type, s->n_ff, s->n_in, n_experts);
    test_weight_experts(&m->up, r, s->up_type, n_up, s->n_in, n_experts);
    test_weight_experts(&m->down, r, s->down_type, s->n_out, s->n_ff, n_experts);
    m->biases = malloc(n_biases * sizeof(float));
    m->x = malloc((size_t)TEST_EXPERTS_ROWS * s->n_in * sizeof(float));
    cr_assert(m->biases != NULL && m->x != NULL);
    fill(r, m->biases, n_biases, 1.0f);
    fill(r, m->x, (size_t)TEST_EXPERTS_ROWS * s->n_in, 0.5f);
    m->router_bias = m->biases;
    m->selection_bias = m->router_bias + n_experts;
    m->gate_bias = m->selection_bias + n_experts;
    m->up_bias = m->gate_bias + (size_t)n_experts * s->n_ff;
    m->down_bias = m->up_bias + (size_t)n_experts * n_up;
}

void test_mixture_finish(struct test_mixture *m)
{
    test_weight_finish(&m->router);
    test_weight_finish(&m->gate);
    test_weight_finish(&m->up);
    test_weight_finish(&m->down);
    free(m->biases);
    free(m->x);
}

static void *no_memory(void *data, size_t bytes)
{
    cr_assert_fail("%zu bytes asked for in a step", bytes);
    return NULL;
}

void test_mixture_program(struct test_program *t, const struct test_mixture *m, enum cpu_isa isa,
                          uint32_t n_threads, uint32_t max_rows)
{
    const struct test_shape *s = &m->shape;
    uint32_t n_experts = s->op.n_experts, n_up = s->op.fused ? 2 * s->n_ff : s->n_ff;
    struct gqa_op_experts op = s->op;
    int own_gate = !s->no_gate && !s->op.fused;

    test_program_init(t, isa, n_threads, max_rows);
    uint32_t src = test_program_reg(t, s->n_in, 0), dst = test_program_reg(t, s->n_out, 0);
    struct gqa_op *o = test_program_op(t, GQA_OP_EXPERTS);
    o->src = test_view(t, src);
    o->dst = test_view(t, dst);
    op.router = test_program_weight(t, &m->router.weight);
    op.gate = own_gate ? test_program_weight(t, &m->gate.weight) : GQA_NONE;
    op.up = test_program_weight(t, &m->up.weight);
    op.down = test_program_weight(t, &m->down.weight);
    op.router_bias = op.gate_bias = op.up_bias = op.down_bias = op.selection_bias = GQA_NONE;
    if (s->biases) {
        op.router_bias = test_program_floats(t, m->router_bias, n_experts, 0);
        op.up_bias = test_program_floats(t, m->up_bias, n_experts, n_up);
        op.down_bias = test_program_floats(t, m->down_bias, n_experts, s->n_out);
    }
    if (s->biases && own_gate) {
        op.gate_bias = test_program_floats(t, m->gate_bias, n_experts, s->n_ff);
    }
    if (s->moved_choice) {
        op.selection_bias = test_program_floats(t, m->selection_bias, n_experts, 0);
    }
    o->u.experts = op;
    int r = test_program_prepare(t);
    cr_assert_eq(r, 0, "%s: %d: %s", s->name, r, t->reason.text);
}

void test_mixture_step(struct test_program *t, const struct test_mixture *m, uint32_t first,
                       uint32_t n_rows, float *ret_y)
{
    static const int32_t tokens[TEST_EXPERTS_ROWS];
    const struct test_shape *s = &m->shape;
    struct gqa_batch batch = {.struct_size = sizeof(batch), .n_rows = n_rows, .tokens = tokens};
    void *(*allocate)(void *data, size_t bytes) = t->host.host.allocate;

    memcpy(test_program_data(t, 0), m->x + (size_t)first * s->n_in,
           (size_t)n_rows * s->n_in * sizeof(float));
    t->host.host.allocate = no_memory;
    cr_assert_eq(test_program_step(t, &batch), 0);
    t->host.host.allocate = allocate;
    memcpy(ret_y, test_program_data(t, 1), (size_t)n_rows * s->n_out * sizeof(float));
}

void test_mixture_run(const struct test_mixture *m, enum cpu_isa isa, uint32_t n_threads,
                      float *ret_y)
{
    struct test_program t;

    test_mixture_program(&t, m, isa, n_threads, TEST_EXPERTS_ROWS);
    test_mixture_step(&t, m, 0, TEST_EXPERTS_ROWS, ret_y);
    test_program_finish(&t);
}

/* y (n) = rows [first, first + n) of the weight times x, plus the bias. */
static void true_product(const struct test_weight *w, uint32_t first, uint32_t n, const double *x,
                         const float *bias, double *y)
{
    uint32_t k = (uint32_t)w->weight.ne[0];
    float row[TEST_WIDTH_MAX];

    for (uint32_t o = 0; o < n; o++) {
        test_weight_row(w, first + o, row);
        y[o] = bias != NULL ? (double)bias[o] : 0.0;
        for (uint32_t i = 0; i < k; i++) {
            y[o] += (double)row[i] * x[i];
        }
    }
}

static const float *row_of_x(const struct test_mixture *m, uint32_t row)
{
    return m->x + (size_t)row * m->shape.n_in;
}

void test_mixture_logits(const struct test_mixture *m, enum cpu_isa isa, uint32_t row,
                         double *ret_logits)
{
    uint32_t n = m->shape.op.n_experts;
    const float *bias = m->shape.biases ? m->router_bias : NULL;
    double x[TEST_WIDTH_MAX];
    float logits[TEST_WIDTH_MAX];

    if (m->router.weight.packed == NULL) {
        for (uint32_t i = 0; i < m->shape.n_in; i++) {
            x[i] = (double)row_of_x(m, row)[i];
        }
        true_product(&m->router, 0, n, x, bias, ret_logits);
        return;
    }
    test_linear_run(&m->router, isa, 1, row_of_x(m, row), 1, bias, logits);
    for (uint32_t i = 0; i < n; i++) {
        ret_logits[i] = (double)logits[i];
    }
}

void test_mixture_route(const struct test_mixture *m, const double *logits, uint32_t *ret_ids,
                        double *ret_weights)
{
    const struct gqa_op_experts *op = &m->shape.op;
    double scores[TEST_WIDTH_MAX], keys[TEST_WIDTH_MAX], all = 0.0, sum = 0.0;
    uint32_t n = 0;

    for (uint32_t e = 0; e < op->n_experts; e++) {
        all += exp(logits[e]);
    }
    for (uint32_t e = 0; e < op->n_experts; e++) {
        scores[e] = op->gating == GQA_GATING_SOFTMAX   ? exp(logits[e]) / all
                    : op->gating == GQA_GATING_SIGMOID ? 1.0 / (1.0 + exp(-logits[e]))
                                                       : logits[e];
        keys[e] = scores[e] + (m->shape.moved_choice ? (double)m->selection_bias[e] : 0.0);
    }
    for (uint32_t e = 0; e < op->n_experts; e++) {
        uint32_t better = 0;
        for (uint32_t i = 0; i < op->n_experts; i++) {
            better += keys[i] > keys[e] || (keys[i] == keys[e] && i < e);
        }
        if (better < op->n_used) {
            ret_ids[n] = e;
            ret_weights[n] = op->gating == GQA_GATING_SOFTMAX_CHOSEN ? exp(scores[e]) : scores[e];
            sum += ret_weights[n++];
        }
    }
    cr_assert_eq(n, op->n_used);
    int normal = op->renormalise || op->gating == GQA_GATING_SOFTMAX_CHOSEN;
    for (uint32_t i = 0; i < n; i++) {
        ret_weights[i] *= (double)op->weight_scale / (normal ? sum : 1.0);
    }
}

static double true_act(const struct gqa_op_experts *op, double x, double y)
{
    double limit = (double)op->limit;

    switch (op->act) {
    case GQA_ACT_SILU:
        return x / (1.0 + exp(-x)) * y;
    case GQA_ACT_RELU:
        return fmax(x, 0.0) * y;
    case GQA_ACT_GELU:
        return 0.5 * x * erfc(-x / sqrt(2.0)) * y;
    default:
        cr_assert_eq(op->act, GQA_ACT_SWIGLU_OAI);
        x = fmin(x, limit);
        return x / (1.0 + exp(-(double)op->alpha * x)) * (fmax(fmin(y, limit), -limit) + 1.0);
    }
}

/* One expert's outputs. */
static void true_expert(const struct test_mixture *m, uint32_t e, const double *x, double *y)
{
    const struct test_shape *s = &m->shape;
    uint32_t n_up = s->op.fused ? 2 * s->n_ff : s->n_ff;
    int biases = s->biases != 0;
    double gate[TEST_WIDTH_MAX], up[TEST_WIDTH_MAX];

    true_product(&m->up, e * n_up, n_up, x, biases ? m->up_bias + (size_t)e * n_up : NULL, up);
    if (!s->op.fused && !s->no_gate) {
        true_product(&m->gate, e * s->n_ff, s->n_ff, x,
                     biases ? m->gate_bias + (size_t)e * s->n_ff : NULL, gate);
    }
    for (uint32_t i = 0; i < s->n_ff; i++) {
        if (s->no_gate) {
            gate[i] = true_act(&s->op, up[i], 1.0);
        } else if (s->op.fused) {
            gate[i] = true_act(&s->op, up[i], up[s->n_ff + i]);
        } else {
            gate[i] = true_act(&s->op, gate[i], up[i]);
        }
    }
    true_product(&m->down, e * s->n_out, s->n_out, gate,
                 biases ? m->down_bias + (size_t)e * s->n_out : NULL, y);
}

void test_mixture_truth(const struct test_mixture *m, enum cpu_isa isa, uint32_t row, double *ret_y)
{
    const struct test_shape *s = &m->shape;
    double logits[TEST_WIDTH_MAX], weights[TEST_WIDTH_MAX], x[TEST_WIDTH_MAX], y[TEST_WIDTH_MAX];
    uint32_t ids[TEST_WIDTH_MAX];

    test_mixture_logits(m, isa, row, logits);
    test_mixture_route(m, logits, ids, weights);
    for (uint32_t i = 0; i < s->n_in; i++) {
        x[i] = (double)row_of_x(m, row)[i];
    }
    memset(ret_y, 0, s->n_out * sizeof(*ret_y));
    for (uint32_t i = 0; i < s->op.n_used; i++) {
        true_expert(m, ids[i], x, y);
        for (uint32_t j = 0; j < s->n_out; j++) {
            ret_y[j] += weights[i] * y[j];
        }
    }
}

static void part(const struct test_weight *all, uint32_t e, enum cpu_isa isa, const float *x,
                 const float *bias, float *y)
{
    struct test_weight one = test_weight_expert(all, e);

    test_linear_run(&one, isa, 1, x, 1, bias != NULL ? bias + e * one.weight.ne[1] : NULL, y);
    free(one.packed);
}

void test_mixture_by_parts(const struct test_mixture *m, enum cpu_isa isa, uint32_t row,
                           float *ret_y)
{
    const struct test_shape *s = &m->shape;
    double logits[TEST_WIDTH_MAX], weights[TEST_WIDTH_MAX];
    float gate[TEST_WIDTH_MAX], up[TEST_WIDTH_MAX], y[TEST_WIDTH_MAX];
    uint32_t ids[TEST_WIDTH_MAX];
    struct cpu_glu_kernels kernels;
    int biases = s->biases != 0;

    cpu_glu_kernels(isa, &kernels);
    test_mixture_logits(m, isa, row, logits);
    test_mixture_route(m, logits, ids, weights);
    memset(ret_y, 0, s->n_out * sizeof(*ret_y));
    for (uint32_t i = 0; i < s->op.n_used; i++) {
        const float *first = up, *second = up + s->n_ff;
        part(&m->up, ids[i], isa, row_of_x(m, row), biases ? m->up_bias : NULL, up);
        if (s->no_gate) {
            second = NULL;
        } else if (!s->op.fused) {
            part(&m->gate, ids[i], isa, row_of_x(m, row), biases ? m->gate_bias : NULL, gate);
            first = gate;
            second = up;
        }
        kernels.act[s->op.act](first, second, gate, s->n_ff, s->op.alpha, s->op.limit);
        part(&m->down, ids[i], isa, gate, biases ? m->down_bias : NULL, y);
        for (uint32_t j = 0; j < s->n_out; j++) {
            ret_y[j] += (float)weights[i] * y[j];
        }
    }
}
