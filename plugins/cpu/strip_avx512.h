/* plugins/cpu/strip_avx512.h - reading a strip of quantised weights with AVX-512, block by block,
 * and what is done with a block's exact sums: for kernels that differ in how they multiply.
 *
 * Everything is specialised by a layout that is known when it is compiled. */
#ifndef PLUGINS_CPU_STRIP_AVX512_H
#define PLUGINS_CPU_STRIP_AVX512_H

#include "plugins/cpu/linear.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>
#include <string.h>

/* One block: vectors of unsigned values, and what its sums are multiplied with. */
struct cpu_block {
    __m512i q[8];
    __m512 scale, min;
    __m512 half_scale[2];
    __m512i half_min; /* pairs of 16 bits */
};

CPU_SPECIALISE __m512 cpu_load_f16(const uint8_t *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)at));
}

/* The levels in every lane, ready for VPSHUFB. */
CPU_SPECIALISE __m512i cpu_load_levels(const struct cpu_layout *l)
{
    if (l->levels == NULL) {
        return _mm512_setzero_si512();
    }
    return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)(const void *)l->levels));
}

/* Adds a plane of width bits, at to at + width of every byte, to vector v. */
CPU_SPECIALISE __m512i cpu_add_plane(__m512i q, const uint8_t *lines, int width, int at, int v)
{
    int shift = v * width % 8 - at;
    __m512i line = _mm512_loadu_si512(lines + v * width / 8 * (int)CPU_BLOCK_LINE);

    line = shift < 0 ? _mm512_slli_epi32(line, (unsigned)-shift & 7)
                     : _mm512_srli_epi32(line, (unsigned)shift & 7);
    return _mm512_or_si512(
        q, _mm512_and_si512(line, _mm512_set1_epi8((char)(((1 << width) - 1) << at))));
}

/* Unsigned bytes: signed ones move up by 128, as cpu_offset_of says. */
CPU_SPECIALISE void cpu_unpack_values(const struct cpu_layout *l, __m512i levels,
                                      const uint8_t *lines, __m512i *q)
{
    CPU_UNROLL
    for (int v = 0; v < 8; v++) {
        int at = 0;

        if (l->bits == 8) {
            q[v] = _mm512_xor_si512(_mm512_loadu_si512(lines + v * (int)CPU_BLOCK_LINE),
                                    _mm512_set1_epi8((char)0x80));
            continue;
        }
        q[v] = _mm512_setzero_si512();
        CPU_UNROLL
        for (int width = 4; width > 0; width /= 2) {
            if ((int)l->bits & width) {
                q[v] = cpu_add_plane(q[v], lines + at * (int)CPU_BLOCK_LINE, width, at, v);
                at += width;
            }
        }
        if (l->levels != NULL) {
            q[v] = _mm512_shuffle_epi8(levels, q[v]);
        }
    }
}

/* The header's scales: f16, or halves of exponents, 2^(e - 128). For e < 2 these are subnormal,
 * 2^(21 + e) as bits; (e + 1) 2^21 is just that, and less than (e - 1) 2^23 for all others. */
CPU_SPECIALISE __m512 cpu_load_header(const struct cpu_layout *l, const uint8_t *header)
{
    if (!l->has_exps) {
        return cpu_load_f16(header);
    }
    const __m512i one = _mm512_set1_epi32(1);
    __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)header));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(_mm512_sub_epi32(e, one), 23),
                                                _mm512_slli_epi32(_mm512_add_epi32(e, one), 21)));
}

/* The scales and minimums of the halves of Q2_K, four bits each. */
CPU_SPECIALISE void cpu_unpack_nibbles(__m128i first, __m128i second, struct cpu_block *w)
{
    const __m512i low_half = _mm512_set1_epi32(0x0f);
    __m512i a = _mm512_cvtepu8_epi32(first), b = _mm512_cvtepu8_epi32(second);

    w->half_scale[0] = _mm512_cvtepi32_ps(_mm512_and_si512(a, low_half));
    w->half_scale[1] = _mm512_cvtepi32_ps(_mm512_and_si512(b, low_half));
    w->half_min =
        _mm512_or_si512(_mm512_srli_epi32(a, 4), _mm512_slli_epi32(_mm512_srli_epi32(b, 4), 16));
}

