/* tests/kernels/program_refusals.c - what prepare refuses, and how the plugin opens. */
#include "tests/kernels/program_util.h"

#include <criterion/criterion.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

extern const struct gqa_plugin gqa_plugin;

static float floats[64 * 64];

/* Two registers of 64 columns, one of output rows; weight 0 a matrix (64, 64), 1 a vector (64). */
static void begin(struct test_program *t)
{
    test_program_init(t, CPU_ISA_C, 1, 4);
    test_program_reg(t, 64, 0);
    test_program_reg(t, 64, 0);
    test_program_reg(t, 64, GQA_REG_OUT);
    test_program_floats(t, floats, 64, 64);
    test_program_floats(t, floats, 64, 0);
}

/* An op that is right, of a kind. */
static struct gqa_op *right_op(struct test_program *t, uint32_t kind)
{
    static const double freqs[8];
    struct gqa_op *op = test_program_op(t, kind);

    op->src = test_view(t, 0);
    op->dst = test_view(t, kind == GQA_OP_GATHER ? 2 : 1);
    switch (kind) {
    case GQA_OP_EMBED:
    case GQA_OP_LINEAR:
        op->weight = 0;
        break;
    case GQA_OP_NORM:
        op->weight = 1;
        op->u.norm.dim = 64;
        break;
    case GQA_OP_ROPE:
        t->ropes[0] = (struct gqa_rope_table){8, freqs, 1.0f};
        t->desc.n_rope_tables = 1;
        op->dst = op->src;
        op->u.rope.head_dim = 16;
        op->u.rope.n_rot = 16;
        break;
    case GQA_OP_ADD:
        op->src2 = test_view(t, 0);
        break;
    default:
        break;
    }
    return op;
}

/* Prepares, expects the error and a reason that contains text, and takes all down. */
static void refused(struct test_program *t, int error, const char *text)
{
    int r = test_program_prepare(t);
    cr_assert_eq(r, error, "%d instead of %d, %s", r, error, t->reason.text);
    cr_assert_not_null(strstr(t->reason.text, text), "\"%s\" lacks \"%s\"", t->reason.text, text);
    test_program_finish(t);
}

Test(refusals, right_ops_prepare)
{
    static const uint32_t kinds[] = {GQA_OP_EMBED, GQA_OP_NORM,    GQA_OP_LINEAR,
                                     GQA_OP_ROPE,  GQA_OP_GLU,     GQA_OP_ADD,
                                     GQA_OP_SCALE, GQA_OP_SOFTCAP, GQA_OP_GATHER};

    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        struct test_program t;
        begin(&t);
        right_op(&t, kinds[i]);
        cr_assert_eq(test_program_prepare(&t), 0, "%s", t.reason.text);
        test_program_finish(&t);
    }
}

/* Every kind: dst past the registers, past the columns, empty. */
Test(refusals, views_outside_their_registers)
{
    for (uint32_t kind = GQA_OP_EMBED; kind <= GQA_OP_GATHER; kind++) {
        struct test_program t;
        begin(&t);
        right_op(&t, kind)->dst.reg = 3;
        refused(&t, -EINVAL, "op 0 (");
        begin(&t);
        right_op(&t, kind)->dst.first = 1;
        refused(&t, -EINVAL, "dst is columns 1+64 of register");
        begin(&t);
        right_op(&t, kind)->dst.width = 0;
        refused(&t, -EINVAL, "dst is columns 0+0");
        begin(&t);
        right_op(&t, kind)->dst.first = UINT32_MAX;
        refused(&t, -EINVAL, "dst is columns");
    }
}

/* ---- hosts of another minor version ------------------------------------------------------ */

/* What a newer host marks as not to be ignored. */
Test(refusals, flags_that_nobody_has_defined)
{
    struct test_program t;

    begin(&t);
    right_op(&t, GQA_OP_SCALE)->flags = 4;
    refused(&t, -ENOTSUP, "op 0 (scale): unknown flags 0x4");
    begin(&t);
    right_op(&t, GQA_OP_SCALE);
    t.regs[1].flags |= 2;
    refused(&t, -ENOTSUP, "a register has flags");
    begin(&t);
    right_op(&t, GQA_OP_ROPE);
    t.ropes[0].flags = 1;
    refused(&t, -ENOTSUP, "a rope table has flags");
    begin(&t);
    right_op(&t, GQA_OP_SCALE);
    t.desc.flags = 1;
    refused(&t, -ENOTSUP, "the program has flags");
}

/* Layers of a host whose struct is longer are struct_size apart, and only the first has heads that
 * do not fit. */
