#include "daemon/model/program_build.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define NAME_BYTES 64
#define STEM_BYTES 32

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

/* "64 x 32 x 8", without the dimensions of 1 at the end. */
static void shape_text(char *text, size_t bytes, const uint64_t ne[4])
{
    int last = 3;
    while (last > 0 && ne[last] == 1) {
        last--;
    }
    size_t used = 0;
    for (int i = 0; i <= last && used < bytes; i++) {
        used += (size_t)snprintf(text + used, bytes - used, "%s%llu", i > 0 ? " x " : "",
                                 (unsigned long long)ne[i]);
    }
}

/* Adds a tensor of that shape with that many dimensions, as the backend will see it. A file may
 * leave out dimensions of 1. */
static uint32_t add_weight(struct builder *b, const char *name, uint32_t n_dims, uint64_t n0,
                           uint64_t n1, uint64_t n2)
{
    if (b->rc < 0) {
        return GQA_NONE;
    }
    const struct gguf_tensor *t = gguf_find_tensor(b->g, name);
    if (t == NULL) {
        b->rc = fmt_fail(b->err, -EINVAL, "%s: tensor %s is missing", gguf_name(b->g), name);
        return GQA_NONE;
    }
    const uint64_t ne[4] = {n0, n1, n2, 1};
    for (int i = 0; i < 4; i++) {
        if (t->ne[i] != ne[i]) {
            char want[80], have[80];
            shape_text(want, sizeof(want), ne);
            shape_text(have, sizeof(have), t->ne);
            b->rc = fmt_fail(b->err, -EINVAL, "%s: tensor %s is %s, must be %s", gguf_name(b->g),
                             name, have, want);
            return GQA_NONE;
        }
    }
    b->used[t - gguf_tensor_at(b->g, 0)] = 1;
    struct model_program *p = b->p;
    if (!grow(b, (void **)&p->weights, &b->weights_capacity, p->n_weights, sizeof(*p->weights))) {
        return GQA_NONE;
    }
    p->weights[p->n_weights] = (struct gqa_weight){
        .name = t->name.data,
        .type = t->type,
        .n_dims = n_dims,
        .ne = {n0, n1, n2, 1},
        .data = t->data,
    };
    return p->n_weights++;
}

/* Vectors are read as they lie. */
static uint32_t check_f32(struct builder *b, uint32_t weight)
{
    if (weight != GQA_NONE && b->p->weights[weight].type != GQA_TYPE_F32) {
        b->rc = fmt_fail(b->err, -ENOTSUP, "%s: tensor %s must be of type F32", gguf_name(b->g),
                         b->p->weights[weight].name);
        return GQA_NONE;
    }
    return weight;
}

uint32_t build_weight(struct builder *b, const char *name, uint64_t n_in, uint64_t n_out)
{
    return n_out > 0 ? add_weight(b, name, 2, n_in, n_out, 1)
                     : check_f32(b, add_weight(b, name, 1, n_in, 1, 1));
}

static void layer_name(char full[NAME_BYTES], uint32_t layer, const char *name)
{
    snprintf(full, NAME_BYTES, "blk.%u.%s", layer, name);
}

bool build_layer_has(const struct builder *b, uint32_t layer, const char *name)
{
    char full[NAME_BYTES];
    layer_name(full, layer, name);
    return gguf_find_tensor(b->g, full) != NULL;
}

uint32_t build_layer_weight(struct builder *b, uint32_t layer, const char *name, uint64_t n_in,
                            uint64_t n_out)
{
    char full[NAME_BYTES];
    layer_name(full, layer, name);
    return build_weight(b, full, n_in, n_out);
}

uint32_t build_layer_matrices(struct builder *b, uint32_t layer, const char *name, uint64_t n_in,
                              uint64_t n_out, uint64_t n)
{
    char full[NAME_BYTES];
    layer_name(full, layer, name);
    return add_weight(b, full, 3, n_in, n_out, n);
}

uint32_t build_layer_bias(struct builder *b, uint32_t layer, const char *name, uint64_t width,
                          uint64_t n, bool required)
{
    char full[NAME_BYTES];
    layer_name(full, layer, name);
    if (n == 0) {
        return build_bias(b, full, width, required);
    }
    bool wanted = required || gguf_find_tensor(b->g, full) != NULL;
    return wanted ? check_f32(b, add_weight(b, full, 2, width, n, 1)) : GQA_NONE;
}

