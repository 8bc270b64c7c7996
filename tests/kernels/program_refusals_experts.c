/* tests/kernels/program_refusals_experts.c - what prepare refuses of mixtures and adapters. */
#include "tests/kernels/program_util.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <string.h>

enum { N_IN = 64, N_FF = 32, N_OUT = 48, EXPERTS = 4 };

static float floats[2 * N_IN * N_IN * EXPERTS];

static uint32_t experts_weight(struct test_program *t, const char *name, uint32_t n_in,
                               uint32_t n_out)
{
    const struct gqa_weight w = {.name = name,
                                 .type = GQA_TYPE_F32,
                                 .n_dims = 3,
                                 .ne = {n_in, n_out, EXPERTS, 1},
                                 .data = floats};
    return test_program_weight(t, &w);
}

/* A mixture that is right. */
static struct gqa_op_experts *begin(struct test_program *t)
{
    test_program_init(t, CPU_ISA_C, 1, 4);
    uint32_t src = test_program_reg(t, N_IN, 0), dst = test_program_reg(t, N_OUT, 0);
    struct gqa_op *op = test_program_op(t, GQA_OP_EXPERTS);
    op->layer = 7;
    op->src = test_view(t, src);
    op->dst = test_view(t, dst);
    op->u.experts = (struct gqa_op_experts){
        .n_experts = EXPERTS,
        .n_used = 2,
        .weight_scale = 1.0f,
        .router = test_program_floats(t, floats, EXPERTS, N_IN),
        .router_bias = test_program_floats(t, floats, EXPERTS, 0),
        .selection_bias = test_program_floats(t, floats, EXPERTS, 0),
        .gate = experts_weight(t, "ffn_gate_exps", N_IN, N_FF),
        .up = experts_weight(t, "ffn_up_exps", N_IN, N_FF),
        .down = experts_weight(t, "ffn_down_exps", N_FF, N_OUT),
        .gate_bias = test_program_floats(t, floats, EXPERTS, N_FF),
        .up_bias = test_program_floats(t, floats, EXPERTS, N_FF),
        .down_bias = test_program_floats(t, floats, EXPERTS, N_OUT),
    };
    return &op->u.experts;
}

/* Prepares, expects the error and a reason that contains text, and takes all down. */
static void refused(struct test_program *t, int error, const char *text)
{
    int r = test_program_prepare(t);
    cr_assert_eq(r, error, "%d instead of %d, %s", r, error, t->reason.text);
    cr_assert_not_null(strstr(t->reason.text, text), "\"%s\" lacks \"%s\"", t->reason.text, text);
    test_program_finish(t);
}

Test(refusals_experts, a_right_mixture_prepares)
{
    struct test_program t;

    begin(&t);
    cr_assert_eq(test_program_prepare(&t), 0, "%s", t.reason.text);
    test_program_finish(&t);
}

Test(refusals_experts, numbers_that_contradict)
{
    struct test_program t;

    begin(&t)->n_used = EXPERTS + 1;
    refused(&t, -EINVAL, "op 0 (experts, layer 7): 5 of 4 experts");
    begin(&t)->n_used = 0;
    refused(&t, -EINVAL, "0 of 4 experts");
    begin(&t)->n_experts = 0;
    refused(&t, -EINVAL, "2 of 0 experts");
    begin(&t)->n_experts = UINT32_MAX;
    refused(&t, -EINVAL, "of 4294967295 experts");
    begin(&t)->gating = 3;
    refused(&t, -ENOTSUP, "gating 3");
    begin(&t)->act = 5;
    refused(&t, -ENOTSUP, "activation 5");
    begin(&t)->weight_scale = 0.0f;
    refused(&t, -EINVAL, "weights times 0");
    begin(&t)->weight_scale = NAN;
    refused(&t, -EINVAL, "weights times");
    begin(&t)->weight_scale = INFINITY;
    refused(&t, -EINVAL, "weights times inf");
}

Test(refusals_experts, gates_that_contradict)
{
    struct test_program t;

    begin(&t)->gate = GQA_NONE;
    refused(&t, -EINVAL, "a bias without its gate");
    begin(&t)->fused = 1;
    refused(&t, -EINVAL, "beside a fused one");
    struct gqa_op_experts *e = begin(&t);
    e->gate = e->gate_bias = GQA_NONE;
    e->act = GQA_ACT_SWIGLU_OAI;
    refused(&t, -EINVAL, "needs a gate");
    e = begin(&t);
    e->gate = e->gate_bias = GQA_NONE;
    e->fused = 1;
    refused(&t, -EINVAL, "ffn_up_exps (F32): is 64 x 32 x 4 instead of 64 x 64 x 4");
}

