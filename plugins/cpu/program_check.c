/* plugins/cpu/program_check.c - checks the ops of a description against its registers and weights,
 * so that running them needs no checks. */
#include "plugins/cpu/program_check.h"

#include "plugins/cpu/attention.h"
#include "plugins/cpu/program.h"

#include "format/types.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>

static const char *const kind_names[] = {
    [GQA_OP_EMBED] = "embed",   [GQA_OP_NORM] = "norm",           [GQA_OP_LINEAR] = "linear",
    [GQA_OP_ROPE] = "rope",     [GQA_OP_ATTENTION] = "attention", [GQA_OP_GLU] = "glu",
    [GQA_OP_ADD] = "add",       [GQA_OP_SCALE] = "scale",         [GQA_OP_SOFTCAP] = "softcap",
    [GQA_OP_GATHER] = "gather", [GQA_OP_EXPERTS] = "experts",
};

#define N_KINDS (sizeof(kind_names) / sizeof(kind_names[0]))

/* What the checks of one op share. */
struct check {
    const struct gqa_program_desc *desc;
    const struct gqa_op *op;
    uint32_t index;
    struct gqa_reason *reason;
};

int cpu_program_fail(const struct gqa_program_desc *desc, uint32_t index, uint32_t weight,
                     int error, struct gqa_reason *reason, const char *format, ...)
{
    const struct gqa_op *op = &desc->ops[index];
    const char *kind = op->kind < N_KINDS && kind_names[op->kind] ? kind_names[op->kind] : "?";
    char layer[24] = "", tensor[96] = "", what[128];
    va_list args;

    va_start(args, format);
    vsnprintf(what, sizeof(what), format, args);
    va_end(args);
    if (op->layer != GQA_NONE) {
        snprintf(layer, sizeof(layer), ", layer %u", op->layer);
    }
    if (weight != GQA_NONE && weight < desc->n_weights) {
        const struct gqa_weight *w = &desc->weights[weight];
        const struct fmt_type_info *type = fmt_type_info(w->type);
        snprintf(tensor, sizeof(tensor), ", %.64s (%s)", w->name != NULL ? w->name : "?",
                 type != NULL ? type->name : "unknown type");
    }
    snprintf(reason->text, sizeof(reason->text), "op %u (%s%s)%s: %s", index, kind, layer, tensor,
             what);
    return error;
}

#define FAIL(c, weight, error, ...) \
    cpu_program_fail((c)->desc, (c)->index, weight, error, (c)->reason, __VA_ARGS__)

static int check_view(const struct check *c, const char *name, const struct gqa_view *v)
{
    if (v->reg >= c->desc->n_regs) {
        return FAIL(c, GQA_NONE, -EINVAL, "%s is register %u of %u", name, v->reg, c->desc->n_regs);
    }
    uint32_t width = c->desc->regs[v->reg].width;
    if (v->width == 0 || v->first > width || v->width > width - v->first) {
        return FAIL(c, GQA_NONE, -EINVAL, "%s is columns %u+%u of register %u with %u", name,
                    v->first, v->width, v->reg, width);
    }
    return 0;
}

static int check_width(const struct check *c, const char *name, const struct gqa_view *v,
                       uint64_t width)
{
    int r = check_view(c, name, v);
    if (r == 0 && v->width != width) {
        r = FAIL(c, GQA_NONE, -EINVAL, "%s has %u columns instead of %llu", name, v->width,
                 (unsigned long long)width);
    }
    return r;
}

static uint32_t rows_kind(const struct check *c, const struct gqa_view *v)
{
    return c->desc->regs[v->reg].flags & GQA_REG_OUT;
}

static int same_view(const struct gqa_view *a, const struct gqa_view *b)
{
    return a->reg == b->reg && a->first == b->first && a->width == b->width;
}

static int overlap(const struct gqa_view *a, const struct gqa_view *b)
{
    return a->reg == b->reg && a->first < b->first + b->width && b->first < a->first + a->width;
}

/* A source of an op that goes value by value: as wide as dst, the same kind of rows, and either
 * dst's own place or clear of it. */