uint32_t build_bias(struct builder *b, const char *name, uint64_t width, bool required)
{
    bool wanted = required || gguf_find_tensor(b->g, name) != NULL;
    return wanted ? build_weight(b, name, width, 0) : GQA_NONE;
}

/* ---- ops --------------------------------------------------------------------------------- */

static const struct gqa_view no_view = {GQA_NONE, 0, 0};

static uint32_t reg_width(const struct builder *b, enum build_reg reg)
{
    const struct model_shape *s = b->s;
    switch (reg) {
    case REG_QKV:
        return s->n_heads * s->k_dim + s->n_kv_heads * (s->k_dim + s->v_dim);
    case REG_ATT:
        return s->n_heads * s->v_dim;
    case REG_FF:
        return 2 * (s->n_experts > 0 ? s->n_ff_shared : s->n_ff);
    case REG_LOGITS:
        return s->n_vocab;
    case REG_SCORES:
        return b->p->n_scores;
    default:
        return s->n_embd;
    }
}

struct gqa_view build_view(struct builder *b, enum build_reg reg, uint32_t first, uint32_t width)
{
    struct model_program *p = b->p;
    uint32_t *index = &b->reg_index[b->out_rows][reg];
    if (*index == 0) {
        p->regs[p->n_regs] = (struct gqa_reg){
            .width = reg_width(b, reg),
            .flags = b->out_rows ? GQA_REG_OUT : 0,
        };
        *index = ++p->n_regs;
    }
    return (struct gqa_view){*index - 1, first, width};
}

struct gqa_op *build_op(struct builder *b, enum gqa_op_kind kind, uint32_t layer,
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

void build_linear(struct builder *b, uint32_t layer, struct gqa_view src, struct gqa_view dst,
                  uint32_t weight, uint32_t bias)
{
    struct gqa_op *op = build_op(b, GQA_OP_LINEAR, layer, src, dst);
    op->weight = weight;
    op->bias = bias;
    b->p->flops_per_row += 2ull * src.width * dst.width;
}

void build_norm(struct builder *b, uint32_t layer, struct gqa_view src, struct gqa_view dst,
                uint32_t weight, uint32_t bias, uint32_t dim)
{
    struct gqa_op *op = build_op(b, GQA_OP_NORM, layer, src, dst);
    op->weight = weight;
    op->bias = bias;
    op->u.norm.kind = b->s->arch->norm;
    op->u.norm.dim = dim;
    op->u.norm.eps = b->s->norm_eps;
}

struct gqa_view build_branch_input(struct builder *b, uint32_t layer, const char *stem)
{
    uint32_t n_embd = b->s->n_embd;
    struct gqa_view x = build_view(b, REG_X, 0, n_embd);
    if (build_has(b, ARCH_NO_PRE_NORMS)) {
        return x;
    }
    char name[STEM_BYTES];
    struct gqa_view h = build_view(b, REG_H, 0, n_embd);
    snprintf(name, sizeof(name), "%s.weight", stem);
    uint32_t weight = build_layer_weight(b, layer, name, n_embd, 0);
    snprintf(name, sizeof(name), "%s.bias", stem);
    uint32_t bias = build_layer_bias(b, layer, name, n_embd, 0, build_has(b, ARCH_NORM_BIAS));
    build_norm(b, layer, x, h, weight, bias, n_embd);
    return h;
}

void build_residual(struct builder *b, uint32_t layer, const char *post_norm)
{
    uint32_t n_embd = b->s->n_embd;
    struct gqa_view x = build_view(b, REG_X, 0, n_embd);
    struct gqa_view t = build_view(b, REG_T, 0, n_embd);
    if (build_has(b, ARCH_POST_NORMS)) {
        build_norm(b, layer, t, t, build_layer_weight(b, layer, post_norm, n_embd, 0), GQA_NONE,
                   n_embd);
    }
    struct gqa_op *op = build_op(b, GQA_OP_ADD, layer, x, x);
    op->src2 = t;
    op->scale = b->s->residual_scale;
}
