/* daemon/model/program_attention.c - the attention branch of a layer. */
#include "daemon/model/program_build.h"

static void build_qkv(struct builder *b, uint32_t layer, struct gqa_view input, struct gqa_view q,
                      struct gqa_view k, struct gqa_view v)
{
    bool biased = build_has(b, ARCH_QKV_BIAS);
    if (build_has(b, ARCH_FUSED_QKV) || build_layer_has(b, layer, "attn_qkv.weight")) {
        struct gqa_view all = build_view(b, REG_QKV, 0, q.width + k.width + v.width);
        build_linear(b, layer, input, all,
                     build_layer_weight(b, layer, "attn_qkv.weight", input.width, all.width),
                     build_layer_bias(b, layer, "attn_qkv.bias", all.width, 0, biased));
        return;
    }
    const struct {
        const char *weight, *bias;
        struct gqa_view dst;
    } parts[] = {
        {"attn_q.weight", "attn_q.bias", q},
        {"attn_k.weight", "attn_k.bias", k},
        {"attn_v.weight", "attn_v.bias", v},
    };
    for (size_t i = 0; i < 3; i++) {
        uint32_t width = parts[i].dst.width;
        build_linear(b, layer, input, parts[i].dst,
                     build_layer_weight(b, layer, parts[i].weight, input.width, width),
                     build_layer_bias(b, layer, parts[i].bias, width, 0, biased));
    }
}

/* Queries or keys: normed where the architecture does, then rotated where the layer does. */
static void build_heads(struct builder *b, uint32_t layer, struct gqa_view heads, const char *norm)
{
    const struct model_shape *s = b->s;
    if (build_has(b, ARCH_QK_NORM | ARCH_QK_NORM_WIDE)) {
        uint32_t dim = build_has(b, ARCH_QK_NORM) ? s->k_dim : heads.width;
        build_norm(b, layer, heads, heads, build_layer_weight(b, layer, norm, dim, 0), GQA_NONE,
                   dim);
    }
    if (model_layer_rotates(s, layer)) {
        bool local = build_has(b, ARCH_LOCAL_ROPE) && model_layer_window(s, layer) > 0;
        struct gqa_op *op = build_op(b, GQA_OP_ROPE, layer, heads, heads);
        op->u.rope.kind = s->arch->rope;
        op->u.rope.head_dim = s->k_dim;
        op->u.rope.n_rot = s->n_rot;
        op->u.rope.table = local ? 1 : 0;
        b->p->attn_layers[layer].rope = &b->p->rope_tables[op->u.rope.table];
        b->p->attn_layers[layer].rope_kind = s->arch->rope;
    }
}

/* From the last layer's attention on, only the rows that give logits are computed. */
static void narrow_to_out_rows(struct builder *b, uint32_t layer)
{
    const struct {
        enum build_reg reg;
        uint32_t width;
    } moved[] = {
        {REG_X, b->s->n_embd},
        {REG_ATT, b->s->n_heads * b->s->v_dim},
        {REG_H, b->s->n_embd}, /* which only a parallel feed-forward reads again */
    };
    for (size_t i = 0; i < (build_has(b, ARCH_PARALLEL) ? 3 : 2); i++) {
        struct gqa_view src = build_view(b, moved[i].reg, 0, moved[i].width);
        b->out_rows = true;
        build_op(b, GQA_OP_GATHER, layer, src, build_view(b, moved[i].reg, 0, moved[i].width));
        b->out_rows = false;
    }
    b->out_rows = true;
}

void build_attention(struct builder *b, uint32_t layer)
{
    const struct model_shape *s = b->s;
    uint32_t q_width = s->n_heads * s->k_dim;
    uint32_t k_width = s->n_kv_heads * s->k_dim;
    uint32_t v_width = s->n_kv_heads * s->v_dim;
    struct gqa_view q = build_view(b, REG_QKV, 0, q_width);
    struct gqa_view k = build_view(b, REG_QKV, q_width, k_width);
    struct gqa_view v = build_view(b, REG_QKV, q_width + k_width, v_width);

    build_qkv(b, layer, build_branch_input(b, layer, "attn_norm"), q, k, v);
    build_heads(b, layer, q, "attn_q_norm.weight");
    build_heads(b, layer, k, "attn_k_norm.weight");
    if (build_has(b, ARCH_SINKS)) {
        uint32_t sinks = build_layer_weight(b, layer, "attn_sinks.weight", s->n_heads, 0);
        b->p->attn_layers[layer].sinks = sinks != GQA_NONE ? b->p->weights[sinks].data : NULL;
    }

    struct gqa_view att = build_view(b, REG_ATT, 0, s->n_heads * s->v_dim);
    struct gqa_op *op = build_op(b, GQA_OP_ATTENTION, layer, q, att);
    op->src2 = k;
    op->src3 = v;
    if (layer + 1 == s->n_layers) {
        narrow_to_out_rows(b, layer);
        att = build_view(b, REG_ATT, 0, att.width);
    }
    build_linear(
        b, layer, att, build_view(b, REG_T, 0, s->n_embd),
        build_layer_weight(b, layer, "attn_output.weight", att.width, s->n_embd),
        build_layer_bias(b, layer, "attn_output.bias", s->n_embd, 0, build_has(b, ARCH_BIASES)));
    build_residual(b, layer, "post_attention_norm.weight");
}
