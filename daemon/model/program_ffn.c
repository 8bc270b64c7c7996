/* daemon/model/program_ffn.c - the feed-forward branch of a layer: dense, or a mixture of experts.
 */
#include "daemon/model/program_build.h"

/* Constants of the clamped activation: no key has them. */
#define OAI_ALPHA 1.702f
#define OAI_LIMIT 7.0f

/* Gate and up of all experts in one tensor, as some converters write them. */
#define FUSED_EXPERTS      "ffn_gate_up_exps.weight"
#define FUSED_EXPERTS_BIAS "ffn_gate_up_exps.bias"

/* Names of the tensors of one feed-forward: the dense one, all experts', or the shared expert's. */
struct ffn_names {
    const char *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
};

static const struct ffn_names dense_names = {
    "ffn_gate.weight", "ffn_gate.bias",   "ffn_up.weight",
    "ffn_up.bias",     "ffn_down.weight", "ffn_down.bias",
};

static const struct ffn_names shared_names = {
    "ffn_gate_shexp.weight", "ffn_gate_shexp.bias",   "ffn_up_shexp.weight",
    "ffn_up_shexp.bias",     "ffn_down_shexp.weight", "ffn_down_shexp.bias",
};

static const struct ffn_names expert_names = {
    "ffn_gate_exps.weight", "ffn_gate_exps.bias",   "ffn_up_exps.weight",
    "ffn_up_exps.bias",     "ffn_down_exps.weight", "ffn_down_exps.bias",
};

/* t = down(act(gate) * up), or down(act(up)). */
static void build_dense(struct builder *b, uint32_t layer, struct gqa_view input,
                        const struct ffn_names *names, uint32_t width)
{
    const struct model_shape *s = b->s;
    bool biased = build_has(b, ARCH_BIASES);
    struct gqa_view gate = build_view(b, REG_FF, 0, width);
    struct gqa_view up = build_view(b, REG_FF, width, width);

    if (build_has(b, ARCH_FUSED_GATE_UP)) {
        build_linear(b, layer, input, build_view(b, REG_FF, 0, 2 * width),
                     build_layer_weight(b, layer, names->up, s->n_embd, 2 * width),
                     build_layer_bias(b, layer, names->up_bias, 2 * width, 0, biased));
    } else {
        if (!build_has(b, ARCH_NO_GATE)) {
            build_linear(b, layer, input, gate,
                         build_layer_weight(b, layer, names->gate, s->n_embd, width),
                         build_layer_bias(b, layer, names->gate_bias, width, 0, biased));
        }
        build_linear(b, layer, input, up, build_layer_weight(b, layer, names->up, s->n_embd, width),
                     build_layer_bias(b, layer, names->up_bias, width, 0, biased));
    }
    struct gqa_view hidden = build_has(b, ARCH_NO_GATE) ? up : gate;
    struct gqa_op *op = build_op(b, GQA_OP_GLU, layer, hidden, hidden);
    op->u.glu.kind = s->arch->act;
    op->u.glu.alpha = OAI_ALPHA;
    op->u.glu.limit = OAI_LIMIT;
    if (!build_has(b, ARCH_NO_GATE)) {
        op->src2 = up;
    }
    build_linear(b, layer, hidden, build_view(b, REG_T, 0, s->n_embd),
                 build_layer_weight(b, layer, names->down, width, s->n_embd),
                 build_layer_bias(b, layer, names->down_bias, s->n_embd, 0, biased));
}

/* Gate and up of all experts, in two tensors or in one. */
static void add_gate_and_up(struct builder *b, uint32_t layer, const struct ffn_names *names,
                            uint32_t width, struct gqa_op_experts *e)
{
    bool biased = build_has(b, ARCH_BIASES);
    uint32_t n_embd = b->s->n_embd, n = e->n_experts;
    if (build_layer_has(b, layer, FUSED_EXPERTS)) {
        e->fused = 1;
        e->up = build_layer_matrices(b, layer, FUSED_EXPERTS, n_embd, 2 * width, n);
        e->up_bias = build_layer_bias(b, layer, FUSED_EXPERTS_BIAS, 2 * width, n, biased);
        return;
    }
    e->gate = build_layer_matrices(b, layer, names->gate, n_embd, width, n);
    e->gate_bias = build_layer_bias(b, layer, names->gate_bias, width, n, biased);
    e->up = build_layer_matrices(b, layer, names->up, n_embd, width, n);
    e->up_bias = build_layer_bias(b, layer, names->up_bias, width, n, biased);
}

