/* plugins/cpu/program_prepare.c - builds a program from its description, and takes it apart. */
#include "plugins/cpu/program.h"

#include "plugins/common/check.h"
#include "plugins/common/weights.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* A zeroed array of at least one element, so that NULL means no memory. */
static void *new_array(size_t n, size_t bytes)
{
    return calloc(n > 0 ? n : 1, bytes);
}

static size_t register_bytes(const struct cpu_program *p, const struct cpu_register *reg)
{
    size_t rows = reg->flags & GQA_REG_OUT ? p->max_out_rows : p->max_rows;
    return (rows > 0 ? rows : 1) * reg->width * sizeof(float);
}

static int build_registers(struct cpu_program *p, const struct gqa_program_desc *desc)
{
    const struct gqa_host *host = p->context->host;

    p->regs = new_array(desc->n_regs, sizeof(*p->regs));
    if (p->regs == NULL) {
        return -ENOMEM;
    }
    p->n_regs = desc->n_regs;
    for (uint32_t i = 0; i < p->n_regs; i++) {
        struct cpu_register *reg = &p->regs[i];
        reg->width = desc->regs[i].width;
        reg->flags = desc->regs[i].flags;
        reg->rows = host->allocate(host->data, register_bytes(p, reg));
        if (reg->rows == NULL) {
            return -ENOMEM;
        }
    }
    return 0;
}

/* Layers with their own copies of the sinks. */
static int build_layers(struct cpu_program *p, const struct gqa_program_desc *desc)
{
    size_t n_sinks = 0;

    for (uint32_t i = 0; i < desc->n_attn_layers; i++) {
        const struct gqa_attn_layer *l = gqa_layer_at(desc, i);
        n_sinks += l->sinks != NULL ? l->n_heads : 0;
    }
    p->layers = new_array(desc->n_attn_layers, sizeof(*p->layers));
    p->sinks = new_array(n_sinks, sizeof(*p->sinks));
    if (p->layers == NULL || p->sinks == NULL) {
        return -ENOMEM;
    }
    p->n_layers = desc->n_attn_layers;
    float *sinks = p->sinks;
    for (uint32_t i = 0; i < p->n_layers; i++) {
        gqa_take(&p->layers[i], sizeof(p->layers[i]), gqa_layer_at(desc, i));
        if (p->layers[i].sinks != NULL) {
            memcpy(sinks, p->layers[i].sinks, p->layers[i].n_heads * sizeof(*sinks));
            p->layers[i].sinks = sinks;
            sinks += p->layers[i].n_heads;
        }
    }
    return 0;
}

static int build_ropes(struct cpu_program *p, const struct gqa_program_desc *desc)
{
    p->ropes = new_array(desc->n_rope_tables, sizeof(*p->ropes));
    if (p->ropes == NULL) {
        return -ENOMEM;
    }
    p->n_ropes = desc->n_rope_tables;
    for (uint32_t i = 0; i < p->n_ropes; i++) {
        const struct gqa_rope_table *from = &desc->rope_tables[i];
        struct cpu_rope *rope = &p->ropes[i];
        size_t n_angles = (size_t)p->max_rows * from->n_freqs;

        rope->n_freqs = from->n_freqs;
        rope->magnitude = from->magnitude;
        rope->freqs = new_array(from->n_freqs, sizeof(*rope->freqs));
        rope->cosines = new_array(n_angles, sizeof(*rope->cosines));
        rope->sines = new_array(n_angles, sizeof(*rope->sines));
        if (rope->freqs == NULL || rope->cosines == NULL || rope->sines == NULL) {
            return -ENOMEM;
        }
        if (from->n_freqs > 0) {
            memcpy(rope->freqs, from->freqs, from->n_freqs * sizeof(*rope->freqs));
        }
    }
    return 0;
}

static int build_op(struct cpu_op *op, const struct gqa_program_desc *desc, uint32_t index,
                    const struct cpu_adapter_list *adapters, struct gqa_reason *reason)
{
    op->op = desc->ops[index];
    if (op->op.kind == GQA_OP_EMBED) {
        op->table = desc->weights[op->op.weight];
        op->type = fmt_type_info(op->table.type);
        return 0;
    }
    if (op->op.kind == GQA_OP_NORM || op->op.kind == GQA_OP_LINEAR) {
        int r = plugin_weight_floats(desc, op->op.bias, &op->bias);
        if (r < 0) {
            return r;
        }
    }
    if (op->op.kind == GQA_OP_NORM) {
        return plugin_weight_floats(desc, op->op.weight, &op->weight);
    }
    if (op->op.kind == GQA_OP_LINEAR) {
        struct gqa_reason why = {""};
        int r = cpu_matrix_init(&op->matrix, &desc->weights[op->op.weight], &why);
        if (r < 0) {
            return plugin_refuse_op(desc, index, op->op.weight, r, reason, "%.120s", why.text);
        }
        op->weight_bytes = cpu_weight_read_bytes(&desc->weights[op->op.weight]);
        op->matrix.bias = op->bias;
        if (op->op.u.linear.adapters) {
            op->adapters = cpu_adapters_of(adapters, op->op.weight, &op->n_adapters);
        }
    }
    return op->op.kind == GQA_OP_EXPERTS ? cpu_mixture_create(desc, index, &op->mixture, reason)
                                         : 0;
}

