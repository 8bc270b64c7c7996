#include "daemon/model/program.h"

#include "daemon/model/rope.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NAME_BYTES 64

/* Registers. Each may exist twice: for all rows of the batch, and for the rows that give logits, as
 * from the last attention on only those matter. They are made when first used. */
enum reg {
    REG_X,   /* residual stream (n_embd) */
    REG_H,   /* normed input of a product (n_embd) */
    REG_QKV, /* queries, keys and values side by side */
    REG_ATT, /* attention's output (n_heads * v_dim) */
    REG_T,   /* what a branch adds to the residual stream (n_embd) */
    REG_FF,  /* gate and up side by side (2 * n_ff) */
    REG_LOGITS,
    REG_COUNT
};

struct builder {
    struct model_program *p;
    const struct gguf *g;
    const struct model_shape *s;
    struct fmt_error *err;
    uint8_t *used;                    /* (n_tensors) by index in the file */
    uint32_t reg_index[2][REG_COUNT]; /* all rows, output rows: 1 + index in regs, 0: not made */
    uint32_t ops_capacity, weights_capacity;
    bool out_rows;         /* registers of the output rows are meant from now on */
    int rc;                /* the first failure; later calls do nothing */
    struct gqa_op scratch; /* where ops go after a failure */
};

/* ---- weights ----------------------------------------------------------------------------- */

static bool grow(struct builder *b, void **array, uint32_t *capacity, uint32_t count, size_t size)
{
    if (count < *capacity) {
        return true;
    }
    uint32_t bigger = *capacity > 0 ? *capacity * 2 : 64;
    void *moved = realloc(*array, bigger * size);
    if (moved == NULL) {
        b->rc = fmt_fail(b->err, -ENOMEM, "no memory for the model's program");
        return false;
    }
    *array = moved;
    *capacity = bigger;
    return true;
}

static void shape_text(char *text, size_t bytes, uint64_t n_in, uint64_t n_out)
{
    if (n_out > 0) {
        snprintf(text, bytes, "%llu x %llu", (unsigned long long)n_in, (unsigned long long)n_out);
    } else {
        snprintf(text, bytes, "%llu", (unsigned long long)n_in);
    }
}

/* Adds a tensor: n_out rows of n_in values (a vector when n_out is 0). Returns its index. */
static uint32_t add_weight(struct builder *b, const char *name, uint64_t n_in, uint64_t n_out)
{
    if (b->rc < 0) {
        return GQA_NONE;
    }
    const struct gguf_tensor *t = gguf_find_tensor(b->g, name);
    if (t == NULL) {
        b->rc = fmt_fail(b->err, -EINVAL, "%s: tensor %s is missing", gguf_path(b->g), name);
        return GQA_NONE;
    }
    bool fits =
        t->ne[0] == n_in && t->ne[1] == (n_out > 0 ? n_out : 1) && t->ne[2] == 1 && t->ne[3] == 1;
    if (!fits) {
        char want[48], have[48];
        shape_text(want, sizeof(want), n_in, n_out);
        shape_text(have, sizeof(have), t->ne[0], t->ne[1] * t->ne[2] * t->ne[3]);
        b->rc = fmt_fail(b->err, -EINVAL, "%s: tensor %s is %s, must be %s", gguf_path(b->g), name,
                         have, want);
        return GQA_NONE;
    }
    if (n_out == 0 && t->type != GQA_TYPE_F32) {
        b->rc =
            fmt_fail(b->err, -ENOTSUP, "%s: tensor %s must be of type F32", gguf_path(b->g), name);
        return GQA_NONE;
    }
    size_t index = (size_t)(t - gguf_tensor_at(b->g, 0));
    b->used[index] = 1;
    struct model_program *p = b->p;
    if (!grow(b, (void **)&p->weights, &b->weights_capacity, p->n_weights, sizeof(*p->weights))) {
        return GQA_NONE;
    }
    p->weights[p->n_weights] = (struct gqa_weight){
        .name = t->name.data,
        .type = t->type,
        .n_dims = t->n_dims,
        .ne = {t->ne[0], t->ne[1], t->ne[2], t->ne[3]},
        .data = t->data,
    };
    return p->n_weights++;
}

