#include "daemon/model/arch.h"

#include <string.h>

/* One row per architecture. All rows share one forward pass: pre-norm attention over grouped KV
 * and a gated feed-forward, with what the flags add. */
static const struct arch archs[] = {
    {"llama", 0, GQA_NORM_RMS, GQA_ROPE_NEIGHBOUR, GQA_ACT_SILU, 0},
    {"qwen2", ARCH_QKV_BIAS, GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_SILU, 0},
    {"qwen3", ARCH_QK_NORM, GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_SILU, 0},
    {"gemma2", ARCH_POST_NORMS | ARCH_EMBED_SQRT, GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_GELU_TANH,
     2},
    {"gemma3", ARCH_QK_NORM | ARCH_POST_NORMS | ARCH_EMBED_SQRT | ARCH_LOCAL_ROPE, GQA_NORM_RMS,
     GQA_ROPE_HALF, GQA_ACT_GELU_TANH, 6},
    {"phi3", ARCH_FUSED_QKV | ARCH_FUSED_GATE_UP, GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_SILU, 1},
    {"granite", ARCH_SCALES, GQA_NORM_RMS, GQA_ROPE_NEIGHBOUR, GQA_ACT_SILU, 0},
};

#define N_ARCHS (sizeof(archs) / sizeof(archs[0]))

const struct arch *arch_find(struct gguf_string name)
{
    for (size_t i = 0; i < N_ARCHS; i++) {
        if (strlen(archs[i].name) == name.bytes &&
            memcmp(archs[i].name, name.data, name.bytes) == 0) {
            return &archs[i];
        }
    }
    return NULL;
}

const struct arch *arch_at(size_t i)
{
    return i < N_ARCHS ? &archs[i] : NULL;
}

uint32_t model_layer_window(const struct model_shape *s, uint32_t layer)
{
    uint32_t pattern = s->arch->window_pattern;
    if (s->window == 0 || pattern == 0) {
        return 0;
    }
    bool sees_all = pattern > 1 && layer % pattern == pattern - 1;
    return sees_all ? 0 : s->window;
}
