/* plugins/cpu/linear_vector256.h - a tile of rows against strips with vectors of 256 bits, for
 * levels that differ in how they multiply. A level includes this file, defines the five functions
 * that are declared below, and has multiply() for each layout.
 *
 * Sums of four rows and both halves of a strip's outputs stay in registers for a block, so that a
 * broadcast of four activations meets 16 outputs. Tiles of more rows go through the strip several
 * times or unpack a block once, into the first level of the cache, where their outputs wait. */
#ifndef PLUGINS_CPU_LINEAR_VECTOR256_H
#define PLUGINS_CPU_LINEAR_VECTOR256_H

#include "plugins/cpu/strip_avx2.h"

/* Rows of a group. */
#define GROUP_ROWS 4
#define HALF       8u /* outputs in a register */

/* What a block's sums are multiplied with, for each half of its outputs. Of the scales of the
 * halves of k a level fills what it uses. */
struct factors {
    __m256 scale[2], min[2];
    __m256 part_scale[2][2];        /* (half of k, half of the outputs) */
    __m256i part_scale_words[2][2]; /* the same in 16 bits, every output's twice */
    __m256i part_min[2];            /* pairs of 16 bits, one for each half of k */
};

/* A block as several groups read it. */
struct unpacked {
    struct factors factors;
    __m256i q[8][2];
};

/* Where a block's vectors come from: unpacked for several groups, or here and now. */
struct source {
    int is_unpacked; /* known when compiled */
    const struct unpacked *unpacked;
    __m256i levels;
    const uint8_t *lines;
};

/* Up to how many rows a tile is multiplied without unpacking a block for all of them: GROUP_ROWS or
 * more. */
CPU_SPECIALISE uint32_t direct_rows(const struct cpu_layout *l);
/* What is taken off a type's levels before they are multiplied. */
CPU_SPECIALISE int32_t levels_shift(const struct cpu_layout *l);
/* Vector v of one half of the outputs as it is multiplied. */
CPU_SPECIALISE __m256i load_values(const struct cpu_layout *l, __m256i levels, const uint8_t *lines,
                                   int v, int half);
/* The scales of the halves of k of one half of the outputs, for types that have them. */
CPU_SPECIALISE void unpack_parts(const struct cpu_layout *l, const struct cpu_scales_256 *s,
                                 int half, struct factors *f);
/* sum(q * a) of linear.h, for each row from row at on and both halves of the outputs. */
CPU_SPECIALISE void block_products(const struct cpu_layout *l, const struct source *from,
                                   const struct factors *f, const int n_rows,
                                   const struct cpu_act_tile *tile, size_t at,
                                   __m256 products[GROUP_ROWS][2]);

/* Eight words of a and of b in turns. */
CPU_SPECIALISE __m256i interleave(__m128i a, __m128i b)
{
    return _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
}

CPU_SPECIALISE __m256i source_vector(const struct cpu_layout *l, const struct source *from, int v,
                                     int half)
{
    return from->is_unpacked ? from->unpacked->q[v][half]
                             : load_values(l, from->levels, from->lines, v, half);
}

CPU_SPECIALISE void unpack_factors(const struct cpu_layout *l, const struct cpu_place_256 *place,
                                   struct factors *f)
{
    struct cpu_scales_256 s;

    cpu_unpack_scales(l, place->header, place->block, &s);
    CPU_UNROLL
    for (int half = 0; half < 2; half++) {
        f->scale[half] = s.scale[half];
        if (l->has_min) {
            f->min[half] = s.min[half];
        }
        if (cpu_layout_has_halves(l)) {
            unpack_parts(l, &s, half, f);
        }
        if (l->scales == CPU_SCALES_HALVES_MIN) {
            f->part_min[half] = interleave(s.part_min[0][half], s.part_min[1][half]);
        }
    }
}

/* Adds one block of n_rows rows, from row at on, to their outputs. */
CPU_SPECIALISE void multiply_block(const struct cpu_layout *l, const struct source *from,
                                   const struct factors *f, const int n_rows,
                                   const struct cpu_act_tile *tile, size_t at,
                                   __m256 acc[GROUP_ROWS][2])
{
    __m256 products[GROUP_ROWS][2];

    block_products(l, from, f, n_rows, tile, at, products);
    /* In registers, which the sums have left by now: a load costs as much as a multiply. */
    __m256 scale[2] = {f->scale[0], f->scale[1]};
    CPU_CHAIN(scale[0]);
    CPU_CHAIN(scale[1]);
    CPU_UNROLL
    for (int r = 0; r < n_rows; r++) {
        const __m256 a_scale = _mm256_broadcast_ss(tile->scale + at + r);
        CPU_UNROLL
        for (int half = 0; half < 2; half++) {
            acc[r][half] = _mm256_fmadd_ps(_mm256_mul_ps(scale[half], a_scale), products[r][half],
                                           acc[r][half]);
            if (l->scales == CPU_SCALES_HALVES_MIN) {
                __m256i halves = cpu_broadcast_dword(tile->halves + (at + (size_t)r) * 2);
                __m256i mins = _mm256_madd_epi16(halves, f->part_min[half]);
                __m256 total = _mm256_mul_ps(a_scale, _mm256_cvtepi32_ps(mins));
                acc[r][half] = _mm256_fmadd_ps(f->min[half], total, acc[r][half]);
            } else if (l->has_min) {
                __m256 total = _mm256_broadcast_ss(tile->total + at + r);
                acc[r][half] = _mm256_fmadd_ps(f->min[half], total, acc[r][half]);
            }
        }
    }
}

