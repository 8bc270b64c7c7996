/* plugins/cuda/program_check.c - refuses descriptions that cannot run, so that running needs no
 * checks. Every refusal names the op, its layer and its tensor. */
#include "plugins/cuda/program.h"

#include "format/types.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

static const char *const kind_names[] = {
    [GQA_OP_EMBED] = "embed",   [GQA_OP_NORM] = "norm",           [GQA_OP_LINEAR] = "linear",
    [GQA_OP_ROPE] = "rope",     [GQA_OP_ATTENTION] = "attention", [GQA_OP_GLU] = "glu",
    [GQA_OP_ADD] = "add",       [GQA_OP_SCALE] = "scale",         [GQA_OP_SOFTCAP] = "softcap",
    [GQA_OP_GATHER] = "gather", [GQA_OP_EXPERTS] = "experts",
};
#define N_KINDS (sizeof(kind_names) / sizeof(kind_names[0]))

struct check {
    const struct gqa_program_desc *desc;
    const struct gqa_op *op;
    uint32_t index;
    struct gqa_reason *reason;
};

__attribute__((format(printf, 4, 5))) static int fail(const struct check *c, uint32_t weight,
                                                      int error, const char *format, ...)
{
    const char *kind = c->op->kind < N_KINDS ? kind_names[c->op->kind] : NULL;
    char layer[24] = "", tensor[88] = "", what[112];
    va_list args;

    va_start(args, format);
    vsnprintf(what, sizeof(what), format, args);
    va_end(args);
    if (c->op->layer != GQA_NONE) {
        snprintf(layer, sizeof(layer), ", layer %u", c->op->layer);
    }
    if (weight < c->desc->n_weights) {
        const struct gqa_weight *w = &c->desc->weights[weight];
        const struct fmt_type_info *type = fmt_type_info(w->type);
        snprintf(tensor, sizeof(tensor), ", %.56s (%.12s)", w->name != NULL ? w->name : "?",
                 type != NULL ? type->name : "unknown type");
    }
    snprintf(c->reason->text, sizeof(c->reason->text), "op %u (%s%s)%s: %s", c->index,
             kind != NULL ? kind : "unknown", layer, tensor, what);
    return error;
}

static int check_view(const struct check *c, const char *name, const struct gqa_view *v,
                      uint64_t width)
{
    if (v->reg >= c->desc->n_regs) {
        return fail(c, GQA_NONE, -EINVAL, "%s is register %u of %u", name, v->reg, c->desc->n_regs);
    }
    uint32_t all = c->desc->regs[v->reg].width;
    if (v->width == 0 || v->first > all || v->width > all - v->first || v->width != width) {
        return fail(c, GQA_NONE, -EINVAL, "%s is columns %u+%u of register %u with %u", name,
                    v->first, v->width, v->reg, all);
    }
    return 0;
}

static uint32_t out_rows(const struct check *c, const struct gqa_view *v)
{
    return c->desc->regs[v->reg].flags & GQA_REG_OUT;
}

static bool overlap(const struct gqa_view *a, const struct gqa_view *b)
{
    return a->reg == b->reg && a->first < b->first + b->width && b->first < a->first + a->width;
}

/* As wide as dst, of the same kind of rows, dst's own place or clear of it. */
static int check_like_dst(const struct check *c, const char *name, const struct gqa_view *v)
{
    const struct gqa_view *dst = &c->op->dst;

    int r = check_view(c, name, v, dst->width);
    if (r < 0) {
        return r;
    }
    if (out_rows(c, v) != out_rows(c, dst) ||
        (overlap(v, dst) && (v->first != dst->first || v->width != dst->width))) {
        return fail(c, GQA_NONE, -EINVAL, "%s has other rows than dst, or overlaps it", name);
    }
    return 0;
}

static int check_vector(const struct check *c, uint32_t weight, uint64_t n)
{
    if (weight == GQA_NONE) {
        return 0;
    }
    if (weight >= c->desc->n_weights) {
        return fail(c, GQA_NONE, -EINVAL, "weight %u of %u", weight, c->desc->n_weights);
    }
    const struct gqa_weight *w = &c->desc->weights[weight];
    const struct fmt_type_info *type = fmt_type_info(w->type);
    if (type == NULL || type->dequantise == NULL) {
        return fail(c, weight, -ENOTSUP, "no reader for type %u", w->type);
    }
    if (w->n_dims != 1 || w->ne[0] != n || fmt_type_bytes(type, n) == 0 || w->data == NULL) {
        return fail(c, weight, -EINVAL, "is not a vector of %llu", (unsigned long long)n);
    }
    return 0;
}