/* Tensor names of a layer: "blk.3.attn_q.weight". */
static uint32_t layer_weight(struct builder *b, uint32_t layer, const char *name, uint64_t n_in,
                             uint64_t n_out)
{
    char full[NAME_BYTES];
    snprintf(full, sizeof(full), "blk.%u.%s", layer, name);
    return add_weight(b, full, n_in, n_out);
}

/* ---- ops --------------------------------------------------------------------------------- */

static uint32_t reg_width(const struct model_shape *s, enum reg reg)
{
    switch (reg) {
    case REG_QKV:
        return s->n_heads * s->k_dim + s->n_kv_heads * (s->k_dim + s->v_dim);
    case REG_ATT:
        return s->n_heads * s->v_dim;
    case REG_FF:
        return 2 * s->n_ff;
    case REG_LOGITS:
        return s->n_vocab;
    default:
        return s->n_embd;
    }
}

static struct gqa_view view(struct builder *b, enum reg reg, uint32_t first, uint32_t width)
{
    struct model_program *p = b->p;
    uint32_t *index = &b->reg_index[b->out_rows][reg];
    if (*index == 0) {
        p->regs[p->n_regs] = (struct gqa_reg){
            .width = reg_width(b->s, reg),
            .flags = b->out_rows ? GQA_REG_OUT : 0,
        };
        *index = ++p->n_regs;
    }
    return (struct gqa_view){*index - 1, first, width};
}

static const struct gqa_view no_view = {GQA_NONE, 0, 0};

/* Appends an op with nothing set but its kind, layer and operands. */
static struct gqa_op *add_op(struct builder *b, enum gqa_op_kind kind, uint32_t layer,
                             struct gqa_view src, struct gqa_view dst)
{
    struct model_program *p = b->p;
    struct gqa_op *op = &b->scratch;
    if (b->rc == 0 && grow(b, (void **)&p->ops, &b->ops_capacity, p->n_ops, sizeof(*p->ops))) {
        op = &p->ops[p->n_ops++];
    }
    *op = (struct gqa_op){
        .kind = kind,
        .layer = layer,
        .src = src,
        .src2 = no_view,
        .src3 = no_view,
        .dst = dst,
        .weight = GQA_NONE,
        .bias = GQA_NONE,
        .scale = 1,
    };
    return op;
}

static void add_norm(struct builder *b, uint32_t layer, struct gqa_view src, struct gqa_view dst,
                     uint32_t weight, uint32_t dim)
{
    struct gqa_op *op = add_op(b, GQA_OP_NORM, layer, src, dst);
    op->weight = weight;
    op->u.norm.kind = b->s->arch->norm;
    op->u.norm.dim = dim;
    op->u.norm.eps = b->s->norm_eps;
}

static void add_linear(struct builder *b, uint32_t layer, struct gqa_view src, struct gqa_view dst,
                       uint32_t weight, uint32_t bias)
{
    struct gqa_op *op = add_op(b, GQA_OP_LINEAR, layer, src, dst);
    op->weight = weight;
    op->bias = bias;
    b->p->flops_per_row += 2ull * src.width * dst.width;
}

static void add_rope(struct builder *b, uint32_t layer, struct gqa_view heads)
{
    const struct model_shape *s = b->s;
    bool local = (s->arch->flags & ARCH_LOCAL_ROPE) && model_layer_window(s, layer) > 0;
    struct gqa_op *op = add_op(b, GQA_OP_ROPE, layer, heads, heads);
    op->u.rope.kind = s->arch->rope;
    op->u.rope.head_dim = s->k_dim;
    op->u.rope.n_rot = s->n_rot;
    op->u.rope.table = local ? 1 : 0;
}

/* dst = norm(src), with the layer's own weight of that name. */
static void add_layer_norm(struct builder *b, uint32_t layer, const char *name, struct gqa_view src,
                           struct gqa_view dst)
{
    add_norm(b, layer, src, dst, layer_weight(b, layer, name, b->s->n_embd, 0), b->s->n_embd);
}