static int check_like_dst(const struct check *c, const char *name, const struct gqa_view *v)
{
    const struct gqa_view *dst = &c->op->dst;

    int r = check_width(c, name, v, dst->width);
    if (r < 0) {
        return r;
    }
    if (rows_kind(c, v) != rows_kind(c, dst)) {
        return FAIL(c, GQA_NONE, -EINVAL, "%s and dst have different rows", name);
    }
    if (overlap(v, dst) && !same_view(v, dst)) {
        return FAIL(c, GQA_NONE, -EINVAL, "%s and dst overlap", name);
    }
    return 0;
}

/* A weight of n values in one row, of any type that format/ reads; GQA_NONE is legal. */
static int check_vector(const struct check *c, uint32_t weight, uint64_t n)
{
    if (weight == GQA_NONE) {
        return 0;
    }
    if (weight >= c->desc->n_weights) {
        return FAIL(c, GQA_NONE, -EINVAL, "weight %u of %u", weight, c->desc->n_weights);
    }
    const struct gqa_weight *w = &c->desc->weights[weight];
    const struct fmt_type_info *type = fmt_type_info(w->type);
    if (type == NULL || type->dequantise == NULL) {
        return FAIL(c, weight, -ENOTSUP, "no reader for type %u", w->type);
    }
    if (w->n_dims != 1 || w->ne[0] != n || fmt_type_bytes(type, n) == 0) {
        return FAIL(c, weight, -EINVAL, "is not a vector of %llu", (unsigned long long)n);
    }
    return w->data != NULL ? 0 : FAIL(c, weight, -EINVAL, "has no data");
}

/* A weight of outputs x inputs; outputs 0: any number. */
static int check_matrix(const struct check *c, uint32_t weight, uint64_t inputs, uint64_t outputs)
{
    if (weight >= c->desc->n_weights) {
        return FAIL(c, GQA_NONE, -EINVAL, "weight %u of %u", weight, c->desc->n_weights);
    }
    const struct gqa_weight *w = &c->desc->weights[weight];
    if (w->n_dims != 2 || w->ne[0] != inputs || (outputs != 0 && w->ne[1] != outputs)) {
        return FAIL(c, weight, -EINVAL, "is %llu x %llu, the op has %llu inputs, %llu outputs",
                    (unsigned long long)w->ne[0], (unsigned long long)w->ne[1],
                    (unsigned long long)inputs, (unsigned long long)outputs);
    }
    return 0;
}

static int check_embed(const struct check *c)
{
    const struct gqa_op *op = c->op;

    if (op->u.embed.row > GQA_EMBED_FIRST) {
        return FAIL(c, op->weight, -ENOTSUP, "embeddings by %u", op->u.embed.row);
    }
    int r = check_matrix(c, op->weight, op->dst.width, 0);
    if (r < 0) {
        return r;
    }
    const struct fmt_type_info *type = fmt_type_info(c->desc->weights[op->weight].type);
    if (type == NULL || type->dequantise == NULL) {
        return FAIL(c, op->weight, -ENOTSUP, "no reader for this type");
    }
    if (fmt_type_bytes(type, op->dst.width) == 0) {
        return FAIL(c, op->weight, -EINVAL, "rows are no multiple of the type's block");
    }
    if (c->desc->weights[op->weight].data == NULL) {
        return FAIL(c, op->weight, -EINVAL, "has no data");
    }
    if (rows_kind(c, &op->dst)) {
        return FAIL(c, GQA_NONE, -EINVAL, "dst has output rows only");
    }
    return 0;
}

static int check_norm(const struct check *c)
{
    const struct gqa_op *op = c->op;

    if (op->u.norm.kind > GQA_NORM_LAYER) {
        return FAIL(c, GQA_NONE, -ENOTSUP, "norm kind %u", op->u.norm.kind);
    }
    if (op->u.norm.dim == 0 || op->dst.width % op->u.norm.dim != 0) {
        return FAIL(c, GQA_NONE, -EINVAL, "groups of %u in %u columns", op->u.norm.dim,
                    op->dst.width);
    }
    int r = check_like_dst(c, "src", &op->src);
    if (r == 0) {
        r = check_vector(c, op->weight, op->u.norm.dim);
    }
    return r == 0 ? check_vector(c, op->bias, op->u.norm.dim) : r;
}