CPU_SPECIALISE void cpu_unpack_scales(const struct cpu_layout *l, const uint8_t *at,
                                      __m512 header_scale, __m512 header_min, struct cpu_block *w)
{
    const __m512 sign = _mm512_set1_ps(-0.0f);

    w->scale = header_scale;
    w->min = header_min;
    if (l->scales == CPU_SCALES_NONE) {
        return;
    }
    __m128i first = _mm_loadu_si128((const __m128i *)(const void *)at);
    if (l->scales == CPU_SCALES_BLOCK) {
        w->scale = _mm512_mul_ps(header_scale, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(first)));
        return;
    }
    __m128i second = _mm_loadu_si128((const __m128i *)(const void *)(at + CPU_STRIP_ROWS));
    if (l->scales == CPU_SCALES_HALVES) {
        w->half_scale[0] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(first));
        w->half_scale[1] = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(second));
    } else if (l->scales == CPU_SCALES_HALVES_MIN) {
        cpu_unpack_nibbles(first, second, w);
        w->min = _mm512_xor_ps(header_min, sign);
    } else {
        __m512 min = _mm512_mul_ps(header_min, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(second)));
        w->scale = _mm512_mul_ps(header_scale, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(first)));
        w->min = _mm512_xor_ps(min, sign);
    }
}

CPU_SPECIALISE int32_t cpu_offset_of(const struct cpu_layout *l)
{
    return l->bits == 8 ? 128 : l->offset;
}

CPU_SPECIALISE __m512i cpu_broadcast_dword(const void *at)
{
    int32_t bits;
    memcpy(&bits, at, sizeof(bits));
    return _mm512_set1_epi32(bits);
}

/* A row's activations of one block. */
struct cpu_row {
    const int8_t *q; /* (32) */
    const float *scale, *total;
    const int16_t *halves; /* (2) */
    const int32_t *minus;
};

/* Adds one block's exact sums of one row to its outputs: the whole block's, or each half's. Halves
 * stay below 2^24 also when scaled (Q6_K: 65,024 x 128, and their sum): float32 adds them exactly.
 */
CPU_SPECIALISE __m512 cpu_add_block(const struct cpu_layout *l, const struct cpu_block *w,
                                    const __m512i *sums, const struct cpu_row *row, __m512 acc)
{
    const __m512 a_scale = _mm512_set1_ps(*row->scale);
    __m512 products = _mm512_cvtepi32_ps(sums[0]);

    if (cpu_layout_has_halves(l)) {
        products = _mm512_mul_ps(products, w->half_scale[0]);
        products = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[1]), w->half_scale[1], products);
    }
    acc = _mm512_fmadd_ps(_mm512_mul_ps(w->scale, a_scale), products, acc);
    if (l->scales == CPU_SCALES_HALVES_MIN) {
        __m512i mins = _mm512_dpwssd_epi32(_mm512_setzero_si512(), cpu_broadcast_dword(row->halves),
                                           w->half_min);
        return _mm512_fmadd_ps(w->min, _mm512_mul_ps(a_scale, _mm512_cvtepi32_ps(mins)), acc);
    }
    return l->has_min ? _mm512_fmadd_ps(w->min, _mm512_set1_ps(*row->total), acc) : acc;
}

/* Where the kernel is in each strip. */
struct cpu_place {
    const uint8_t *at;
    __m512 scale, min; /* of the unit's header */
};

CPU_SPECIALISE void cpu_enter_unit(const struct cpu_layout *l, struct cpu_place *p)
{
    p->scale = cpu_load_header(l, p->at);
    p->min =
        l->has_min ? cpu_load_f16(p->at + cpu_layout_header_scales_bytes(l)) : _mm512_setzero_ps();
    p->at += cpu_layout_header_bytes(l);
}

CPU_SPECIALISE void cpu_unpack_block(const struct cpu_layout *l, __m512i levels,
                                     struct cpu_place *p, struct cpu_block *w)
{
    cpu_unpack_scales(l, p->at, p->scale, p->min, w);
    cpu_unpack_values(l, levels, p->at + cpu_layout_scales_bytes(l), w->q);
    p->at += cpu_layout_block_bytes(l);
}

/* A tile's row of its first block. */
static inline struct cpu_row cpu_tile_row(const struct cpu_act_tile *tile, uint32_t r)
{
    return (struct cpu_row){tile->q + (size_t)r * CPU_BLOCK, tile->scale + r, tile->total + r,
                            tile->halves + (size_t)r * 2, tile->minus + r};
}

/* The same block, r rows further. */
static inline struct cpu_row cpu_row_at(const struct cpu_row *row, uint32_t r)
{
    return (struct cpu_row){row->q + (size_t)r * CPU_BLOCK, row->scale + r, row->total + r,
                            row->halves + (size_t)r * 2, row->minus + r};
}

/* The next block of the same row, of a tile of n_tile_rows. */
static inline struct cpu_row cpu_row_after(const struct cpu_row *row, uint32_t n_tile_rows)
{
    return cpu_row_at(row, n_tile_rows);
}

#endif
