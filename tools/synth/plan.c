/* tools/synth/plan.c - tensors and types. The mixtures are llama.cpp's, so that sizes and speeds
 * compare with files that it quantised:
 *
 *   q4_0    everything Q4_0, the output head Q6_K
 *   q8_0    everything Q8_0
 *   q4_k_m  everything Q4_K; Q6_K: the output head, and attn_v and ffn_down of the first and last
 *           eighth of the layers and of every third layer between
 *   f32, f16, bf16  everything in that type
 *
 * Where the embedding is also the head it has the head's type. Norms and biases are F32. A K type
 * needs rows of a multiple of 256 values; others fall back, Q4_K to Q5_0 and Q6_K to Q8_0, and to
 * F16 where not even 32 divides the row.
 *
 * Deviations are 1 / sqrt(row length), so that every product of a normalised row has values of
 * about one; matrices that write into the residual stream are smaller by sqrt(2 x layers), so that
 * the stream does not grow with depth. Logits are then finite and about normal with a deviation of
 * one. */
#include "tools/synth/plan.h"

#include "format/types.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TENSORS_PER_LAYER_MAX 16
#define TENSORS_BESIDES       3 /* embedding, last norm, head */

static const struct synth_mixture mixtures[] = {
    {"q4_0", 2, FMT_TYPE_Q4_0, FMT_TYPE_Q6_K, false},
    {"q8_0", 7, FMT_TYPE_Q8_0, FMT_TYPE_Q8_0, false},
    {"q4_k_m", 15, FMT_TYPE_Q4_K, FMT_TYPE_Q6_K, true},
    {"f16", 1, FMT_TYPE_F16, FMT_TYPE_F16, false},
    {"bf16", 32, FMT_TYPE_BF16, FMT_TYPE_BF16, false},
    {"f32", 0, FMT_TYPE_F32, FMT_TYPE_F32, false},
};

#define N_MIXTURES (sizeof(mixtures) / sizeof(mixtures[0]))

const struct synth_mixture *synth_mixture_by_name(const char *name)
{
    for (size_t i = 0; i < N_MIXTURES; i++) {
        if (strcasecmp(mixtures[i].name, name) == 0) {
            return &mixtures[i];
        }
    }
    return NULL;
}

const struct synth_mixture *synth_mixture_at(size_t i)
{
    return i < N_MIXTURES ? &mixtures[i] : NULL;
}

static uint32_t fit_type(uint32_t type, uint64_t row)
{
    if (row % fmt_type_info(type)->n_block == 0) {
        return type;
    }
    if (row % 32 != 0) {
        return FMT_TYPE_F16;
    }
    return type == FMT_TYPE_Q4_K ? FMT_TYPE_Q5_0 : FMT_TYPE_Q8_0;
}

/* llama.cpp's choice of the layers that get more bits. */
static bool wants_more_bits(uint32_t layer, uint32_t n_layers)
{
    uint32_t eighth = n_layers / 8;
    return layer < eighth || layer >= 7 * n_layers / 8 || (layer - eighth) % 3 == 2;
}

/* Appends a tensor; the array has room for the most that a shape can have. */
__attribute__((format(printf, 2, 3))) static struct synth_tensor *add(struct synth_plan *plan,
                                                                      const char *format, ...)
{
    struct synth_tensor *tensor = &plan->tensors[plan->n_tensors++];
    va_list args;
    va_start(args, format);
    vsnprintf(tensor->name, sizeof(tensor->name), format, args);
    va_end(args);
    return tensor;
}

/* F32 values about mean: a norm's weight or a bias. */
static void set_vector(struct synth_plan *plan, struct synth_tensor *tensor, uint64_t n, float mean)
{
    tensor->type = FMT_TYPE_F32;
    tensor->n_dims = 1;
    tensor->ne[0] = n;
    tensor->mean = mean;
    tensor->deviation = 0.05f;
    plan->n_parameters += n;
}

