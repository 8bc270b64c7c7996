/* plugins/cpu/linear_avx2.c - products of quantised weights with AVX2 and FMA.
 *
 * VPMADDUBSW multiplies unsigned weights with signed activations and adds pairs into 16 bits, which
 * hold a few of them before they must move to 32: |a| <= 127, so a pair is at most 254 times the
 * largest weight. Eight pairs of 4-bit weights make 30,480, four of 5 bits 31,496. Sums of halves
 * of k begin with what the weights' offset adds too much, negated: four pairs of six-bit weights
 * without their offset make 32,512, and what comes before does no harm where it wraps around.
 * Weights of 8 bits, and levels that are as wide, are signed and lend their sign to the activation:
 * a pair is at most 2 x 128 x 127 = 32,512, and moves at once. */
#include "plugins/cpu/linear.h"
#include "plugins/cpu/linear_vector256.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

/* Whether weights are multiplied as signed bytes, their offset taken off. */
CPU_SPECIALISE int is_signed(const struct cpu_layout *l)
{
    return l->peak > 63;
}

/* Measured: bytes and nibbles cost less to unpack again than to store and load; their scales count,
 * too. */
CPU_SPECIALISE uint32_t direct_rows(const struct cpu_layout *l)
{
    if (l->levels != NULL || (l->bits != 4 && l->bits != 8)) {
        return GROUP_ROWS;
    }
    return l->scales == CPU_SCALES_NONE ? 12 : 8;
}

CPU_SPECIALISE int32_t levels_shift(const struct cpu_layout *l)
{
    return is_signed(l) ? l->offset : 0;
}

CPU_SPECIALISE __m256i load_values(const struct cpu_layout *l, __m256i levels, const uint8_t *lines,
                                   int v, int half)
{
    return cpu_unpack_vector(l, levels, lines, v, half);
}

/* The multiply that widens the sums of a half of k scales them, too. */
CPU_SPECIALISE void unpack_parts(const struct cpu_layout *l, const struct cpu_scales_256 *s,
                                 int half, struct factors *f)
{
    const __m128i a = s->part_scale[0][half], b = s->part_scale[1][half];

    f->part_scale_words[0][half] = interleave(a, a);
    f->part_scale_words[1][half] = interleave(b, b);
}

/* Whether the 16-bit sums begin with what the offset adds too much. */
CPU_SPECIALISE int starts_with_offset(const struct cpu_layout *l)
{
    return cpu_layout_has_halves(l) && l->offset != 0;
}

/* Pairs that 16 bits can hold, a power of two up to most. */
CPU_SPECIALISE int pairs_held(const struct cpu_layout *l, int most)
{
    int peak = starts_with_offset(l) ? l->offset : (int)l->peak;
    int held = is_signed(l) ? 1 : INT16_MAX / (2 * 127 * peak);

    return held >= most ? most : (held >= 4 ? 4 : (held >= 2 ? 2 : 1));
}

/* Exact sums, halves of k scaled; where these begin with nothing the offset is not taken off. a's
 * rows and lanes lie side by side. */
CPU_SPECIALISE void dot(const struct cpu_layout *l, const struct source *from,
                        const struct factors *f, const int n_rows, const int8_t *a,
                        const int16_t *lanes, __m256i sums[GROUP_ROWS][2])
{
    const int parts = cpu_layout_has_halves(l) ? 2 : 1;
    const int held = pairs_held(l, 8 / parts);
    __m256i pairs[GROUP_ROWS][2] = {{_mm256_setzero_si256()}}; /* for loops that stay loops */

    CPU_UNROLL
    for (int v = 0; v < 8; v++) {
        const __m256i q[2] = {source_vector(l, from, v, 0), source_vector(l, from, v, 1)};
        const __m256i magnitude[2] = {_mm256_abs_epi8(q[0]), _mm256_abs_epi8(q[1])};
        CPU_UNROLL
        for (int r = 0; r < n_rows; r++) {
            __m256i x = cpu_broadcast_dword(a + r * (int)CPU_BLOCK + 4 * v);
            __m256i start = _mm256_setzero_si256();
            if (v % held == 0 && starts_with_offset(l)) {
                start = _mm256_slli_epi16(cpu_broadcast_dword(lanes + r * 4 + v / 4 * 2),
                                          __builtin_ctz((unsigned)l->offset));
            }
            __m256i p[2]; /* multiplied both before either is added: 1 % faster */
            CPU_UNROLL
            for (int half = 0; half < 2; half++) {
                p[half] = is_signed(l)
                              ? _mm256_maddubs_epi16(magnitude[half], _mm256_sign_epi8(x, q[half]))
                              : _mm256_maddubs_epi16(q[half], x);
            }
            CPU_CHAIN(p[0]);
            CPU_CHAIN(p[1]);
            CPU_UNROLL
            for (int half = 0; half < 2; half++) {
                if (v % held != 0) {
                    pairs[r][half] = _mm256_add_epi16(pairs[r][half], p[half]);
                } else {
                    pairs[r][half] =
                        starts_with_offset(l) ? _mm256_add_epi16(p[half], start) : p[half];
                }
                CPU_CHAIN(pairs[r][half]);
                if (v % held == held - 1) {
                    __m256i by =
                        parts == 2 ? f->part_scale_words[v / 4][half] : _mm256_set1_epi16(1);
                    __m256i sum = _mm256_madd_epi16(pairs[r][half], by);
                    sums[r][half] = v < held ? sum : _mm256_add_epi32(sums[r][half], sum);
                    CPU_CHAIN(sums[r][half]);
                }
            }
        }
    }
}

