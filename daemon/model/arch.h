/* daemon/model/arch.h - architectures as table rows, and a model's shape as read from its file.
 *
 * A row says how an architecture differs: which norms, which rotary embedding, which biases and
 * tensors; one forward pass (program.c) reads it and emits ops. A new architecture is a row. */
#ifndef DAEMON_MODEL_ARCH_H
#define DAEMON_MODEL_ARCH_H

#include "format/gguf.h"

#include <gqa/plugin.h>

#define MODEL_MAX_LAYERS 1024

enum arch_flags {
    ARCH_QKV_BIAS = 1u << 0,      /* attn_q.bias, attn_k.bias, attn_v.bias are required */
    ARCH_QK_NORM = 1u << 1,       /* attn_q_norm, attn_k_norm over every head */
    ARCH_FUSED_QKV = 1u << 2,     /* attn_qkv holds q, k and v */
    ARCH_FUSED_GATE_UP = 1u << 3, /* ffn_up holds gate and up */
    ARCH_POST_NORMS = 1u << 4,    /* post_attention_norm, post_ffw_norm before the residual */
    ARCH_SCALE_EMBED = 1u << 5,   /* embeddings times sqrt(n_embd) */
};

struct arch {
    const char *name; /* general.architecture */
    uint32_t flags;
    enum gqa_norm_kind norm;
    enum gqa_rope_kind rope;
    enum gqa_act_kind act;
};

/* The row, or NULL. */
const struct arch *arch_find(struct gguf_string name);
/* The i-th row, or NULL past the end: for errors that list what is known. */
const struct arch *arch_at(size_t i);

/* A model's numbers. Sizes are checked against limits and each other when read. */
struct model_shape {
    const struct arch *arch;
    uint32_t n_layers, n_embd, n_heads, n_kv_heads, k_dim, v_dim, n_ff, n_vocab;
    uint32_t n_ctx_train;
    uint32_t n_rot; /* dimensions of a head that rotate */
    float norm_eps;
    float rope_base;
    float attn_scale;        /* of the scores */
    float attn_softcap;      /* 0: none */
    float logit_softcap;     /* 0: none */
    uint32_t window;         /* 0: none */
    uint32_t window_pattern; /* every so many layers one has no window; 0: as window says for all */
};

/* Reads and checks. -ENOTSUP (unknown architecture: the sentence lists the known ones; a key that
 * would change results and is not understood), -EINVAL. */
int model_shape_read(const struct gguf *g, struct model_shape *ret, struct fmt_error *err);

/* The window of one layer, 0 for none. */
uint32_t model_layer_window(const struct model_shape *s, uint32_t layer);

#endif