Test(refusals_experts, views_that_do_not_fit)
{
    struct test_program t;

    begin(&t);
    t.ops[0].src.width = 32;
    refused(&t, -EINVAL, "is 64 x 4, the op has 32 inputs, 4 outputs");
    begin(&t);
    t.ops[0].dst.width = 32;
    refused(&t, -EINVAL, "ffn_down_exps (F32): is 32 x 48 x 4 instead of 32 x 32 x 4");
    begin(&t);
    t.ops[0].dst = (struct gqa_view){0, 0, N_OUT};
    refused(&t, -EINVAL, "overlap");
    begin(&t);
    t.regs[1].flags = GQA_REG_OUT;
    refused(&t, -EINVAL, "different rows");
    begin(&t);
    t.ops[0].src.reg = 2;
    refused(&t, -EINVAL, "src is register 2 of 2");
}

/* Each weight in turn: absent from the list, and of another shape. */
Test(refusals_experts, weights_that_do_not_fit)
{
    static const size_t places[] = {
        offsetof(struct gqa_op_experts, router),
        offsetof(struct gqa_op_experts, router_bias),
        offsetof(struct gqa_op_experts, selection_bias),
        offsetof(struct gqa_op_experts, gate),
        offsetof(struct gqa_op_experts, up),
        offsetof(struct gqa_op_experts, down),
        offsetof(struct gqa_op_experts, gate_bias),
        offsetof(struct gqa_op_experts, up_bias),
        offsetof(struct gqa_op_experts, down_bias),
    };
    struct test_program t;

    for (size_t i = 0; i < sizeof(places) / sizeof(places[0]); i++) {
        uint32_t *place = (uint32_t *)(void *)((char *)begin(&t) + places[i]);
        uint32_t weight = *place;
        *place = t.desc.n_weights;
        refused(&t, -EINVAL, "weight 9 of 9");
        for (uint32_t d = 0; d < t.weights[weight].n_dims; d++) {
            begin(&t);
            t.weights[weight].ne[d] += 1;
            t.weights[weight].name = "odd one";
            /* One more input of down is one more output of gate and up. */
            refused(&t, -EINVAL, i == 5 && d == 0 ? "ffn_up_exps" : "odd one (F32)");
        }
        begin(&t);
        t.weights[weight].n_dims = 4;
        refused(&t, -EINVAL, "op 0 (experts, layer 7)");
    }
}

Test(refusals_experts, types_and_packed_forms)
{
    struct test_program t;

    struct gqa_op_experts *e = begin(&t);
    t.weights[e->up].type = GQA_TYPE_Q8_0;
    refused(&t, -EINVAL, "ffn_up_exps (Q8_0): expert 0: packed form has 0 bytes");
    e = begin(&t);
    t.weights[e->up].type = GQA_TYPE_Q8_0;
    t.weights[e->up].packed = floats;
    t.weights[e->up].packed_bytes = cpu_weights_packed_bytes(&t.weights[e->up]) - EXPERTS;
    refused(&t, -EINVAL, "ffn_up_exps (Q8_0): expert 0: packed form has");
    e = begin(&t);
    t.weights[e->down].type = GQA_TYPE_Q2_K;
    refused(&t, -EINVAL, "ffn_down_exps (Q2_K): rows are no multiple of the type's block");
    e = begin(&t);
    t.weights[e->down].type = 77;
    refused(&t, -ENOTSUP, "ffn_down_exps (unknown type)");
    e = begin(&t);
    t.weights[e->down].data = NULL;
    refused(&t, -EINVAL, "ffn_down_exps (F32): expert 0: has no data");
    e = begin(&t);
    t.weights[e->down_bias].type = 77;
    refused(&t, -ENOTSUP, "no reader for type 77");
    e = begin(&t);
    t.weights[e->down_bias].data = NULL;
    refused(&t, -EINVAL, "has no data");
    e = begin(&t);
    t.weights[e->router].type = GQA_TYPE_Q8_0;
    refused(&t, -EINVAL, "floats (Q8_0): packed form");
    e = begin(&t);
    t.weights[e->down].type = GQA_TYPE_Q8_0;
    t.ops[0].dst.width = t.weights[e->down].ne[1] = t.weights[e->down_bias].ne[0] = 40;
    refused(&t, -ENOTSUP, "ffn_down_exps (Q8_0): 40 outputs of an expert are no multiple of 16");
}