/* (n_out, n_in), rows of n_in. */
static void set_matrix(struct synth_plan *plan, struct synth_tensor *tensor, uint32_t type,
                       uint64_t n_in, uint64_t n_out, float gain)
{
    tensor->type = fit_type(type, n_in);
    tensor->n_dims = 2;
    tensor->ne[0] = n_in;
    tensor->ne[1] = n_out;
    tensor->deviation = gain / sqrtf((float)n_in);
    plan->n_parameters += n_in * n_out;
}

static void plan_layer(const struct synth_shape *s, const struct synth_mixture *mixture, uint32_t i,
                       struct synth_plan *plan)
{
    const uint64_t q_rows = (uint64_t)s->n_heads * s->head_dim;
    const uint64_t kv_rows = (uint64_t)s->n_kv_heads * s->head_dim;
    const float into_stream = 1.0f / sqrtf(2.0f * (float)s->n_layers);
    const uint32_t type = mixture->type;
    const uint32_t finer =
        mixture->more_bits && wants_more_bits(i, s->n_layers) ? FMT_TYPE_Q6_K : type;

    set_vector(plan, add(plan, "blk.%u.attn_norm.weight", i), s->n_embd, 1.0f);
    set_matrix(plan, add(plan, "blk.%u.attn_q.weight", i), type, s->n_embd, q_rows, 1.0f);
    set_matrix(plan, add(plan, "blk.%u.attn_k.weight", i), type, s->n_embd, kv_rows, 1.0f);
    set_matrix(plan, add(plan, "blk.%u.attn_v.weight", i), finer, s->n_embd, kv_rows, 1.0f);
    if (s->arch == SYNTH_QWEN2) {
        set_vector(plan, add(plan, "blk.%u.attn_q.bias", i), q_rows, 0.0f);
        set_vector(plan, add(plan, "blk.%u.attn_k.bias", i), kv_rows, 0.0f);
        set_vector(plan, add(plan, "blk.%u.attn_v.bias", i), kv_rows, 0.0f);
    }
    if (s->arch == SYNTH_QWEN3) {
        set_vector(plan, add(plan, "blk.%u.attn_q_norm.weight", i), s->head_dim, 1.0f);
        set_vector(plan, add(plan, "blk.%u.attn_k_norm.weight", i), s->head_dim, 1.0f);
    }
    set_matrix(plan, add(plan, "blk.%u.attn_output.weight", i), type, q_rows, s->n_embd,
               into_stream);
    set_vector(plan, add(plan, "blk.%u.ffn_norm.weight", i), s->n_embd, 1.0f);
    set_matrix(plan, add(plan, "blk.%u.ffn_gate.weight", i), type, s->n_embd, s->n_ff, 1.0f);
    set_matrix(plan, add(plan, "blk.%u.ffn_up.weight", i), type, s->n_embd, s->n_ff, 1.0f);
    set_matrix(plan, add(plan, "blk.%u.ffn_down.weight", i), finer, s->n_ff, s->n_embd,
               into_stream);
}

int synth_plan_init(const struct synth_shape *s, const struct synth_mixture *mixture,
                    struct synth_plan *ret)
{
    struct synth_plan plan = {0};
    plan.tensors = calloc((size_t)s->n_layers * TENSORS_PER_LAYER_MAX + TENSORS_BESIDES,
                          sizeof(*plan.tensors));
    if (plan.tensors == NULL) {
        return -ENOMEM;
    }
    set_matrix(&plan, add(&plan, "token_embd.weight"),
               s->tied != 0 ? mixture->head_type : mixture->type, s->n_embd, s->n_vocab, 1.0f);
    for (uint32_t i = 0; i < s->n_layers; i++) {
        plan_layer(s, mixture, i, &plan);
    }
    set_vector(&plan, add(&plan, "output_norm.weight"), s->n_embd, 1.0f);
    if (s->tied == 0) {
        set_matrix(&plan, add(&plan, "output.weight"), mixture->head_type, s->n_embd, s->n_vocab,
                   1.0f);
    }
    *ret = plan;
    return 0;
}

void synth_plan_finish(struct synth_plan *plan)
{
    free(plan->tensors);
    plan->tensors = NULL;
}