static int check_linear(const struct check *c)
{
    const struct gqa_op *op = c->op;

    int r = check_view(c, "src", &op->src);
    if (r == 0) {
        r = check_matrix(c, op->weight, op->src.width, op->dst.width);
    }
    if (r == 0) {
        r = check_vector(c, op->bias, op->dst.width);
    }
    if (r < 0) {
        return r;
    }
    if (rows_kind(c, &op->src) != rows_kind(c, &op->dst)) {
        return FAIL(c, op->weight, -EINVAL, "src and dst have different rows");
    }
    if (overlap(&op->src, &op->dst)) {
        return FAIL(c, op->weight, -EINVAL, "src and dst overlap");
    }
    return 0;
}

static int check_rope(const struct check *c)
{
    const struct gqa_op *op = c->op;
    uint32_t head_dim = op->u.rope.head_dim, n_rot = op->u.rope.n_rot;

    if (op->u.rope.kind > GQA_ROPE_HALF) {
        return FAIL(c, GQA_NONE, -ENOTSUP, "rope kind %u", op->u.rope.kind);
    }
    if (head_dim == 0 || op->dst.width % head_dim != 0 || n_rot > head_dim || n_rot % 2 != 0) {
        return FAIL(c, GQA_NONE, -EINVAL, "heads of %u, %u of it rotated, in %u columns", head_dim,
                    n_rot, op->dst.width);
    }
    if (op->u.rope.table >= c->desc->n_rope_tables ||
        c->desc->rope_tables[op->u.rope.table].n_freqs != n_rot / 2) {
        return FAIL(c, GQA_NONE, -EINVAL, "rope table %u does not fit %u rotated values",
                    op->u.rope.table, n_rot);
    }
    if (!same_view(&op->src, &op->dst) || rows_kind(c, &op->dst)) {
        return FAIL(c, GQA_NONE, -EINVAL, "rotates in place, and rows of the batch");
    }
    return 0;
}

static int check_attention(const struct check *c)
{
    const struct gqa_op *op = c->op;
    const struct gqa_view *views[4] = {&op->src, &op->src2, &op->src3, &op->dst};
    static const char *const names[4] = {"src", "src2", "src3", "dst"};
    struct gqa_reason why = {""};

    if (op->layer >= c->desc->n_attn_layers) {
        return FAIL(c, GQA_NONE, -EINVAL, "layer %u of %u", op->layer, c->desc->n_attn_layers);
    }
    const struct gqa_attn_layer *l = &c->desc->attn_layers[op->layer];
    uint64_t widths[4] = {(uint64_t)l->n_heads * l->k_dim, (uint64_t)l->n_kv_heads * l->k_dim,
                          (uint64_t)l->n_kv_heads * l->v_dim, (uint64_t)l->n_heads * l->v_dim};
    for (uint32_t i = 0; i < 4; i++) {
        int r = check_width(c, names[i], views[i], widths[i]);
        if (r < 0) {
            return r;
        }
        if (rows_kind(c, views[i]) || (i < 3 && overlap(views[i], &op->dst))) {
            return FAIL(c, GQA_NONE, -EINVAL, "%s has output rows only, or overlaps dst", names[i]);
        }
    }
    int r = cpu_attention_supports(l, &why);
    return r < 0 ? FAIL(c, GQA_NONE, r, "%.120s", why.text) : 0;
}

static int check_glu(const struct check *c)
{
    const struct gqa_op *op = c->op;

    if (op->u.glu.kind >= CPU_GLU_KINDS) {
        return FAIL(c, GQA_NONE, -ENOTSUP, "activation %u", op->u.glu.kind);
    }
    if (op->u.glu.kind == GQA_ACT_SWIGLU_OAI && op->src2.reg == GQA_NONE) {
        return FAIL(c, GQA_NONE, -EINVAL, "this activation needs src2");
    }
    int r = check_like_dst(c, "src", &op->src);
    return r == 0 && op->src2.reg != GQA_NONE ? check_like_dst(c, "src2", &op->src2) : r;
}

static int check_add(const struct check *c)
{
    int r = check_like_dst(c, "src", &c->op->src);
    return r == 0 ? check_like_dst(c, "src2", &c->op->src2) : r;
}

static int check_scale(const struct check *c)
{
    return check_like_dst(c, "src", &c->op->src);
}

