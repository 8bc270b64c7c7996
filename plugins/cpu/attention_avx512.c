/* plugins/cpu/attention_avx512.c - grouped attention with 16 lanes of AVX-512. */
#include "plugins/cpu/attention_avx512.h"
#include "plugins/cpu/attention_vector.h"

/* float32 to bfloat16, rounded to nearest even; NaN stays NaN. */
static __m256i bf16_of(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));

    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

static void store(uint32_t type, const float *src, void *dst, size_t n)
{
    uint32_t bytes = element_bytes(type);

    for (size_t i = 0; i < n; i += LANES) {
        __mmask16 mask = first_lanes(n - i < LANES ? (uint32_t)(n - i) : LANES);
        __m512 x = _mm512_maskz_loadu_ps(mask, src + i);
        char *to = (char *)dst + i * bytes;

        if (type == GQA_TYPE_F16) {
            _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
        } else if (type == GQA_TYPE_BF16) {
            _mm256_mask_storeu_epi16(to, mask, bf16_of(x));
        } else {
            _mm512_mask_storeu_ps(to, mask, x);
        }
    }
}

const struct cpu_attn_kernels cpu_attn_kernels_avx512 = {
    .isa = CPU_ISA_AVX512,
    .segment = segment,
    .merge = merge,
    .finish = finish,
    .store = store,
};
