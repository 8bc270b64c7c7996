/* tests/cuda/emulate/kernels.cc - the plugin's kernels, compiled for the emulated GPU, by name. */
#include "tests/cuda/emulate/device.h"

#include "plugins/cuda/kernels.cu"

#include "tests/cuda/emulate/kernels.h"

#include <cstring>

#define ENTRY(name, type)                                                        \
    {                                                                            \
#name, sizeof(type), [](const void *args) { name(*(const type *)args); } \
    }
#define PRODUCT_ENTRIES(type)                             \
    ENTRY(gqa_product_##type##_1, cuda_product_args),     \
        ENTRY(gqa_product_##type##_2, cuda_product_args), \
        ENTRY(gqa_product_##type##_4, cuda_product_args), \
        ENTRY(gqa_product_##type##_8, cuda_product_args)

static const emulated_kernel kernels[] = {
    ENTRY(gqa_quantise, cuda_quantise_args),
    ENTRY(gqa_halve, cuda_quantise_args),
    ENTRY(gqa_route, cuda_route_args),
    ENTRY(gqa_sort, cuda_sort_args),
    ENTRY(gqa_combine, cuda_combine_args),
    ENTRY(gqa_adapt_low, cuda_adapt_args),
    ENTRY(gqa_adapt_high, cuda_adapt_args),
    ENTRY(gqa_norm, cuda_norm_args),
    ENTRY(gqa_rope, cuda_rope_args),
    ENTRY(gqa_map, cuda_map_args),
    ENTRY(gqa_unpack, cuda_unpack_args),
    ENTRY(gqa_round_rows, cuda_round_args),
    ENTRY(gqa_scale_rows, cuda_scale_rows_args),
    ENTRY(gqa_append, cuda_append_args),
    ENTRY(gqa_attend, cuda_attend_args),
    ENTRY(gqa_merge, cuda_merge_args),
    ENTRY(gqa_observe_parts, cuda_observe_args),
    ENTRY(gqa_observe_totals, cuda_observe_args),
    ENTRY(gqa_observe_votes, cuda_observe_args),
    PRODUCT_ENTRIES(q4_0),
    PRODUCT_ENTRIES(q8_0),
    PRODUCT_ENTRIES(q4_k),
    PRODUCT_ENTRIES(q6_k),
    PRODUCT_ENTRIES(mxfp4),
    PRODUCT_ENTRIES(f16),
    PRODUCT_ENTRIES(bf16),
};

const emulated_kernel *emulated_kernel_find(const char *name)
{
    for (const emulated_kernel &k : kernels) {
        if (strcmp(k.name, name) == 0) {
            return &k;
        }
    }
    return nullptr;
}
