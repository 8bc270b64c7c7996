/* plugins/cuda/product.cuh - dst = activations x weight^T, for any number of rows.
 *
 * One kernel for decoding and for prompts, for one matrix and for those of a mixture's experts: a
 * warp multiplies a strip of 32 outputs with NT tiles of 8 rows, on tensor cores, from operands that
 * already lie as they want them (kernels.h). A weight is unpacked in registers, once for all rows of
 * the warp; with one tile its bytes are what counts: they stream at the speed of memory, 512 bytes a
 * load.
 *
 *   bytes  n_outs * k * bits / 8 for every NT tiles of rows
 *   flops  2 * n_rows * n_outs * k, int8 (f16, bf16: twice that); and for int8 about 3 float operations an
 *          output, row and 32 k, which is what limits prompts
 *
 * Numerics: quantised weights, activations int8 per 32 values: exact int32 sums, scaled and added
 * in ascending k over segments of 256 k, whose sums are added in ascending order. Halves:
 * activations as two halves each, float32 sums of the tensor core over segments, then the same. Who computes a segment does not matter: a
 * row's result is the same with any NT, split and neighbours. */
#ifndef PLUGINS_CUDA_PRODUCT_CUH
#define PLUGINS_CUDA_PRODUCT_CUH

#include "plugins/cuda/device.cuh"

template <int TYPE>
struct weight_layout {
    static constexpr int halves = TYPE == CUDA_W_F16 || TYPE == CUDA_W_BF16;
    static constexpr int bytes = TYPE == CUDA_W_Q4_0   ? 64 + 512
                                 : TYPE == CUDA_W_Q8_0 ? 64 + 1024
                                 : TYPE == CUDA_W_Q4_K ? 64 + 64 + 32 + 32 + 512
                                 : TYPE == CUDA_W_Q6_K ? 64 + 64 + 512 + 256
                                 : TYPE == CUDA_W_MXFP4 ? 32 + 512
                                                       : 2048;
    static constexpr int offset = TYPE == CUDA_W_Q4_0 ? 8 : TYPE == CUDA_W_Q6_K ? 32 : 0;
};

/* A lane's part of a block of 32 outputs x 32 k: registers of two products' A, and what belongs to
 * outputs g, g + 8, g + 16, g + 24. */
struct weight_block {
    uint32_t a[2][4];
    float scale[4], min[4];
    int32_t half_scale[2][4];
};

/* 2^(exponent - 128): MXFP4's levels are doubled. */
DEVICE float half_scale(uint32_t exponent)
{
    return __uint_as_float(exponent > 1 ? (exponent - 1) << 23 : 0x00200000u << exponent);
}

/* Four levels of MXFP4, as int8, from the nibbles of a half-word: 0 1 2 3 4 6 8 12 and their
 * opposites. */
DEVICE uint32_t four_levels(uint32_t nibbles)
{
    uint32_t pick = nibbles & 0x7777u;
    uint32_t positive = __byte_perm(0x03020100u, 0x0c080604u, pick);
    uint32_t negative = __byte_perm(0xfdfeff00u, 0xf4f8fafcu, pick);
    uint32_t signs = __byte_perm(0x0000ff00u, 0, nibbles >> 3 & 0x1111u);
    return (positive & ~signs) | (negative & signs);
}

template <int TYPE>
DEVICE void load_block(const uint8_t *w, uint32_t lane, weight_block &b)
{
    uint32_t g = lane / 4, scales[2], words[4], more[4];

    if constexpr (TYPE == CUDA_W_MXFP4) {
        uint32_t exponents = __ldg((const uint32_t *)w + g);
        load_16(w + 32 + lane * 16, words);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            b.scale[i] = half_scale(exponents >> 8 * i & 0xffu);
            b.a[i / 2][i % 2] = four_levels(words[i]);
            b.a[i / 2][2 + i % 2] = four_levels(words[i] >> 16);
        }
        return;
    }
    load_8(w + g * 8, scales);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        b.scale[i] = f16_to_float(scales[i / 2] >> 16 * (i % 2) & 0xffffu);
    }
    if constexpr (TYPE == CUDA_W_Q8_0) {
        load_16(w + 64 + lane * 16, words);
        load_16(w + 64 + 512 + lane * 16, more);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            b.a[i / 2][i % 2] = words[i];
            b.a[i / 2][2 + i % 2] = more[i];
        }
        return;
    }
    uint32_t front = 64;
    if constexpr (TYPE == CUDA_W_Q4_K) {
        uint32_t mins[2];
        uint32_t s = __ldg((const uint32_t *)(w + 128) + g);
        uint32_t m = __ldg((const uint32_t *)(w + 160) + g);
        load_8(w + 64 + g * 8, mins);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float min = f16_to_float(mins[i / 2] >> 16 * (i % 2) & 0xffffu);
            b.scale[i] = __fmul_rn(b.scale[i], (float)(s >> 8 * i & 0xffu));
            b.min[i] = -__fmul_rn(min, (float)(m >> 8 * i & 0xffu));
        }
        front = 192;
    }
    if constexpr (TYPE == CUDA_W_Q6_K) {
        uint32_t s0 = __ldg((const uint32_t *)(w + 64) + g);
        uint32_t s1 = __ldg((const uint32_t *)(w + 96) + g);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            b.half_scale[0][i] = (int8_t)(s0 >> 8 * i & 0xffu);
            b.half_scale[1][i] = (int8_t)(s1 >> 8 * i & 0xffu);
        }
        front = 128;
    }
    load_16(w + front + lane * 16, words);
