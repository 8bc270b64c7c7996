/* plugins/cpu/attention_avx512.h - loads of KV elements, exp and tanh for attention_avx512.c. */
#ifndef PLUGINS_CPU_ATTENTION_AVX512_H
#define PLUGINS_CPU_ATTENTION_AVX512_H

#include "plugins/cpu/attention_convert.h"
#include "plugins/cpu/attention_exp.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>

#define LANES 16u

/* ---- loads ------------------------------------------------------------------------------- */

CPU_SPECIALISE uint32_t bytes_of(const uint32_t type)
{
    return type == GQA_TYPE_F32 ? 4 : 2;
}

/* 16 values of a type that is a constant where this is called; lanes outside mask are not read. */
CPU_SPECIALISE __m512 load_some(const uint32_t type, const char *p, __mmask16 mask)
{
    if (type == GQA_TYPE_F32) {
        return _mm512_maskz_loadu_ps(mask, p);
    }
    __m256i half = _mm256_maskz_loadu_epi16(mask, p);
    if (type == GQA_TYPE_F16) {
        return _mm512_cvtph_ps(half);
    }
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

CPU_SPECIALISE __m512 load_all(const uint32_t type, const char *p)
{
    if (type == GQA_TYPE_F32) {
        return _mm512_loadu_ps(p);
    }
    __m256i half = _mm256_loadu_si256((const __m256i *)p);
    if (type == GQA_TYPE_F16) {
        return _mm512_cvtph_ps(half);
    }
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

CPU_SPECIALISE __mmask16 first_lanes(uint32_t n)
{
    return n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1);
}

/* ---- quants ------------------------------------------------------------------------------ */

/* 16 codes of a quant, from its bytes, as floats: see struct gqa_kv_quant. */
CPU_SPECIALISE __m512 codes_of(const uint32_t type, __m128i bytes, const int high)
{
    if (type == GQA_TYPE_Q8_0) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    __m512i nibbles = _mm512_cvtepu8_epi32(bytes);
    nibbles =
        high ? _mm512_srli_epi32(nibbles, 4) : _mm512_and_si512(nibbles, _mm512_set1_epi32(15));
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(nibbles, _mm512_set1_epi32(8)));
}

static inline __m128i load_16_bytes(const char *p)
{
    return _mm_loadu_si128((const __m128i *)(const void *)p);
}

/* A tile of K in quants as floats, (k_dim in whole quants, 16). ahead: fetched at the same pace. */
CPU_SPECIALISE void widen_tile(const uint32_t type, const char *k, const char *ahead,
                               uint32_t k_dim, float *tile)
{
    const uint32_t n_rows = type == GQA_TYPE_Q8_0 ? 32 : 16;
    const uint32_t bytes = GQA_KV_TILE_TOKENS * (2 + n_rows);

    for (uint32_t d = 0; d < k_dim; d += GQA_KV_QUANT_DIMS, k += bytes, ahead += bytes) {
        __m512 scale = load_all(GQA_TYPE_F16, k);

        for (uint32_t line = 0; line < bytes; line += 64) {
            _mm_prefetch(ahead + line, _MM_HINT_T1);
        }
        for (uint32_t i = 0; i < n_rows; i++, tile += LANES) {
            __m128i row = load_16_bytes(k + 2 * GQA_KV_TILE_TOKENS + i * GQA_KV_TILE_TOKENS);
            _mm512_store_ps(tile, _mm512_mul_ps(codes_of(type, row, 0), scale));
            if (type == GQA_TYPE_Q4_0) {
                _mm512_store_ps(tile + 16 * LANES, _mm512_mul_ps(codes_of(type, row, 1), scale));
            }
        }
        tile += (32 - n_rows) * LANES;
    }
}

/* One token's V in quants as floats, in whole quants. */
CPU_SPECIALISE void widen_row(const uint32_t type, const char *v, uint32_t v_dim, float *row)
{
    const uint32_t n_bytes = type == GQA_TYPE_Q8_0 ? 32 : 16;

    for (uint32_t d = 0; d < v_dim; d += GQA_KV_QUANT_DIMS, v += 2 + n_bytes, row += 32) {
        uint16_t half;
        memcpy(&half, v, sizeof(half));
        __m512 scale = _mm512_cvtph_ps(_mm256_set1_epi16((short)half));

        for (uint32_t i = 0; i < n_bytes; i += LANES) {
            __m128i bytes = load_16_bytes(v + 2 + i);
            _mm512_store_ps(row + i, _mm512_mul_ps(codes_of(type, bytes, 0), scale));
            if (type == GQA_TYPE_Q4_0) {
                _mm512_store_ps(row + 16, _mm512_mul_ps(codes_of(type, bytes, 1), scale));
            }
        }
    }
}

/* ---- exp and tanh ------------------------------------------------------------------------ */

/* exp of x <= 0: see attention_exp.h. -INFINITY gives 0, NaN gives NaN. */
CPU_SPECIALISE __m512 exp_negative(__m512 x)
{
    __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(CPU_EXP_LEAST), _CMP_NLT_UQ);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(CPU_EXP_LOG2E)),
                                    _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(CPU_EXP_LN2_HI), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(CPU_EXP_LN2_LO), r);
    __m512 p = _mm512_set1_ps(CPU_EXP_C6);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(CPU_EXP_C5));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(CPU_EXP_C4));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(CPU_EXP_C3));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(CPU_EXP_C2));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(normal, p, n);
}

static inline float exp_one(float x)
{
    return _mm512_cvtss_f32(exp_negative(_mm512_set1_ps(x)));
}

static inline __m512 tanh_all(__m512 y)
{
    __m512 magnitude = _mm512_abs_ps(y);
    __mmask16 small = _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(CPU_TANH_SMALL), _CMP_LT_OQ);
    __m512 z = _mm512_mul_ps(y, y);
    __m512 p = _mm512_set1_ps(CPU_TANH_C11);
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(CPU_TANH_C9));
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(CPU_TANH_C7));
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(CPU_TANH_C5));
    p = _mm512_fmadd_ps(p, z, _mm512_set1_ps(CPU_TANH_C3));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, z), y, y);
    __m512 e = exp_negative(_mm512_mul_ps(magnitude, _mm512_set1_ps(-2.0f)));
    __m512 one = _mm512_set1_ps(1.0f);
    __m512 t = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
    __m512 sign = _mm512_and_ps(y, _mm512_set1_ps(-0.0f));
    return _mm512_mask_mov_ps(_mm512_or_ps(t, sign), small, p);
}

#endif