Test(refusals, layers_that_are_longer_than_this_backend_knows)
{
    struct {
        struct gqa_attn_layer was;
        uint64_t more[3];
    } layers[2];
    struct gqa_reason reason = {""};
    struct test_program t;

    memset(layers, 0xff, sizeof(layers));
    for (uint32_t i = 0; i < 2; i++) {
        layers[i].was = (struct gqa_attn_layer){.struct_size = sizeof(layers[i]),
                                                .layer = i,
                                                .n_heads = i == 0 ? 3 : 4,
                                                .n_kv_heads = i == 0 ? 3 : 4,
                                                .k_dim = 16,
                                                .v_dim = 16,
                                                .k_type = GQA_TYPE_F16,
                                                .v_type = GQA_TYPE_F16,
                                                .scale = 1,
                                                .k_head_bytes = 2048,
                                                .v_head_bytes = 2048,
                                                .v_offset = 8192};
    }
    for (uint32_t i = 0; i < 2; i++) {
        begin(&t);
        struct gqa_op *op = right_op(&t, GQA_OP_ATTENTION);
        op->src2 = op->src3 = op->src;
        op->layer = i;
        t.desc.attn_layers = &layers[0].was;
        t.desc.n_attn_layers = 2;
        if (i == 0) {
            refused(&t, -EINVAL, "op 0 (attention, layer 0)");
            continue;
        }
        cr_assert_eq(test_program_prepare(&t), 0, "%s", t.reason.text);
        test_program_finish(&t);
    }
    layers[1].was.flags = 1;
    cr_assert_eq(cpu_attention_supports(&layers[1].was, &reason), -ENOTSUP);
    cr_assert_not_null(strstr(reason.text, "flags"), "%s", reason.text);
    layers[1].was.flags = 0;
    layers[1].was.struct_size = GQA_SIZE_TO(struct gqa_attn_layer, rope_kind);
    cr_assert_eq(cpu_attention_supports(&layers[1].was, &reason), -ENOTSUP);
    cr_assert_not_null(strstr(reason.text, "shorter than in ABI 1.0"), "%s", reason.text);
}

Test(refusals, shapes_that_do_not_fit)
{
    struct test_program t;

    begin(&t);
    right_op(&t, GQA_OP_LINEAR)->src.width = 32;
    refused(&t, -EINVAL, "floats (F32): is 64 x 64, the op has 32 inputs");
    begin(&t);
    right_op(&t, GQA_OP_LINEAR)->weight = 1;
    refused(&t, -EINVAL, "op 0 (linear), floats (F32)");
    begin(&t);
    right_op(&t, GQA_OP_LINEAR)->weight = 2;
    refused(&t, -EINVAL, "weight 2 of 2");
    begin(&t);
    right_op(&t, GQA_OP_LINEAR)->bias = 0;
    refused(&t, -EINVAL, "is not a vector of 64");
    begin(&t);
    right_op(&t, GQA_OP_LINEAR)->dst = test_view(&t, 0);
    refused(&t, -EINVAL, "overlap");
    begin(&t);
    right_op(&t, GQA_OP_LINEAR)->dst = test_view(&t, 2);
    refused(&t, -EINVAL, "different rows");
    begin(&t);
    right_op(&t, GQA_OP_NORM)->u.norm.dim = 48;
    refused(&t, -EINVAL, "groups of 48");
    begin(&t);
    right_op(&t, GQA_OP_ROPE)->u.rope.n_rot = 8;
    refused(&t, -EINVAL, "rope table 0");
    begin(&t);
    right_op(&t, GQA_OP_ROPE)->u.rope.table = 1;
    refused(&t, -EINVAL, "rope table 1");
    begin(&t);
    right_op(&t, GQA_OP_ADD)->src2.reg = GQA_NONE;
    refused(&t, -EINVAL, "src2 is register");
    begin(&t);
    right_op(&t, GQA_OP_SOFTCAP)->scale = NAN;
    refused(&t, -EINVAL, "caps at");
    begin(&t);
    right_op(&t, GQA_OP_GATHER)->dst = test_view(&t, 1);
    refused(&t, -EINVAL, "gathers");
    begin(&t);
    test_program_op(&t, GQA_OP_ATTENTION)->dst = test_view(&t, 1);
    refused(&t, -EINVAL, "of 0");
}

