/* tools/synth/shape.h - the shapes that gqa-synth knows, and how the command line changes them. */
#ifndef TOOLS_SYNTH_SHAPE_H
#define TOOLS_SYNTH_SHAPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum synth_arch {
    SYNTH_LLAMA,
    SYNTH_QWEN2, /* biases on q, k, v */
    SYNTH_QWEN3, /* norms on the heads of q and k */
};

struct synth_shape {
    char name[64];
    enum synth_arch arch;
    uint32_t n_layers;
    uint32_t n_embd;
    uint32_t n_heads;
    uint32_t n_kv_heads;
    uint32_t head_dim;
    uint32_t n_ff;
    uint32_t n_vocab;
    uint32_t n_ctx;
    uint32_t rope_base;
    uint32_t tied; /* 1: the output head is the embedding */
};

struct synth_error {
    char text[200];
};

/* The word that GGUF files use for an architecture. */
const char *synth_arch_name(enum synth_arch arch);

/* The i-th known shape, or NULL past the end. */
const struct synth_shape *synth_shape_at(size_t i);

/* Parses "NAME", "NAME,key=value,..." or "key=value,..." (which changes "tiny") and checks that a
 * model can have that shape. head_dim follows n_embd and n_heads unless it is given. 0, or -EINVAL
 * and a sentence. */
int synth_shape_parse(const char *text, struct synth_shape *ret, struct synth_error *err);

#endif
