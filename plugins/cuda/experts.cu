/* plugins/cuda/experts.cu - mixtures of experts: who goes where, and the sum of what comes back. The
 * products in between are product.cuh's.
 *
 *   route    a row's logits -> the ids of its experts, ascending, and their weights
 *   sort     all choices    -> slots: by expert, each from a whole tile on; and the products' items
 *   combine  experts' rows  -> dst, by ascending expert
 *
 * Nothing of it waits for the host: buffers and grids have room for whatever the rows may choose. */
#include "plugins/cuda/device.cuh"

#include <gqa/plugin.h>

#define NO_KEY __uint_as_float(0xff800000u) /* minus infinity */

/* ---- routing ----------------------------------------------------------------------------- */

/* exp(logit - max) / sum: the largest term is 1, so neither overflow nor a sum of zero. In double,
 * as the reference does it, so that scores that are compared are rounded alike. */
struct softmax_terms {
    double max, sum;
};

struct route_room {
    float *logits, *keys; /* (n_experts) */
    uint8_t *is_chosen;
};

DEVICE float block_max(float x, float *room)
{
    for (uint32_t i = 16; i > 0; i /= 2) {
        float y = __shfl_xor_sync(WARP_ALL, x, i);
        x = y > x ? y : x;
    }
    __syncthreads(); /* the room's last readers */
    if (threadIdx.x % 32 == 0) {
        room[threadIdx.x / 32] = x;
    }
    __syncthreads();
    for (uint32_t i = 0; i < OP_THREADS / 32; i++) {
        x = room[i] > x ? room[i] : x;
    }
    return x;
}

/* Over all experts, or the chosen alone. What is not a number is no maximum, but makes the sum none. */
DEVICE softmax_terms softmax_of(const route_room &r, uint32_t n_experts, bool chosen_only)
{
    __shared__ float maxima[OP_THREADS / 32];
    __shared__ double sums[OP_THREADS / 32];
    float max = NO_KEY;
    double sum = 0.0;

    for (uint32_t e = threadIdx.x; e < n_experts; e += OP_THREADS) {
        bool counts = !chosen_only || r.is_chosen[e];
        max = counts && r.logits[e] > max ? r.logits[e] : max;
    }
    max = block_max(max, maxima);
    for (uint32_t e = threadIdx.x; e < n_experts; e += OP_THREADS) {
        if (!chosen_only || r.is_chosen[e]) {
            sum += exp((double)r.logits[e] - (double)max);
        }
    }
    return {(double)max, block_sum(sum, sums)};
}

DEVICE double softmax_at(const softmax_terms &s, float logit)
{
    return exp((double)logit - s.max) / s.sum;
}

DEVICE double sigmoid(float logit)
{
    return 1.0 / (1.0 + exp(-(double)logit));
}

/* What the choice goes by: without a bias the logits, whose order is that of the scores. */
DEVICE float key_of(const cuda_route_args &p, const softmax_terms &all, float logit, uint32_t e)
{
    double key = (double)logit;

    if (p.selection_bias != NULL) {
        if (p.gating == GQA_GATING_SOFTMAX) {
            key = softmax_at(all, logit);
        } else if (p.gating == GQA_GATING_SIGMOID) {
            key = sigmoid(logit);
        }
        key += (double)p.selection_bias[e];
    }
    float rounded = (float)key;
    return rounded == rounded ? rounded : NO_KEY;
}

/* How many go before expert e: those with a greater key, and of equals those of lower ids. */
DEVICE uint32_t rank_of(const float *keys, uint32_t n_experts, uint32_t e)
{
    float key = keys[e];
    uint32_t rank = 0;

    for (uint32_t i = 0; i < n_experts; i++) {
        rank += keys[i] > key || (keys[i] == key && i < e) ? 1 : 0;
    }
    return rank;
}

DEVICE void choose(const cuda_route_args &p, const route_room &r, const softmax_terms &all)
{
    for (uint32_t e = threadIdx.x; e < p.n_experts; e += OP_THREADS) {
        r.keys[e] = key_of(p, all, r.logits[e], e);
    }
    __syncthreads();
    for (uint32_t e = threadIdx.x; e < p.n_experts; e += OP_THREADS) {
        r.is_chosen[e] = rank_of(r.keys, p.n_experts, e) < p.n_used;
    }
    __syncthreads();
}

/* Where all of the chosen sigmoids are zero, so are the weights. */
DEVICE double sigmoid_factor(const cuda_route_args &p, const route_room &r)
{
    __shared__ double sums[OP_THREADS / 32];
    double sum = 0.0;

    for (uint32_t e = threadIdx.x; e < p.n_experts; e += OP_THREADS) {
        sum += r.is_chosen[e] ? sigmoid(r.logits[e]) : 0.0;
    }
    sum = block_sum(sum, sums);
    return p.renormalise && sum > 0.0 ? 1.0 / sum : 1.0;
}