Test(refusals, kinds_and_types_that_are_not_here)
{
    struct test_program t;
    struct gqa_weight w = {.name = "blk.7.attn_q.weight",
                           .type = GQA_TYPE_Q4_0,
                           .n_dims = 2,
                           .ne = {64, 64, 1, 1},
                           .data = floats};

    begin(&t);
    test_program_op(&t, 99)->dst = test_view(&t, 1);
    refused(&t, -ENOTSUP, "unknown kind 99");
    begin(&t);
    right_op(&t, GQA_OP_GLU)->u.glu.kind = 5;
    refused(&t, -ENOTSUP, "activation 5");
    begin(&t);
    right_op(&t, GQA_OP_GLU)->u.glu.kind = GQA_ACT_SWIGLU_OAI;
    refused(&t, -EINVAL, "src2");
    begin(&t);
    struct gqa_op *op = right_op(&t, GQA_OP_LINEAR);
    op->weight = test_program_weight(&t, &w);
    op->layer = 7;
    refused(&t, -EINVAL, "op 0 (linear, layer 7), blk.7.attn_q.weight (Q4_0): packed form");
    w.type = 9; /* Q8_1: in no file */
    begin(&t);
    right_op(&t, GQA_OP_LINEAR)->weight = test_program_weight(&t, &w);
    refused(&t, -ENOTSUP, "blk.7.attn_q.weight (");
    w.type = 77;
    begin(&t);
    right_op(&t, GQA_OP_EMBED)->weight = test_program_weight(&t, &w);
    refused(&t, -ENOTSUP, "unknown type");
}

Test(refusals, sizes_past_the_limits)
{
    struct test_program t;

    begin(&t);
    t.desc.max_rows = 0;
    refused(&t, -EINVAL, "batches of 0 rows");
    begin(&t);
    t.desc.max_rows = UINT32_MAX;
    refused(&t, -EINVAL, "rows");
    begin(&t);
    t.regs[1].width = UINT32_MAX;
    refused(&t, -EINVAL, "register 1");
    begin(&t);
    t.desc.n_ops = UINT32_MAX;
    refused(&t, -EINVAL, "entries");
}

static void *no_memory(void *data, size_t bytes)
{
    return NULL;
}

Test(refusals, no_memory_is_an_error)
{
    struct test_program t;
    begin(&t);
    right_op(&t, GQA_OP_LINEAR);
    t.host.host.allocate = no_memory;
    refused(&t, -ENOMEM, "not enough memory");
}

Test(plugin, opens_at_every_level_it_names)
{
    struct gqa_probe probe = {.struct_size = sizeof(probe)};
    struct test_host host;
    char isas[sizeof(probe.isas)], *rest = NULL;

    test_host_init(&host, 2);
    cr_assert_eq(gqa_plugin.probe(&probe), 0);
    cr_assert(probe.usable && probe.device[0] != '\0');
    cr_assert_eq(strncmp(probe.isas, probe.isa, strlen(probe.isa)), 0);
    fprintf(stderr, "%s: %s\n", probe.device, probe.isas);
    memcpy(isas, probe.isas, sizeof(isas));
    for (char *isa = strtok_r(isas, ",", &rest); isa != NULL; isa = strtok_r(NULL, ",", &rest)) {
        struct gqa_reason reason = {""};
        char options[32];
        void *context = NULL;

        snprintf(options, sizeof(options), "isa=%s", isa);
        cr_assert_eq(gqa_plugin.open(&host.host, options, &context, &reason), 0);
        const struct gqa_program *program = gqa_plugin.get_interface(context, GQA_PROGRAM_0);
        const struct gqa_attention *attention = gqa_plugin.get_interface(context, GQA_ATTENTION_0);
        cr_assert_eq(program->struct_size, sizeof(*program));
        cr_assert_eq(attention->struct_size, sizeof(*attention));
        cr_assert_null(gqa_plugin.get_interface(context, "gqa.memory.0"));
        gqa_plugin.close(context);
    }
}

Test(plugin, refuses_other_options)
{
    struct test_host host;
    struct gqa_reason reason = {""};
    void *context = NULL;

    test_host_init(&host, 1);
    cr_assert_eq(gqa_plugin.open(&host.host, "isa=mmx", &context, &reason), -EINVAL);
    cr_assert_str_eq(reason.text, "isa=mmx: unknown level");
    cr_assert_eq(gqa_plugin.open(&host.host, "isa=", &context, &reason), -EINVAL);
    cr_assert_eq(gqa_plugin.open(&host.host, "isa=c,threads=4", &context, &reason), -EINVAL);
    cr_assert_not_null(strstr(reason.text, "threads=4"));
    cr_assert_eq(gqa_plugin.open(&host.host, "isa=aaaaaaaaaaaaaaaaaaaaaaaaaaaa", &context, &reason),
                 -EINVAL);
    cr_assert_null(context);
}
