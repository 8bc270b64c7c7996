/* plugins/cpu/linear_avxvnni.c - products of quantised weights with AVX2 and AVX-VNNI, for
 * processors that have VPDPBUSD without AVX-512.
 *
 * VPDPBUSD adds four products of unsigned weights and signed activations to 32 bits, whatever the
 * weights' width. Sums begin with what the weights' offset adds too much, negated. */
#include "plugins/cpu/linear.h"
#include "plugins/cpu/linear_vector256.h"

#include <immintrin.h>
#include <stdbool.h>
#include <string.h>

/* Signed bytes move up by 128, to be unsigned. */
CPU_SPECIALISE int32_t offset_of(const struct cpu_layout *l)
{
    return l->bits == 8 ? 128 : l->offset;
}

CPU_SPECIALISE uint32_t direct_rows(const struct cpu_layout *l)
{
    return GROUP_ROWS;
}

CPU_SPECIALISE int32_t levels_shift(const struct cpu_layout *l)
{
    return 0;
}

CPU_SPECIALISE __m256i load_values(const struct cpu_layout *l, __m256i levels, const uint8_t *lines,
                                   int v, int half)
{
    __m256i q = cpu_unpack_vector(l, levels, lines, v, half);

    return l->bits == 8 ? _mm256_xor_si256(q, _mm256_set1_epi8((char)0x80)) : q;
}

CPU_SPECIALISE void unpack_parts(const struct cpu_layout *l, const struct cpu_scales_256 *s,
                                 int half, struct factors *f)
{
    f->part_scale[0][half] = cpu_float_of_words(s->part_scale[0][half]);
    f->part_scale[1][half] = cpu_float_of_words(s->part_scale[1][half]);
}

/* Where a row's sums begin: of the whole block, or of a half of k. */
CPU_SPECIALISE __m256i start_sums(const struct cpu_layout *l, const int16_t *a_halves,
                                  const int32_t *a_minus, int part)
{
    const uint32_t low = (uint32_t)-offset_of(l) & 0xffff;

    if (low == 0) {
        return _mm256_setzero_si256();
    }
    if (cpu_layout_has_halves(l)) {
        return _mm256_madd_epi16(cpu_broadcast_dword(a_halves),
                                 _mm256_set1_epi32((int32_t)(part == 0 ? low : low << 16)));
    }
    return cpu_load_minus(offset_of(l), a_minus);
}

/* Exact sums of n vectors from first on. a's rows lie side by side. */
CPU_SPECIALISE void dot(const struct cpu_layout *l, const struct source *from, int first, int n,
                        const int n_rows, const int8_t *a, __m256i sums[GROUP_ROWS][2])
{
    CPU_UNROLL
    for (int v = first; v < first + n; v++) {
        const __m256i q[2] = {source_vector(l, from, v, 0), source_vector(l, from, v, 1)};
        CPU_UNROLL
        for (int r = 0; r < n_rows; r++) {
            __m256i x = cpu_broadcast_dword(a + r * (int)CPU_BLOCK + 4 * v);
            sums[r][0] = _mm256_dpbusd_avx_epi32(sums[r][0], q[0], x);
            sums[r][1] = _mm256_dpbusd_avx_epi32(sums[r][1], q[1], x);
        }
    }
}

/* Exact sums of one part: a half of k, or (n_parts 1) the whole block. */
CPU_SPECIALISE void sum_part(const struct cpu_layout *l, const struct source *from,
                             const int n_rows, const struct cpu_act_tile *tile, size_t at, int part,
                             int n_parts, __m256i sums[GROUP_ROWS][2])
{
    const int8_t *a = tile->q + at * CPU_BLOCK;

    CPU_APART(a);
    CPU_UNROLL
    for (int r = 0; r < n_rows; r++) {
        sums[r][0] = sums[r][1] =
            start_sums(l, tile->halves + (at + (size_t)r) * 2, tile->minus + at + (size_t)r, part);
    }
    dot(l, from, part * 8 / n_parts, 8 / n_parts, n_rows, a, sums);
}

/* Halves of k stay below 2^24 also when scaled (Q6_K: 65,024 x 128, and their sum): float32 adds
 * them exactly. */
CPU_SPECIALISE void block_products(const struct cpu_layout *l, const struct source *from,
                                   const struct factors *f, const int n_rows,
                                   const struct cpu_act_tile *tile, size_t at,
                                   __m256 products[GROUP_ROWS][2])
{
    const bool has_halves = cpu_layout_has_halves(l);
    __m256i sums[GROUP_ROWS][2];

    sum_part(l, from, n_rows, tile, at, 0, has_halves ? 2 : 1, sums);
    CPU_UNROLL
    for (int i = 0; i < 2 * n_rows; i++) {
        __m256 sum = _mm256_cvtepi32_ps(sums[i / 2][i % 2]);
        products[i / 2][i % 2] = has_halves ? _mm256_mul_ps(sum, f->part_scale[0][i % 2]) : sum;
    }
    if (!has_halves) {
        return;
    }
    sum_part(l, from, n_rows, tile, at, 1, 2, sums);
    CPU_UNROLL
    for (int i = 0; i < 2 * n_rows; i++) {
        products[i / 2][i % 2] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[i / 2][i % 2]),
                                                 f->part_scale[1][i % 2], products[i / 2][i % 2]);
    }
}

CPU_EACH_LAYOUT(CPU_DEFINE_QUANT)

/* Quantising, and float weights: AVX2's. */
const struct cpu_linear_kernels cpu_linear_avxvnni = {
    .quant = {CPU_EACH_LAYOUT(CPU_QUANT_ENTRY)},
};
