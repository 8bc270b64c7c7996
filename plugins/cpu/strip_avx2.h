/* plugins/cpu/strip_avx2.h - reading a strip of quantised weights with vectors of 256 bits, block
 * by block: for kernels that differ in how they multiply.
 *
 * A register holds 8 of a strip's 16 outputs. Everything is specialised by a layout that is known
 * when it is compiled. */
#ifndef PLUGINS_CPU_STRIP_AVX2_H
#define PLUGINS_CPU_STRIP_AVX2_H

#include "plugins/cpu/linear.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>
#include <string.h>

/* How far ahead of the block in work to ask for the strip's bytes: decode waits for memory, and the
 * hardware's own prefetch stops at each page. */
#define CPU_PREFETCH_BYTES 4096u

/* The scales of a block, for each half of its outputs. Those of the halves of k are eight words,
 * one for an output. */
struct cpu_scales_256 {
    __m256 scale[2], min[2];
    __m128i part_scale[2][2]; /* (half of k, half of the outputs) */
    __m128i part_min[2][2];
};

CPU_SPECIALISE __m256 cpu_load_f16(const uint8_t *at)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)at));
}

CPU_SPECIALISE __m256i cpu_load_line(const uint8_t *lines, int line, int half)
{
    return _mm256_loadu_si256(
        (const __m256i *)(const void *)(lines + line * (int)CPU_BLOCK_LINE + half * 32));
}

CPU_SPECIALISE __m256i cpu_broadcast_dword(const void *at)
{
    int32_t bits;
    memcpy(&bits, at, sizeof(bits));
    return _mm256_set1_epi32(bits);
}

/* What an offset adds too much to a row's sums, negated. */
CPU_SPECIALISE __m256i cpu_load_minus(int32_t offset, const int32_t *minus)
{
    const int shift = (int)cpu_minus_shift(offset);
    __m256i x = cpu_broadcast_dword(minus);

    return shift == 0 ? x : _mm256_slli_epi32(x, shift);
}

/* The levels in both lanes, ready for VPSHUFB, with shift taken off. */
CPU_SPECIALISE __m256i cpu_load_levels(const struct cpu_layout *l, int32_t shift)
{
    if (l->levels == NULL) {
        return _mm256_setzero_si256();
    }
    __m256i levels =
        _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(const void *)l->levels));
    return _mm256_sub_epi8(levels, _mm256_set1_epi8((char)shift));
}

/* Adds a plane of width bits, at to at + width of every byte, to vector v of one half. */
CPU_SPECIALISE __m256i cpu_add_plane(__m256i q, const uint8_t *lines, int width, int at, int v,
                                     int half)
{
    int shift = v * width % 8 - at;
    __m256i line = cpu_load_line(lines, v * width / 8, half);

    line = shift < 0 ? _mm256_slli_epi32(line, -shift & 7) : _mm256_srli_epi32(line, shift & 7);
    return _mm256_or_si256(
        q, _mm256_and_si256(line, _mm256_set1_epi8((char)(((1 << width) - 1) << at))));
}

/* Vector v of one half: stored values, or levels as they were loaded. */
CPU_SPECIALISE __m256i cpu_unpack_vector(const struct cpu_layout *l, __m256i levels,
                                         const uint8_t *lines, int v, int half)
{
    __m256i q = _mm256_setzero_si256();
    int at = 0;

    if (l->bits == 8) {
        return cpu_load_line(lines, v, half);
    }
    CPU_UNROLL
    for (int width = 4; width > 0; width /= 2) {
        if ((int)l->bits & width) {
            q = cpu_add_plane(q, lines + at * (int)CPU_BLOCK_LINE, width, at, v, half);
            at += width;
        }
    }
    return l->levels != NULL ? _mm256_shuffle_epi8(levels, q) : q;
}

/* The header's scales of one half: f16, or halves of exponents, 2^(e - 128). For e < 2 these are
 * subnormal, 2^(21 + e) as bits; (e + 1) 2^21 is just that, and less than (e - 1) 2^23 for all
 * others. */
