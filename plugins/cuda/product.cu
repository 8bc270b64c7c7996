/* plugins/cuda/product.cu - the variants of the product: a kernel for each type of weights and each
 * number of row tiles, called product_TYPE_NT. */
#include "plugins/cuda/product.cuh"

/* Blocks of a multiprocessor: 128 registers are enough for one tile, and for four where a block of
 * weights is small; other variants would spill. */
constexpr int product_blocks(int type, int nt)
{
    return nt == 1 || (nt == 4 && type != CUDA_W_Q4_K && type != CUDA_W_Q6_K) ? 2 : 1;
}

#define PRODUCT(name, type, nt)                                                              \
    KERNEL __launch_bounds__(256, product_blocks(type, nt))                                  \
        gqa_product_##name##_##nt(const cuda_product_args args)                              \
    {                                                                                        \
        product<type, nt>(args);                                                             \
    }

#define PRODUCTS(name, type) \
    PRODUCT(name, type, 1)   \
    PRODUCT(name, type, 2)   \
    PRODUCT(name, type, 4)   \
    PRODUCT(name, type, 8)

PRODUCTS(q4_0, CUDA_W_Q4_0)
PRODUCTS(q8_0, CUDA_W_Q8_0)
PRODUCTS(q4_k, CUDA_W_Q4_K)
PRODUCTS(q6_k, CUDA_W_Q6_K)
PRODUCTS(mxfp4, CUDA_W_MXFP4)
PRODUCTS(f16, CUDA_W_F16)
PRODUCTS(bf16, CUDA_W_BF16)