/* x = x + residual_scale * t, after the branch's own norm where there is one. */
static void add_residual(struct builder *b, uint32_t layer, const char *post_norm)
{
    struct gqa_view x = view(b, REG_X, 0, b->s->n_embd);
    struct gqa_view t = view(b, REG_T, 0, b->s->n_embd);
    if (b->s->arch->flags & ARCH_POST_NORMS) {
        add_layer_norm(b, layer, post_norm, t, t);
    }
    struct gqa_op *op = add_op(b, GQA_OP_ADD, layer, x, x);
    op->src2 = t;
    op->scale = b->s->residual_scale;
}

/* ---- the pass ---------------------------------------------------------------------------- */

static void build_qkv(struct builder *b, uint32_t layer, struct gqa_view q, struct gqa_view k,
                      struct gqa_view v)
{
    const struct model_shape *s = b->s;
    struct gqa_view h = view(b, REG_H, 0, s->n_embd);
    if (s->arch->flags & ARCH_FUSED_QKV) {
        struct gqa_view all = view(b, REG_QKV, 0, q.width + k.width + v.width);
        add_linear(b, layer, h, all,
                   layer_weight(b, layer, "attn_qkv.weight", s->n_embd, all.width), GQA_NONE);
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
        uint32_t weight = layer_weight(b, layer, parts[i].weight, s->n_embd, parts[i].dst.width);
        uint32_t bias = s->arch->flags & ARCH_QKV_BIAS
                            ? layer_weight(b, layer, parts[i].bias, parts[i].dst.width, 0)
                            : GQA_NONE;
        add_linear(b, layer, h, parts[i].dst, weight, bias);
    }
}

/* From the last layer's attention on, only the rows that give logits are computed. */
static void narrow_to_out_rows(struct builder *b, uint32_t layer)
{
    const enum reg moved[] = {REG_X, REG_ATT};
    const uint32_t widths[] = {b->s->n_embd, b->s->n_heads * b->s->v_dim};
    for (size_t i = 0; i < 2; i++) {
        struct gqa_view src = view(b, moved[i], 0, widths[i]);
        b->out_rows = true;
        add_op(b, GQA_OP_GATHER, layer, src, view(b, moved[i], 0, widths[i]));
        b->out_rows = false;
    }
    b->out_rows = true;
}

static void build_attention(struct builder *b, uint32_t layer)
{
    const struct model_shape *s = b->s;
    uint32_t q_width = s->n_heads * s->k_dim;
    uint32_t k_width = s->n_kv_heads * s->k_dim;
    uint32_t v_width = s->n_kv_heads * s->v_dim;
    struct gqa_view q = view(b, REG_QKV, 0, q_width);
    struct gqa_view k = view(b, REG_QKV, q_width, k_width);
    struct gqa_view v = view(b, REG_QKV, q_width + k_width, v_width);

    add_layer_norm(b, layer, "attn_norm.weight", view(b, REG_X, 0, s->n_embd),
                   view(b, REG_H, 0, s->n_embd));
    build_qkv(b, layer, q, k, v);
    if (s->arch->flags & ARCH_QK_NORM) {
        add_norm(b, layer, q, q, layer_weight(b, layer, "attn_q_norm.weight", s->k_dim, 0),
                 s->k_dim);
        add_norm(b, layer, k, k, layer_weight(b, layer, "attn_k_norm.weight", s->k_dim, 0),
                 s->k_dim);
    }
    add_rope(b, layer, q);
    add_rope(b, layer, k);

    struct gqa_op *op =
        add_op(b, GQA_OP_ATTENTION, layer, q, view(b, REG_ATT, 0, s->n_heads * s->v_dim));
    op->src2 = k;
    op->src3 = v;
    if (layer + 1 == s->n_layers) {
        narrow_to_out_rows(b, layer);
    }
    struct gqa_view att = view(b, REG_ATT, 0, s->n_heads * s->v_dim);
    add_linear(b, layer, att, view(b, REG_T, 0, s->n_embd),
               layer_weight(b, layer, "attn_output.weight", att.width, s->n_embd), GQA_NONE);
    add_residual(b, layer, "post_attention_norm.weight");
}