CPU_SPECIALISE __m256 cpu_load_header(const struct cpu_layout *l, const uint8_t *header, int half)
{
    if (!l->has_exps) {
        return cpu_load_f16(header + half * 16);
    }
    const __m256i one = _mm256_set1_epi32(1);
    __m256i e =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(header + half * 8)));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(_mm256_sub_epi32(e, one), 23),
                                                _mm256_slli_epi32(_mm256_add_epi32(e, one), 21)));
}

CPU_SPECIALISE __m256 cpu_float_of_words(__m128i words)
{
    return _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(words));
}

/* The integer scales of one half of a block's outputs. */
CPU_SPECIALISE void cpu_unpack_integers(const struct cpu_layout *l, const uint8_t *block, int half,
                                        struct cpu_scales_256 *s)
{
    const __m128i low = _mm_set1_epi16(0x0f);
    const uint8_t *at = block + half * 8;
    __m128i first = _mm_loadl_epi64((const __m128i *)(const void *)at), second = first;

    if (l->scales != CPU_SCALES_BLOCK) {
        second = _mm_loadl_epi64((const __m128i *)(const void *)(at + CPU_STRIP_ROWS));
    }
    switch (l->scales) {
    case CPU_SCALES_NONE:
        break;
    case CPU_SCALES_BLOCK:
        s->scale[half] =
            _mm256_mul_ps(s->scale[half], cpu_float_of_words(_mm_cvtepi8_epi16(first)));
        break;
    case CPU_SCALES_BLOCK_MIN:
        s->scale[half] =
            _mm256_mul_ps(s->scale[half], cpu_float_of_words(_mm_cvtepu8_epi16(first)));
        s->min[half] = _mm256_mul_ps(s->min[half], cpu_float_of_words(_mm_cvtepu8_epi16(second)));
        break;
    case CPU_SCALES_HALVES:
        s->part_scale[0][half] = _mm_cvtepi8_epi16(first);
        s->part_scale[1][half] = _mm_cvtepi8_epi16(second);
        break;
    case CPU_SCALES_HALVES_MIN:
        first = _mm_cvtepu8_epi16(first);
        second = _mm_cvtepu8_epi16(second);
        s->part_scale[0][half] = _mm_and_si128(first, low);
        s->part_scale[1][half] = _mm_and_si128(second, low);
        s->part_min[0][half] = _mm_srli_epi16(first, 4);
        s->part_min[1][half] = _mm_srli_epi16(second, 4);
        break;
    }
}

CPU_SPECIALISE void cpu_unpack_scales(const struct cpu_layout *l, const uint8_t *header,
                                      const uint8_t *block, struct cpu_scales_256 *s)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);

    CPU_UNROLL
    for (int half = 0; half < 2; half++) {
        s->scale[half] = cpu_load_header(l, header, half);
        if (l->has_min) {
            s->min[half] = cpu_load_f16(header + cpu_layout_header_scales_bytes(l) + half * 16);
        }
        if (l->scales != CPU_SCALES_NONE) {
            cpu_unpack_integers(l, block, half, s);
        }
        if (l->scales == CPU_SCALES_BLOCK_MIN || l->scales == CPU_SCALES_HALVES_MIN) {
            s->min[half] = _mm256_xor_ps(s->min[half], sign);
        }
    }
}

/* Where a strip's block lies, and its unit's header. */
struct cpu_place_256 {
    const uint8_t *header, *block, *lines;
};

CPU_SPECIALISE struct cpu_place_256 cpu_enter_block(const struct cpu_layout *l,
                                                    const uint8_t *strip, uint32_t b)
{
    const uint32_t unit_blocks = l->unit / CPU_BLOCK;
    const uint8_t *header = strip + (size_t)(b / unit_blocks) * cpu_layout_unit_bytes(l);
    const uint8_t *block =
        header + cpu_layout_header_bytes(l) + b % unit_blocks * cpu_layout_block_bytes(l);

    for (uint32_t i = 0; i < cpu_layout_block_bytes(l); i += CPU_BLOCK_LINE) {
        _mm_prefetch((const char *)block + CPU_PREFETCH_BYTES + i, _MM_HINT_T0);
    }
    return (struct cpu_place_256){header, block, block + cpu_layout_scales_bytes(l)};
}

#endif