static int check_matrix(const struct check *c, uint32_t weight, uint64_t inputs, uint64_t outputs)
{
    if (weight >= c->desc->n_weights) {
        return fail(c, GQA_NONE, -EINVAL, "weight %u of %u", weight, c->desc->n_weights);
    }
    const struct gqa_weight *w = &c->desc->weights[weight];
    if (w->n_dims != 2 || w->ne[0] != inputs || (outputs != 0 && w->ne[1] != outputs)) {
        return fail(c, weight, -EINVAL, "is %llu x %llu, the op has %llu inputs, %llu outputs",
                    (unsigned long long)w->ne[0], (unsigned long long)w->ne[1],
                    (unsigned long long)inputs, (unsigned long long)outputs);
    }
    const struct fmt_type_info *type = fmt_type_info(w->type);
    if (type == NULL || type->dequantise == NULL || fmt_type_bytes(type, inputs) == 0) {
        return fail(c, weight, -ENOTSUP, "no reader for type %u", w->type);
    }
    return 0;
}

static int check_linear(const struct check *c)
{
    const struct gqa_op *op = c->op;

    int r = check_view(c, "src", &op->src, op->src.width);
    r = r < 0 ? r : check_matrix(c, op->weight, op->src.width, op->dst.width);
    r = r < 0 ? r : check_vector(c, op->bias, op->dst.width);
    if (r < 0) {
        return r;
    }
    const struct gqa_weight *w = &c->desc->weights[op->weight];
    if (out_rows(c, &op->src) != out_rows(c, &op->dst) || overlap(&op->src, &op->dst)) {
        return fail(c, op->weight, -EINVAL, "src has other rows than dst, or overlaps it");
    }
    uint64_t bytes = cuda_weights_packed_bytes(w);
    if (w->packed != NULL ? w->packed_bytes != bytes : w->data == NULL) {
        return fail(c, op->weight, -EINVAL, "is packed in %llu bytes instead of %llu",
                    (unsigned long long)w->packed_bytes, (unsigned long long)bytes);
    }
    return 0;
}

static int check_norm(const struct check *c)
{
    uint32_t dim = c->op->u.norm.dim;

    if (c->op->u.norm.kind > GQA_NORM_LAYER || dim == 0 || c->op->dst.width % dim != 0) {
        return fail(c, GQA_NONE, -EINVAL, "kind %u, groups of %u in %u columns", c->op->u.norm.kind,
                    dim, c->op->dst.width);
    }
    int r = check_like_dst(c, "src", &c->op->src);
    r = r < 0 ? r : check_vector(c, c->op->weight, dim);
    return r < 0 ? r : check_vector(c, c->op->bias, dim);
}

static int check_rope(const struct check *c)
{
    const struct gqa_op *op = c->op;
    uint32_t head_dim = op->u.rope.head_dim, n_rot = op->u.rope.n_rot;

    if (op->u.rope.kind > GQA_ROPE_HALF || head_dim == 0 || op->dst.width % head_dim != 0 ||
        n_rot > head_dim || n_rot % 2 != 0) {
        return fail(c, GQA_NONE, -EINVAL, "kind %u, heads of %u, %u of it rotated, in %u columns",
                    op->u.rope.kind, head_dim, n_rot, op->dst.width);
    }
    if (op->u.rope.table >= c->desc->n_rope_tables ||
        c->desc->rope_tables[op->u.rope.table].n_freqs != n_rot / 2) {
        return fail(c, GQA_NONE, -EINVAL, "rope table %u does not fit %u rotated values",
                    op->u.rope.table, n_rot);
    }
    if (op->src.reg != op->dst.reg || op->src.first != op->dst.first || out_rows(c, &op->dst)) {
        return fail(c, GQA_NONE, -EINVAL, "rotates in place, and rows of the batch");
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
        return fail(c, GQA_NONE, -EINVAL, "layer %u of %u", op->layer, c->desc->n_attn_layers);
    }
    const struct gqa_attn_layer *l = &c->desc->attn_layers[op->layer];
    int r = cuda_attention_supports(l, &why);
    if (r < 0) {
        return fail(c, GQA_NONE, r, "%.120s", why.text);
    }
    uint64_t widths[4] = {(uint64_t)l->n_heads * l->k_dim, (uint64_t)l->n_kv_heads * l->k_dim,
                          (uint64_t)l->n_kv_heads * l->v_dim, (uint64_t)l->n_heads * l->v_dim};
    for (uint32_t i = 0; i < 4; i++) {
        r = check_view(c, names[i], views[i], widths[i]);
        if (r < 0) {
            return r;
        }
        if (out_rows(c, views[i]) || (i < 3 && overlap(views[i], &op->dst))) {
            return fail(c, GQA_NONE, -EINVAL, "%s has output rows only, or overlaps dst", names[i]);
        }
    }
    return 0;
}

