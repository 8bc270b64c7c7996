/* plugins/cuda/program_prepare.c - puts a program on the device, and takes it off. */
#include "plugins/cuda/program.h"

#include "plugins/common/check.h"
#include "plugins/common/weights.h"

#include "format/types.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void *array(size_t n, size_t size)
{
    return calloc(n + 1, size);
}

int cuda_pinned_reserve(struct cuda_context *c, struct cuda_pinned *p, uint64_t bytes)
{
    if (bytes <= p->bytes) {
        return 0;
    }
    if (p->at != NULL) {
        CUDA(&c->driver, cuMemFreeHost)(p->at);
    }
    *p = (struct cuda_pinned){0};
    int r = cuda_check(c, CUDA(&c->driver, cuMemHostAlloc)(&p->at, bytes, 0), "pinned memory");
    p->bytes = r == 0 ? bytes : 0;
    return r;
}

int cuda_program_upload(struct cuda_program *p, const void *from, uint64_t bytes,
                        struct cuda_buffer *to)
{
    int r = cuda_buffer_reserve(p->context, to, bytes);

    r = r < 0 ? r : cuda_upload(p->context, to->at, from, bytes);
    return r < 0 ? r : cuda_synchronise(p->context);
}

int cuda_program_upload_matrix(struct cuda_program *p, const struct gqa_weight *w,
                               struct cuda_buffer *to)
{
    const void *packed;
    void *made;

    if (to->at != 0) {
        return 0;
    }
    int r = cuda_weights_packed(w, &packed, &made);
    r = r < 0 ? r : cuda_program_upload(p, packed, cuda_weights_packed_bytes(w), to);
    free(made);
    return r;
}

int cuda_program_upload_floats(struct cuda_program *p, const struct gqa_program_desc *desc,
                               uint32_t weight, struct cuda_buffer *to)
{
    float *values;

    if (weight == GQA_NONE || to->at != 0) {
        return 0;
    }
    int r = plugin_weight_floats(desc, weight, &values);
    if (r == 0) {
        uint64_t n = plugin_weight_values(&desc->weights[weight]);
        r = cuda_program_upload(p, values, n * sizeof(*values), to);
        free(values);
    }
    return r;
}

static int build_op(struct cuda_program *p, const struct gqa_program_desc *desc, uint32_t i)
{
    struct cuda_op *op = &p->ops[i];
    uint32_t weight = desc->ops[i].weight, bias = desc->ops[i].bias;
    int r = 0;

    op->op = desc->ops[i];
    switch (op->op.kind) {
    case GQA_OP_EMBED:
        op->table = desc->weights[weight];
        return cuda_buffer_reserve(p->context, &op->embeddings,
                                   (uint64_t)p->max_rows * op->op.dst.width * sizeof(float));
    case GQA_OP_LINEAR:
        op->matrix.type = cuda_weight_type_of(desc->weights[weight].type);
        op->matrix.n_inputs = op->op.src.width;
        op->matrix.n_outputs = op->op.dst.width;
        r = cuda_program_upload_matrix(p, &desc->weights[weight], &p->weights[weight]);
        if (r == 0 && op->op.u.linear.adapters) {
            r = cuda_adapters_table(p, desc, weight, &op->adapters);
        }
        break;
    case GQA_OP_NORM:
        if (weight != GQA_NONE) {
            r = cuda_program_upload_floats(p, desc, weight, &p->weights[weight]);
        }
        break;
    case GQA_OP_EXPERTS:
        return cuda_mixture_create(p, desc, i, &op->mixture);
    default:
        return 0;
    }
    if (r == 0 && bias != GQA_NONE) {
        r = cuda_program_upload_floats(p, desc, bias, &p->weights[bias]);
    }
    if (r == 0) {
        op->matrix.weight = weight != GQA_NONE ? p->weights[weight].at : 0;
        op->matrix.bias = bias != GQA_NONE ? p->weights[bias].at : 0;
    }
    return r;
}

static int build_inputs(struct cuda_program *p)
{
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < p->n_ops; i++) {
        const struct cuda_matrix *m = &p->ops[i].matrix;
        if (p->ops[i].op.kind == GQA_OP_LINEAR) {
            r = cuda_inputs_reserve(p->context, &p->inputs, cuda_input_kind_of(m->type),
                                    p->max_rows, m->n_inputs);
        }
    }
    return r < 0 ? r : cuda_mixture_room_init(p);
}

