/* format/types.c - the table of tensor types. */
#include "format/quant.h"
#include "format/checked.h"

#include <strings.h>

static const struct fmt_type_info types[] = {
    {"F32", FMT_TYPE_F32, 1, 4, quant_f32_dequantise, quant_f32_quantise},
    {"F16", FMT_TYPE_F16, 1, 2, quant_f16_dequantise, quant_f16_quantise},
    {"BF16", FMT_TYPE_BF16, 1, 2, quant_bf16_dequantise, quant_bf16_quantise},
    {"Q4_0", FMT_TYPE_Q4_0, 32, 18, quant_q4_0_dequantise, quant_q4_0_quantise},
    {"Q4_1", FMT_TYPE_Q4_1, 32, 20, quant_q4_1_dequantise, NULL},
    {"Q5_0", FMT_TYPE_Q5_0, 32, 22, quant_q5_0_dequantise, NULL},
    {"Q5_1", FMT_TYPE_Q5_1, 32, 24, quant_q5_1_dequantise, NULL},
    {"Q8_0", FMT_TYPE_Q8_0, 32, 34, quant_q8_0_dequantise, quant_q8_0_quantise},
    {"Q2_K", FMT_TYPE_Q2_K, 256, 84, quant_q2_k_dequantise, quant_q2_k_quantise},
    {"Q3_K", FMT_TYPE_Q3_K, 256, 110, quant_q3_k_dequantise, quant_q3_k_quantise},
    {"Q4_K", FMT_TYPE_Q4_K, 256, 144, quant_q4_k_dequantise, quant_q4_k_quantise},
    {"Q5_K", FMT_TYPE_Q5_K, 256, 176, quant_q5_k_dequantise, NULL},
    {"Q6_K", FMT_TYPE_Q6_K, 256, 210, quant_q6_k_dequantise, quant_q6_k_quantise},
    {"IQ4_NL", FMT_TYPE_IQ4_NL, 32, 18, quant_iq4_nl_dequantise, quant_iq4_nl_quantise},
    {"IQ4_XS", FMT_TYPE_IQ4_XS, 256, 136, quant_iq4_xs_dequantise, quant_iq4_xs_quantise},
    {"MXFP4", FMT_TYPE_MXFP4, 32, 17, quant_mxfp4_dequantise, quant_mxfp4_quantise},
};

#define N_TYPES (sizeof(types) / sizeof(types[0]))

const struct fmt_type_info *fmt_type_info(uint32_t type)
{
    for (size_t i = 0; i < N_TYPES; i++) {
        if (types[i].type == type) {
            return &types[i];
        }
    }
    return NULL;
}

const struct fmt_type_info *fmt_type_by_name(const char *name)
{
    for (size_t i = 0; i < N_TYPES; i++) {
        if (strcasecmp(types[i].name, name) == 0) {
            return &types[i];
        }
    }
    return NULL;
}

const struct fmt_type_info *fmt_type_at(size_t i)
{
    return i < N_TYPES ? &types[i] : NULL;
}

uint64_t fmt_type_bytes(const struct fmt_type_info *info, uint64_t n)
{
    uint64_t bytes;
    if (n % info->n_block != 0 || !checked_mul_u64(n / info->n_block, info->block_bytes, &bytes)) {
        return 0;
    }
    return bytes;
}
