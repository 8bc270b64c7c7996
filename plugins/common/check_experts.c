/* plugins/common/check_experts.c - mixtures of experts against their weights. */
#include "plugins/common/check_internal.h"

#include "format/types.h"

#include <errno.h>
#include <math.h>

/* A weight of all experts' matrices, whose size fits memory. */
static int check_expert_matrices(const struct plugin_check *c, uint32_t weight, uint64_t inputs,
                                 uint64_t outputs)
{
    uint64_t bytes;

    if (weight >= c->desc->n_weights) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "weight %u of %u", weight, c->desc->n_weights);
    }
    const struct gqa_weight *w = &c->desc->weights[weight];
    uint32_t n_experts = c->op->u.experts.n_experts;
    if (w->n_dims != 3 || w->ne[0] != inputs || w->ne[1] != outputs || w->ne[2] != n_experts) {
        return PLUGIN_REFUSE(c, weight, -EINVAL,
                             "is %llu x %llu x %llu instead of %llu x %llu x %u",
                             (unsigned long long)w->ne[0], (unsigned long long)w->ne[1],
                             (unsigned long long)w->ne[2], (unsigned long long)inputs,
                             (unsigned long long)outputs, n_experts);
    }
    const struct fmt_type_info *type = fmt_type_info(w->type);
    if (type == NULL) {
        return PLUGIN_REFUSE(c, weight, -ENOTSUP, "no product for this type");
    }
    if (fmt_type_bytes(type, inputs) == 0 ||
        __builtin_mul_overflow(fmt_type_bytes(type, inputs), outputs, &bytes) ||
        __builtin_mul_overflow(bytes, n_experts, &bytes)) {
        return PLUGIN_REFUSE(c, weight, -EINVAL,
                             "rows are no multiple of the type's block, or too large");
    }
    return 0;
}

/* Their biases; GQA_NONE is legal. */
static int check_expert_biases(const struct plugin_check *c, uint32_t weight, uint64_t outputs)
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
    if (w->n_dims != 2 || w->ne[0] != outputs || w->ne[1] != c->op->u.experts.n_experts ||
        fmt_type_bytes(type, outputs) == 0) {
        return PLUGIN_REFUSE(c, weight, -EINVAL, "is %llu x %llu instead of %llu x %u",
                             (unsigned long long)w->ne[0], (unsigned long long)w->ne[1],
                             (unsigned long long)outputs, c->op->u.experts.n_experts);
    }
    return w->data != NULL ? 0 : PLUGIN_REFUSE(c, weight, -EINVAL, "has no data");
}

static int check_expert_numbers(const struct plugin_check *c)
{
    const struct gqa_op_experts *e = &c->op->u.experts;
    int gated = e->fused || e->gate != GQA_NONE;

    if (e->n_experts == 0 || e->n_experts > PLUGIN_EXPERTS_MAX || e->n_used == 0 ||
        e->n_used > e->n_experts || (uint64_t)c->desc->max_rows * e->n_used > INT32_MAX) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "%u of %u experts for each of %u rows",
                             e->n_used, e->n_experts, c->desc->max_rows);
    }
    if (e->gating > GQA_GATING_SOFTMAX_CHOSEN) {
        return PLUGIN_REFUSE(c, GQA_NONE, -ENOTSUP, "gating %u", e->gating);
    }
    if (e->act >= PLUGIN_ACT_KINDS) {
        return PLUGIN_REFUSE(c, GQA_NONE, -ENOTSUP, "activation %u", e->act);
    }
    if (e->act == GQA_ACT_SWIGLU_OAI && !gated) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "this activation needs a gate");
    }
    if (e->fused && (e->gate != GQA_NONE || e->gate_bias != GQA_NONE)) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "a gate of its own beside a fused one");
    }
    if (e->gate == GQA_NONE && e->gate_bias != GQA_NONE) {
        return PLUGIN_REFUSE(c, e->gate_bias, -EINVAL, "a bias without its gate");
    }
    if (!(e->weight_scale > 0.0f) || !isfinite(e->weight_scale)) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "weights times %g", (double)e->weight_scale);
    }
    return 0;
}

static int check_expert_weights(const struct plugin_check *c, uint64_t n_ff)
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

int plugin_check_experts(const struct plugin_check *c)
{
    const struct gqa_op *op = c->op;
    const struct gqa_op_experts *e = &op->u.experts;

    int r = plugin_check_view(c, "src", &op->src);
    if (r == 0) {
        r = check_expert_numbers(c);
    }
    if (r < 0) {
        return r;
    }
    if (plugin_rows_kind(c, &op->src) != plugin_rows_kind(c, &op->dst) ||
        plugin_views_overlap(&op->src, &op->dst)) {
        return PLUGIN_REFUSE(c, GQA_NONE, -EINVAL, "src and dst have different rows, or overlap");
    }
    r = plugin_check_matrix(c, e->router, op->src.width, e->n_experts);
    if (r == 0) {
        r = plugin_check_vector(c, e->router_bias, e->n_experts);
    }
    if (r == 0) {
        r = plugin_check_vector(c, e->selection_bias, e->n_experts);
    }
    if (r < 0) {
        return r;
    }
    uint64_t n_ff = e->down < c->desc->n_weights ? c->desc->weights[e->down].ne[0] : 0;
    if (n_ff > PLUGIN_WIDTH_MAX) {
        return PLUGIN_REFUSE(c, e->down, -EINVAL, "%llu inputs", (unsigned long long)n_ff);
    }
    return check_expert_weights(c, n_ff);
}