static int build_registers(struct cuda_program *p, const struct gqa_program_desc *desc)
{
    int r = 0;

    p->n_regs = desc->n_regs;
    for (uint32_t i = 0; r == 0 && i < p->n_regs; i++) {
        uint32_t out = desc->regs[i].flags & GQA_REG_OUT;
        uint64_t rows = out ? p->max_out_rows : p->max_rows;
        p->regs[i].width = desc->regs[i].width;
        p->regs[i].flags = desc->regs[i].flags;
        r = cuda_buffer_reserve(p->context, &p->regs[i].rows,
                                (rows + 1) * desc->regs[i].width * sizeof(float));
    }
    return r;
}

/* Whether the op's rows of prompts may go to the library: output rows have no classes. */
static bool may_be_apart(const struct cuda_program *p, const struct cuda_op *op)
{
    const struct gqa_view *dst = &op->op.dst;

    return op->op.kind == GQA_OP_LINEAR && dst->first % 4 == 0 &&
           !(p->regs[dst->reg].flags & GQA_REG_OUT);
}

/* Which matrices the library multiplies, once there is room for all of them. */
static int build_library(struct cuda_program *p)
{
    uint32_t n_ops = p->context->lt != NULL ? p->n_ops : 0;
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < n_ops; i++) {
        if (may_be_apart(p, &p->ops[i])) {
            r = cuda_lt_reserve(p->context, &p->lt_room, &p->ops[i].matrix, p->max_rows);
        }
    }
    for (uint32_t i = 0; r == 0 && i < n_ops; i++) {
        struct cuda_op *op = &p->ops[i];
        if (may_be_apart(p, op)) {
            r = cuda_lt_find(p->context, &p->lt_room, &p->inputs, &op->matrix,
                             p->regs[op->op.dst.reg].width, &op->lt);
            p->has_lt = p->has_lt || op->lt != NULL;
        }
    }
    return r;
}

static bool same_kind(const struct gqa_attn_layer *a, const struct gqa_attn_layer *b)
{
    return a->n_heads == b->n_heads && a->n_kv_heads == b->n_kv_heads && a->k_dim == b->k_dim &&
           a->v_dim == b->v_dim && a->window == b->window && a->layer_class == b->layer_class &&
           a->rope == b->rope && a->rope_kind == b->rope_kind;
}

static uint32_t kind_of(struct cuda_program *p, const struct gqa_attn_layer *l, uint32_t layer)
{
    for (uint32_t k = 0; k < p->n_kinds; k++) {
        if (same_kind(&p->layers[p->kind_layers[k]].host, l)) {
            return k;
        }
    }
    p->kind_layers[p->n_kinds] = layer;
    return p->n_kinds++;
}

static int build_layers(struct cuda_program *p, const struct gqa_program_desc *desc)
{
    int r = 0;

    for (uint32_t i = 0; i < desc->n_attn_layers; i++) {
        uint32_t n = gqa_layer_at(desc, i)->layer_class + 1;
        if (n > PLUGIN_ITEMS_MAX) {
            return -EINVAL;
        }
        p->n_classes = n > p->n_classes ? n : p->n_classes;
    }
    p->class_bytes = array(p->n_classes, sizeof(*p->class_bytes));
    if (p->class_bytes == NULL) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; r == 0 && i < desc->n_attn_layers; i++) {
        const struct gqa_attn_layer *l = gqa_layer_at(desc, i);
        struct cuda_layer *to = &p->layers[i];
        uint64_t k_end = l->k_offset + l->n_kv_heads * l->k_head_bytes;
        uint64_t v_end = l->v_offset + l->n_kv_heads * l->v_head_bytes;
        uint64_t end = k_end > v_end ? k_end : v_end;
        uint64_t *bytes = &p->class_bytes[l->layer_class];

        *bytes = end > *bytes ? end : *bytes;
        if (l->sinks != NULL) {
            r = cuda_program_upload(p, l->sinks, l->n_heads * sizeof(float), &p->sinks[i]);
        }
        gqa_take(&to->host, sizeof(to->host), l);
        to->host.sinks = NULL; /* those are the device's now */
        to->device = cuda_layer_of(l, p->sinks[i].at);
        to->kind = kind_of(p, l, i);
        to->log_at = p->log_row_bytes;
        p->log_row_bytes += cuda_log_row_bytes(l);
        p->n_layers = i + 1;
    }
    return r < 0 ? r : cuda_buffer_reserve(p->context, &p->log, p->log_row_bytes * p->max_rows);
}

