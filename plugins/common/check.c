/* plugins/common/check.c - ops of a description against its registers and weights. */
#include "plugins/common/check_internal.h"

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

int plugin_refuse_op(const struct gqa_program_desc *desc, uint32_t index, uint32_t weight,
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

int plugin_check_view(const struct plugin_check *c, const char *name, const struct gqa_view *v)
{
    if (v->reg >= c->desc->n_regs) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "%s is register %u of %u", name, v->reg,
                             c->desc->n_regs);
    }
    uint32_t width = c->desc->regs[v->reg].width;
    if (v->width == 0 || v->first > width || v->width > width - v->first) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "%s is columns %u+%u of register %u with %u",
                             name, v->first, v->width, v->reg, width);
    }
    return 0;
}

static int check_width(const struct plugin_check *c, const char *name, const struct gqa_view *v,
                       uint64_t width)
{
    int r = plugin_check_view(c, name, v);
    if (r == 0 && v->width != width) {
        r = PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "%s has %u columns instead of %llu", name, v->width,
                          (unsigned long long)width);
    }
    return r;
}

static int same_view(const struct gqa_view *a, const struct gqa_view *b)
{
    return a->reg == b->reg && a->first == b->first && a->width == b->width;
}

/* A source of an op that goes value by value: as wide as dst, the same kind of rows, and either
 * dst's own place or clear of it. */
static int check_like_dst(const struct plugin_check *c, const char *name, const struct gqa_view *v)
{
    const struct gqa_view *dst = &c->op->dst;

    int r = check_width(c, name, v, dst->width);
    if (r < 0) {
        return r;
    }
    if (plugin_rows_kind(c, v) != plugin_rows_kind(c, dst)) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "%s and dst have different rows", name);
    }
    if (plugin_views_overlap(v, dst) && !same_view(v, dst)) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "%s and dst overlap", name);
    }
    return 0;
}

int plugin_check_readable(const struct plugin_check *c, uint32_t weight)
{
    if (weight >= c->desc->n_weights) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "weight %u of %u", weight, c->desc->n_weights);
    }
    const struct gqa_weight *w = &c->desc->weights[weight];
    const struct fmt_type_info *type = fmt_type_info(w->type);
    if (type == NULL || type->dequantise == NULL) {
        return PLUGIN_REFUSE(c, weight, -ENOTSUP, "no reader for type %u", w->type);
    }
    return 0;
}

int plugin_check_vector(const struct plugin_check *c, uint32_t weight, uint64_t n)
{
    if (weight == GQA_NONE) {
        return 0;
    }
    int r = plugin_check_readable(c, weight);
    if (r < 0) {
        return r;
    }
    const struct gqa_weight *w = &c->desc->weights[weight];
    const struct fmt_type_info *type = fmt_type_info(w->type);
    if (w->n_dims != 1 || w->ne[0] != n || fmt_type_bytes(type, n) == 0) {
        return PLUGIN_REFUSE(c, weight, -EINVAL, "is not a vector of %llu", (unsigned long long)n);
    }
    return w->data != NULL ? 0 : PLUGIN_REFUSE(c, weight, -EINVAL, "has no data");
}

int plugin_check_matrix(const struct plugin_check *c, uint32_t weight, uint64_t inputs,
                        uint64_t outputs)
{
    if (weight >= c->desc->n_weights) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "weight %u of %u", weight, c->desc->n_weights);
    }
    const struct gqa_weight *w = &c->desc->weights[weight];
    if (w->n_dims != 2 || w->ne[0] != inputs || (outputs != 0 && w->ne[1] != outputs)) {
        return PLUGIN_REFUSE(c, weight, -EINVAL,
                             "is %llu x %llu, the op has %llu inputs, %llu outputs",
                             (unsigned long long)w->ne[0], (unsigned long long)w->ne[1],
                             (unsigned long long)inputs, (unsigned long long)outputs);
    }
    return 0;
}

static int check_embed(const struct plugin_check *c)
{
    const struct gqa_op *op = c->op;

    if (op->u.embed.row > GQA_EMBED_FIRST) {
        return PLUGIN_REFUSE(c, op->weight, -ENOTSUP, "embeddings by %u", op->u.embed.row);
    }
    int r = plugin_check_matrix(c, op->weight, op->dst.width, 0);
    if (r < 0) {
        return r;
    }
    const struct fmt_type_info *type = fmt_type_info(c->desc->weights[op->weight].type);
    if (type == NULL || type->dequantise == NULL) {
        return PLUGIN_REFUSE(c, op->weight, -ENOTSUP, "no reader for this type");
    }
    if (fmt_type_bytes(type, op->dst.width) == 0) {
        return PLUGIN_REFUSE(c, op->weight, -EINVAL, "rows are no multiple of the type's block");
    }
    if (c->desc->weights[op->weight].data == NULL) {
        return PLUGIN_REFUSE(c, op->weight, -EINVAL, "has no data");
    }
    if (plugin_rows_kind(c, &op->dst)) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "dst has output rows only");
    }
    return 0;
}

