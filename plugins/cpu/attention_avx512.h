/* plugins/cpu/attention_avx512.h - attention_vector.h's vectors, with AVX-512. */
#ifndef PLUGINS_CPU_ATTENTION_AVX512_H
#define PLUGINS_CPU_ATTENTION_AVX512_H

#include "plugins/cpu/attention_convert.h"
#include "plugins/cpu/exp_avx512.h"

typedef __m512 vec;
#define LANES 16u

#define QUERIES_MAX                   12u
#define VECS_MAX                      4u
#define FETCH_HINT                    _MM_HINT_T0
#define FETCHES_V_STRAIGHT            0
#define GATHERS_QUANTS                0
#define STEP_UNROLL                   /* no more than the compiler does */
#define APART                         CPU_SPECIALISE
#define KEEP_OUT_OF_REGISTERS(number) (void)0

/* 32 registers: 24 sums, and what they are made of. */
CPU_SPECIALISE uint32_t vecs_of(const uint32_t nq)
{
    return nq <= 6 ? 4 : 2;
}

CPU_SPECIALISE int takes_rows_whole(const uint32_t nq, const uint32_t nv)
{
    return 1;
}

/* Measured: quants of several queries, and floats of many, gain by tiles. */
CPU_SPECIALISE int fetches_straight(const uint32_t nq, const uint32_t type)
{
    return cpu_kv_is_quant(type) ? nq < 3 : nq <= 6;
}

/* How many of the queries that are left go through the registers next: 12, or 8 down to 1. */
CPU_SPECIALISE uint32_t take(uint32_t left)
{
    return left >= 12 ? 12 : left > 8 ? (left + 1) / 2 : left;
}

/* Calls f(n, ...) with n as a constant: the registers need to know it. */
#define WITH_COUNT(n, f, ...) \
    switch (n) {              \
    case 1:                   \
        f(1, __VA_ARGS__);    \
        break;                \
    case 2:                   \
        f(2, __VA_ARGS__);    \
        break;                \
    case 3:                   \
        f(3, __VA_ARGS__);    \
        break;                \
    case 4:                   \
        f(4, __VA_ARGS__);    \
        break;                \
    case 5:                   \
        f(5, __VA_ARGS__);    \
        break;                \
    case 6:                   \
        f(6, __VA_ARGS__);    \
        break;                \
    case 7:                   \
        f(7, __VA_ARGS__);    \
        break;                \
    case 8:                   \
        f(8, __VA_ARGS__);    \
        break;                \
    default:                  \
        f(12, __VA_ARGS__);   \
        break;                \
    }

#define WITH_MET_COUNT WITH_COUNT

/* ---- arithmetic -------------------------------------------------------------------------- */

CPU_SPECIALISE vec vec_all(float x)
{
    return _mm512_set1_ps(x);
}

CPU_SPECIALISE vec vec_load(const float *from)
{
    return _mm512_load_ps(from);
}

CPU_SPECIALISE void vec_store(float *to, vec x)
{
    _mm512_store_ps(to, x);
}

CPU_SPECIALISE vec vec_add(vec x, vec y)
{
    return _mm512_add_ps(x, y);
}

CPU_SPECIALISE vec vec_sub(vec x, vec y)
{
    return _mm512_sub_ps(x, y);
}

CPU_SPECIALISE vec vec_mul(vec x, vec y)
{
    return _mm512_mul_ps(x, y);
}

CPU_SPECIALISE vec vec_div(vec x, vec y)
{
    return _mm512_div_ps(x, y);
}

CPU_SPECIALISE vec vec_max(vec x, vec y)
{
    return _mm512_max_ps(x, y);
}

/* x times y plus z */
CPU_SPECIALISE vec vec_fma(vec x, vec y, vec z)
{
    return _mm512_fmadd_ps(x, y, z);
}

/* Of x where the lane's bit is set, else of y. */
CPU_SPECIALISE vec vec_choose(uint32_t bits, vec x, vec y)
{
    return _mm512_mask_mov_ps(y, (__mmask16)bits, x);
}

CPU_SPECIALISE float max_of_lanes(vec x)
{
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    x = _mm512_max_ps(x, _mm512_permute_ps(x, 0x4e));
    return _mm512_cvtss_f32(_mm512_max_ps(x, _mm512_permute_ps(x, 0xb1)));
}

CPU_SPECIALISE float sum_of_lanes(vec x)
{
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
    return _mm512_cvtss_f32(_mm512_add_ps(x, _mm512_permute_ps(x, 0xb1)));
}

CPU_SPECIALISE vec tanh_all(vec y)
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

/* ---- elements ---------------------------------------------------------------------------- */

CPU_SPECIALISE __mmask16 first_lanes(uint32_t n)
{
    return n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1);
}

CPU_SPECIALISE vec widen(const uint32_t type, __m256i half)
{
    if (type == GQA_TYPE_F16) {
        return _mm512_cvtph_ps(half);
    }
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* Values of a type (F32, F16, BF16) that is a constant where this is called. */
CPU_SPECIALISE vec load_all(const uint32_t type, const char *p)
{
    if (type == GQA_TYPE_F32) {
        return _mm512_loadu_ps(p);
    }
    return widen(type, _mm256_loadu_si256((const __m256i *)(const void *)p));
}

/* The first n of them, zeros after them; nothing past them is read. */
CPU_SPECIALISE vec load_some(const uint32_t type, const char *p, uint32_t n)
{
    if (type == GQA_TYPE_F32) {
        return _mm512_maskz_loadu_ps(first_lanes(n), p);
    }
    return widen(type, _mm256_maskz_loadu_epi16(first_lanes(n), p));
}

/* The codes of a quant (Q8_0, Q4_0) in so many bytes at p, as floats: see struct gqa_kv_quant.
 * high: those in the high halves of Q4_0. */
CPU_SPECIALISE vec load_codes(const uint32_t type, const char *p, const int high)
{
    const __m512 values = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)p);

    if (type == GQA_TYPE_Q8_0) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
    __m512i nibbles = _mm512_cvtepu8_epi32(bytes);
    /* The choice looks at the lowest four bits only. */
    return _mm512_permutexvar_ps(high ? _mm512_srli_epi32(nibbles, 4) : nibbles, values);
}

/* The f16 scales that begin LANES quants, from one to the next stride bytes. */
CPU_SPECIALISE vec load_scales(const char *p, size_t stride)
{
#define SCALE(i) (short)cpu_kv_scale(p, (i)*stride)
    return _mm512_cvtph_ps(_mm256_setr_epi16(
        SCALE(0), SCALE(1), SCALE(2), SCALE(3), SCALE(4), SCALE(5), SCALE(6), SCALE(7), SCALE(8),
        SCALE(9), SCALE(10), SCALE(11), SCALE(12), SCALE(13), SCALE(14), SCALE(15)));
#undef SCALE
}

CPU_SPECIALISE void store_some(float *to, vec x, uint32_t n)
{
    _mm512_mask_storeu_ps(to, first_lanes(n), x);
}

#endif