static int check_softcap(const struct check *c)
{
    if (!(c->op->scale > 0.0f)) {
        return FAIL(c, GQA_NONE, -EINVAL, "caps at %g", (double)c->op->scale);
    }
    return check_like_dst(c, "src", &c->op->src);
}

static int check_gather(const struct check *c)
{
    const struct gqa_op *op = c->op;

    int r = check_width(c, "src", &op->src, op->dst.width);
    if (r == 0 && (!rows_kind(c, &op->dst) || rows_kind(c, &op->src))) {
        r = FAIL(c, GQA_NONE, -EINVAL, "gathers rows of the batch into output rows");
    }
    return r;
}

/* A weight of all experts' matrices, whose size fits memory. */
static int check_expert_matrices(const struct check *c, uint32_t weight, uint64_t inputs,
                                 uint64_t outputs)
{
    uint64_t bytes;

    if (weight >= c->desc->n_weights) {
        return FAIL(c, GQA_NONE, -EINVAL, "weight %u of %u", weight, c->desc->n_weights);
    }
    const struct gqa_weight *w = &c->desc->weights[weight];
    uint32_t n_experts = c->op->u.experts.n_experts;
    if (w->n_dims != 3 || w->ne[0] != inputs || w->ne[1] != outputs || w->ne[2] != n_experts) {
        return FAIL(c, weight, -EINVAL, "is %llu x %llu x %llu instead of %llu x %llu x %u",
                    (unsigned long long)w->ne[0], (unsigned long long)w->ne[1],
                    (unsigned long long)w->ne[2], (unsigned long long)inputs,
                    (unsigned long long)outputs, n_experts);
    }
    const struct fmt_type_info *type = fmt_type_info(w->type);
    if (type == NULL) {
        return FAIL(c, weight, -ENOTSUP, "no product for this type");
    }
    if (fmt_type_bytes(type, inputs) == 0 ||
        __builtin_mul_overflow(fmt_type_bytes(type, inputs), outputs, &bytes) ||
        __builtin_mul_overflow(bytes, n_experts, &bytes)) {
        return FAIL(c, weight, -EINVAL, "rows are no multiple of the type's block, or too large");
    }
    return 0;
}

/* Their biases; GQA_NONE is legal. */
static int check_expert_biases(const struct check *c, uint32_t weight, uint64_t outputs)
{
    if (weight == GQA_NONE) {
        return 0;
    }
    if (weight >= c->desc->n_weights) {
        return FAIL(c, GQA_NONE, -EINVAL, "weight %u of %u", weight, c->desc->n_weights);
    }
    const struct gqa_weight *w = &c->desc->weights[weight];
    const struct fmt_type_info *type = fmt_type_info(w->type);
    if (type == NULL || type->dequantise == NULL) {
        return FAIL(c, weight, -ENOTSUP, "no reader for type %u", w->type);
    }
    if (w->n_dims != 2 || w->ne[0] != outputs || w->ne[1] != c->op->u.experts.n_experts ||
        fmt_type_bytes(type, outputs) == 0) {
        return FAIL(c, weight, -EINVAL, "is %llu x %llu instead of %llu x %u",
                    (unsigned long long)w->ne[0], (unsigned long long)w->ne[1],
                    (unsigned long long)outputs, c->op->u.experts.n_experts);
    }
    return w->data != NULL ? 0 : FAIL(c, weight, -EINVAL, "has no data");
}

