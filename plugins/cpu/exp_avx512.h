/* plugins/cpu/exp_avx512.h - exp with AVX-512. */
#ifndef PLUGINS_CPU_EXP_AVX512_H
#define PLUGINS_CPU_EXP_AVX512_H

#include "plugins/cpu/exp.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>
#include <stdint.h>

/* The bits of 2^(i/16), minus i << 19. */
static const uint32_t exp_table[16] __attribute__((aligned(64))) = {
    0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f,
    0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d,
};

/* exp of x <= 0: see exp.h. -INFINITY gives 0, NaN gives NaN. */
CPU_SPECIALISE __m512 exp_negative(__m512 x)
{
    const __m512 magic = _mm512_set1_ps(CPU_EXP_MAGIC(16));
    const __m512 table = _mm512_load_ps((const float *)(const void *)exp_table);
    const __m512 log2e = _mm512_set1_ps(CPU_EXP_LOG2E);
    __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(CPU_EXP_LEAST), _CMP_NLT_UQ);
    __m512 n = _mm512_fmadd_ps(x, log2e, magic);
    __m512 r = _mm512_fmadd_ps(x, log2e, _mm512_sub_ps(magic, n));
    r = _mm512_fmadd_ps(x, _mm512_set1_ps(CPU_EXP_LOG2E_LO), r);
    __m512 p = _mm512_fmadd_ps(r, _mm512_set1_ps(CPU_EXP_C3), _mm512_set1_ps(CPU_EXP_C2_16));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(CPU_EXP_C1));
    __m512i bits = _mm512_castps_si512(n);
    __m512i part = _mm512_castps_si512(_mm512_permutexvar_ps(bits, table));
    __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(part, _mm512_slli_epi32(bits, 19)));
    return _mm512_maskz_mov_ps(normal, _mm512_fmadd_ps(_mm512_mul_ps(power, r), p, power));
}

#endif