static int check_embed(const struct check *c)
{
    if (c->op->u.embed.row > GQA_EMBED_FIRST || out_rows(c, &c->op->dst)) {
        return fail(c, c->op->weight, -ENOTSUP, "embeddings by %u, or of output rows",
                    c->op->u.embed.row);
    }
    int r = check_matrix(c, c->op->weight, c->op->dst.width, 0);
    if (r == 0 && c->desc->weights[c->op->weight].data == NULL) {
        r = fail(c, c->op->weight, -EINVAL, "has no data");
    }
    return r;
}

static int check_glu(const struct check *c)
{
    bool both = c->op->src2.reg != GQA_NONE;

    if (c->op->u.glu.kind > GQA_ACT_RELU || (c->op->u.glu.kind == GQA_ACT_SWIGLU_OAI && !both)) {
        return fail(c, GQA_NONE, -ENOTSUP, "activation %u", c->op->u.glu.kind);
    }
    int r = check_like_dst(c, "src", &c->op->src);
    return r == 0 && both ? check_like_dst(c, "src2", &c->op->src2) : r;
}

static int check_gather(const struct check *c)
{
    int r = check_view(c, "src", &c->op->src, c->op->dst.width);

    if (r == 0 && (!out_rows(c, &c->op->dst) || out_rows(c, &c->op->src))) {
        r = fail(c, GQA_NONE, -EINVAL, "gathers rows of the batch into output rows");
    }
    return r;
}

static int check_op(const struct check *c)
{
    int r = check_view(c, "dst", &c->op->dst, c->op->dst.width);

    if (r < 0) {
        return r;
    }
    switch (c->op->kind) {
    case GQA_OP_EMBED:
        return check_embed(c);
    case GQA_OP_NORM:
        return check_norm(c);
    case GQA_OP_LINEAR:
        return check_linear(c);
    case GQA_OP_ROPE:
        return check_rope(c);
    case GQA_OP_ATTENTION:
        return check_attention(c);
    case GQA_OP_GLU:
        return check_glu(c);
    case GQA_OP_ADD:
        r = check_like_dst(c, "src2", &c->op->src2);
        return r < 0 ? r : check_like_dst(c, "src", &c->op->src);
    case GQA_OP_SOFTCAP:
        if (!(c->op->scale > 0.0f)) {
            return fail(c, GQA_NONE, -EINVAL, "caps at %g", (double)c->op->scale);
        }
        return check_like_dst(c, "src", &c->op->src);
    case GQA_OP_SCALE:
        return check_like_dst(c, "src", &c->op->src);
    case GQA_OP_GATHER:
        return check_gather(c);
    case GQA_OP_EXPERTS:
        return fail(c, c->op->u.experts.up, -ENOTSUP, "mixtures of experts do not run on cuda yet");
    default:
        return fail(c, GQA_NONE, -ENOTSUP, "kind %u", c->op->kind);
    }
}

int cuda_program_check(const struct gqa_program_desc *desc, struct gqa_reason *reason)
{
    const uint32_t counts[] = {desc->n_ops, desc->n_regs, desc->n_weights, desc->n_attn_layers,
                               desc->n_rope_tables};

    if (desc->max_rows == 0 || desc->max_rows > CUDA_PROGRAM_ROWS_MAX ||
        desc->max_out_rows > desc->max_rows) {
        snprintf(reason->text, sizeof(reason->text), "batches of %u rows, %u of output",
                 desc->max_rows, desc->max_out_rows);
        return -EINVAL;
    }
    for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
        if (counts[i] > CUDA_PROGRAM_ITEMS_MAX) {
            snprintf(reason->text, sizeof(reason->text), "%u ops or weights", counts[i]);
            return -EINVAL;
        }
    }
    if (desc->n_adapters > 0) {
        snprintf(reason->text, sizeof(reason->text), "adapters do not run on cuda yet");
        return -ENOTSUP;
    }
    for (uint32_t i = 0; i < desc->n_ops; i++) {
        struct check c = {desc, &desc->ops[i], i, reason};
        int r = check_op(&c);
        if (r < 0) {
            return r;
        }
    }
    return 0;
}