CPU_SPECIALISE void store_rows(const int n_rows, __m256 acc[][2], float *out)
{
    CPU_UNROLL
    for (int r = 0; r < n_rows; r++) {
        _mm256_storeu_ps(out + r * (int)CPU_STRIP_ROWS, acc[r][0]);
        _mm256_storeu_ps(out + r * (int)CPU_STRIP_ROWS + HALF, acc[r][1]);
    }
}

/* A tile of n_rows rows, one group. out (n_rows, 16) */
CPU_SPECIALISE void multiply_group(const enum cpu_layout_id id, const int n_rows,
                                   const struct cpu_act_tile *tile, const uint8_t *strip,
                                   float *out)
{
    const struct cpu_layout *l = &cpu_layouts[id];
    struct source from = {0, NULL, cpu_load_levels(l, levels_shift(l)), NULL};
    __m256 acc[GROUP_ROWS][2];

    CPU_UNROLL
    for (int i = 0; i < 2 * n_rows; i++) {
        acc[i / 2][i % 2] = _mm256_setzero_ps();
    }
    for (uint32_t b = 0; b < tile->n_blocks; b++) {
        struct cpu_place_256 place = cpu_enter_block(l, strip, b);
        struct factors f;

        unpack_factors(l, &place, &f);
        from.lines = place.lines;
        multiply_block(l, &from, &f, n_rows, tile, (size_t)b * tile->n_tile_rows, acc);
    }
    store_rows(n_rows, acc, out);
}

CPU_SPECIALISE void unpack_block(const struct cpu_layout *l, __m256i levels,
                                 const struct cpu_place_256 *place, struct unpacked *w)
{
    unpack_factors(l, place, &w->factors);
    CPU_UNROLL
    for (int i = 0; i < 16; i++) {
        w->q[i / 2][i % 2] = load_values(l, levels, place->lines, i / 2, i % 2);
    }
}

/* A tile of several groups: of four rows, and of three or two at its end rather than of one. out
 * (n_rows, 16) */
CPU_SPECIALISE void multiply_groups(const enum cpu_layout_id id, const struct cpu_act_tile *tile,
                                    const uint8_t *strip, float *out)
{
    const struct cpu_layout *l = &cpu_layouts[id];
    const __m256i levels = cpu_load_levels(l, levels_shift(l));
    struct unpacked memory, *w = &memory;
    __m256 acc[CPU_TILE_ROWS][2];

    memset(acc, 0, tile->n_rows * sizeof(acc[0]));
    for (uint32_t b = 0; b < tile->n_blocks; b++) {
        struct cpu_place_256 place = cpu_enter_block(l, strip, b);
        size_t at = (size_t)b * tile->n_tile_rows;

        unpack_block(l, levels, &place, w);
        CPU_APART(w);
        const struct source from = {1, w, levels, NULL};
        for (uint32_t row = 0; row < tile->n_rows;) {
            uint32_t left = tile->n_rows - row;
            if (left >= GROUP_ROWS && left != GROUP_ROWS + 1) {
                multiply_block(l, &from, &w->factors, GROUP_ROWS, tile, at + row, acc + row);
                row += GROUP_ROWS;
            } else if (left >= 3) {
                multiply_block(l, &from, &w->factors, 3, tile, at + row, acc + row);
                row += 3;
            } else {
                multiply_block(l, &from, &w->factors, 2, tile, at + row, acc + row);
                row += 2;
            }
        }
    }
    for (uint32_t r = 0; r < tile->n_rows; r++) {
        store_rows(1, acc + r, out + r * CPU_STRIP_ROWS);
    }
}

/* n rows of a tile from row on. */
CPU_SPECIALISE struct cpu_act_tile rows_of(const struct cpu_act_tile *tile, uint32_t row,
                                           uint32_t n)
{
    struct cpu_act_tile part = *tile;

    part.n_rows = n;
    part.q += row * CPU_BLOCK;
    part.scale += row;
    part.halves += 2 * row;
    part.minus += row;
    part.total += row;
    part.lanes += 4 * row;
    return part;
}

/* Up to GROUP_ROWS. */
CPU_SPECIALISE void multiply_few(const enum cpu_layout_id id, const struct cpu_act_tile *tile,
                                 const uint8_t *strip, float *out)
{
    switch (tile->n_rows) {
    case 1:
        multiply_group(id, 1, tile, strip, out);
        break;
    case 2:
        multiply_group(id, 2, tile, strip, out);
        break;
    case 3:
        multiply_group(id, 3, tile, strip, out);
        break;
    default:
        multiply_group(id, GROUP_ROWS, tile, strip, out);
        break;
    }
}

/* Group by group over the whole strip, which the caches hold from the first one on. */
CPU_SPECIALISE void multiply_directly(const enum cpu_layout_id id, const struct cpu_act_tile *tile,
                                      const uint8_t *strip, float *out)
{
    uint32_t n_groups = (tile->n_rows + GROUP_ROWS - 1) / GROUP_ROWS;

    for (uint32_t row = 0, n; row < tile->n_rows; row += n, n_groups--) {
        n = (tile->n_rows - row + n_groups - 1) / n_groups;
        const struct cpu_act_tile part = rows_of(tile, row, n);
        multiply_few(id, &part, strip, out + row * CPU_STRIP_ROWS);
    }
}

CPU_SPECIALISE void multiply(const enum cpu_layout_id id, const struct cpu_act_tile *tile,
                             const struct cpu_quant_strips *strips, float *out)
{
    for (uint32_t i = 0; i < strips->n; i++) {
        const uint8_t *strip = strips->first + i * strips->bytes;
        float *at = out + (size_t)i * tile->n_rows * CPU_STRIP_ROWS;

        if (tile->n_rows <= direct_rows(&cpu_layouts[id])) {
            multiply_directly(id, tile, strip, at);
        } else {
            multiply_groups(id, tile, strip, at);
        }
    }
}

#endif