static void *no_memory(void *data, size_t bytes)
{
    return NULL;
}

Test(refusals_experts, no_memory_is_an_error)
{
    struct test_program t;

    begin(&t);
    t.host.host.allocate = no_memory;
    refused(&t, -ENOMEM, "not enough memory");
}

/* ---- adapters ---------------------------------------------------------------------------- */

enum { RANK = 8 };

static uint32_t factor(struct test_program *t, const char *name, uint32_t n_in, uint32_t n_out)
{
    const struct gqa_weight w = {
        .name = name, .type = GQA_TYPE_F32, .n_dims = 2, .ne = {n_in, n_out, 1, 1}, .data = floats};
    return test_program_weight(t, &w);
}

/* A LINEAR of weight 0, and an adapter of it that is right. */
static struct gqa_adapter *begin_adapter(struct test_program *t)
{
    test_program_init(t, CPU_ISA_C, 1, 4);
    uint32_t src = test_program_reg(t, N_IN, 0), dst = test_program_reg(t, N_OUT, 0);
    struct gqa_op *op = test_program_op(t, GQA_OP_LINEAR);
    op->src = test_view(t, src);
    op->dst = test_view(t, dst);
    op->weight = factor(t, "base", N_IN, N_OUT);
    op->u.linear.adapters = 1;
    uint32_t a = factor(t, "low", N_IN, RANK), b = factor(t, "high", RANK, N_OUT);
    return test_program_adapter(t, 3, op->weight, a, b, 1.0f);
}

Test(refusals_adapters, a_right_adapter_prepares)
{
    struct test_program t;

    begin_adapter(&t);
    cr_assert_eq(test_program_prepare(&t), 0, "%s", t.reason.text);
    test_program_finish(&t);
}

Test(refusals_adapters, entries_that_do_not_fit)
{
    struct test_program t;

    begin_adapter(&t)->id = GQA_NONE;
    refused(&t, -EINVAL, "this id means none");
    begin_adapter(&t)->weight = 3;
    refused(&t, -EINVAL, "weight 3 of 3 is no matrix");
    begin_adapter(&t)->a = 3;
    refused(&t, -EINVAL, "adapter 3 of base: weight 3 of 3");
    begin_adapter(&t)->b = GQA_NONE;
    refused(&t, -EINVAL, "adapter 3 of base: weight 4294967295 of 3");
    begin_adapter(&t)->scale = NAN;
    refused(&t, -EINVAL, "scale nan");
    struct gqa_adapter *x = begin_adapter(&t);
    test_program_adapter(&t, x->id, x->weight, x->a, x->b, 2.0f);
    refused(&t, -EINVAL, "adapter 3 of base: is there twice");
    begin_adapter(&t);
    t.desc.n_adapters = UINT32_MAX;
    refused(&t, -EINVAL, "a list of 4294967295 entries");
}

Test(refusals_adapters, factors_that_do_not_fit)
{
    struct test_program t;

    struct gqa_adapter *x = begin_adapter(&t);
    t.weights[x->a].ne[0] = 32;
    refused(&t, -EINVAL, "adapter 3 of base, low (F32): is 32 x 8 instead of 64 x 8");
    x = begin_adapter(&t);
    t.weights[x->b].ne[0] = 4;
    refused(&t, -EINVAL, "adapter 3 of base, high (F32): is 4 x 48 instead of 8 x 48");
    x = begin_adapter(&t);
    t.weights[x->b].ne[1] = 32;
    refused(&t, -EINVAL, "high (F32): is 8 x 32 instead of 8 x 48");
    x = begin_adapter(&t);
    t.weights[x->a].ne[1] = t.weights[x->b].ne[0] = 0;
    refused(&t, -EINVAL, "low (F32): not a matrix");
    x = begin_adapter(&t);
    t.weights[x->a].type = GQA_TYPE_Q8_0;
    refused(&t, -ENOTSUP, "low (Q8_0): adapters are of type F32, F16 or BF16");
    x = begin_adapter(&t);
    t.weights[x->a].type = GQA_TYPE_IQ4_NL;
    refused(&t, -ENOTSUP, "low (IQ4_NL)");
    x = begin_adapter(&t);
    t.weights[x->b].data = NULL;
    refused(&t, -EINVAL, "high (F32): has no data");
    begin_adapter(&t);
    t.host.host.allocate = no_memory;
    refused(&t, -ENOMEM, "not enough memory");
}