/* Grid (rows); CUDA_ROUTE_BYTES of shared memory. */
KERNEL __launch_bounds__(256) gqa_route(const cuda_route_args p)
{
    DYNAMIC_SHARED(shared_memory);
    float *logits = (float *)shared_memory;
    const route_room r = {logits, logits + p.n_experts, (uint8_t *)(logits + 2 * p.n_experts)};
    const float *from = p.logits + (uint64_t)blockIdx.x * 2 * p.n_experts;
    bool sigmoids = p.gating == GQA_GATING_SIGMOID;
    softmax_terms terms = {0.0, 1.0};
    double factor = 1.0;

    for (uint32_t e = threadIdx.x; e < p.n_experts; e += OP_THREADS) {
        float logit = from[e] + __fmul_rn(from[p.n_experts + e], 1.0f / CUDA_ROUTER_LOW);
        logits[e] = p.router_bias != NULL ? logit + p.router_bias[e] : logit;
    }
    __syncthreads();
    if (p.gating == GQA_GATING_SOFTMAX && (p.selection_bias != NULL || !p.renormalise)) {
        terms = softmax_of(r, p.n_experts, false);
    }
    choose(p, r, terms);
    if (sigmoids) {
        factor = sigmoid_factor(p, r);
    } else if (p.gating == GQA_GATING_SOFTMAX_CHOSEN || p.renormalise) {
        /* Renormalised scores are the softmax over the chosen. */
        terms = softmax_of(r, p.n_experts, true);
    }
    for (uint32_t e = threadIdx.x; e < p.n_experts; e += OP_THREADS) {
        if (!r.is_chosen[e]) {
            continue;
        }
        uint64_t at = (uint64_t)blockIdx.x * p.n_used;
        for (uint32_t i = 0; i < e; i++) {
            at += r.is_chosen[i];
        }
        double weight = sigmoids ? sigmoid(logits[e]) * factor : softmax_at(terms, logits[e]);
        p.chosen[at] = e;
        p.weights[at] = (float)(weight * (double)p.weight_scale);
    }
}

/* ---- sorting ----------------------------------------------------------------------------- */

/* Sums of both over all threads before this one; *ret_items: over all of them. */
DEVICE void sum_before(uint32_t n_threads, uint32_t &tiles, uint32_t &items, uint32_t &ret_items)
{
    __shared__ uint32_t sums[2][CUDA_SORT_THREADS_MAX];
    uint32_t me = threadIdx.x, own_tiles = tiles, own_items = items;

    sums[0][me] = tiles;
    sums[1][me] = items;
    __syncthreads();
    for (uint32_t step = 1; step < n_threads; step *= 2) {
        uint32_t more_tiles = me >= step ? sums[0][me - step] : 0;
        uint32_t more_items = me >= step ? sums[1][me - step] : 0;
        __syncthreads();
        sums[0][me] += more_tiles;
        sums[1][me] += more_items;
        __syncthreads();
    }
    tiles = sums[0][me] - own_tiles;
    items = sums[1][me] - own_items;
    ret_items = sums[1][n_threads - 1];
}

/* A counting sort by one block. The order of an expert's slots is as it happens: a slot's result
 * does not depend on its place. */
KERNEL __launch_bounds__(1024) gqa_sort(const cuda_sort_args p)
{
    __shared__ uint32_t next[CUDA_EXPERTS_MAX]; /* rows of an expert, then its next free slot */
    uint32_t me = threadIdx.x, per_thread = (p.n_experts + p.n_threads - 1) / p.n_threads;
    uint32_t first = min(me * per_thread, p.n_experts);
    uint32_t last = min(first + per_thread, p.n_experts);
    uint32_t tile = 0, item = 0, n_items;

    for (uint32_t e = me; e < p.n_experts; e += p.n_threads) {
        next[e] = 0;
    }
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = me; i < p.n; i += p.n_threads) {
        atomicAdd(&next[p.chosen[i]], 1u);
    }
    __syncthreads();
    for (uint32_t e = first; e < last; e++) {
        uint32_t tiles = (next[e] + CUDA_TILE - 1) / CUDA_TILE;
        tile += tiles;
        item += (tiles + p.item_tiles - 1) / p.item_tiles;
    }
    sum_before(p.n_threads, tile, item, n_items);
    for (uint32_t e = first; e < last; e++) {
        uint32_t n = next[e], tiles = (n + CUDA_TILE - 1) / CUDA_TILE;
        next[e] = tile * CUDA_TILE;
        for (uint32_t at = 0; at < tiles; at += p.item_tiles) {
            p.items[item++] = {e, tile + at, tile * CUDA_TILE + n};
        }
        tile += tiles;
    }
    for (uint32_t i = n_items + me; i < p.n_items; i += p.n_threads) {
        p.items[i] = {0, 0, 0};
    }
    __syncthreads();
#pragma unroll 4
    for (uint32_t i = me; i < p.n; i += p.n_threads) {
        p.slots[i] = atomicAdd(&next[p.chosen[i]], 1u);
    }
}

/* ---- the sum ----------------------------------------------------------------------------- */

/* Grid (width / 256, rows). */
KERNEL __launch_bounds__(256) gqa_combine(const cuda_combine_args p)
{
    uint32_t column = blockIdx.x * OP_THREADS + threadIdx.x;
    uint64_t first = (uint64_t)blockIdx.y * p.n_used;
    float sum = 0.0f;

    if (column >= p.width) {
        return;
    }
#pragma unroll 4
    for (uint32_t i = 0; i < p.n_used; i++) {
        float y = p.y[p.slots[first + i] * p.y_stride + column];
        sum += __fmul_rn(p.weights[first + i], y);
    }
    p.dst[blockIdx.y * p.dst_stride + column] = sum;
}