#pragma unroll
    for (int i = 0; i < 4; i++) {
        b.a[i / 2][i % 2] = words[i] & 0x0f0f0f0fu;
        b.a[i / 2][2 + i % 2] = words[i] >> 4 & 0x0f0f0f0fu;
    }
    if constexpr (TYPE == CUDA_W_Q6_K) {
        load_8(w + front + 512 + lane * 8, more);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            b.a[i / 2][i % 2] |= (more[0] >> 2 * i & 0x03030303u) << 4;
            b.a[i / 2][2 + i % 2] |= (more[1] >> 2 * i & 0x03030303u) << 4;
        }
    }
}

/* One block of one tile of rows, quantised: acc[m][..] is outputs 16 m + g (two rows), then
 * 16 m + 8 + g. */
template <int TYPE>
DEVICE void multiply_quants(const weight_block &w, const cuda_product_args &p, uint64_t at,
                            uint32_t lane, float acc[2][4])
{
    uint32_t t = lane % 4, q[2], bits[2], sums[4];

    load_8(p.q + at * 256 + lane * 8, q);
    load_8(p.scales + at * 8 + 2 * t, bits);
    load_16(p.sums + (at * 8 + 2 * t) * 2, sums); /* rows 2 t and 2 t + 1, two halves each */
    float scale[2] = {__uint_as_float(bits[0]), __uint_as_float(bits[1])};
    int32_t all[2] = {(int32_t)(sums[0] + sums[1]), (int32_t)(sums[2] + sums[3])};
#pragma unroll
    for (int m = 0; m < 2; m++) {
        int32_t dot[4];
        if constexpr (TYPE == CUDA_W_Q6_K) {
            int32_t second[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                dot[i] = -weight_layout<TYPE>::offset * (int32_t)sums[i % 2 * 2];
                second[i] = -weight_layout<TYPE>::offset * (int32_t)sums[i % 2 * 2 + 1];
            }
            mma_s8_half(dot, w.a[m][0], w.a[m][1], q[0]);
            mma_s8_half(second, w.a[m][2], w.a[m][3], q[1]);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                dot[i] = w.half_scale[0][2 * m + i / 2] * dot[i] +
                         w.half_scale[1][2 * m + i / 2] * second[i];
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                dot[i] = -weight_layout<TYPE>::offset * all[i % 2];
            }
            mma_s8(dot, w.a[m], q[0], q[1]);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float s = __fmul_rn(w.scale[2 * m + i / 2], scale[i % 2]);
            acc[m][i] = fmaf(s, (float)dot[i], acc[m][i]);
            if constexpr (TYPE == CUDA_W_Q4_K) {
                float sum = __fmul_rn(scale[i % 2], (float)all[i % 2]);
                acc[m][i] = fmaf(w.min[2 * m + i / 2], sum, acc[m][i]);
            }
        }
    }
}

/* A segment's sums for all of a warp's outputs and rows. */
template <int TYPE, int NT>
DEVICE void multiply_segment(const cuda_product_args &p, const uint8_t *strip, uint32_t tile,
                             uint32_t segment, uint32_t lane, float acc[NT][2][4])
{
    uint32_t first = segment * CUDA_SEGMENT;
    uint32_t last = min(first + CUDA_SEGMENT, p.n_blocks);

#pragma unroll(NT <= 2 ? 4 : 1)
    for (uint32_t b = first; b < last; b++) {
        const uint8_t *w = strip + (uint64_t)b * weight_layout<TYPE>::bytes;
        if constexpr (weight_layout<TYPE>::halves) {
            uint32_t a[4][4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                load_16(w + i * 512 + lane * 16, a[i]);
            }
#pragma unroll
            for (int n = 0; n < NT; n++) {
#pragma unroll
                for (int plane = 0; plane < 2; plane++) {
                    uint32_t q[4];
                    load_16(p.q + (((uint64_t)(tile + n) * p.n_blocks + b) * 2 + plane) * 512 +
                                lane * 16, q);
#pragma unroll
                    for (int m = 0; m < 2; m++) {
                        mma_half(acc[n][m], a[2 * m], q[0], q[1], TYPE == CUDA_W_BF16);
                        mma_half(acc[n][m], a[2 * m + 1], q[2], q[3], TYPE == CUDA_W_BF16);
                    }
                }
            }
        } else {
            weight_block block;
            load_block<TYPE>(w, lane, block);
#pragma unroll
            for (int n = 0; n < NT; n++) {
                multiply_quants<TYPE>(block, p, (uint64_t)(tile + n) * p.n_blocks + b, lane,
                                      acc[n]);
            }
        }
    }
}

