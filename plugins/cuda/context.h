/* plugins/cuda/context.h - what open() makes: one device, its stream, its kernels.
 *
 * Any thread may call, one at a time: every entry of the plugin makes the device's context current
 * with cuda_enter() and restores what was with cuda_leave(). All work goes to one stream, so that
 * steps are ordered without events. */
#ifndef PLUGINS_CUDA_CONTEXT_H
#define PLUGINS_CUDA_CONTEXT_H

#include "plugins/cuda/driver.h"
#include "plugins/cuda/kernels.h"

#include <gqa/plugin.h>
#include <stdbool.h>

/* Numbers of row tiles that products exist for: 1, 2, 4, 8. */
#define CUDA_PRODUCT_TILES 4u

enum cuda_kernel {
#define CUDA_ENUM(name) CUDA_KERNEL_##name,
    CUDA_KERNELS(CUDA_ENUM)
#undef CUDA_ENUM
        CUDA_KERNEL_COUNT
};

/* Device memory that grows and is used again. What it held is lost when it grows. */
struct cuda_buffer {
    CUdeviceptr at;
    uint64_t bytes;
};

struct cuda_context {
    const struct gqa_host *host; /* outlives the context */
    struct cuda_driver driver;
    struct cuda_device device;
    CUcontext primary;
    CUmodule module;
    CUstream stream;
    CUfunction kernels[CUDA_KERNEL_COUNT];
    CUfunction products[CUDA_W_COUNT][CUDA_PRODUCT_TILES];
    struct cuda_attention *attention;
    struct cuda_pages *pages;
    struct cuda_lt *lt;          /* cublaslt.h; NULL: rows of prompts go the way of all */
    struct gqa_program lt_table; /* gqa.program.0 with lt: of other numerics */
    CUresult last;               /* of the last call that failed, for its words */
};

/* Options: "device=N", and "cublaslt=on|off|auto" (cublaslt.h). */
int cuda_context_create(const struct gqa_host *host, const char *options, struct cuda_context **ret,
                        struct gqa_reason *reason);
void cuda_context_destroy(struct cuda_context *c);

int cuda_enter(struct cuda_context *c);
void cuda_leave(struct cuda_context *c);

/* A driver's result as 0 or -errno; what failed is logged in the driver's words. */
int cuda_check(struct cuda_context *c, CUresult result, const char *what);

/* At least so many bytes, zeroed when new. */
int cuda_buffer_reserve(struct cuda_context *c, struct cuda_buffer *b, uint64_t bytes);
void cuda_buffer_finish(struct cuda_context *c, struct cuda_buffer *b);

/* Copies on the stream. From pageable memory the call returns when the source may change. */
int cuda_upload(struct cuda_context *c, CUdeviceptr to, const void *from, uint64_t bytes);
int cuda_download(struct cuda_context *c, void *to, CUdeviceptr from, uint64_t bytes);
int cuda_synchronise(struct cuda_context *c);

/* Launches a kernel with its one argument. */
struct cuda_grid {
    uint32_t x, y, threads, shared_bytes;
};
int cuda_launch(struct cuda_context *c, CUfunction f, struct cuda_grid grid, void *args);

/* How a product of so many strips, segments of k and tiles of rows is spread: tiles of a warp (as a
 * power of two) and warps of a strip. As many blocks as the device has multiprocessors, else as
 * much reuse of weights as there is; results do not depend on it. */
void cuda_product_shape(const struct cuda_context *c, uint32_t n_strips, uint32_t n_segments,
                        uint32_t n_tiles, uint32_t *ret_log_tiles, uint32_t *ret_split);
/* The split alone, for blocks of so many tiles of which `columns` run beside each other. */
uint32_t cuda_product_split(const struct cuda_context *c, uint32_t n_strips, uint32_t n_segments,
                            uint32_t log_tiles, uint32_t columns);

/* Groups of up to `size` rows that n rows make at most when those of each of n_kinds begin one. */
static inline uint64_t cuda_groups_max(uint64_t n, uint32_t n_kinds, uint32_t size)
{
    uint64_t n_begun = n < n_kinds ? n : n_kinds;
    return n_begun + (n - n_begun) / size;
}

/* Device addresses as pointers, for arguments of kernels; never dereferenced here. */
static inline void *cuda_pointer(CUdeviceptr at)
{
    return (void *)(uintptr_t)at;
}

/* The fatbin of all kernels. */
extern const unsigned long long cuda_fatbin[];

#endif
