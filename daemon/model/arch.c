#include "daemon/model/arch.h"

#include <string.h>

/* One row per architecture. All rows share one forward pass: attention over grouped KV and a
 * feed-forward, with what the flags add or leave out. Columns after the flags: norm, rotation,
 * activation, pattern of windows, step of layers without rotation, base of windowed layers. */
static const struct arch archs[] = {
    {"llama", ARCH_EXPERTS_IF_COUNT, GQA_NORM_RMS, GQA_ROPE_NEIGHBOUR, GQA_ACT_SILU, 1, 0, 0},
    {"mistral3", ARCH_EXPERTS_IF_COUNT | ARCH_TEMPERATURE, GQA_NORM_RMS, GQA_ROPE_NEIGHBOUR,
     GQA_ACT_SILU, 1, 0, 0},
    {"smollm3", 0, GQA_NORM_RMS, GQA_ROPE_NEIGHBOUR, GQA_ACT_SILU, 0, 4, 0},
    {"granite", ARCH_SCALES | ARCH_ROPE_SWITCH, GQA_NORM_RMS, GQA_ROPE_NEIGHBOUR, GQA_ACT_SILU, 0,
     0, 0},
    {"granitemoe", ARCH_SCALES | ARCH_ROPE_SWITCH | ARCH_EXPERTS_IF_COUNT | ARCH_SHARED_EXPERT,
     GQA_NORM_RMS, GQA_ROPE_NEIGHBOUR, GQA_ACT_SILU, 0, 0, 0},
    {"qwen2", ARCH_QKV_BIAS, GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_SILU, 0, 0, 0},
    {"qwen2moe",
     ARCH_QKV_BIAS | ARCH_EXPERTS | ARCH_EXPERTS_RAW | ARCH_SHARED_EXPERT | ARCH_SHARED_GATE,
     GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_SILU, 0, 0, 0},
    {"qwen3", ARCH_QK_NORM | ARCH_RANK_SOFTMAX, GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_SILU, 0, 0, 0},
    {"qwen3moe", ARCH_QK_NORM | ARCH_EXPERTS, GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_SILU, 0, 0, 0},
    {"olmo2", ARCH_QK_NORM_WIDE | ARCH_POST_NORMS | ARCH_NO_PRE_NORMS | ARCH_LOCAL_ROPE,
     GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_SILU, 4, 0, 0},
    {"olmoe", ARCH_QK_NORM_WIDE | ARCH_EXPERTS | ARCH_EXPERTS_RAW, GQA_NORM_RMS, GQA_ROPE_HALF,
     GQA_ACT_SILU, 0, 0, 0},
    {"gemma", ARCH_EMBED_SQRT, GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_GELU_TANH, 0, 0, 0},
    {"gemma2", ARCH_POST_NORMS | ARCH_EMBED_SQRT, GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_GELU_TANH, 2,
     0, 0},
    {"gemma3", ARCH_QK_NORM | ARCH_POST_NORMS | ARCH_EMBED_SQRT | ARCH_LOCAL_ROPE, GQA_NORM_RMS,
     GQA_ROPE_HALF, GQA_ACT_GELU_TANH, 6, 0, 10000},
    {"phi2", ARCH_QKV_BIAS | ARCH_BIASES | ARCH_NORM_BIAS | ARCH_PARALLEL | ARCH_NO_GATE,
     GQA_NORM_LAYER, GQA_ROPE_HALF, GQA_ACT_GELU_TANH, 0, 0, 0},
    {"phi3", ARCH_FUSED_QKV | ARCH_FUSED_GATE_UP, GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_SILU, 1, 0,
     0},
    {"stablelm", ARCH_NORM_BIAS, GQA_NORM_LAYER, GQA_ROPE_HALF, GQA_ACT_SILU, 0, 0, 0},
    {"starcoder2", ARCH_QKV_BIAS | ARCH_BIASES | ARCH_NORM_BIAS | ARCH_NO_GATE, GQA_NORM_LAYER,
     GQA_ROPE_HALF, GQA_ACT_GELU_TANH, 1, 0, 0},
    {"gpt-oss", ARCH_QKV_BIAS | ARCH_BIASES | ARCH_SINKS | ARCH_NORM_2_NAME | ARCH_EXPERTS,
     GQA_NORM_RMS, GQA_ROPE_HALF, GQA_ACT_SWIGLU_OAI, 2, 0, 0},
    {"bert",
     ARCH_ENCODER | ARCH_POSITIONS | ARCH_QKV_BIAS | ARCH_BIASES | ARCH_NORM_BIAS |
         ARCH_NO_PRE_NORMS | ARCH_NO_GATE,
     GQA_NORM_LAYER, GQA_ROPE_HALF, GQA_ACT_GELU, 0, 0, 0},
    {"nomic-bert", ARCH_ENCODER | ARCH_NORM_BIAS | ARCH_NO_PRE_NORMS, GQA_NORM_LAYER, GQA_ROPE_HALF,
     GQA_ACT_SILU, 0, 0, 0},
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
    bool windowed = s->window_layers[layer / 8] >> layer % 8 & 1;
    return windowed ? s->window : 0;
}

bool model_layer_rotates(const struct model_shape *s, uint32_t layer)
{
    uint32_t step = s->arch->nope_step;
    return s->n_rot > 0 && (step == 0 || (layer + 1) % step != 0);
}
