/* plugins/cpu/attention_c.c - grouped attention in plain C: the truth for every other level.
 *
 * Softmax in float32 with the segment's own maximum. Every sum runs in one order: dimensions
 * ascending in a score, tokens ascending in the denominator and in the output. */
#include "plugins/cpu/attention_convert.h"
#include "plugins/cpu/attention_kernels.h"

#include <math.h>

static float score(const struct cpu_attn_pack *pack, uint32_t query, uint32_t token)
{
    const struct gqa_attn_layer *layer = pack->layer;
    const char *k = pack->k[token / GQA_KV_BLOCK_TOKENS];
    float sum = 0.0f;

    for (uint32_t d = 0; d < layer->k_dim; d++) {
        sum += pack->q[(size_t)d * pack->n_queries + query] *
               cpu_k_load(layer->k_type, k, layer->k_dim, token % GQA_KV_BLOCK_TOKENS, d);
    }
    sum *= layer->scale;
    if (layer->softcap > 0.0f) {
        sum = layer->softcap * tanhf(sum / layer->softcap);
    }
    return sum;
}

static void segment_of_query(const struct cpu_attn_pack *pack, uint32_t query, float *part)
{
    const struct gqa_attn_layer *layer = pack->layer;
    uint32_t begin = pack->begin[query], end = pack->end[query];
    const uint64_t *seen =
        pack->seen != NULL ? pack->seen + (size_t)query * CPU_ATTN_SEGMENT_BLOCKS : NULL;
    float *p = pack->scores + (size_t)query * GQA_ATTN_SEGMENT_TOKENS;
    float max = -INFINITY, sum = 0.0f;

    memset(part, 0, cpu_attn_part_floats(layer->v_dim) * sizeof(*part));
    for (uint32_t t = begin; t < end; t++) {
        if (seen == NULL || cpu_attn_sees(seen, t)) {
            p[t] = score(pack, query, t);
            max = p[t] > max ? p[t] : max;
        }
    }
    for (uint32_t t = begin; t < end; t++) {
        const char *v = pack->v[t / GQA_KV_BLOCK_TOKENS];

        if (seen != NULL && !cpu_attn_sees(seen, t)) {
            continue;
        }
        /* Scores that are all -inf have no maximum to subtract: they weigh nothing. */
        p[t] = p[t] == -INFINITY ? 0.0f : expf(p[t] - max);
        sum += p[t];
        for (uint32_t d = 0; d < layer->v_dim; d++) {
            part[d] +=
                p[t] * cpu_v_load(layer->v_type, v, layer->v_dim, t % GQA_KV_BLOCK_TOKENS, d);
        }
    }
    part[cpu_attn_v_pad(layer->v_dim)] = max;
    part[cpu_attn_v_pad(layer->v_dim) + 1] = sum;
}

static void segment_c(const struct cpu_attn_pack *packs, uint32_t n_packs)
{
    for (const struct cpu_attn_pack *pack = packs; pack < packs + n_packs; pack++) {
        for (uint32_t i = 0; i < pack->n_queries; i++) {
            segment_of_query(pack, i,
                             pack->parts + (size_t)i * cpu_attn_part_floats(pack->layer->v_dim));
        }
    }
}

static void merge_one(float *state, const float *part, uint32_t v_dim)
{
    float *state_end = state + cpu_attn_v_pad(v_dim);
    const float *part_end = part + cpu_attn_v_pad(v_dim);
    float max = state_end[0] > part_end[0] ? state_end[0] : part_end[0];

    if (part_end[0] == -INFINITY && part_end[1] == 0.0f) {
        return; /* an empty part; two of them would make NaN of -inf minus -inf */
    }
    float state_weight = expf(state_end[0] - max), part_weight = expf(part_end[0] - max);
    for (uint32_t d = 0; d < v_dim; d++) {
        state[d] = state[d] * state_weight + part[d] * part_weight;
    }
    state_end[0] = max;
    state_end[1] = state_end[1] * state_weight + part_end[1] * part_weight;
}

static void merge_c(float *states, const float *parts, uint32_t n, uint32_t v_dim)
{
    const size_t stride = cpu_attn_part_floats(v_dim);

    for (uint32_t i = 0; i < n; i++) {
        merge_one(states + i * stride, parts + i * stride, v_dim);
    }
}

static void finish_c(const float *state, const float *sink, uint32_t v_dim, float *out)
{
    const float *end = state + cpu_attn_v_pad(v_dim);
    float weight = 1.0f, sum = end[1];

    if (sink != NULL && *sink != -INFINITY) {
        float max = end[0] > *sink ? end[0] : *sink;
        weight = expf(end[0] - max);
        sum = sum * weight + expf(*sink - max);
    }
    for (uint32_t d = 0; d < v_dim; d++) {
        out[d] = sum == 0.0f ? 0.0f : state[d] * weight / sum;
    }
}

static void store_c(uint32_t type, const float *src, void *dst, size_t n)
{
    uint16_t *half = dst;

    switch (type) {
    case GQA_TYPE_F16:
        for (size_t i = 0; i < n; i++) {
            half[i] = gqa_f32_to_f16(src[i]);
        }
        break;
    case GQA_TYPE_BF16:
        for (size_t i = 0; i < n; i++) {
            half[i] = cpu_f32_to_bf16(src[i]);
        }
        break;
    default:
        memcpy(dst, src, n * sizeof(float));
        break;
    }
}

const struct cpu_attn_kernels cpu_attn_kernels_c = {
    .isa = CPU_ISA_C,
    .segment = segment_c,
    .merge = merge_c,
    .finish = finish_c,
    .store = store_c,
};
