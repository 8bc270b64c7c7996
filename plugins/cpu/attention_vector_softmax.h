/* plugins/cpu/attention_vector_softmax.h - weights from scores. */
#ifndef PLUGINS_CPU_ATTENTION_VECTOR_SOFTMAX_H
#define PLUGINS_CPU_ATTENTION_VECTOR_SOFTMAX_H

#include "plugins/cpu/attention_vector_rows.h"

#include <math.h>

/* A bit for each of 64 places from at on that is in [begin, end). */
static inline uint64_t places_between(uint32_t at, uint32_t begin, uint32_t end)
{
    uint64_t bits = end - at >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << (end - at)) - 1;

    return at < begin ? bits >> (begin - at) << (begin - at) : bits;
}

/* Turns the scores s (nq, TOKENS) of queries that see the same into weights; ends (nq, end_stride)
 * = maximum and sum of each. Several go at once, so that they need not wait for their own maximum
 * and sum. Lanes outside [begin, end) or without their bit in mask are chosen away before anything
 * is computed from them and add exact zeros: the sum does not depend on them. */
CPU_SPECIALISE void softmax_queries(const uint32_t nq, const struct gqa_attn_layer *layer,
                                    const uint64_t *mask, float *s, uint32_t begin, uint32_t end,
                                    float *ends, size_t end_stride)
{
    const uint32_t first = begin / LANES * LANES;
    const vec lowest = vec_all(-INFINITY);
    vec max[4], sum[4];

    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        max[i] = lowest;
        sum[i] = vec_all(0.0f);
    }
    for (uint32_t t = first; t < end; t += LANES) {
        const int whole = t >= begin && t + LANES <= end && layer->softcap == 0.0f && mask == NULL;
        uint64_t seen = places_between(t, begin, end);

        if (mask != NULL) {
            seen &= mask[t / GQA_KV_BLOCK_TOKENS] >> t % GQA_KV_BLOCK_TOKENS;
        }
        CPU_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            vec x = vec_load(s + i * TOKENS + t);

            if (!whole) {
                if (layer->softcap > 0.0f) {
                    vec cap = vec_all(layer->softcap);
                    x = vec_mul(cap, tanh_all(vec_div(x, cap)));
                }
                x = vec_choose((uint32_t)seen & ((1u << LANES) - 1), x, lowest);
                vec_store(s + i * TOKENS + t, x);
            }
            max[i] = vec_max(max[i], x);
        }
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        float most = max_of_lanes(max[i]);
        ends[i * end_stride] = most;
        /* Scores that are all -inf have no maximum to subtract: they weigh nothing. */
        max[i] = vec_all(most == -INFINITY ? 0.0f : most);
    }
    for (uint32_t t = first; t < end; t += LANES) {
        CPU_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            vec p = exp_negative(vec_sub(vec_load(s + i * TOKENS + t), max[i]));
            vec_store(s + i * TOKENS + t, p);
            sum[i] = vec_add(sum[i], p);
        }
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        ends[i * end_stride + 1] = sum_of_lanes(sum[i]);
    }
}

static void softmax(const struct gqa_attn_layer *layer, const uint64_t *mask, uint32_t n_queries,
                    float *s, uint32_t begin, uint32_t end, float *ends, size_t end_stride)
{
    for (uint32_t n; n_queries > 0; n_queries -= n, s += n * TOKENS, ends += n * end_stride) {
        n = n_queries >= 4 ? 4 : n_queries >= 2 ? 2 : 1;
        if (n == 4) {
            softmax_queries(4, layer, mask, s, begin, end, ends, end_stride);
        } else if (n == 2) {
            softmax_queries(2, layer, mask, s, begin, end, ends, end_stride);
        } else {
            softmax_queries(1, layer, mask, s, begin, end, ends, end_stride);
        }
    }
}

#endif
