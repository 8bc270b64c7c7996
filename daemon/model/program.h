/* daemon/model/program.h - the forward pass of every architecture, as a list of ops.
 *
 * Reads the architecture's row and the file's tensors and emits ops over registers (gqa/plugin.h).
 * Every tensor of the file must be used by the pass or known to be harmless: one that we would
 * ignore could change the result, and is refused by name. */
#ifndef DAEMON_MODEL_PROGRAM_H
#define DAEMON_MODEL_PROGRAM_H

#include "daemon/kv/layout.h"
#include "daemon/model/arch.h"

struct model_program {
    struct gqa_op *ops;
    uint32_t n_ops;
    struct gqa_reg *regs;
    uint32_t n_regs;
    struct gqa_weight *weights; /* packed fields are filled later, by the model's loader */
    uint8_t *weight_is_linear;  /* (n_weights) a matrix of LINEAR or EXPERTS: worth packing */
    uint32_t n_weights;
    struct gqa_attn_layer *attn_layers;
    uint32_t n_attn_layers;
    struct gqa_rope_table rope_tables[2];
    uint32_t n_rope_tables;
    /* Ops [0, head_op) give the hidden states of the output rows, after the last norm; [head_op,
     * scores_op) their logits, and [scores_op, n_ops) a classifier's scores. Either may be empty.
     */
    uint32_t head_op, scores_op;
    uint32_t embd_reg, logits_reg, scores_reg;
    uint32_t n_scores;      /* 0: no classifier */
    uint64_t flops_per_row; /* of the products of a row that gives logits */
};

/* layout: of a decoder's cache; encoders have none. n_ctx chooses among rotary factors. -EINVAL: a
 * tensor is missing, has a wrong shape; -ENOTSUP: one is not understood; -ENOMEM. The gguf object
 * outlives the program. */
int model_program_init(struct model_program *p, const struct gguf *g,
                       const struct model_shape *shape, const struct kv_layout *layout,
                       uint32_t n_ctx, struct fmt_error *err);
void model_program_finish(struct model_program *p);

#endif
