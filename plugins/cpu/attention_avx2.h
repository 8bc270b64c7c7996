/* plugins/cpu/attention_avx2.h - attention_vector.h's vectors, with AVX2, FMA and F16C. */
#ifndef PLUGINS_CPU_ATTENTION_AVX2_H
#define PLUGINS_CPU_ATTENTION_AVX2_H

#include "plugins/cpu/attention_convert.h"
#include "plugins/cpu/exp_avx2.h"

typedef __m256 vec;
#define LANES 8u

#define QUERIES_MAX           6u
#define VECS_MAX              8u
#define FETCH_HINT            _MM_HINT_T0
#define FETCHES_V_STRAIGHT    1
#define GATHERS_QUANTS        1
#define MET_QUERIES_MAX       2u
#define STEP_UNROLL           CPU_UNROLL_4
#define APART                 static __attribute__((noinline))
#define KEEP_OUT_OF_REGISTERS CPU_KEEP_IN_MEMORY

/* 16 registers: 12 sums where they can be had, since with 8 no multiply-add may ever start late,
 * and what they are made of. A lone query has the 8 of a whole block. */
CPU_SPECIALISE uint32_t vecs_of(const uint32_t nq)
{
    return nq == 1 ? 8 : nq <= 3 ? 4 : nq == 4 ? 3 : 2;
}

/* 12 sums leave four registers: for three of the row and a query's number, or for three queries'
 * numbers and one of the row. */
CPU_SPECIALISE int takes_rows_whole(const uint32_t nq, const uint32_t nv)
{
    return nq >= nv;
}

CPU_SPECIALISE int fetches_straight(const uint32_t nq, const uint32_t type)
{
    return 1;
}

/* How many of the queries that are left go through the registers next: 6 down to 1. Eight are five
 * and three, which have 10 and 12 sums. */
CPU_SPECIALISE uint32_t take(uint32_t left)
{
    return left >= 12 ? 6 : left == 8 ? 5 : left > 6 ? (left + 1) / 2 : left;
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
    default:                  \
        f(6, __VA_ARGS__);    \
        break;                \
    }

/* The same up to MET_QUERIES_MAX. */
#define WITH_MET_COUNT(n, f, ...) \
    if ((n) == 1) {               \
        f(1, __VA_ARGS__);        \
    } else {                      \
        f(2, __VA_ARGS__);        \
    }

/* ---- arithmetic -------------------------------------------------------------------------- */

CPU_SPECIALISE vec vec_all(float x)
{
    return _mm256_set1_ps(x);
}

CPU_SPECIALISE vec vec_load(const float *from)
{
    return _mm256_load_ps(from);
}

CPU_SPECIALISE void vec_store(float *to, vec x)
{
    _mm256_store_ps(to, x);
}

CPU_SPECIALISE vec vec_add(vec x, vec y)
{
    return _mm256_add_ps(x, y);
}

CPU_SPECIALISE vec vec_sub(vec x, vec y)
{
    return _mm256_sub_ps(x, y);
}

CPU_SPECIALISE vec vec_mul(vec x, vec y)
{
    return _mm256_mul_ps(x, y);
}

CPU_SPECIALISE vec vec_div(vec x, vec y)
{
    return _mm256_div_ps(x, y);
}

CPU_SPECIALISE vec vec_max(vec x, vec y)
{
    return _mm256_max_ps(x, y);
}

/* x times y plus z */
CPU_SPECIALISE vec vec_fma(vec x, vec y, vec z)
{
    return _mm256_fmadd_ps(x, y, z);
}

/* Of x where the lane's bit is set, else of y. */
CPU_SPECIALISE vec vec_choose(uint32_t bits, vec x, vec y)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    __m256i set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32((int)bits), bit), bit);

    return _mm256_blendv_ps(y, x, _mm256_castsi256_ps(set));
}

CPU_SPECIALISE float max_of_lanes(vec x)
{
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_permute_ps(y, 0x4e));
    return _mm_cvtss_f32(_mm_max_ps(y, _mm_permute_ps(y, 0xb1)));
}

