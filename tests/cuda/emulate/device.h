/* tests/cuda/emulate/device.h - a GPU's block of threads in plain C++, for the kernels of the cuda
 * plugin: the very same sources run where no GPU is, slowly and one block after the other.
 *
 * Each thread is a fiber; a barrier, a shuffle or a tensor core's product lets the others run until
 * all that take part have come. Products are computed from the fragments' layout in the PTX ISA,
 * not from what the kernels think of it. Shared memory starts as NaN and results of a block that
 * waits for a thread that never comes end the process with a message. GQAD_EMULATED_ORDER=reverse
 * or scattered runs threads and blocks in another order, which finds barriers that are missing. */
#ifndef TESTS_CUDA_EMULATE_DEVICE_H
#define TESTS_CUDA_EMULATE_DEVICE_H

#include <cmath>
#include <cstdint>
#include <cstring>

#include <gqa/tensor.h>

#define EMULATED_DEVICE
#define DEVICE static inline
#define KERNEL extern "C" void
#define __launch_bounds__(...)
#define __shared__           static /* blocks run one at a time */
#define DYNAMIC_SHARED(name) uint4 *name = (uint4 *)emulated_shared()

struct uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct emulated_index {
    uint32_t x, y;
};

/* Those of the fiber that runs. */
extern emulated_index threadIdx, blockIdx;

void *emulated_shared();
void __syncthreads();

/* What each lane of a warp brings to a common operation. */
struct emulated_post {
    uint32_t words[12];
};
/* Posts, waits for the whole warp and returns all 32 posts, valid until the next operation. The
 * last to come does the work, if there is any, on all posts. */
const emulated_post *emulated_warp(const emulated_post &mine,
                                   void (*work)(emulated_post *all) = nullptr);

template <typename T> T min(T a, T b)
{
    return a < b ? a : b;
}
template <typename T> T max(T a, T b)
{
    return a > b ? a : b;
}

static inline uint32_t __float_as_uint(float f)
{
    return gqa_float_bits(f);
}
static inline float __uint_as_float(uint32_t bits)
{
    return gqa_bits_float(bits);
}
static inline float __fmul_rn(float a, float b)
{
    return a * b;
}
static inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
static inline int32_t __float2int_rn(float f)
{
    return (int32_t)nearbyintf(f);
}
static inline float f16_to_float(uint32_t h)
{
    return gqa_f16_to_f32((uint16_t)h);
}
static inline uint32_t float_to_f16(float f)
{
    return gqa_f32_to_f16(f);
}
void emulated_misaligned(const void *at, size_t bytes);
template <typename T> T __ldg(const T *at)
{
    if ((uintptr_t)at % sizeof(T) != 0) {
        emulated_misaligned(at, sizeof(T));
    }
    return *at;
}
/* Bytes picked from the eight of b:a; PTX ISA, prmt. */
static inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t pick)
{
    uint64_t both = (uint64_t)b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        r |= (uint32_t)(both >> 8 * (pick >> 4 * i & 7) & 0xff) << 8 * i;
    }
    return r;
}

template <typename T> T __shfl_xor_sync(uint32_t, T value, uint32_t mask)
{
    static_assert(sizeof(T) <= 8, "a lane's word, or two");
    emulated_post post = {};
    memcpy(post.words, &value, sizeof(T));
    const emulated_post *all = emulated_warp(post);
    memcpy(&value, all[(threadIdx.x % 32) ^ mask].words, sizeof(T));
    return value;
}
static inline void __syncwarp()
{
    emulated_warp(emulated_post{});
}
static inline bool __any_sync(uint32_t, bool value)
{
    const emulated_post *all = emulated_warp(emulated_post{{value}});
    bool any = false;
    for (int i = 0; i < 32; i++) {
        any = any || all[i].words[0] != 0;
    }
    return any;
}
/* Fibers give way at barriers only. */
static inline uint32_t atomicAdd(uint32_t *at, uint32_t n)
{
    uint32_t was = *at;
    *at += n;
    return was;
}
using std::isfinite;

void mma_s8(int32_t c[4], const uint32_t a[4], uint32_t b0, uint32_t b1);
void mma_s8_half(int32_t c[4], uint32_t a0, uint32_t a1, uint32_t b);
void mma_f16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1);
void mma_bf16(float c[4], const uint32_t a[4], uint32_t b0, uint32_t b1);

/* Runs a kernel's blocks. */
struct emulated_launch {
    uint32_t grid_x, grid_y, threads, shared_bytes;
    void (*kernel)(const void *args);
    const void *args;
};
void emulated_run(const emulated_launch &launch);

#endif
