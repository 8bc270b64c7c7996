/* plugins/cpu/attention_avx2.c - grouped attention with 8 lanes of AVX2, FMA and F16C. */
#include "plugins/cpu/attention_avx2.h"
#include "plugins/cpu/attention_vector.h"

static void store(uint32_t type, const float *src, void *dst, size_t n)
{
    uint16_t *half = dst;
    size_t i = 0;

    if (type == GQA_TYPE_F32) {
        memcpy(dst, src, n * sizeof(float));
    } else if (type == GQA_TYPE_F16) {
        for (; i + LANES <= n; i += LANES) {
            __m128i x = _mm256_cvtps_ph(_mm256_loadu_ps(src + i), _MM_FROUND_TO_NEAREST_INT);
            _mm_storeu_si128((__m128i *)(void *)(half + i), x);
        }
        for (; i < n; i++) {
            half[i] = gqa_f32_to_f16(src[i]);
        }
    } else {
        for (; i < n; i++) {
            half[i] = cpu_f32_to_bf16(src[i]);
        }
    }
}

const struct cpu_attn_kernels cpu_attn_kernels_avx2 = {
    .isa = CPU_ISA_AVX2,
    .segment = segment,
    .merge = merge,
    .finish = finish,
    .store = store,
};