static void build_feed_forward(struct builder *b, uint32_t layer)
{
    const struct model_shape *s = b->s;
    struct gqa_view h = view(b, REG_H, 0, s->n_embd);
    struct gqa_view gate = view(b, REG_FF, 0, s->n_ff);
    struct gqa_view up = view(b, REG_FF, s->n_ff, s->n_ff);

    add_layer_norm(b, layer, "ffn_norm.weight", view(b, REG_X, 0, s->n_embd), h);
    if (s->arch->flags & ARCH_FUSED_GATE_UP) {
        add_linear(b, layer, h, view(b, REG_FF, 0, 2 * s->n_ff),
                   layer_weight(b, layer, "ffn_up.weight", s->n_embd, 2 * s->n_ff), GQA_NONE);
    } else {
        add_linear(b, layer, h, gate, layer_weight(b, layer, "ffn_gate.weight", s->n_embd, s->n_ff),
                   GQA_NONE);
        add_linear(b, layer, h, up, layer_weight(b, layer, "ffn_up.weight", s->n_embd, s->n_ff),
                   GQA_NONE);
    }
    struct gqa_op *op = add_op(b, GQA_OP_GLU, layer, gate, gate);
    op->src2 = up;
    op->u.glu.kind = s->arch->act;
    add_linear(b, layer, gate, view(b, REG_T, 0, s->n_embd),
               layer_weight(b, layer, "ffn_down.weight", s->n_ff, s->n_embd), GQA_NONE);
    add_residual(b, layer, "post_ffw_norm.weight");
}

static void build_head(struct builder *b, uint32_t embd)
{
    const struct model_shape *s = b->s;
    struct gqa_view h = view(b, REG_H, 0, s->n_embd);
    struct gqa_view logits = view(b, REG_LOGITS, 0, s->n_vocab);
    add_norm(b, GQA_NONE, view(b, REG_X, 0, s->n_embd), h,
             add_weight(b, "output_norm.weight", s->n_embd, 0), s->n_embd);
    bool tied = gguf_find_tensor(b->g, "output.weight") == NULL;
    uint32_t head = tied ? embd : add_weight(b, "output.weight", s->n_embd, s->n_vocab);
    add_linear(b, GQA_NONE, h, logits, head, GQA_NONE);
    if (s->logit_scale != 1) {
        add_op(b, GQA_OP_SCALE, GQA_NONE, logits, logits)->scale = s->logit_scale;
    }
    if (s->logit_softcap > 0) {
        add_op(b, GQA_OP_SOFTCAP, GQA_NONE, logits, logits)->scale = s->logit_softcap;
    }
    b->p->logits_reg = logits.reg;
}

static void build_ops(struct builder *b)
{
    const struct model_shape *s = b->s;
    uint32_t embd = add_weight(b, "token_embd.weight", s->n_embd, s->n_vocab);
    struct gqa_op *op = add_op(b, GQA_OP_EMBED, GQA_NONE, no_view, view(b, REG_X, 0, s->n_embd));
    op->weight = embd;
    op->scale = s->embed_scale;
    for (uint32_t layer = 0; b->rc == 0 && layer < s->n_layers; layer++) {
        build_attention(b, layer);
        build_feed_forward(b, layer);
    }
    build_head(b, embd);
}

/* ---- tables beside the ops --------------------------------------------------------------- */

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
        kv_layout_describe(layout, i, a);
    }
    return 0;
}

static int build_rope_tables(struct builder *b, uint32_t n_ctx)
{
    struct model_program *p = b->p;
    bool local = (b->s->arch->flags & ARCH_LOCAL_ROPE) != 0;
    for (uint32_t i = 0; i < (local ? 2u : 1u); i++) {
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
                            gguf_path(b->g), t->name.data, b->s->arch->name);
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
        if (p->ops[i].kind == GQA_OP_LINEAR) {
            p->weight_is_linear[p->ops[i].weight] = 1;
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
        build_ops(&b);
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