/* t = sum over chosen experts. The router's tensors and how it chooses are the caller's. */
static struct gqa_op_experts *build_experts(struct builder *b, uint32_t layer,
                                            struct gqa_view input, const struct ffn_names *names,
                                            uint32_t width, uint32_t n, uint32_t n_used)
{
    const struct model_shape *s = b->s;
    struct gqa_op *op =
        build_op(b, GQA_OP_EXPERTS, layer, input, build_view(b, REG_T, 0, s->n_embd));
    struct gqa_op_experts *e = &op->u.experts;
    *e = (struct gqa_op_experts){
        .n_experts = n,
        .n_used = n_used,
        .weight_scale = 1,
        .router = GQA_NONE,
        .router_bias = GQA_NONE,
        .selection_bias = GQA_NONE,
        .act = s->arch->act,
        .alpha = OAI_ALPHA,
        .limit = OAI_LIMIT,
        .gate = GQA_NONE,
        .gate_bias = GQA_NONE,
    };
    add_gate_and_up(b, layer, names, width, e);
    e->down = build_layer_matrices(b, layer, names->down, width, s->n_embd, n);
    e->down_bias =
        build_layer_bias(b, layer, names->down_bias, s->n_embd, n, build_has(b, ARCH_BIASES));
    b->p->flops_per_row += 2ull * s->n_embd * (n + 3ull * width * n_used);
    return e;
}

static void build_routed(struct builder *b, uint32_t layer, struct gqa_view input)
{
    const struct model_shape *s = b->s;
    struct gqa_op_experts *e = build_experts(b, layer, input, &expert_names, s->n_ff_expert,
                                             s->n_experts, s->n_experts_used);
    /* Softmax over all, divided by the sum over the chosen, is softmax over the chosen: in one
     * step it cannot lose digits. */
    e->gating = s->expert_renormalise ? GQA_GATING_SOFTMAX_CHOSEN : GQA_GATING_SOFTMAX;
    e->weight_scale = s->expert_scale;
    e->router = build_layer_weight(b, layer, "ffn_gate_inp.weight", s->n_embd, s->n_experts);
    e->router_bias =
        build_layer_bias(b, layer, "ffn_gate_inp.bias", s->n_experts, 0, build_has(b, ARCH_BIASES));
}

/* The expert that every token takes. Its gate, where it has one, is a router over one expert. */
static void build_shared(struct builder *b, uint32_t layer, struct gqa_view input)
{
    const struct model_shape *s = b->s;
    if (!build_has(b, ARCH_SHARED_GATE)) {
        build_dense(b, layer, input, &shared_names, s->n_ff_shared);
        return;
    }
    struct gqa_op_experts *e = build_experts(b, layer, input, &shared_names, s->n_ff_shared, 1, 1);
    e->gating = GQA_GATING_SIGMOID;
    e->router = build_layer_weight(b, layer, "ffn_gate_inp_shexp.weight", s->n_embd, 1);
}

void build_feed_forward(struct builder *b, uint32_t layer)
{
    const struct model_shape *s = b->s;
    const char *norm = build_has(b, ARCH_NORM_2_NAME) ? "post_attention_norm" : "ffn_norm";
    /* In parallel, the norm that attention read is still in its register. */
    struct gqa_view input = build_has(b, ARCH_PARALLEL) ? build_view(b, REG_H, 0, s->n_embd)
                                                        : build_branch_input(b, layer, norm);
    if (s->n_experts == 0) {
        build_dense(b, layer, input, &dense_names, s->n_ff);
    } else {
        build_routed(b, layer, input);
    }
    build_residual(b, layer, "post_ffw_norm.weight");
    if (s->n_ff_shared > 0) {
        build_shared(b, layer, input);
        build_residual(b, layer, "post_ffw_norm.weight");
    }
}