static int check_norm(const struct plugin_check *c)
{
    const struct gqa_op *op = c->op;

    if (op->u.norm.kind > GQA_NORM_LAYER) {
        return PLUGIN_REFUSE(c, GQA_NONE, -ENOTSUP, "norm kind %u", op->u.norm.kind);
    }
    if (op->u.norm.dim == 0 || op->dst.width % op->u.norm.dim != 0) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "groups of %u in %u columns", op->u.norm.dim,
                             op->dst.width);
    }
    int r = check_like_dst(c, "src", &op->src);
    if (r == 0) {
        r = plugin_check_vector(c, op->weight, op->u.norm.dim);
    }
    return r == 0 ? plugin_check_vector(c, op->bias, op->u.norm.dim) : r;
}

static int check_linear(const struct plugin_check *c)
{
    const struct gqa_op *op = c->op;
    struct gqa_reason why = {""};

    int r = plugin_check_view(c, "src", &op->src);
    if (r == 0) {
        r = plugin_check_matrix(c, op->weight, op->src.width, op->dst.width);
    }
    if (r == 0) {
        r = plugin_check_vector(c, op->bias, op->dst.width);
    }
    if (r < 0) {
        return r;
    }
    if (plugin_rows_kind(c, &op->src) != plugin_rows_kind(c, &op->dst)) {
        return PLUGIN_REFUSE(c, op->weight, -EINVAL, "src and dst have different rows");
    }
    if (plugin_views_overlap(&op->src, &op->dst)) {
        return PLUGIN_REFUSE(c, op->weight, -EINVAL, "src and dst overlap");
    }
    r = c->rules->matrix != NULL ? c->rules->matrix(&c->desc->weights[op->weight], &why) : 0;
    return r < 0 ? PLUGIN_REFUSE(c, op->weight, r, "%.120s", why.text) : 0;
}

static int check_rope(const struct plugin_check *c)
{
    const struct gqa_op *op = c->op;
    uint32_t head_dim = op->u.rope.head_dim, n_rot = op->u.rope.n_rot;

    if (op->u.rope.kind > GQA_ROPE_HALF) {
        return PLUGIN_REFUSE(c, GQA_NONE, -ENOTSUP, "rope kind %u", op->u.rope.kind);
    }
    if (head_dim == 0 || op->dst.width % head_dim != 0 || n_rot > head_dim || n_rot % 2 != 0) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "heads of %u, %u of it rotated, in %u columns",
                             head_dim, n_rot, op->dst.width);
    }
    if (op->u.rope.table >= c->desc->n_rope_tables ||
        c->desc->rope_tables[op->u.rope.table].n_freqs != n_rot / 2) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "rope table %u does not fit %u rotated values",
                             op->u.rope.table, n_rot);
    }
    if (!same_view(&op->src, &op->dst) || plugin_rows_kind(c, &op->dst)) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "rotates in place, and rows of the batch");
    }
    return 0;
}

static int check_attention(const struct plugin_check *c)
{
    const struct gqa_op *op = c->op;
    const struct gqa_view *views[4] = {&op->src, &op->src2, &op->src3, &op->dst};
    static const char *const names[4] = {"src", "src2", "src3", "dst"};
    struct gqa_reason why = {""};

    if (op->layer >= c->desc->n_attn_layers) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "layer %u of %u", op->layer,
                             c->desc->n_attn_layers);
    }
    const struct gqa_attn_layer *l = gqa_layer_at(c->desc, op->layer);
    uint64_t widths[4] = {(uint64_t)l->n_heads * l->k_dim, (uint64_t)l->n_kv_heads * l->k_dim,
                          (uint64_t)l->n_kv_heads * l->v_dim, (uint64_t)l->n_heads * l->v_dim};
    for (uint32_t i = 0; i < 4; i++) {
        int r = check_width(c, names[i], views[i], widths[i]);
        if (r < 0) {
            return r;
        }
        if (plugin_rows_kind(c, views[i]) || (i < 3 && plugin_views_overlap(views[i], &op->dst))) {
            return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "%s has output rows only, or overlaps dst",
                                 names[i]);
        }
    }
    int r = c->rules->layer != NULL ? c->rules->layer(l, &why) : 0;
    return r < 0 ? PLUGIN_REFUSE(c, GQA_NONE, r, "%.120s", why.text) : 0;
}

