/* plugins/cpu/attention_avx2.h - loads of KV elements, exp and tanh for attention_avx2.c. */
#ifndef PLUGINS_CPU_ATTENTION_AVX2_H
#define PLUGINS_CPU_ATTENTION_AVX2_H

#include "plugins/cpu/attention_convert.h"
#include "plugins/cpu/attention_exp.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>

#define LANES 8u

/* ---- loads ------------------------------------------------------------------------------- */

CPU_SPECIALISE uint32_t bytes_of(const uint32_t type)
{
    return type == GQA_TYPE_F32 ? 4 : 2;
}

CPU_SPECIALISE __m256 widen(const uint32_t type, __m128i half)
{
    if (type == GQA_TYPE_F16) {
        return _mm256_cvtph_ps(half);
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* 8 values of a type that is a constant where this is called. */
CPU_SPECIALISE __m256 load_all(const uint32_t type, const char *p)
{
    if (type == GQA_TYPE_F32) {
        return _mm256_loadu_ps((const float *)(const void *)p);
    }
    return widen(type, _mm_loadu_si128((const __m128i *)(const void *)p));
}

static inline __m256i first_lanes(uint32_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Lane i of all ones where bit i of bits is set. */
static inline __m256i lanes_of_bits(uint32_t bits)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);

    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), bit), bit);
}

/* The first n of 8 values, zeros after them; nothing past them is read. */
CPU_SPECIALISE __m256 load_some(const uint32_t type, const char *p, uint32_t n)
{
    if (n >= LANES) {
        return load_all(type, p);
    }
    if (type == GQA_TYPE_F32) {
        return _mm256_maskload_ps((const float *)(const void *)p, first_lanes(n));
    }
    uint16_t half[LANES] = {0};
    memcpy(half, p, n * sizeof(*half));
    return widen(type, _mm_loadu_si128((const __m128i *)(const void *)half));
}

/* ---- quants ------------------------------------------------------------------------------ */

/* 8 codes of a quant, from its bytes, as floats: see struct gqa_kv_quant. */
CPU_SPECIALISE __m256 codes_of(const uint32_t type, __m128i bytes, const int high)
{
    if (type == GQA_TYPE_Q8_0) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    __m256i nibbles = _mm256_cvtepu8_epi32(bytes);
    nibbles =
        high ? _mm256_srli_epi32(nibbles, 4) : _mm256_and_si256(nibbles, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles, _mm256_set1_epi32(8)));
}

static inline __m128i load_8_bytes(const char *p)
{
    return _mm_loadl_epi64((const __m128i *)(const void *)p);
}

/* A tile of K in quants as floats, (k_dim in whole quants, 16). ahead: fetched at the same pace. */
CPU_SPECIALISE void widen_tile(const uint32_t type, const char *k, const char *ahead,
                               uint32_t k_dim, float *tile)
{
    const uint32_t n_rows = type == GQA_TYPE_Q8_0 ? 32 : 16;
    const uint32_t bytes = GQA_KV_TILE_TOKENS * (2 + n_rows);

    for (uint32_t d = 0; d < k_dim; d += GQA_KV_QUANT_DIMS, k += bytes, ahead += bytes) {
        __m256 scale[2];

        for (uint32_t line = 0; line < bytes; line += 64) {
            _mm_prefetch(ahead + line, _MM_HINT_T1);
        }
        for (uint32_t j = 0; j < 2; j++) {
            scale[j] = load_all(GQA_TYPE_F16, k + 2 * LANES * j);
        }
        for (uint32_t i = 0; i < n_rows; i++, tile += 2 * LANES) {
            for (uint32_t j = 0; j < 2; j++) {
                __m128i row =
                    load_8_bytes(k + 2 * GQA_KV_TILE_TOKENS + i * GQA_KV_TILE_TOKENS + j * LANES);
                _mm256_store_ps(tile + j * LANES, _mm256_mul_ps(codes_of(type, row, 0), scale[j]));
                if (type == GQA_TYPE_Q4_0) {
                    _mm256_store_ps(tile + 16 * 2 * LANES + j * LANES,
                                    _mm256_mul_ps(codes_of(type, row, 1), scale[j]));
                }
            }
        }
        tile += (32 - n_rows) * 2 * LANES;
    }
}

/* One token's V in quants as floats, in whole quants. */
CPU_SPECIALISE void widen_row(const uint32_t type, const char *v, uint32_t v_dim, float *row)
{
    const uint32_t n_bytes = type == GQA_TYPE_Q8_0 ? 32 : 16;

    for (uint32_t d = 0; d < v_dim; d += GQA_KV_QUANT_DIMS, v += 2 + n_bytes, row += 32) {
        uint16_t half;
        memcpy(&half, v, sizeof(half));
        __m256 scale = _mm256_broadcastss_ps(_mm_cvtph_ps(_mm_cvtsi32_si128(half)));

        for (uint32_t i = 0; i < n_bytes; i += LANES) {
            __m128i bytes = load_8_bytes(v + 2 + i);
            _mm256_store_ps(row + i, _mm256_mul_ps(codes_of(type, bytes, 0), scale));
            if (type == GQA_TYPE_Q4_0) {
                _mm256_store_ps(row + 16 + i, _mm256_mul_ps(codes_of(type, bytes, 1), scale));
            }
        }
    }
}

/* ---- exp and tanh ------------------------------------------------------------------------ */

/* exp of x <= 0: see attention_exp.h. -INFINITY gives 0, NaN gives NaN. */
CPU_SPECIALISE __m256 exp_negative(__m256 x)
{
    __m256 normal = _mm256_cmp_ps(x, _mm256_set1_ps(CPU_EXP_LEAST), _CMP_NLT_UQ);
    __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(CPU_EXP_LOG2E)),
                               _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(CPU_EXP_LN2_HI), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(CPU_EXP_LN2_LO), r);
    __m256 p = _mm256_set1_ps(CPU_EXP_C6);
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(CPU_EXP_C5));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(CPU_EXP_C4));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(CPU_EXP_C3));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(CPU_EXP_C2));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
    __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    __m256 power = _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    return _mm256_and_ps(normal, _mm256_mul_ps(p, power));
}

static inline float exp_one(float x)
{
    return _mm256_cvtss_f32(exp_negative(_mm256_set1_ps(x)));
}

static inline __m256 tanh_all(__m256 y)
{
    __m256 sign_bit = _mm256_set1_ps(-0.0f);
    __m256 magnitude = _mm256_andnot_ps(sign_bit, y);
    __m256 small = _mm256_cmp_ps(magnitude, _mm256_set1_ps(CPU_TANH_SMALL), _CMP_LT_OQ);
    __m256 z = _mm256_mul_ps(y, y);
    __m256 p = _mm256_set1_ps(CPU_TANH_C11);
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(CPU_TANH_C9));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(CPU_TANH_C7));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(CPU_TANH_C5));
    p = _mm256_fmadd_ps(p, z, _mm256_set1_ps(CPU_TANH_C3));
    p = _mm256_fmadd_ps(_mm256_mul_ps(p, z), y, y);
    __m256 e = exp_negative(_mm256_mul_ps(magnitude, _mm256_set1_ps(-2.0f)));
    __m256 one = _mm256_set1_ps(1.0f);
    __m256 t = _mm256_div_ps(_mm256_sub_ps(one, e), _mm256_add_ps(one, e));
    return _mm256_blendv_ps(_mm256_or_ps(t, _mm256_and_ps(y, sign_bit)), p, small);
}

#endif
