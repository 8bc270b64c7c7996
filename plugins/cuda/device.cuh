/* plugins/cuda/device.cuh - the machine that kernels are written for: a warp's products, loads of
 * 128 bits, half precision. tests/cuda/emulate has the same names in plain C++, so that kernels
 * run, slowly, where no GPU is. */
#ifndef PLUGINS_CUDA_DEVICE_CUH
#define PLUGINS_CUDA_DEVICE_CUH

#include "plugins/cuda/kernels.h"

#define WARP_ALL 0xffffffffu

#ifdef __CUDACC__

#define DEVICE static __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define DYNAMIC_SHARED(name) extern __shared__ uint4 name[]

/* c (16 x 8) += a (16 x 32) b (32 x 8), int8 to int32, exactly. PTX ISA, mma.m16n8k32. */
DEVICE void mma_s8(int32_t c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* The same with 16 k: mma.m16n8k16. */
DEVICE void mma_s8_half(int32_t c[4], uint32_t a0, uint32_t a1, uint32_t b)
{
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}

/* c (16 x 8) += a (16 x 16) b (16 x 8), f16 or bf16 to float32. PTX ISA, mma.m16n8k16. */
DEVICE void mma_f16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE float f16_to_float(uint32_t h)
{
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"((uint16_t)h));
    return f;
}

/* To nearest, ties to even. */
DEVICE uint32_t float_to_f16(float f)
{
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}

#elif !defined(EMULATED_DEVICE)
#error "for nvcc, or after tests/cuda/emulate/device.h"
#endif

DEVICE float bf16_to_float(uint32_t h)
{
    return __uint_as_float(h << 16);
}

/* To nearest, ties to even; a NaN stays one. */
DEVICE uint32_t float_to_bf16(float f)
{
    uint32_t bits = __float_as_uint(f);

    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return (bits >> 16 | 0x40u) & 0xffffu;
    }
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

DEVICE uint32_t to_half(float f, uint32_t bf16)
{
    return bf16 ? float_to_bf16(f) : float_to_f16(f);
}

DEVICE float from_half(uint32_t h, uint32_t bf16)
{
    return bf16 ? bf16_to_float(h) : f16_to_float(h);
}

/* x = high + low, with twice the bits of a half. What is no number, or no half's, is told by the high
 * part alone. */
DEVICE void split_halves(float x, uint32_t bf16, uint32_t &high, uint32_t &low)
{
    high = to_half(x, bf16);
    float rest = x - from_half(high, bf16);
    low = (high & 0x7fffu) < (bf16 ? 0x7f80u : 0x7c00u) ? to_half(rest, bf16) : 0;
}

DEVICE void mma_half(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1, uint32_t bf16)
{
    if (bf16) {
        mma_bf16(c, a, b0, b1);
    } else {
        mma_f16(c, a, b0, b1);
    }
}

/* Threads of a block of the small ops. */
#define OP_THREADS 256u

/* Sum over the block's threads, for all of them: lanes by a tree, then warps in order. */
template <typename T>
DEVICE T block_sum(T x, T *room)
{
    for (uint32_t i = 16; i > 0; i /= 2) {
        x += __shfl_xor_sync(WARP_ALL, x, i);
    }
    __syncthreads(); /* the room's last readers */
    if (threadIdx.x % 32 == 0) {
        room[threadIdx.x / 32] = x;
    }
    __syncthreads();
    T sum = 0;
    for (uint32_t i = 0; i < OP_THREADS / 32; i++) {
        sum += room[i];
    }
    return sum;
}

/* A row of n values is divided by 2 to so many, so that its largest finite one fits into f16: 0 for
 * nearly all rows, and for bf16. For all threads of the block; value(k) is called for each k once. */
template <typename F>
DEVICE uint32_t halves_down(uint32_t n, uint32_t bf16, uint32_t *room, F value)
{
    uint32_t peak = 0;

    if (bf16) {
        return 0;
    }
    for (uint32_t k = threadIdx.x; k < n; k += OP_THREADS) {
        uint32_t bits = __float_as_uint(value(k)) & 0x7fffffffu;
        peak = max(peak, bits < 0x7f800000u ? bits : 0u);
    }
    for (uint32_t i = 16; i > 0; i /= 2) {
        peak = max(peak, __shfl_xor_sync(WARP_ALL, peak, i));
    }
    if (threadIdx.x % 32 == 0) {
        room[threadIdx.x / 32] = peak;
    }
    __syncthreads();
    for (uint32_t i = 0; i < OP_THREADS / 32; i++) {
        peak = max(peak, room[i]);
    }
    uint32_t exponent = peak >> 23; /* 127: from 1 to 2; f16 reaches to 65504 */
    return exponent > 141 ? exponent - 141 : 0;
}

/* Read-only data of 16 bytes' alignment. */
DEVICE void load_16(const void *at, uint32_t to[4])
{
    uint4 v = __ldg((const uint4 *)at);

    to[0] = v.x;
    to[1] = v.y;
    to[2] = v.z;
    to[3] = v.w;
}

DEVICE void load_8(const void *at, uint32_t to[2])
{
    uint2 v = __ldg((const uint2 *)at);

    to[0] = v.x;
    to[1] = v.y;
}

#endif