static int build_ropes(struct cuda_program *p, const struct gqa_program_desc *desc)
{
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < desc->n_rope_tables; i++) {
        const struct gqa_rope_table *from = &desc->rope_tables[i];
        struct cuda_rope *rope = &p->ropes[i];

        p->n_ropes = i + 1;
        rope->n_freqs = from->n_freqs;
        rope->magnitude = from->magnitude;
        rope->freqs = array(from->n_freqs, sizeof(*rope->freqs));
        if (rope->freqs == NULL) {
            return -ENOMEM;
        }
        memcpy(rope->freqs, from->freqs, from->n_freqs * sizeof(*rope->freqs));
        r = cuda_buffer_reserve(p->context, &rope->angles,
                                2 * (uint64_t)p->max_rows * from->n_freqs * sizeof(float));
    }
    return r;
}

static int allocate(struct cuda_program *p, const struct gqa_program_desc *desc)
{
    p->ops = array(desc->n_ops, sizeof(*p->ops));
    p->regs = array(desc->n_regs, sizeof(*p->regs));
    p->downloads = array(desc->n_regs, sizeof(*p->downloads));
    p->layers = array(desc->n_attn_layers, sizeof(*p->layers));
    p->plans = array(desc->n_attn_layers, sizeof(*p->plans));
    p->kind_layers = array(desc->n_attn_layers, sizeof(*p->kind_layers));
    p->sinks = array(desc->n_attn_layers, sizeof(*p->sinks));
    p->ropes = array(desc->n_rope_tables, sizeof(*p->ropes));
    p->weights = array(desc->n_weights, sizeof(*p->weights));
    if (p->ops == NULL || p->regs == NULL || p->downloads == NULL || p->layers == NULL ||
        p->plans == NULL || p->kind_layers == NULL || p->sinks == NULL || p->ropes == NULL ||
        p->weights == NULL) {
        return -ENOMEM;
    }
    p->n_weights = desc->n_weights;
    return 0;
}

static int build(struct cuda_program *p, const struct gqa_program_desc *desc)
{
    int r = allocate(p, desc);

    r = r < 0 ? r : cuda_adapters_init(p, desc);
    for (uint32_t i = 0; r == 0 && i < desc->n_ops; i++) {
        r = build_op(p, desc, i);
        p->n_ops = i + 1;
    }
    r = r < 0 ? r : build_inputs(p);
    r = r < 0 ? r : build_registers(p, desc);
    r = r < 0 ? r : build_library(p);
    r = r < 0 ? r : build_layers(p, desc);
    r = r < 0 ? r : build_ropes(p, desc);
    r = r < 0 ? r : cuda_buffer_reserve(p->context, &p->out_rows, p->max_rows * sizeof(uint32_t));
    return r < 0 ? r : cuda_synchronise(p->context);
}

static int check_matrix(const struct gqa_weight *w, struct gqa_reason *reason)
{
    const struct fmt_type_info *type = fmt_type_info(w->type);
    uint64_t bytes = cuda_weights_packed_bytes(w);

    if (type == NULL || type->dequantise == NULL || bytes == 0) {
        snprintf(reason->text, sizeof(reason->text), "no reader for type %u", w->type);
        return -ENOTSUP;
    }
    if (w->packed != NULL ? w->packed_bytes != bytes : w->data == NULL) {
        snprintf(reason->text, sizeof(reason->text), "is packed in %llu bytes instead of %llu",
                 (unsigned long long)w->packed_bytes, (unsigned long long)bytes);
        return -EINVAL;
    }
    return 0;
}

static int check_mixture(const struct gqa_program_desc *desc, uint32_t index,
                         struct gqa_reason *reason)
{
    const struct gqa_op_experts *e = &desc->ops[index].u.experts;
    const uint32_t matrices[] = {e->router, e->gate, e->up, e->down};
    struct gqa_reason why = {""};
    int r = 0;

    for (uint32_t i = 0; r == 0 && i < sizeof(matrices) / sizeof(matrices[0]); i++) {
        r = matrices[i] != GQA_NONE ? check_matrix(&desc->weights[matrices[i]], &why) : 0;
        if (r < 0) {
            plugin_refuse_op(desc, index, matrices[i], r, reason, "%.120s", why.text);
        }
    }
    if (r == 0 && desc->weights[e->router].data == NULL) { /* it is not used as it was packed */
        r = plugin_refuse_op(desc, index, e->router, -EINVAL, reason, "has no data");
    }
    uint64_t n_items = cuda_mixture_items_max(desc->max_rows, e->n_experts, e->n_used);
    if (r == 0 && n_items > CUDA_PROGRAM_ROWS_MAX) {
        r = plugin_refuse_op(desc, index, GQA_NONE, -ENOTSUP, reason,
                             "%u experts for each of %u rows are more than a grid has room for",
                             e->n_used, desc->max_rows);
    }
    return r;
}

