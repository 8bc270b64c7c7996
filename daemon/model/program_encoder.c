/* daemon/model/program_encoder.c - the forward pass of BERT-like encoders: learned positions or
 * rotation, a norm after each residual sum, no head. Branches are the decoders'. */
#include "daemon/model/program_build.h"

/* x = norm(x), with a weight and a bias of those names. */
static void norm_stream(struct builder *b, uint32_t layer, uint32_t weight, uint32_t bias)
{
    struct gqa_view x = build_view(b, REG_X, 0, b->s->n_embd);
    build_norm(b, layer, x, x, weight, bias, b->s->n_embd);
}

static void norm_after(struct builder *b, uint32_t layer, const char *weight, const char *bias)
{
    uint32_t n_embd = b->s->n_embd;
    norm_stream(b, layer, build_layer_weight(b, layer, weight, n_embd, 0),
                build_layer_bias(b, layer, bias, n_embd, 0, build_has(b, ARCH_NORM_BIAS)));
}

/* dst = a row of the table: the token's, the position's, or the first. */
static void embed(struct builder *b, uint32_t table, enum gqa_embed_row row, struct gqa_view dst)
{
    const struct gqa_view none = {GQA_NONE, 0, 0};
    struct gqa_op *op = build_op(b, GQA_OP_EMBED, GQA_NONE, none, dst);
    op->weight = table;
    op->u.embed.row = row;
}

/* x = x + a row of the table */
static void add_embedding(struct builder *b, uint32_t table, enum gqa_embed_row row)
{
    struct gqa_view x = build_view(b, REG_X, 0, b->s->n_embd);
    struct gqa_view t = build_view(b, REG_T, 0, b->s->n_embd);
    embed(b, table, row, t);
    build_op(b, GQA_OP_ADD, GQA_NONE, x, x)->src2 = t;
}

/* All tokens of a text have the first type: texts are not told apart within an input. */
static void build_embeddings(struct builder *b)
{
    const struct model_shape *s = b->s;
    const struct gguf_tensor *types = gguf_find_tensor(b->g, "token_types.weight");
    embed(b, build_weight(b, "token_embd.weight", s->n_embd, s->n_vocab), GQA_EMBED_TOKEN,
          build_view(b, REG_X, 0, s->n_embd));
    if (types != NULL) {
        add_embedding(b, build_weight(b, "token_types.weight", s->n_embd, types->ne[1]),
                      GQA_EMBED_FIRST);
    }
    if (build_has(b, ARCH_POSITIONS)) {
        add_embedding(b, build_weight(b, "position_embd.weight", s->n_embd, s->n_ctx_train),
                      GQA_EMBED_POSITION);
    }
    norm_stream(b, GQA_NONE, build_weight(b, "token_embd_norm.weight", s->n_embd, 0),
                build_bias(b, "token_embd_norm.bias", s->n_embd, build_has(b, ARCH_NORM_BIAS)));
}

void build_encoder(struct builder *b)
{
    const struct model_shape *s = b->s;
    build_embeddings(b);
    for (uint32_t layer = 0; b->rc == 0 && layer < s->n_layers; layer++) {
        build_attention(b, layer);
        norm_after(b, layer, "attn_output_norm.weight", "attn_output_norm.bias");
        build_feed_forward(b, layer);
        norm_after(b, layer, "layer_output_norm.weight", "layer_output_norm.bias");
    }
    b->p->embd_reg = build_view(b, REG_X, 0, s->n_embd).reg;
    b->p->head_op = b->p->n_ops;
}