static int check_expert_numbers(const struct check *c)
{
    const struct gqa_op_experts *e = &c->op->u.experts;
    int gated = e->fused || e->gate != GQA_NONE;

    if (e->n_experts == 0 || e->n_experts > CPU_EXPERTS_MAX || e->n_used == 0 ||
        e->n_used > e->n_experts || (uint64_t)c->desc->max_rows * e->n_used > INT32_MAX) {
        return FAIL(c, GQA_NONE, -EINVAL, "%u of %u experts for each of %u rows", e->n_used,
                    e->n_experts, c->desc->max_rows);
    }
    if (e->gating > GQA_GATING_SOFTMAX_CHOSEN) {
        return FAIL(c, GQA_NONE, -ENOTSUP, "gating %u", e->gating);
    }
    if (e->act >= CPU_GLU_KINDS) {
        return FAIL(c, GQA_NONE, -ENOTSUP, "activation %u", e->act);
    }
    if (e->act == GQA_ACT_SWIGLU_OAI && !gated) {
        return FAIL(c, GQA_NONE, -EINVAL, "this activation needs a gate");
    }
    if (e->fused && (e->gate != GQA_NONE || e->gate_bias != GQA_NONE)) {
        return FAIL(c, GQA_NONE, -EINVAL, "a gate of its own beside a fused one");
    }
    if (e->gate == GQA_NONE && e->gate_bias != GQA_NONE) {
        return FAIL(c, e->gate_bias, -EINVAL, "a bias without its gate");
    }
    if (!(e->weight_scale > 0.0f) || !isfinite(e->weight_scale)) {
        return FAIL(c, GQA_NONE, -EINVAL, "weights times %g", (double)e->weight_scale);
    }
    return 0;
}

static int check_expert_weights(const struct check *c, uint64_t n_ff)
{
    const struct gqa_op_experts *e = &c->op->u.experts;
    uint64_t n_in = c->op->src.width, n_out = c->op->dst.width;
    uint64_t n_up = e->fused ? 2 * n_ff : n_ff;

    int r = check_expert_matrices(c, e->down, n_ff, n_out);
    if (r == 0) {
        r = check_expert_matrices(c, e->up, n_in, n_up);
    }
    if (r == 0 && e->gate != GQA_NONE) {
        r = check_expert_matrices(c, e->gate, n_in, n_ff);
    }
    if (r == 0) {
        r = check_expert_biases(c, e->gate_bias, n_ff);
    }
    if (r == 0) {
        r = check_expert_biases(c, e->up_bias, n_up);
    }
    return r == 0 ? check_expert_biases(c, e->down_bias, n_out) : r;
}

static int check_experts(const struct check *c)
{
    const struct gqa_op *op = c->op;
    const struct gqa_op_experts *e = &op->u.experts;

    int r = check_view(c, "src", &op->src);
    if (r == 0) {
        r = check_expert_numbers(c);
    }
    if (r < 0) {
        return r;
    }
    if (rows_kind(c, &op->src) != rows_kind(c, &op->dst) || overlap(&op->src, &op->dst)) {
        return FAIL(c, GQA_NONE, -EINVAL, "src and dst have different rows, or overlap");
    }
    r = check_matrix(c, e->router, op->src.width, e->n_experts);
    if (r == 0) {
        r = check_vector(c, e->router_bias, e->n_experts);
    }
    if (r == 0) {
        r = check_vector(c, e->selection_bias, e->n_experts);
    }
    if (r < 0) {
        return r;
    }
    uint64_t n_ff = e->down < c->desc->n_weights ? c->desc->weights[e->down].ne[0] : 0;
    if (n_ff > CPU_PROGRAM_WIDTH_MAX) {
        return FAIL(c, e->down, -EINVAL, "%llu inputs", (unsigned long long)n_ff);
    }
    return check_expert_weights(c, n_ff);
}

static int (*const checks[N_KINDS])(const struct check *c) = {
    [GQA_OP_EMBED] = check_embed,
    [GQA_OP_NORM] = check_norm,
    [GQA_OP_LINEAR] = check_linear,
    [GQA_OP_ROPE] = check_rope,
    [GQA_OP_ATTENTION] = check_attention,
    [GQA_OP_GLU] = check_glu,
    [GQA_OP_ADD] = check_add,
    [GQA_OP_SCALE] = check_scale,
    [GQA_OP_SOFTCAP] = check_softcap,
    [GQA_OP_GATHER] = check_gather,
    [GQA_OP_EXPERTS] = check_experts,
};

int cpu_program_check_op(const struct gqa_program_desc *desc, uint32_t index,
                         struct gqa_reason *reason)
{
    struct check c = {desc, &desc->ops[index], index, reason};

    if (c.op->kind >= N_KINDS || checks[c.op->kind] == NULL) {
        return FAIL(&c, GQA_NONE, -ENOTSUP, "unknown kind %u", c.op->kind);
    }
    int r = check_view(&c, "dst", &c.op->dst);
    return r == 0 ? checks[c.op->kind](&c) : r;
}
