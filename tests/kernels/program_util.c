/* tests/kernels/program_util.c - see program_util.h. */
#include "tests/kernels/program_util.h"

#include <criterion/criterion.h>
#include <string.h>

void test_program_init(struct test_program *t, enum cpu_isa isa, uint32_t n_threads,
                       uint32_t max_rows)
{
    memset(t, 0, sizeof(*t));
    test_host_init(&t->host, n_threads);
    t->context.host = &t->host.host;
    t->context.isa = isa;
    cr_assert_eq(cpu_attention_create(&t->host.host, isa, &t->context.attention), 0);
    t->desc = (struct gqa_program_desc){
        .struct_size = sizeof(t->desc),
        .max_rows = max_rows,
        .max_out_rows = max_rows,
        .ops = t->ops,
        .regs = t->regs,
        .weights = t->weights,
        .rope_tables = t->ropes,
        .adapters = t->adapters,
    };
}

uint32_t test_program_reg(struct test_program *t, uint32_t width, uint32_t flags)
{
    cr_assert(t->desc.n_regs < TEST_REGS_MAX);
    t->regs[t->desc.n_regs] = (struct gqa_reg){width, flags};
    return t->desc.n_regs++;
}

uint32_t test_program_weight(struct test_program *t, const struct gqa_weight *weight)
{
    cr_assert(t->desc.n_weights < TEST_REGS_MAX);
    t->weights[t->desc.n_weights] = *weight;
    return t->desc.n_weights++;
}

uint32_t test_program_floats(struct test_program *t, const float *values, uint32_t n, uint32_t k)
{
    struct gqa_weight w = {
        .name = "floats",
        .type = GQA_TYPE_F32,
        .n_dims = k > 0 ? 2 : 1,
        .ne = {k > 0 ? k : n, k > 0 ? n : 1, 1, 1},
        .data = values,
    };
    return test_program_weight(t, &w);
}

struct gqa_op *test_program_op(struct test_program *t, uint32_t kind)
{
    const struct gqa_view none = {GQA_NONE, 0, 0};
    cr_assert(t->desc.n_ops < TEST_OPS_MAX);
    struct gqa_op *op = &t->ops[t->desc.n_ops++];

    *op = (struct gqa_op){
        .kind = kind,
        .layer = GQA_NONE,
        .src = none,
        .src2 = none,
        .src3 = none,
        .dst = none,
        .weight = GQA_NONE,
        .bias = GQA_NONE,
        .scale = 1.0f,
    };
    return op;
}

struct gqa_adapter *test_program_adapter(struct test_program *t, uint32_t id, uint32_t weight,
                                         uint32_t a, uint32_t b, float scale)
{
    cr_assert(t->desc.n_adapters < TEST_ADAPTERS_MAX);
    struct gqa_adapter *adapter = &t->adapters[t->desc.n_adapters++];

    *adapter = (struct gqa_adapter){id, weight, a, b, scale};
    return adapter;
}

struct gqa_view test_view(const struct test_program *t, uint32_t reg)
{
    return (struct gqa_view){reg, 0, t->regs[reg].width};
}

int test_program_prepare(struct test_program *t)
{
    return cpu_program_prepare(&t->context, &t->desc, &t->program, &t->reason);
}

float *test_program_data(const struct test_program *t, uint32_t reg)
{
    return cpu_program_data((void *)&t->context, t->program, reg);
}

int test_program_step(const struct test_program *t, const struct gqa_batch *batch)
{
    void *context = (void *)&t->context;

    int r = cpu_program_begin(context, t->program, batch);
    if (r < 0) {
        return r;
    }
    r = cpu_program_run(context, t->program, 0, t->desc.n_ops);
    cr_assert_eq(cpu_program_end(context, t->program), 0);
    return r;
}

void test_program_finish(struct test_program *t)
{
    cpu_program_release(&t->context, t->program);
    cpu_attention_destroy(t->context.attention);
}
