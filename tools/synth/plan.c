/* tools/synth/plan.c - tensors and types. The mixtures are llama.cpp's, so that sizes and speeds
 * compare with files that it quantised:
 *
 *   q4_0    everything Q4_0, the output head Q6_K
 *   q8_0    everything Q8_0
 *   q4_k_m  everything Q4_K; Q6_K: the output head, and attn_v and ffn_down of the first and last
 *           eighth of the layers and of every third layer between
 *   q2_k, q3_k_s, q6_k, iq4_nl, iq4_xs, mxfp4  everything in that type, the output head Q6_K: no
 *           mixture of llama.cpp's, but what its name says is measured
 *   f32, f16, bf16  everything in that type
 *
 * Where the embedding is also the head it has the head's type. Norms, biases, sinks and routers are
 * F32. A K type needs rows of a multiple of 256 values; others fall back, Q4_K to Q5_0, Q6_K to
 * Q8_0, Q2_K, Q3_K and IQ4_XS to IQ4_NL, and all to F16 where not even 32 divides the row.
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

#define TENSORS_PER_LAYER_MAX 32
#define TENSORS_BESIDES       3 /* embedding, last norm, head */

static const struct synth_mixture mixtures[] = {
    {"q4_0", 2, FMT_TYPE_Q4_0, FMT_TYPE_Q6_K, false},
    {"q8_0", 7, FMT_TYPE_Q8_0, FMT_TYPE_Q8_0, false},
    {"q4_k_m", 15, FMT_TYPE_Q4_K, FMT_TYPE_Q6_K, true},
    {"q2_k", 10, FMT_TYPE_Q2_K, FMT_TYPE_Q6_K, false},
    {"q3_k_s", 11, FMT_TYPE_Q3_K, FMT_TYPE_Q6_K, false},
    {"q6_k", 18, FMT_TYPE_Q6_K, FMT_TYPE_Q6_K, false},
    {"iq4_nl", 25, FMT_TYPE_IQ4_NL, FMT_TYPE_Q6_K, false},
    {"iq4_xs", 30, FMT_TYPE_IQ4_XS, FMT_TYPE_Q6_K, false},
    {"mxfp4", 38, FMT_TYPE_MXFP4, FMT_TYPE_Q6_K, false},
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
    switch (type) {
    case FMT_TYPE_Q4_K:
        return FMT_TYPE_Q5_0;
    case FMT_TYPE_Q2_K:
    case FMT_TYPE_Q3_K:
    case FMT_TYPE_IQ4_XS:
        return FMT_TYPE_IQ4_NL;
    default:
        return FMT_TYPE_Q8_0;
    }
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

/* F32 values about mean: a norm's weight or a bias; of all experts, when n_experts is not 0. */
static void set_vector(struct synth_plan *plan, struct synth_tensor *tensor, uint64_t n,
                       uint64_t n_experts, float mean)
{
    tensor->type = FMT_TYPE_F32;
    tensor->n_dims = n_experts > 0 ? 2 : 1;
    tensor->ne[0] = n;
    tensor->ne[1] = n_experts > 0 ? n_experts : 1;
    tensor->ne[2] = 1;
    tensor->mean = mean;
    tensor->deviation = 0.05f;
    plan->n_parameters += n * tensor->ne[1];
}

/* (n_experts, n_out, n_in), rows of n_in; one matrix alone when n_experts is 0. */
static void set_matrices(struct synth_plan *plan, struct synth_tensor *tensor, uint32_t type,
                         uint64_t n_in, uint64_t n_out, uint64_t n_experts, float gain)
{
    tensor->type = fit_type(type, n_in);
    tensor->n_dims = n_experts > 0 ? 3 : 2;
    tensor->ne[0] = n_in;
    tensor->ne[1] = n_out;
    tensor->ne[2] = n_experts > 0 ? n_experts : 1;
    tensor->deviation = gain / sqrtf((float)n_in);
    plan->n_parameters += n_in * n_out * tensor->ne[2];
}

static void set_matrix(struct synth_plan *plan, struct synth_tensor *tensor, uint32_t type,
                       uint64_t n_in, uint64_t n_out, float gain)
{
    set_matrices(plan, tensor, type, n_in, n_out, 0, gain);
}

/* What the tensors of one layer share. */
struct layer {
    const struct synth_shape *s;
    struct synth_plan *plan;
    uint32_t index, type, finer; /* finer: of attn_v and ffn_down */
    float into_stream;           /* gain of what is added to the residual stream */
};

static void plan_norm(const struct layer *l, const char *name, uint64_t n)
{
    set_vector(l->plan, add(l->plan, "blk.%u.%s.weight", l->index, name), n, 0, 1.0f);
}

static void plan_attention(const struct layer *l)
{
    const struct synth_shape *s = l->s;
    const unsigned flags = s->arch->flags;
    const uint64_t q_rows = (uint64_t)s->n_heads * s->head_dim;
    const uint64_t kv_rows = (uint64_t)s->n_kv_heads * s->head_dim;
    struct synth_plan *plan = l->plan;
    const uint32_t i = l->index;

    if ((flags & SYNTH_NO_PRE_NORMS) == 0) {
        plan_norm(l, "attn_norm", s->n_embd);
    }
    set_matrix(plan, add(plan, "blk.%u.attn_q.weight", i), l->type, s->n_embd, q_rows, 1.0f);
    set_matrix(plan, add(plan, "blk.%u.attn_k.weight", i), l->type, s->n_embd, kv_rows, 1.0f);
    set_matrix(plan, add(plan, "blk.%u.attn_v.weight", i), l->finer, s->n_embd, kv_rows, 1.0f);
    if (flags & SYNTH_QKV_BIAS) {
        set_vector(plan, add(plan, "blk.%u.attn_q.bias", i), q_rows, 0, 0.0f);
        set_vector(plan, add(plan, "blk.%u.attn_k.bias", i), kv_rows, 0, 0.0f);
        set_vector(plan, add(plan, "blk.%u.attn_v.bias", i), kv_rows, 0, 0.0f);
    }
    if (flags & (SYNTH_QK_NORM | SYNTH_QK_NORM_WIDE)) {
        bool wide = (flags & SYNTH_QK_NORM_WIDE) != 0;
        plan_norm(l, "attn_q_norm", wide ? q_rows : s->head_dim);
        plan_norm(l, "attn_k_norm", wide ? kv_rows : s->head_dim);
    }
    if (flags & SYNTH_SINKS) {
        set_vector(plan, add(plan, "blk.%u.attn_sinks.weight", i), s->n_heads, 0, 0.0f);
    }
    set_matrix(plan, add(plan, "blk.%u.attn_output.weight", i), l->type, q_rows, s->n_embd,
               l->into_stream);
    if (flags & SYNTH_BIASES) {
        set_vector(plan, add(plan, "blk.%u.attn_output.bias", i), s->n_embd, 0, 0.0f);
    }
    if (flags & (SYNTH_POST_NORMS | SYNTH_NORM_2_NAME)) {
        plan_norm(l, "post_attention_norm", s->n_embd);
    }
}

static void plan_feed_forward(const struct layer *l)
{
    const struct synth_shape *s = l->s;
    const uint64_t n = s->n_experts, width = n > 0 ? s->n_ff_expert : s->n_ff;
    const char *suffix = n > 0 ? "_exps" : "";
    const struct {
        const char *name;
        uint64_t n_in, n_out;
        uint32_t type;
        float gain;
    } parts[] = {{"gate", s->n_embd, width, l->type, 1.0f},
                 {"up", s->n_embd, width, l->type, 1.0f},
                 {"down", width, s->n_embd, l->finer, l->into_stream}};
    struct synth_plan *plan = l->plan;

    if ((s->arch->flags & (SYNTH_NO_PRE_NORMS | SYNTH_NORM_2_NAME)) == 0) {
        plan_norm(l, "ffn_norm", s->n_embd);
    }
    if (n > 0) {
        set_matrix(plan, add(plan, "blk.%u.ffn_gate_inp.weight", l->index), FMT_TYPE_F32, s->n_embd,
                   n, 1.0f);
    }
    if (n > 0 && (s->arch->flags & SYNTH_BIASES)) {
        set_vector(plan, add(plan, "blk.%u.ffn_gate_inp.bias", l->index), n, 0, 0.0f);
    }
    for (size_t p = 0; p < 3; p++) {
        set_matrices(plan, add(plan, "blk.%u.ffn_%s%s.weight", l->index, parts[p].name, suffix),
                     parts[p].type, parts[p].n_in, parts[p].n_out, n, parts[p].gain);
        if (s->arch->flags & SYNTH_BIASES) {
            set_vector(plan, add(plan, "blk.%u.ffn_%s%s.bias", l->index, parts[p].name, suffix),
                       parts[p].n_out, n, 0.0f);
        }
    }
    if (s->arch->flags & SYNTH_POST_NORMS) {
        plan_norm(l, "post_ffw_norm", s->n_embd);
    }
}

static void plan_layer(const struct synth_shape *s, const struct synth_mixture *mixture, uint32_t i,
                       struct synth_plan *plan)
{
    bool finer = mixture->more_bits && wants_more_bits(i, s->n_layers);
    const struct layer l = {
        .s = s,
        .plan = plan,
        .index = i,
        .type = mixture->type,
        .finer = finer ? FMT_TYPE_Q6_K : mixture->type,
        .into_stream = 1.0f / sqrtf(2.0f * (float)s->n_layers),
    };
    plan_attention(&l);
    plan_feed_forward(&l);
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
    set_vector(&plan, add(&plan, "output_norm.weight"), s->n_embd, 0, 1.0f);
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
