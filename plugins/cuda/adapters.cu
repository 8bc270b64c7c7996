/* plugins/cuda/adapters.cu - what adapters (LoRA) add to a product: dst += scale * (b (a x)).
 *
 *   adapt_low    low (rows, rank) = a x        4 of the rank for 8 rows by a block
 *   adapt_high   dst += scale * b low          256 outputs of 8 rows by a block
 *
 * Rows come by adapter, in tiles of up to 8: a's and b's values are read once for all rows of a tile.
 * Each sum has one order whatever else is in its tile: over k a thread's every 256th, then the block's
 * tree; over the rank ascending. */
#include "plugins/cuda/device.cuh"

#include <gqa/tensor.h>

#define LOW_PARTS 64u /* of the rank, in shared memory at a time */
#define LOW_WARPS (OP_THREADS / 32u)

template <int TYPE>
DEVICE float factor_value(const void *at, uint64_t i)
{
    if (TYPE == GQA_TYPE_F32) {
        return ((const float *)at)[i];
    }
    return from_half(((const uint16_t *)at)[i], TYPE == GQA_TYPE_BF16);
}

template <int TYPE>
DEVICE void sum_low(const cuda_adapt_args &p, const cuda_adapter &adapter,
                    const cuda_adapter_tile &tile, uint32_t first,
                    float sums[CUDA_ADAPT_RANKS][CUDA_TILE])
{
    const float *x[CUDA_TILE];

#pragma unroll
    for (uint32_t i = 0; i < CUDA_TILE; i++) {
        x[i] = p.src + (i < tile.n ? p.rows[tile.first + i] : 0) * p.src_stride;
    }
    for (uint32_t k = threadIdx.x; k < p.n_in; k += OP_THREADS) {
        float a[CUDA_ADAPT_RANKS];
#pragma unroll
        for (uint32_t r = 0; r < CUDA_ADAPT_RANKS; r++) {
            uint64_t at = (uint64_t)(first + r) * p.n_in + k;
            a[r] = first + r < adapter.rank ? factor_value<TYPE>(adapter.a, at) : 0.0f;
        }
#pragma unroll
        for (uint32_t i = 0; i < CUDA_TILE; i++) {
            if (i < tile.n) {
                float value = x[i][k];
#pragma unroll
                for (uint32_t r = 0; r < CUDA_ADAPT_RANKS; r++) {
                    sums[r][i] = fmaf(a[r], value, sums[r][i]);
                }
            }
        }
    }
}

/* Grid (rank / 4, tiles). */
KERNEL __launch_bounds__(256) gqa_adapt_low(const cuda_adapt_args p)
{
    __shared__ float room[LOW_WARPS][CUDA_ADAPT_RANKS * CUDA_TILE];
    const cuda_adapter_tile tile = p.tiles[blockIdx.y];
    uint32_t first = blockIdx.x * CUDA_ADAPT_RANKS, warp = threadIdx.x / 32;

    if (tile.n == 0 || first >= p.adapters[tile.adapter].rank) {
        return;
    }
    const cuda_adapter adapter = p.adapters[tile.adapter];
    float sums[CUDA_ADAPT_RANKS][CUDA_TILE] = {};
    if (adapter.a_type == GQA_TYPE_F32) {
        sum_low<GQA_TYPE_F32>(p, adapter, tile, first, sums);
    } else if (adapter.a_type == GQA_TYPE_F16) {
        sum_low<GQA_TYPE_F16>(p, adapter, tile, first, sums);
    } else {
        sum_low<GQA_TYPE_BF16>(p, adapter, tile, first, sums);
    }
#pragma unroll
    for (uint32_t i = 0; i < CUDA_ADAPT_RANKS * CUDA_TILE; i++) {
        float sum = sums[i / CUDA_TILE][i % CUDA_TILE];
        for (uint32_t step = 16; step > 0; step /= 2) {
            sum += __shfl_xor_sync(WARP_ALL, sum, step);
        }
        if (threadIdx.x % 32 == 0) {
            room[warp][i] = sum;
        }
    }
    __syncthreads();
    uint32_t r = first + threadIdx.x / CUDA_TILE, row = threadIdx.x % CUDA_TILE;
    if (threadIdx.x < CUDA_ADAPT_RANKS * CUDA_TILE && r < adapter.rank && row < tile.n) {
        float sum = 0.0f;
        for (uint32_t w = 0; w < LOW_WARPS; w++) {
            sum += room[w][threadIdx.x];
        }
        p.low[(tile.first + row) * p.low_stride + r] = sum;
    }
}

/* Of parts [first, last) of the rank, whose low values are in shared memory. */
template <int TYPE>
DEVICE void sum_high(const cuda_adapt_args &p, const cuda_adapter &adapter, uint32_t first,
                     uint32_t last, uint32_t out, const float low[LOW_PARTS][CUDA_TILE],
                     float sums[CUDA_TILE])
{
#pragma unroll 4
    for (uint32_t r = first; r < last; r++) {
        float b = factor_value<TYPE>(adapter.b, (uint64_t)r * p.n_out + out);
#pragma unroll
        for (uint32_t i = 0; i < CUDA_TILE; i++) {
            sums[i] = fmaf(b, low[r - first][i], sums[i]);
        }
    }
}

/* Grid (n_out / 256, tiles). */
KERNEL __launch_bounds__(256) gqa_adapt_high(const cuda_adapt_args p)
{
    __shared__ float low[LOW_PARTS][CUDA_TILE];
    const cuda_adapter_tile tile = p.tiles[blockIdx.y];
    uint32_t out = blockIdx.x * OP_THREADS + threadIdx.x;
    float sums[CUDA_TILE] = {};

    if (tile.n == 0 || p.adapters[tile.adapter].rank == 0) {
        return;
    }
    const cuda_adapter adapter = p.adapters[tile.adapter];
    for (uint32_t first = 0; first < adapter.rank; first += LOW_PARTS) {
        uint32_t last = min(first + LOW_PARTS, adapter.rank);
        __syncthreads(); /* the last readers */
        for (uint32_t i = threadIdx.x; i < (last - first) * CUDA_TILE; i += OP_THREADS) {
            uint32_t row = i % CUDA_TILE, r = first + i / CUDA_TILE;
            low[i / CUDA_TILE][row] =
                row < tile.n ? p.low[(tile.first + row) * p.low_stride + r] : 0.0f;
        }
        __syncthreads();
        if (out >= p.n_out) {
            continue;
        }
        if (adapter.b_type == GQA_TYPE_F32) {
            sum_high<GQA_TYPE_F32>(p, adapter, first, last, out, low, sums);
        } else if (adapter.b_type == GQA_TYPE_F16) {
            sum_high<GQA_TYPE_F16>(p, adapter, first, last, out, low, sums);
        } else {
            sum_high<GQA_TYPE_BF16>(p, adapter, first, last, out, low, sums);
        }
    }
#pragma unroll
    for (uint32_t i = 0; i < CUDA_TILE; i++) {
        if (i < tile.n && out < p.n_out) {
            float *dst = p.dst + p.rows[tile.first + i] * p.dst_stride + out;
            *dst += __fmul_rn(adapter.scale, sums[i]);
        }
    }
}