/* Scaled halves of k and their sum stay below 2^24 (Q6_K: 65,024 x 128): exact in float32. */
CPU_SPECIALISE void block_products(const struct cpu_layout *l, const struct source *from,
                                   const struct factors *f, const int n_rows,
                                   const struct cpu_act_tile *tile, size_t at,
                                   __m256 products[GROUP_ROWS][2])
{
    const int8_t *a = tile->q + at * CPU_BLOCK;
    __m256i sums[GROUP_ROWS][2];

    CPU_APART(a);
    dot(l, from, f, n_rows, a, tile->lanes + at * 4, sums);
    CPU_UNROLL
    for (int r = 0; r < n_rows; r++) {
        CPU_UNROLL
        for (int half = 0; half < 2; half++) {
            __m256i sum = sums[r][half];
            if (l->offset != 0 && !is_signed(l) && !starts_with_offset(l)) {
                sum = _mm256_add_epi32(sum, cpu_load_minus(l->offset, tile->minus + at + r));
            }
            products[r][half] = _mm256_cvtepi32_ps(sum);
        }
    }
}

CPU_EACH_LAYOUT(CPU_DEFINE_QUANT)

/* The largest magnitude of a block, as bits: those of floats above zero order as the floats do. */
static uint32_t peak_bits_of(const __m256 *x)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i peak = _mm256_setzero_si256();

    for (int i = 0; i < 4; i++) {
        peak = _mm256_max_epi32(peak, _mm256_and_si256(_mm256_castps_si256(x[i]), magnitude));
    }
    __m128i four = _mm_max_epi32(_mm256_castsi256_si128(peak), _mm256_extracti128_si256(peak, 1));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(four);
}

/* Rounds 16 values to int8 at q; returns their sum. lanes (2) */
static int16_t quantise_16(__m256 low, __m256 high, __m256 inverse, int8_t *q, int16_t *lanes)
{
    __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(low, inverse));
    __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(high, inverse));
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    /* Pairs, those of k % 4 < 2 in even lanes; then the sum of every second. */
    __m128i pairs = _mm_maddubs_epi16(_mm_set1_epi8(1), bytes);
    pairs = _mm_add_epi16(pairs, _mm_shuffle_epi32(pairs, 0x4e));
    pairs = _mm_add_epi16(pairs, _mm_shuffle_epi32(pairs, 0xb1));
    int32_t negated = _mm_cvtsi128_si32(_mm_sub_epi16(_mm_setzero_si128(), pairs));

    _mm_storeu_si128((__m128i *)(void *)q, bytes);
    memcpy(lanes, &negated, sizeof(negated));
    return (int16_t)(-lanes[0] - lanes[1]);
}

static void quantise(const float *x, const struct cpu_act_place *place)
{
    for (uint32_t b = 0; b < place->n_blocks; b++, x += CPU_BLOCK) {
        size_t at = (size_t)b * place->n_tile_rows;
        int8_t *q = place->q + at * CPU_BLOCK;
        int16_t *halves = place->halves + at * 2, *lanes = place->lanes + at * 4;
        __m256 v[4] = {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _mm256_loadu_ps(x + 16),
                       _mm256_loadu_ps(x + 24)};
        uint32_t peak_bits = peak_bits_of(v);
        float peak;

        memcpy(&peak, &peak_bits, sizeof(peak));
        if (peak_bits >= 0x7f800000 || peak < CPU_ACT_PEAK_MIN) {
            memset(q, 0, CPU_BLOCK);
            memset(halves, 0, 2 * sizeof(*halves));
            memset(lanes, 0, 4 * sizeof(*lanes));
            place->scale[at] = peak_bits >= 0x7f800000 ? NAN : 0.0f;
        } else {
            __m256 inverse = _mm256_set1_ps(127.0f / peak);
            halves[0] = quantise_16(v[0], v[1], inverse, q, lanes);
            halves[1] = quantise_16(v[2], v[3], inverse, q + 16, lanes + 2);
            place->scale[at] = peak / 127.0f;
        }
        place->minus[at] = -CPU_MINUS_UNIT * (halves[0] + halves[1]);
        place->total[at] = place->scale[at] * (float)(halves[0] + halves[1]);
    }
}

const struct cpu_linear_kernels cpu_linear_avx2 = {
    .quantise = quantise,
    .quant = {CPU_EACH_LAYOUT(CPU_QUANT_ENTRY)},
    .real =
        {
            [CPU_FLOAT_F32] = cpu_multiply_f32_avx2,
            [CPU_FLOAT_F16] = cpu_multiply_f16_avx2,
            [CPU_FLOAT_BF16] = cpu_multiply_bf16_avx2,
        },
};
