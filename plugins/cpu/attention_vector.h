/* plugins/cpu/attention_vector.h - grouped attention over vectors of floats: the body of every
 * vector level, which includes it once, after naming its vectors (attention_avx2.h,
 * attention_avx512.h).
 *
 * Scores: a lane is a token. One load of a K tile's row (16 tokens of one dimension) feeds one
 * multiply-add per query. Output: a lane is a dimension. One load of a V row feeds one multiply-add
 * per query. So K and V are read and converted once for all queries whose sums fit the registers,
 * and enough sums are in flight to hide a multiply-add's latency. A pack of more queries goes
 * through a block in parts, all but the first of which find it in the first-level cache.
 *
 * Quants' codes become floats in registers, and a scale, which is the same for 32 codes, joins
 * where that costs least: K's the sums over its 32 dimensions, V's the weights. A level may gather
 * V's scales, and make bytes of Q4_0's codes, once for all queries of a pack; the operations on
 * floats are the same.
 *
 * Every lane's sum is a chain of its own (dimensions or tokens ascending), so a query's bits do not
 * depend on how many others share its registers. */
#ifndef PLUGINS_CPU_ATTENTION_VECTOR_H
#define PLUGINS_CPU_ATTENTION_VECTOR_H

#include "plugins/cpu/attention_vector_output.h"
#include "plugins/cpu/attention_vector_scores.h"
#include "plugins/cpu/attention_vector_softmax.h"

#include <math.h>

static void segment(const struct cpu_attn_pack *packs, uint32_t n_packs)
{
    static const struct cpu_attn_steps steps = {score, softmax, weigh};

    cpu_attn_segment_by_blocks(&steps, packs, n_packs);
}

static float exp_one(float x)
{
    return max_of_lanes(exp_negative(vec_all(x))); /* which are all alike */
}

/* What up to LANES states and their parts weigh when they meet. */
struct weights {
    _Alignas(64) float max[LANES];
    _Alignas(64) float state[LANES];
    _Alignas(64) float part[LANES];
};

/* ends, part_ends (n, stride): maxima, that is. */
static void find_weights(const float *ends, const float *part_ends, uint32_t n, size_t stride,
                         struct weights *ret)
{
    for (uint32_t i = 0; i < n && i < LANES; i++) {
        ret->state[i] = ends[i * stride];
        ret->part[i] = part_ends[i * stride];
    }
    vec a = vec_load(ret->state), b = vec_load(ret->part), max = vec_max(a, b);
    vec_store(ret->max, max);
    vec_store(ret->state, exp_negative(vec_sub(a, max)));
    vec_store(ret->part, exp_negative(vec_sub(b, max)));
}

static void merge(float *states, const float *parts, uint32_t n, uint32_t v_dim)
{
    const uint32_t v_pad = cpu_attn_v_pad(v_dim);
    const size_t stride = cpu_attn_part_floats(v_dim);
    struct weights w = {0};

    for (uint32_t i = 0; i < n; i++, states += stride, parts += stride) {
        float *end = states + v_pad;
        const float *part_end = parts + v_pad;

        if (i % LANES == 0) {
            find_weights(end, part_end, n - i, stride, &w);
        }
        if (part_end[0] == -INFINITY && part_end[1] == 0.0f) {
            continue; /* an empty part; two of them make NaN of -inf minus -inf */
        }
        vec a = vec_all(w.state[i % LANES]), b = vec_all(w.part[i % LANES]);
        for (uint32_t d = 0; d < v_pad; d += LANES) {
            vec x = vec_mul(vec_load(parts + d), b);
            vec_store(states + d, vec_fma(vec_load(states + d), a, x));
        }
        /* The sums go the same way, beside the maximum and the padding. */
        vec x = vec_mul(vec_load(part_end), b);
        vec_store(end, vec_fma(vec_load(end), a, x));
        end[0] = w.max[i % LANES];
    }
}

static void finish(const float *state, const float *sink, uint32_t v_dim, float *out)
{
    const float *end = state + cpu_attn_v_pad(v_dim);
    float weight = 1.0f, sum = end[1];

    if (sink != NULL && *sink != -INFINITY) {
        float max = end[0] > *sink ? end[0] : *sink;
        weight = exp_one(end[0] - max);
        sum = sum * weight + exp_one(*sink - max);
    }
    /* Nothing seen: zero over one, not over zero. */
    vec divisor = vec_all(sum == 0.0f ? 1.0f : sum);
    for (uint32_t d = 0; d < v_dim; d += LANES) {
        vec x = vec_mul(vec_load(state + d), vec_all(weight));
        store_some(out + d, vec_div(x, divisor), v_dim - d);
    }
}

#endif
