/* daemon/model/arch.h - architectures as table rows, and a model's shape as read from its file.
 *
 * A row says how an architecture differs: which norms, which rotary embedding, which biases, scales
 * and tensors; one forward pass (program.c) reads it and emits ops. A new architecture is a row. */
#ifndef DAEMON_MODEL_ARCH_H
#define DAEMON_MODEL_ARCH_H

#include "format/gguf.h"

#include <gqa/plugin.h>

enum arch_flags {
    ARCH_QKV_BIAS = 1u << 0,      /* attn_q.bias, attn_k.bias and attn_v.bias */
    ARCH_QK_NORM = 1u << 1,       /* attn_q_norm and attn_k_norm, over every head */
    ARCH_FUSED_QKV = 1u << 2,     /* attn_qkv holds q, k and v */
    ARCH_FUSED_GATE_UP = 1u << 3, /* ffn_up holds gate and up */
    ARCH_POST_NORMS = 1u << 4,    /* post_attention_norm, post_ffw_norm before the residual */
    ARCH_EMBED_SQRT = 1u << 5,    /* embeddings times sqrt(n_embd) */
    ARCH_SCALES = 1u << 6,     /* embedding_scale, residual_scale, attention.scale, logit_scale */
    ARCH_LOCAL_ROPE = 1u << 7, /* windowed layers rotate with base 10000, unscaled */
};

struct arch {
    const char *name; /* general.architecture */
    uint32_t flags;
    enum gqa_norm_kind norm;
    enum gqa_rope_kind rope;
    enum gqa_act_kind act;
    uint32_t
        window_pattern; /* every so many layers the last one sees everything; 1: all windowed */
};

/* The row, or NULL. */
const struct arch *arch_find(struct gguf_string name);
/* The i-th row, or NULL past the end: for errors that list what is known. */
const struct arch *arch_at(size_t i);

enum rope_scaling { ROPE_SCALING_NONE, ROPE_SCALING_LINEAR, ROPE_SCALING_YARN };

/* A model's numbers. Sizes are checked against limits and each other when read. */
struct model_shape {
    const struct arch *arch;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, k_dim, v_dim, n_ff, n_vocab;
    uint32_t n_ctx_train;
    float norm_eps;

    uint32_t n_rot; /* dimensions of a head that rotate */
    float rope_base;
    enum rope_scaling rope_scaling;
    float rope_factor;        /* of the scaling; 1 without */
    float rope_attn_factor;   /* magnitude given by the file; 0: by the scaling's own rule */
    uint32_t rope_n_ctx_orig; /* context before scaling */
    float yarn_beta_fast, yarn_beta_slow;

    float attn_scale;     /* of the scores */
    float attn_softcap;   /* 0: none */
    float logit_softcap;  /* 0: none */
    float embed_scale;    /* 1: none */
    float residual_scale; /* 1: none */
    float logit_scale;    /* logits are multiplied by it; 1: none */
    uint32_t window;      /* of the windowed layers; 0: none */
};

/* Reads and checks. -ENOTSUP (unknown architecture: the sentence lists the known ones; a key that
 * would change results and is not understood), -EINVAL (missing or out of range, by name). */
int model_shape_read(const struct gguf *g, struct model_shape *ret, struct fmt_error *err);

/* The window of one layer, 0 for none. */
uint32_t model_layer_window(const struct model_shape *s, uint32_t layer);

#endif