/* The widest input of an op's quantised matrices; 0: none. */
static uint32_t quantised_k(const struct cpu_op *op)
{
    if (op->op.kind == GQA_OP_EXPERTS) {
        return cpu_mixture_quantised_k(op->mixture);
    }
    return op->op.kind == GQA_OP_LINEAR && op->matrix.layout != CPU_LAYOUT_COUNT ? op->matrix.k : 0;
}

/* Builds all ops; finds the widest input that will be quantised. */
static int build_ops(struct cpu_program *p, const struct gqa_program_desc *desc,
                     uint32_t *ret_max_k, struct gqa_reason *reason)
{
    uint32_t max_k = 0;

    p->ops = new_array(desc->n_ops, sizeof(*p->ops));
    if (p->ops == NULL) {
        return -ENOMEM;
    }
    p->n_ops = desc->n_ops;
    for (uint32_t i = 0; i < p->n_ops; i++) {
        int r = build_op(&p->ops[i], desc, i, &p->adapters, reason);
        if (r < 0) {
            return r;
        }
        uint32_t k = quantised_k(&p->ops[i]);
        max_k = k > max_k ? k : max_k;
    }
    *ret_max_k = max_k;
    return 0;
}

/* Room for the widest input of a LINEAR, whether or not its matrix has panels. */
static int build_panels(struct cpu_program *p)
{
    uint32_t max_k = 0;

    for (uint32_t i = 0; i < p->n_ops; i++) {
        const struct cpu_op *op = &p->ops[i];
        if (op->op.kind == GQA_OP_LINEAR && op->matrix.k > max_k) {
            max_k = op->matrix.k;
        }
    }
    return cpu_panels_init(&p->panels, p->context->host, p->context->isa, p->max_rows, max_k);
}

int cpu_program_prepare(void *context, const struct gqa_program_desc *desc, void **ret_program,
                        struct gqa_reason *reason)
{
    const struct plugin_rules rules = {
        .rows_max = CPU_PROGRAM_ROWS_MAX,
        .layer = cpu_attention_supports,
    };
    struct cpu_context *c = context;
    uint32_t max_k = 0;

    int r = plugin_check(desc, &rules, reason);
    if (r < 0) {
        return r;
    }
    struct cpu_program *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        r = -ENOMEM;
        goto err_reason;
    }
    p->context = c;
    p->max_rows = desc->max_rows;
    p->max_out_rows = desc->max_out_rows;
    cpu_glu_kernels(c->isa, &p->glu);
    p->rows = *cpu_row_kernels(c->isa);
    r = cpu_adapters_init(&p->adapters, desc, reason);
    if (r == 0) {
        r = build_ops(p, desc, &max_k, reason);
    }
    if (r == 0) {
        r = cpu_adapter_room_init(p);
    }
    if (r == 0) {
        r = cpu_mixture_room_init(p);
    }
    if (r == 0) {
        r = build_layers(p, desc);
    }
    if (r == 0) {
        r = build_ropes(p, desc);
    }
    if (r == 0) {
        r = build_registers(p, desc);
    }
    if (r == 0) {
        uint32_t slots = p->mixture_room.n_slots;
        r = cpu_linear_init(&p->linear, c->host, c->isa, slots > p->max_rows ? slots : p->max_rows,
                            max_k);
    }
    if (r == 0) {
        r = build_panels(p);
    }
    if (r < 0) {
        goto err_release;
    }
    *ret_program = p;
    return 0;

err_release:
    cpu_program_release(context, p);
err_reason:
    if (r == -ENOMEM) {
        snprintf(reason->text, sizeof(reason->text), "not enough memory for batches of %u rows",
                 desc->max_rows);
    }
    return r;
}

void cpu_program_release(void *context, void *program)
{
    struct cpu_context *c = context;
    struct cpu_program *p = program;

    if (p == NULL) {
        return;
    }
    cpu_panels_finish(&p->panels);
    cpu_linear_finish(&p->linear);
    cpu_mixture_room_finish(p);
    cpu_adapter_room_finish(p);
    cpu_adapters_finish(&p->adapters);
    for (uint32_t i = 0; i < p->n_regs; i++) {
        if (p->regs[i].rows != NULL) {
            c->host->release(c->host->data, p->regs[i].rows, register_bytes(p, &p->regs[i]));
        }
    }
    for (uint32_t i = 0; i < p->n_ropes; i++) {
        free(p->ropes[i].freqs);
        free(p->ropes[i].cosines);
        free(p->ropes[i].sines);
    }
    for (uint32_t i = 0; i < p->n_ops; i++) {
        free(p->ops[i].weight);
        free(p->ops[i].bias);
        cpu_mixture_destroy(p->ops[i].mixture);
    }
    free(p->regs);
    free(p->ropes);
    free(p->layers);
    free(p->sinks);
    free(p->ops);
    free(p);
}
