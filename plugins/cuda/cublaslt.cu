/* plugins/cuda/cublaslt.cu - what cuBLASLt's products want before and after them (cublaslt.h). Each reads and
 * writes its operands once. */
#include "plugins/cuda/device.cuh"

/* A matrix of halves as rows of k values again: 2048 bytes of a block of 32 x 32 are in 64 of each row. A warp
 * for a block. Grid (n_blocks / 8, strips). */
KERNEL __launch_bounds__(256) gqa_unpack(const cuda_unpack_args p)
{
    uint32_t lane = threadIdx.x % 32, block = blockIdx.x * 8 + threadIdx.x / 32;
    const uint8_t *from = p.weight + ((uint64_t)blockIdx.y * p.n_blocks + block) * 2048;

    if (block >= p.n_blocks) {
        return;
    }
    for (uint32_t plane = 0; plane < 4; plane++) {
        uint32_t a[4];
        load_16(from + plane * 512 + lane * 16, a);
        for (uint32_t i = 0; i < 4; i++) {
            uint32_t out = blockIdx.y * CUDA_STRIP + plane / 2 * 16 + i % 2 * 8 + lane / 4;
            uint32_t k = block * CUDA_BLOCK + plane % 2 * 16 + i / 2 * 8 + lane % 4 * 2;
            if (out < p.n_outs && k < p.k) {
                *(uint32_t *)(p.dst + (uint64_t)out * p.k + k) = a[i];
            }
        }
    }
}

/* Rows as one half each, f16 divided where they would not fit. Grid (n_rows). */
KERNEL __launch_bounds__(256) gqa_round_rows(const cuda_round_args p)
{
    __shared__ uint32_t room[OP_THREADS / 32];
    const float *src = p.src + blockIdx.x * p.stride;
    uint16_t *dst = p.dst + (uint64_t)blockIdx.x * p.k;
    uint32_t down = halves_down(p.k, p.bf16, room, [&](uint32_t k) { return src[k]; });
    float factor = __uint_as_float((127 - down) << 23);

    for (uint32_t k = threadIdx.x; k < p.k; k += OP_THREADS) {
        dst[k] = (uint16_t)to_half(__fmul_rn(src[k], factor), p.bf16);
    }
    if (threadIdx.x == 0) {
        p.scales[blockIdx.x] = __uint_as_float((127 + down) << 23);
    }
}

/* dst = dst * scale + bias, in place. Grid (width / 256, rows). */
KERNEL __launch_bounds__(256) gqa_scale_rows(const cuda_scale_rows_args p)
{
    uint32_t i = blockIdx.x * OP_THREADS + threadIdx.x;
    float scale = p.scales[blockIdx.y];

    if (i >= p.width || (scale == 1.0f && p.bias == NULL)) {
        return;
    }
    float *dst = p.dst + blockIdx.y * p.stride + i;
    float value = __fmul_rn(*dst, scale); /* a power of two */
    *dst = p.bias != NULL ? value + p.bias[i] : value;
}