CPU_SPECIALISE float sum_of_lanes(vec x)
{
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_permute_ps(y, 0x4e));
    return _mm_cvtss_f32(_mm_add_ps(y, _mm_permute_ps(y, 0xb1)));
}

CPU_SPECIALISE vec tanh_all(vec y)
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

/* ---- elements ---------------------------------------------------------------------------- */

CPU_SPECIALISE __m256i first_lanes(uint32_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

CPU_SPECIALISE vec widen(const uint32_t type, __m128i half)
{
    if (type == GQA_TYPE_F16) {
        return _mm256_cvtph_ps(half);
    }
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}

/* Values of a type (F32, F16, BF16) that is a constant where this is called. */
CPU_SPECIALISE vec load_all(const uint32_t type, const char *p)
{
    if (type == GQA_TYPE_F32) {
        return _mm256_loadu_ps((const float *)(const void *)p);
    }
    return widen(type, _mm_loadu_si128((const __m128i *)(const void *)p));
}

/* The first n of them, zeros after them; nothing past them is read. */
CPU_SPECIALISE vec load_some(const uint32_t type, const char *p, uint32_t n)
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

/* The codes of a quant (bytes, or Q4_0) in so many bytes at p, as floats: see struct gqa_kv_quant.
 * high: those in the high halves of Q4_0. */
CPU_SPECIALISE vec load_codes(const uint32_t type, const char *p, const int high)
{
    __m128i bytes = _mm_loadl_epi64((const __m128i *)(const void *)p);

    if (type != GQA_TYPE_Q4_0) {
        return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
    }
    __m256i nibbles = _mm256_cvtepu8_epi32(bytes);
    nibbles =
        high ? _mm256_srli_epi32(nibbles, 4) : _mm256_and_si256(nibbles, _mm256_set1_epi32(15));
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(nibbles, _mm256_set1_epi32(8)));
}

/* The low halves of 32 bytes of Q4_0's codes, as bytes, and the high ones. */
CPU_SPECIALISE void unpack_32(const char *from, char *low, char *high)
{
    const __m256i mask = _mm256_set1_epi8(15), middle = _mm256_set1_epi8(8);
    __m256i codes = _mm256_loadu_si256((const __m256i *)(const void *)from);
    __m256i shifted = _mm256_srli_epi16(codes, 4);

    codes = _mm256_sub_epi8(_mm256_and_si256(codes, mask), middle);
    shifted = _mm256_sub_epi8(_mm256_and_si256(shifted, mask), middle);
    _mm256_storeu_si256((__m256i *)(void *)low, codes);
    _mm256_storeu_si256((__m256i *)(void *)high, shifted);
}

/* Those of 16 bytes, the high ones after the low ones. */
CPU_SPECIALISE void unpack_16(const char *from, char *to)
{
    const __m256i mask = _mm256_set1_epi8(15), middle = _mm256_set1_epi8(8);
    __m128i half = _mm_loadu_si128((const __m128i *)(const void *)from);
    __m256i codes =
        _mm256_srlv_epi64(_mm256_broadcastsi128_si256(half), _mm256_setr_epi64x(0, 0, 4, 4));

    codes = _mm256_sub_epi8(_mm256_and_si256(codes, mask), middle);
    _mm256_storeu_si256((__m256i *)(void *)to, codes);
}

/* The f16 scales that begin LANES quants, from one to the next stride bytes. */
CPU_SPECIALISE vec load_scales(const char *p, size_t stride)
{
#define SCALE(i) (short)cpu_kv_scale(p, (i)*stride)
    return _mm256_cvtph_ps(_mm_setr_epi16(SCALE(0), SCALE(1), SCALE(2), SCALE(3), SCALE(4),
                                          SCALE(5), SCALE(6), SCALE(7)));
#undef SCALE
}

CPU_SPECIALISE void store_some(float *to, vec x, uint32_t n)
{
    _mm256_maskstore_ps(to, first_lanes(n), x);
}

#endif
