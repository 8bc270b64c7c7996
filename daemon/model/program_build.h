/* daemon/model/program_build.h - what the parts of the forward pass build with; private to
 * program*.c.
 *
 * A builder keeps the first failure: calls after it do nothing and give GQA_NONE, an empty view or
 * a scratch op, so that the pass reads as the mathematics does and its caller checks once. */
#ifndef DAEMON_MODEL_PROGRAM_BUILD_H
#define DAEMON_MODEL_PROGRAM_BUILD_H

#include "daemon/model/program.h"

/* Registers. Each may exist twice: for all rows of the batch, and for the rows that give logits, as
 * from the last attention on only those matter. They are made when first used. */
enum build_reg {
    REG_X,   /* residual stream (n_embd) */
    REG_H,   /* normed input of a product (n_embd) */
    REG_QKV, /* queries, keys and values side by side */
    REG_ATT, /* attention's output (n_heads * v_dim) */
    REG_T,   /* what a branch adds to the residual stream (n_embd) */
    REG_FF,  /* gate and up side by side (2 * the wider of n_ff and n_ff_shared) */
    REG_LOGITS,
    REG_CLS,    /* the classifier's own layer (n_embd) */
    REG_SCORES, /* what it says (n_scores) */
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

/* Flags of the architecture's row. */
static inline bool build_has(const struct builder *b, uint32_t flags)
{
    return (b->s->arch->flags & flags) != 0;
}

/* ---- weights: each is looked up, checked and marked as used; the result is its index -------- */

/* A tensor of n_out rows of n_in values (a vector when n_out is 0). */
uint32_t build_weight(struct builder *b, const char *name, uint64_t n_in, uint64_t n_out);

/* The same of a layer: "attn_q.weight" is "blk.3.attn_q.weight"; of n matrices when n is not 0. */
uint32_t build_layer_weight(struct builder *b, uint32_t layer, const char *name, uint64_t n_in,
                            uint64_t n_out);
uint32_t build_layer_matrices(struct builder *b, uint32_t layer, const char *name, uint64_t n_in,
                              uint64_t n_out, uint64_t n);

/* A bias that is used where it is there, and missed where it is required; n rows of it when n is
 * not 0. */
uint32_t build_layer_bias(struct builder *b, uint32_t layer, const char *name, uint64_t width,
                          uint64_t n, bool required);
uint32_t build_bias(struct builder *b, const char *name, uint64_t width, bool required);

bool build_layer_has(const struct builder *b, uint32_t layer, const char *name);

/* ---- ops ----------------------------------------------------------------------------------- */

/* Columns [first, first + width) of a register. */
struct gqa_view build_view(struct builder *b, enum build_reg reg, uint32_t first, uint32_t width);

/* Appends an op with nothing set but its kind, layer and operands. */
struct gqa_op *build_op(struct builder *b, enum gqa_op_kind kind, uint32_t layer,
                        struct gqa_view src, struct gqa_view dst);

/* dst = src x weight^T + bias */
void build_linear(struct builder *b, uint32_t layer, struct gqa_view src, struct gqa_view dst,
                  uint32_t weight, uint32_t bias);

/* dst = norm(src) over groups of dim values. */
void build_norm(struct builder *b, uint32_t layer, struct gqa_view src, struct gqa_view dst,
                uint32_t weight, uint32_t bias, uint32_t dim);

/* What a branch reads: the normed residual stream, or the stream itself. stem: "attn_norm". */
struct gqa_view build_branch_input(struct builder *b, uint32_t layer, const char *stem);

/* x = x + residual_scale * t, after the branch's own norm where there is one. */
void build_residual(struct builder *b, uint32_t layer, const char *post_norm);

/* ---- the branches of a layer --------------------------------------------------------------- */

/* Each ends with the residual stream having the branch's part. The last layer's attention turns to
 * the output rows. */
void build_attention(struct builder *b, uint32_t layer);
void build_feed_forward(struct builder *b, uint32_t layer);

/* The whole pass of an encoder, up to p->embd_reg. */
void build_encoder(struct builder *b);

/* The ops of the file's classifier over p->embd_reg, from p->scores_op on: tanh(cls x + bias), then
 * cls.output; either may be alone. None where the file has neither. */
void build_classifier(struct builder *b);

#endif