static int check_glu(const struct plugin_check *c)
{
    const struct gqa_op *op = c->op;

    if (op->u.glu.kind >= PLUGIN_ACT_KINDS) {
        return PLUGIN_REFUSE(c, GQA_NONE, -ENOTSUP, "activation %u", op->u.glu.kind);
    }
    if (op->u.glu.kind == GQA_ACT_SWIGLU_OAI && op->src2.reg == GQA_NONE) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "this activation needs src2");
    }
    int r = check_like_dst(c, "src", &op->src);
    return r == 0 && op->src2.reg != GQA_NONE ? check_like_dst(c, "src2", &op->src2) : r;
}

static int check_add(const struct plugin_check *c)
{
    int r = check_like_dst(c, "src", &c->op->src);
    return r == 0 ? check_like_dst(c, "src2", &c->op->src2) : r;
}

static int check_scale(const struct plugin_check *c)
{
    return check_like_dst(c, "src", &c->op->src);
}

static int check_softcap(const struct plugin_check *c)
{
    if (!(c->op->scale > 0.0f)) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "caps at %g", (double)c->op->scale);
    }
    return check_like_dst(c, "src", &c->op->src);
}

static int check_gather(const struct plugin_check *c)
{
    const struct gqa_op *op = c->op;

    int r = check_width(c, "src", &op->src, op->dst.width);
    if (r == 0 && (!plugin_rows_kind(c, &op->dst) || plugin_rows_kind(c, &op->src))) {
        r = PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "gathers rows of the batch into output rows");
    }
    return r;
}

static int (*const checks[N_KINDS])(const struct plugin_check *c) = {
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
    [GQA_OP_EXPERTS] = plugin_check_experts,
};

static int check_op(const struct plugin_check *c)
{
    if (c->op->kind >= N_KINDS || checks[c->op->kind] == NULL) {
        return PLUGIN_REFUSE(c, GQA_NONE, -ENOTSUP, "unknown kind %u", c->op->kind);
    }
    if (c->op->flags != 0) {
        return PLUGIN_REFUSE(c, GQA_NONE, -ENOTSUP, "unknown flags 0x%x", c->op->flags);
    }
    int r = plugin_check_view(c, "dst", &c->op->dst);
    return r == 0 ? checks[c->op->kind](c) : r;
}

static int check_limits(const struct gqa_program_desc *desc, uint32_t rows_max,
                        struct gqa_reason *reason)
{
    const uint32_t counts[] = {desc->n_ops,         desc->n_regs,        desc->n_weights,
                               desc->n_attn_layers, desc->n_rope_tables, desc->n_adapters};

    if (desc->max_rows == 0 || desc->max_rows > rows_max || desc->max_out_rows > desc->max_rows) {
        snprintf(reason->text, sizeof(reason->text), "batches of %u rows, %u of output",
                 desc->max_rows, desc->max_out_rows);
        return -EINVAL;
    }
    for (uint32_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
        if (counts[i] > PLUGIN_ITEMS_MAX) {
            snprintf(reason->text, sizeof(reason->text), "a list of %u entries", counts[i]);
            return -EINVAL;
        }
    }
    for (uint32_t i = 0; i < desc->n_regs; i++) {
        if (desc->regs[i].width == 0 || desc->regs[i].width > PLUGIN_WIDTH_MAX) {
            snprintf(reason->text, sizeof(reason->text), "register %u has %u columns", i,
                     desc->regs[i].width);
            return -EINVAL;
        }
    }
    for (uint32_t i = 0; i < desc->n_rope_tables; i++) {
        if (desc->rope_tables[i].n_freqs > PLUGIN_ITEMS_MAX) {
            snprintf(reason->text, sizeof(reason->text), "rope table %u has %u angles", i,
                     desc->rope_tables[i].n_freqs);
            return -EINVAL;
        }
    }
    return 0;
}

/* What a newer host has marked as not to be ignored. */
static int check_flags(const struct gqa_program_desc *desc, struct gqa_reason *reason)
{
    const char *what = desc->flags != 0 ? "the program" : NULL;

    for (uint32_t i = 0; i < desc->n_regs; i++) {
        what = desc->regs[i].flags & ~GQA_REG_OUT ? "a register" : what;
    }
    for (uint32_t i = 0; i < desc->n_rope_tables; i++) {
        what = desc->rope_tables[i].flags != 0 ? "a rope table" : what;
    }
    if (what != NULL) {
        snprintf(reason->text, sizeof(reason->text), "%s has flags that this backend does not know",
                 what);
    }
    return what != NULL ? -ENOTSUP : 0;
}

int plugin_check(const struct gqa_program_desc *desc, const struct plugin_rules *rules,
                 struct gqa_reason *reason)
{
    int r = check_limits(desc, rules->rows_max, reason);

    r = r < 0 ? r : check_flags(desc, reason);
    for (uint32_t i = 0; r == 0 && i < desc->n_ops; i++) {
        struct plugin_check c = {desc, rules, &desc->ops[i], i, reason};
        r = check_op(&c);
    }
    return r;
}
