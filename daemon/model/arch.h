/* daemon/model/arch.h - architectures as table rows, and a model's shape as read from its file.
 *
 * A row says how an architecture differs: which norms, which rotary embedding, which biases, scales
 * and tensors; one forward pass (program.c) reads it and emits ops. A new architecture is a row. */
#ifndef DAEMON_MODEL_ARCH_H
#define DAEMON_MODEL_ARCH_H

#include "daemon/model/pooling.h"
#include "format/gguf.h"

#include <gqa/plugin.h>

/* Biases of products that a file has are always added; these flags say which must be there. */
enum arch_flags {
    /* attention */
    ARCH_QKV_BIAS = 1u << 0,     /* attn_q.bias, attn_k.bias and attn_v.bias */
    ARCH_QK_NORM = 1u << 1,      /* attn_q_norm and attn_k_norm, over every head */
    ARCH_QK_NORM_WIDE = 1u << 2, /* the same tensors, over all heads together */
    ARCH_FUSED_QKV = 1u << 3,    /* attn_qkv holds q, k and v */
    ARCH_SINKS = 1u << 4,        /* attn_sinks: logits that join the softmax's denominator */
    ARCH_LOCAL_ROPE = 1u << 5,   /* windowed layers rotate with their own base, unscaled */
    ARCH_ROPE_SWITCH = 1u << 6,  /* rope.scaling.finetuned false: nothing rotates */
    ARCH_TEMPERATURE = 1u << 7,  /* attention.temperature_scale, beyond the original context */
    /* feed-forward */
    ARCH_FUSED_GATE_UP = 1u << 8,     /* ffn_up holds gate and up */
    ARCH_NO_GATE = 1u << 9,           /* down(act(up)), without a gate */
    ARCH_EXPERTS = 1u << 10,          /* mixture of experts in every layer */
    ARCH_EXPERTS_IF_COUNT = 1u << 11, /* the same where expert_count is there and not 0 */
    ARCH_EXPERTS_RAW = 1u << 12,      /* the chosen experts' weights are not renormalised */
    ARCH_SHARED_EXPERT = 1u << 13,    /* one more expert for every token, if it has a length */
    ARCH_SHARED_GATE = 1u << 14,      /* which there must be, times sigmoid(ffn_gate_inp_shexp) */
    /* both, and around them */
    ARCH_BIASES = 1u << 15,       /* biases of attention's output and of the feed-forward */
    ARCH_NORM_BIAS = 1u << 16,    /* biases of the norms before the branches and the head */
    ARCH_POST_NORMS = 1u << 17,   /* post_attention_norm, post_ffw_norm before the residual */
    ARCH_NO_PRE_NORMS = 1u << 18, /* the branches read the residual stream as it is */
    ARCH_PARALLEL = 1u << 19,     /* feed-forward reads what attention reads: one norm for both */
    ARCH_NORM_2_NAME = 1u << 20,  /* feed-forward's norm is called post_attention_norm */
    ARCH_EMBED_SQRT = 1u << 21,   /* embeddings times sqrt(n_embd) */
    ARCH_SCALES = 1u << 22, /* embedding_scale, residual_scale, attention.scale, logit_scale */
    ARCH_RANK_SOFTMAX = 1u << 23, /* a classifier's scores are made probabilities */
    /* encoders (program_encoder.c) */
    ARCH_ENCODER = 1u << 24,   /* all tokens see each other; norms after the residual */
    ARCH_POSITIONS = 1u << 25, /* position_embd: learned positions; nothing rotates */
};

struct arch {
    const char *name; /* general.architecture */
    uint32_t flags;
    enum gqa_norm_kind norm;
    enum gqa_rope_kind rope;
    enum gqa_act_kind act;
    /* With attention.sliding_window: every so many layers the last one sees everything; 1: all are
     * windowed; 0: no model of this architecture has windows. */
    uint32_t window_pattern;
    uint32_t nope_step; /* every so many layers the last one does not rotate; 0: all rotate */
    float local_base;   /* ARCH_LOCAL_ROPE: of the windowed layers; 0: the base of the others */
};

/* The row, or NULL. */
const struct arch *arch_find(struct gguf_string name);
/* The i-th row, or NULL past the end: for errors that list what is known. */
const struct arch *arch_at(size_t i);

#define MODEL_MAX_LAYERS 1024u

enum rope_scaling { ROPE_SCALING_NONE, ROPE_SCALING_LINEAR, ROPE_SCALING_YARN };

/* A model's numbers. Sizes are checked against limits and each other when read. */
struct model_shape {
    const struct arch *arch;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, k_dim, v_dim, n_ff, n_vocab;
    uint32_t n_ctx_train;
    uint32_t n_ctx_max; /* beyond it the pass would be wrong; 0: no such bound */
    float norm_eps;

    uint32_t n_experts, n_experts_used; /* 0: dense */
    uint32_t n_ff_expert, n_ff_shared;  /* widths of one expert, of the shared one; 0: none */
    float expert_scale;                 /* of the routed experts' weights */
    bool expert_renormalise;            /* the chosen ones' weights sum to 1 */

    uint32_t n_rot; /* dimensions of a head that rotate; 0: none do */
    float rope_base, rope_base_local;
    enum rope_scaling rope_scaling;
    float rope_factor;        /* of the scaling; 1 without */
    float rope_attn_factor;   /* magnitude given by the file; 0: by the scaling's own rule */
    uint32_t rope_n_ctx_orig; /* context before scaling */
    float yarn_beta_fast, yarn_beta_slow;
    float yarn_log_mul; /* how much of YaRN's magnitude the model takes back; 0: nothing */

    float attn_scale;     /* of the scores */
    float attn_softcap;   /* 0: none */
    float logit_softcap;  /* 0: none */
    float embed_scale;    /* 1: none */
    float residual_scale; /* 1: none */
    float logit_scale;    /* logits are multiplied by it; 1: none */

    uint32_t window;                             /* of the windowed layers; 0: none */
    uint8_t window_layers[MODEL_MAX_LAYERS / 8]; /* a bit per layer: windowed */
    enum pooling pooling;                        /* of embeddings, unless the caller says */
};

/* Reads and checks. -ENOTSUP (unknown architecture: the sentence lists the known ones; a key that
 * would change results and is not understood), -EINVAL (missing or out of range, by name). */
int model_shape_read(const struct gguf *g, struct model_shape *ret, struct fmt_error *err);

/* The window of one layer, 0 for none. */
uint32_t model_layer_window(const struct model_shape *s, uint32_t layer);

/* Whether a layer's queries and keys rotate. */
bool model_layer_rotates(const struct model_shape *s, uint32_t layer);

#endif
