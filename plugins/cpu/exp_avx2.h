/* plugins/cpu/exp_avx2.h - exp with AVX2 and FMA. */
#ifndef PLUGINS_CPU_EXP_AVX2_H
#define PLUGINS_CPU_EXP_AVX2_H

#include "plugins/cpu/exp.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>
#include <stdint.h>

/* The bits of 2^(i/8), minus i << 20. */
static const uint32_t exp_table[8] __attribute__((aligned(64))) = {
    0x3f800000, 0x3f7b95c2, 0x3f7837f0, 0x3f75fed7, 0x3f7504f3, 0x3f75672a, 0x3f7744fd, 0x3f7ac0c7,
};

/* exp of x <= 0: see exp.h. -INFINITY gives 0, NaN gives NaN. */
CPU_SPECIALISE __m256 exp_negative(__m256 x)
{
    const __m256 magic = _mm256_set1_ps(CPU_EXP_MAGIC(8));
    const __m256 table = _mm256_load_ps((const float *)(const void *)exp_table);
    const __m256 log2e = _mm256_set1_ps(CPU_EXP_LOG2E);
    __m256 normal = _mm256_cmp_ps(x, _mm256_set1_ps(CPU_EXP_LEAST), _CMP_NLT_UQ);
    __m256 n = _mm256_fmadd_ps(x, log2e, magic);
    __m256 r = _mm256_fmadd_ps(x, log2e, _mm256_sub_ps(magic, n));
    r = _mm256_fmadd_ps(x, _mm256_set1_ps(CPU_EXP_LOG2E_LO), r);
    __m256 p = _mm256_fmadd_ps(r, _mm256_set1_ps(CPU_EXP_C3), _mm256_set1_ps(CPU_EXP_C2_8));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(CPU_EXP_C1));
    __m256i bits = _mm256_castps_si256(n);
    __m256i part = _mm256_castps_si256(_mm256_permutevar8x32_ps(table, bits));
    __m256 power = _mm256_castsi256_ps(_mm256_add_epi32(part, _mm256_slli_epi32(bits, 20)));
    return _mm256_and_ps(normal, _mm256_fmadd_ps(_mm256_mul_ps(power, r), p, power));
}

#endif