/* What a block multiplies: the outputs of one matrix and some tiles of rows. */
struct product_work {
    uint32_t first_out, last_strip; /* of the matrix, in the weight */
    uint32_t tile, end_row;
};

template <int TYPE, int NT>
DEVICE void store_outputs(const cuda_product_args &p, const volatile product_work &at,
                          uint32_t strip, uint32_t lane, const float total[NT][2][4])
{
    const product_work work = {at.first_out, at.last_strip, at.tile, at.end_row};

#pragma unroll
    for (int n = 0; n < NT; n++) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t out = strip * CUDA_STRIP + 16 * (i / 4) + i % 4 / 2 * 8 + lane / 4;
            uint32_t row = (work.tile + n) * CUDA_TILE + lane % 4 * 2 + i % 2;
            uint32_t column = out - work.first_out; /* of matrices before: beyond all columns */
            if (column < p.n_outs && row < work.end_row) {
                float value = total[n][i / 4][i % 4];
                if (weight_layout<TYPE>::halves) {
                    value = __fmul_rn(value, p.scales[row]); /* a power of two */
                }
                p.dst[row * p.stride + column] = p.bias != NULL ? value + p.bias[out] : value;
            }
        }
    }
}

template <int NT>
DEVICE void add_all(float total[NT][2][4], const float acc[NT][2][4])
{
#pragma unroll
    for (int i = 0; i < 8 * NT; i++) {
        total[i / 8][i / 4 % 2][i % 4] += acc[i / 8][i / 4 % 2][i % 4];
    }
}

/* The first warp of each strip adds the segments of its split, in order. */
template <int NT>
DEVICE void share_segments(float *parts, uint32_t warp, uint32_t lane, uint32_t split,
                           uint32_t n_segments, const float acc[NT][2][4], float total[NT][2][4])
{
#pragma unroll
    for (int i = 0; i < 8 * NT; i++) {
        parts[(warp * 8 * NT + i) * 32 + lane] = acc[i / 8][i / 4 % 2][i % 4];
    }
    __syncthreads();
    for (uint32_t s = 0; warp % split == 0 && s < n_segments; s++) {
#pragma unroll
        for (int i = 0; i < 8 * NT; i++) {
            total[i / 8][i / 4 % 2][i % 4] += parts[((warp + s) * 8 * NT + i) * 32 + lane];
        }
    }
    __syncthreads();
}

/* Nothing to do: end_row 0, for all threads of the block. */
template <int NT>
DEVICE void find_work(const cuda_product_args &p, volatile product_work &ret)
{
    cuda_product_item item = {0, blockIdx.y * NT, p.n_rows};

    if (p.items != NULL) {
        item = p.items[blockIdx.y];
    }
    ret.first_out = item.matrix * p.n_outs;
    ret.last_strip = (item.matrix * p.n_outs + p.n_outs - 1) / CUDA_STRIP;
    ret.tile = item.tile;
    ret.end_row = item.end_row;
}

/* Grid (strips of a matrix / (CUDA_WARPS / split), tiles / NT or items), 256 threads. Buffers of
 * activations have NT - 1 tiles behind the last one. */
template <int TYPE, int NT>
DEVICE void product(const cuda_product_args &p)
{
    /* In shared memory, not in registers, of which the loop below needs all. */
    __shared__ volatile product_work work;
    if (threadIdx.x == 0) {
        find_work<NT>(p, work);
    }
    __syncthreads();
    if (work.end_row == 0) {
        return;
    }
    /* Parts of one round of segments, (warp, value, lane). NT = 8 has no split. */
    __shared__ float parts[NT <= 4 ? CUDA_WARPS * NT * 8 * 32 : 1];
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = warp % p.split;
    uint32_t strip =
        work.first_out / CUDA_STRIP + blockIdx.x * (CUDA_WARPS / p.split) + warp / p.split;
    uint32_t n_segments = (p.n_blocks + CUDA_SEGMENT - 1) / CUDA_SEGMENT, tile = work.tile;
    bool mine = strip <= work.last_strip;
    const uint8_t *w = p.weight + (uint64_t)strip * p.n_blocks * weight_layout<TYPE>::bytes;
    float total[NT][2][4] = {};

    for (uint32_t first = 0; first < n_segments; first += p.split) {
        float acc[NT][2][4] = {};
        if (mine && first + part < n_segments) {
            multiply_segment<TYPE, NT>(p, w, tile, first + part, lane, acc);
        }
        if (NT > 4 || p.split == 1) {
            add_all<NT>(total, acc);
        } else if constexpr (NT <= 4) {
            share_segments<NT>(parts, warp, lane, p.split, min(p.split, n_segments - first), acc,
                               total);
        }
    }
    if (part == 0 && mine) {
        store_outputs<TYPE, NT>(p, work, strip, lane, total);
    }
}

#endif