/* Refuses what cannot run. */
static int check(const struct gqa_program_desc *desc, struct gqa_reason *reason)
{
    const struct plugin_rules rules = {
        .rows_max = CUDA_PROGRAM_ROWS_MAX,
        .layer = cuda_attention_supports,
        .matrix = check_matrix,
    };
    int r = plugin_check(desc, &rules, reason);

    for (uint32_t i = 0; r == 0 && i < desc->n_ops; i++) {
        if (desc->ops[i].kind == GQA_OP_EXPERTS) {
            r = check_mixture(desc, i, reason);
        }
    }
    return r;
}

int cuda_program_prepare(struct cuda_context *c, const struct gqa_program_desc *desc,
                         struct cuda_program **ret, struct gqa_reason *reason)
{
    int r = check(desc, reason);

    if (r < 0) {
        return r;
    }
    struct cuda_program *p = calloc(1, sizeof(*p));
    if (p == NULL) {
        snprintf(reason->text, sizeof(reason->text), "no memory");
        return -ENOMEM;
    }
    p->context = c;
    p->max_rows = desc->max_rows;
    p->max_out_rows = desc->max_out_rows;
    r = plugin_adapters_init(&p->adapters.all, desc, reason);
    if (r < 0 && r != -ENOMEM) {
        cuda_program_release(p);
        return r;
    }
    c->last = CUDA_SUCCESS;
    r = r < 0 ? r : cuda_enter(c);
    if (r == 0) {
        r = build(p, desc);
        cuda_leave(c);
    }
    if (r < 0) {
        snprintf(reason->text, sizeof(reason->text), "the program does not fit: %s",
                 c->last != CUDA_SUCCESS ? cuda_error_text(&c->driver, c->last) : strerror(-r));
        cuda_program_release(p);
        return r;
    }
    *ret = p;
    return 0;
}

static void free_pinned(struct cuda_program *p, struct cuda_pinned *memory)
{
    if (memory->at != NULL) {
        CUDA(&p->context->driver, cuMemFreeHost)(memory->at);
    }
}

/* What is on the device. The context is current. */
static void release_device(struct cuda_program *p)
{
    struct cuda_context *c = p->context;
    struct cuda_buffer *all[] = {&p->out_rows, &p->log};

    cuda_graphs_finish(p);
    cuda_inputs_finish(c, &p->inputs);
    cuda_lt_room_finish(c, &p->lt_room);
    cuda_adapters_finish(p);
    cuda_mixture_room_finish(c, &p->mixture_room);
    cuda_times_finish(p);
    for (size_t i = 0; i < sizeof(all) / sizeof(all[0]); i++) {
        cuda_buffer_finish(c, all[i]);
    }
    for (uint32_t i = 0; i < p->n_weights; i++) {
        cuda_buffer_finish(c, &p->weights[i]);
    }
    for (uint32_t i = 0; i < p->n_ops; i++) {
        cuda_buffer_finish(c, &p->ops[i].embeddings);
        cuda_buffer_finish(c, &p->ops[i].adapters.entries);
        cuda_mixture_finish(c, p->ops[i].mixture);
    }
    for (uint32_t i = 0; i < p->n_regs; i++) {
        cuda_buffer_finish(c, &p->regs[i].rows);
        free_pinned(p, &p->downloads[i]);
    }
    for (uint32_t i = 0; i < p->n_layers; i++) {
        cuda_buffer_finish(c, &p->sinks[i]);
    }
    for (uint32_t i = 0; i < p->n_kinds; i++) {
        cuda_plan_finish(c, &p->plans[i]);
    }
    for (uint32_t i = 0; i < p->n_ropes; i++) {
        cuda_buffer_finish(c, &p->ropes[i].angles);
    }
    free_pinned(p, &p->host_log);
    free_pinned(p, &p->staging);
}

void cuda_program_release(struct cuda_program *p)
{
    if (p == NULL) {
        return;
    }
    if (cuda_enter(p->context) == 0) {
        cuda_synchronise(p->context);
        release_device(p);
        cuda_leave(p->context);
    }
    for (uint32_t i = 0; i < p->n_ropes; i++) {
        free(p->ropes[i].freqs);
    }
    for (uint32_t i = 0; i < p->n_ops; i++) {
        free(p->ops[i].mixture);
    }
    free(p->adapters.factors);
    plugin_adapters_finish(&p->adapters.all);
    free(p->step.page_index);
    free(p->step.page_at);
    free(p->class_bytes);
    free(p->ops);
    free(p->regs);
    free(p->downloads);
    free(p->layers);
    free(p->plans);
    free(p->kind_layers);
    free(p->sinks);
    free(p->ropes);
    free(p->weights);
    free(p);
}
