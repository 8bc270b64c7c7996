/* tools/synth/shape.h - the shapes that gqa-synth knows, and how the command line changes them. */
#ifndef TOOLS_SYNTH_SHAPE_H
#define TOOLS_SYNTH_SHAPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What the tensors and keys of an architecture have beyond a llama's. */
enum synth_flags {
    SYNTH_QKV_BIAS = 1u << 0,
    SYNTH_QK_NORM = 1u << 1,      /* norms of q and k, for a head */
    SYNTH_QK_NORM_WIDE = 1u << 2, /* the same for all heads together */
    SYNTH_POST_NORMS = 1u << 3,
    SYNTH_NO_PRE_NORMS = 1u << 4,
    SYNTH_BIASES = 1u << 5, /* of everything but norms */
    SYNTH_SINKS = 1u << 6,
    SYNTH_NORM_2_NAME = 1u << 7, /* ffn_norm is called post_attention_norm */
    SYNTH_SOFTCAPS = 1u << 8,
    SYNTH_SCALES = 1u << 9,
    SYNTH_YARN = 1u << 10,
    SYNTH_EXPERTS = 1u << 11,   /* there may be experts */
    SYNTH_NOT_DENSE = 1u << 12, /* there must be */
    SYNTH_ROUGH_EPS = 1u << 13, /* 1e-5 under the norms' roots, not 1e-6 */
};

struct synth_arch {
    const char *name; /* general.architecture */
    unsigned flags;
};

struct synth_shape {
    char name[64];
    const struct synth_arch *arch;
    uint32_t n_layers;
    uint32_t n_embd;
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t n_ff;
    uint32_t n_vocab;
    uint32_t n_ctx;
    uint32_t rope_base;
    uint32_t tied;      /* 1: the output head is the embedding */
    uint32_t n_experts; /* 0: dense */
    uint32_t n_used;
    uint32_t n_ff_expert;
    uint32_t window; /* 0: none */
};

struct synth_error {
    char text[200];
};

/* The i-th architecture, or NULL past the end. */
const struct synth_arch *synth_arch_at(size_t i);

/* The i-th known shape, or NULL past the end. */
const struct synth_shape *synth_shape_at(size_t i);

/* Parses "NAME", "NAME,key=value,..." or "key=value,..." (which changes "tiny") and checks that a
 * model can have that shape. head_dim follows n_embd and n_heads unless it is given. 0, or -EINVAL
 * and a sentence. */
int synth_shape_parse(const char *text, struct synth_shape *ret, struct synth_error *err);

#endif
