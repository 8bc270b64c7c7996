#include "daemon/model/program_build.h"

#include "daemon/model/rope.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- the pass ---------------------------------------------------------------------------- */

static void build_head(struct builder *b, uint32_t embd)
{
    const struct model_shape *s = b->s;
    struct gqa_view h = build_view(b, REG_H, 0, s->n_embd);
    struct gqa_view logits = build_view(b, REG_LOGITS, 0, s->n_vocab);
    build_norm(b, GQA_NONE, build_view(b, REG_X, 0, s->n_embd), h,
               build_weight(b, "output_norm.weight", s->n_embd, 0),
               build_bias(b, "output_norm.bias", s->n_embd, build_has(b, ARCH_NORM_BIAS)),
               s->n_embd);
    b->p->embd_reg = h.reg;
    b->p->head_op = b->p->n_ops;
    bool tied = gguf_find_tensor(b->g, "output.weight") == NULL;
    uint32_t head = tied ? embd : build_weight(b, "output.weight", s->n_embd, s->n_vocab);
    build_linear(b, GQA_NONE, h, logits, head, build_bias(b, "output.bias", s->n_vocab, false));
    if (s->logit_scale != 1) {
        build_op(b, GQA_OP_SCALE, GQA_NONE, logits, logits)->scale = s->logit_scale;
    }
    if (s->logit_softcap > 0) {
        build_op(b, GQA_OP_SOFTCAP, GQA_NONE, logits, logits)->scale = s->logit_softcap;
    }
    b->p->logits_reg = logits.reg;
}

static void build_decoder(struct builder *b)
{
    const struct model_shape *s = b->s;
    const struct gqa_view none = {GQA_NONE, 0, 0};
    uint32_t embd = build_weight(b, "token_embd.weight", s->n_embd, s->n_vocab);
    struct gqa_op *op =
        build_op(b, GQA_OP_EMBED, GQA_NONE, none, build_view(b, REG_X, 0, s->n_embd));
    op->weight = embd;
    op->scale = s->embed_scale;
    for (uint32_t layer = 0; b->rc == 0 && layer < s->n_layers; layer++) {
        build_attention(b, layer);
        build_feed_forward(b, layer);
    }
    build_head(b, embd);
}

/* ---- tables beside the ops --------------------------------------------------------------- */

/* K and V that no cache keeps are used as they were computed. */
static void describe_unkept(const struct model_shape *s, uint32_t layer, struct gqa_attn_layer *a)
{
    a->n_kv_heads = s->n_kv_heads;
    a->k_dim = s->k_dim;
    a->v_dim = s->v_dim;
    a->k_type = a->v_type = GQA_TYPE_F32;
    a->window = model_layer_window(s, layer);
}

static int build_attn_layers(struct model_program *p, const struct model_shape *s,
                             const struct kv_layout *layout)
{
    p->n_attn_layers = s->n_layers;
    p->attn_layers = calloc(s->n_layers, sizeof(*p->attn_layers));
    if (p->attn_layers == NULL) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < s->n_layers; i++) {
        struct gqa_attn_layer *a = &p->attn_layers[i];
        a->struct_size = sizeof(*a);
        a->layer = i;
        a->n_heads = s->n_heads;
        a->scale = s->attn_scale;
        a->softcap = s->attn_softcap;
        if (s->arch->flags & ARCH_ENCODER) {
            describe_unkept(s, i, a);
        } else {
            kv_layout_describe(layout, i, a);
        }
    }
    return 0;
}

static int build_rope_tables(struct builder *b, uint32_t n_ctx)
{
    struct model_program *p = b->p;
    uint32_t n_tables = b->s->n_rot == 0 ? 0 : build_has(b, ARCH_LOCAL_ROPE) ? 2 : 1;
    for (uint32_t i = 0; i < n_tables; i++) {
        int rc = rope_table_create(b->g, b->s, i == 1, n_ctx, &p->rope_tables[i], b->err);
        if (rc < 0) {
            return rc;
        }
        p->n_rope_tables++;
    }
    return 0;
}

/* Tensors that the rotary tables read, or that older converters left behind without meaning. */
static bool is_side_tensor(const char *name)
{
    static const char *const whole[] = {"rope_freqs.weight", "rope_factors_long.weight",
                                        "rope_factors_short.weight"};
    for (size_t i = 0; i < sizeof(whole) / sizeof(whole[0]); i++) {
        if (strcmp(name, whole[i]) == 0) {
            return true;
        }
    }
    const char *last = strrchr(name, '.');
    size_t stem = last != NULL ? (size_t)(last - name) : 0;
    const char freqs[] = ".attn_rot_embd";
    return stem >= sizeof(freqs) - 1 &&
           memcmp(name + stem - (sizeof(freqs) - 1), freqs, sizeof(freqs) - 1) == 0;
}

static int check_all_used(const struct builder *b)
{
    for (size_t i = 0; i < gguf_n_tensors(b->g); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(b->g, i);
        if (!b->used[i] && !is_side_tensor(t->name.data)) {
            return fmt_fail(b->err, -ENOTSUP,
                            "%s: tensor %s is not understood for architecture %s and could change "
                            "the result",
                            gguf_name(b->g), t->name.data, b->s->arch->name);
        }
    }
    return 0;
}

static int mark_linear_weights(struct model_program *p)
{
    p->weight_is_linear = calloc(p->n_weights, 1);
    if (p->weight_is_linear == NULL) {
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < p->n_ops; i++) {
        const struct gqa_op *op = &p->ops[i];
        const struct gqa_op_experts *e = &op->u.experts;
        if (op->kind == GQA_OP_LINEAR) {
            p->weight_is_linear[op->weight] = 1;
        } else if (op->kind == GQA_OP_EXPERTS) {
            const uint32_t matrices[] = {e->router, e->gate, e->up, e->down};
            for (size_t m = 0; m < 4; m++) {
                if (matrices[m] != GQA_NONE) {
                    p->weight_is_linear[matrices[m]] = 1;
                }
            }
        }
    }
    return 0;
}

int model_program_init(struct model_program *p, const struct gguf *g,
                       const struct model_shape *shape, const struct kv_layout *layout,
                       uint32_t n_ctx, struct fmt_error *err)
{
    memset(p, 0, sizeof(*p));
    struct builder b = {.p = p, .g = g, .s = shape, .err = err};
    b.used = calloc(gguf_n_tensors(g), 1);
    p->regs = calloc(2 * REG_COUNT, sizeof(*p->regs));
    int rc = b.used == NULL || p->regs == NULL ? -ENOMEM : 0;
    rc = rc < 0 ? rc : build_attn_layers(p, shape, layout);
    if (rc == 0) {
        if (build_has(&b, ARCH_ENCODER)) {
            build_encoder(&b);
        } else {
            build_decoder(&b);
        }
        build_classifier(&b);
        rc = b.rc;
    }
    rc = rc < 0 ? rc : mark_linear_weights(p);
    rc = rc < 0 ? rc : build_rope_tables(&b, n_ctx);
    rc = rc < 0 ? rc : check_all_used(&b);
    free(b.used);
    if (rc < 0) {
        model_program_finish(p);
        return rc == -ENOMEM ? fmt_fail(err, -ENOMEM, "no memory for the model's program") : rc;
    }
    return 0;
}

void model_program_finish(struct model_program *p)
{
    for (uint32_t i = 0; i < p->n_rope_tables; i++) {
        free((void *)p->rope_tables[i].freqs);
    }
    free(p->ops);
    free(p->regs);
    free(p->weights);
    free(p->weight_is_linear);
    free(p->attn_layers);
    memset(p, 0, sizeof(*p));
}
