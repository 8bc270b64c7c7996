/* plugins/cpu/linear_avx2.c - products of quantised weights with AVX2 and FMA.
 *
 * A register holds 8 of a strip's 16 outputs. VPMADDUBSW multiplies unsigned weights with signed
 * activations and adds pairs into 16 bits, which hold a few of them before they must move to 32:
 * |a| <= 127, so a pair is at most 254 times the largest weight. Eight pairs of 4-bit weights make
 * 30,480, four of 5 bits 31,496, two of 6 bits 32,004. Weights of 8 bits, and levels that are as
 * wide, are signed and lend their sign to the activation: a pair is at most 2 x 128 x 127 = 32,512,
 * and moves at once. */
#include "plugins/cpu/linear.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

/* Rows whose sums, 16 outputs each, stay in registers for a block. */
#define GROUP_ROWS 4
#define HALF       8u /* outputs in a register */

/* As in linear_avx512.c: decode waits for memory. */
#define PREFETCH_BYTES 4096u

/* What a block's sums are multiplied with, for each half of its outputs. */
struct scales {
    __m256 scale[2], min[2];
    __m256i part_scale[2][2]; /* of each half of k: every output's twice, in 16 bits */
    __m256i part_offset[2];   /* pairs of 16 bits, one for each half of k */
    __m256i part_min[2];
};

/* A block as several groups of rows read it. */
struct unpacked {
    struct scales scales;
    __m256i q[8][2];
};

CPU_SPECIALISE __m256 load_f16(const uint8_t *at)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)at));
}

CPU_SPECIALISE __m256i load_line(const uint8_t *lines, int line, int half)
{
    return _mm256_loadu_si256(
        (const __m256i *)(const void *)(lines + line * (int)CPU_BLOCK_LINE + half * 32));
}

CPU_SPECIALISE __m256i broadcast_dword(const void *at)
{
    int32_t bits;
    memcpy(&bits, at, sizeof(bits));
    return _mm256_set1_epi32(bits);
}

/* Whether weights are multiplied as signed bytes, their offset taken off. */
CPU_SPECIALISE int is_signed(const struct cpu_layout *l)
{
    return l->peak > 63;
}

/* The levels in both lanes, ready for VPSHUFB. */
CPU_SPECIALISE __m256i load_levels(const struct cpu_layout *l)
{
    if (l->levels == NULL) {
        return _mm256_setzero_si256();
    }
    __m256i levels =
        _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i *)(const void *)l->levels));
    return is_signed(l) ? _mm256_sub_epi8(levels, _mm256_set1_epi8((char)l->offset)) : levels;
}

/* Adds a plane of width bits, at to at + width of every byte, to vector v of one half. */
CPU_SPECIALISE __m256i add_plane(__m256i q, const uint8_t *lines, int width, int at, int v,
                                 int half)
{
    int shift = v * width % 8 - at;
    __m256i line = load_line(lines, v * width / 8, half);

    line = shift < 0 ? _mm256_slli_epi32(line, -shift & 7) : _mm256_srli_epi32(line, shift & 7);
    return _mm256_or_si256(
        q, _mm256_and_si256(line, _mm256_set1_epi8((char)(((1 << width) - 1) << at))));
}

/* Vector v of one half as it is multiplied. */
CPU_SPECIALISE __m256i unpack_vector(const struct cpu_layout *l, __m256i levels,
                                     const uint8_t *lines, int v, int half)
{
    __m256i q = _mm256_setzero_si256();
    int at = 0;

    if (l->bits == 8) {
        return load_line(lines, v, half);
    }
    CPU_UNROLL
    for (int width = 4; width > 0; width /= 2) {
        if ((int)l->bits & width) {
            q = add_plane(q, lines + at * (int)CPU_BLOCK_LINE, width, at, v, half);
            at += width;
        }
    }
    return l->levels != NULL ? _mm256_shuffle_epi8(levels, q) : q;
}

/* The header's scales of one half: f16, or halves of exponents, 2^(e - 128). For e < 2 these are
 * subnormal, 2^(21 + e) as bits; (e + 1) 2^21 is just that, and less than (e - 1) 2^23 for all
 * others. */
CPU_SPECIALISE __m256 load_header(const struct cpu_layout *l, const uint8_t *header, int half)
{
    if (!l->has_exps) {
        return load_f16(header + half * 16);
    }
    const __m256i one = _mm256_set1_epi32(1);
    __m256i e =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(header + half * 8)));
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(_mm256_sub_epi32(e, one), 23),
                                                _mm256_slli_epi32(_mm256_add_epi32(e, one), 21)));
}

/* Eight words of a and of b in turns. */
CPU_SPECIALISE __m256i interleave(__m128i a, __m128i b)
{
    return _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
}

/* Scales of the halves of k of Q3_K and Q6_K. The offset is taken off each half's sum before that
 * is scaled: -offset * scale times the sum of the half's activations does it after. */
CPU_SPECIALISE void unpack_parts(const struct cpu_layout *l, __m128i first, __m128i second,
                                 int half, struct scales *s)
{
    const __m128i offset = _mm_set1_epi16((short)-l->offset);
    __m128i a = _mm_cvtepi8_epi16(first), b = _mm_cvtepi8_epi16(second);

    s->part_scale[0][half] = interleave(a, a);
    s->part_scale[1][half] = interleave(b, b);
    s->part_offset[half] = interleave(_mm_mullo_epi16(a, offset), _mm_mullo_epi16(b, offset));
}

/* The scales and minimums of the halves of Q2_K, four bits each. */
CPU_SPECIALISE void unpack_nibbles(__m128i first, __m128i second, int half, struct scales *s)
{
    const __m128i low = _mm_set1_epi16(0x0f);
    __m128i a = _mm_cvtepu8_epi16(first), b = _mm_cvtepu8_epi16(second);
    __m128i a_scale = _mm_and_si128(a, low), b_scale = _mm_and_si128(b, low);

    s->part_scale[0][half] = interleave(a_scale, a_scale);
    s->part_scale[1][half] = interleave(b_scale, b_scale);
    s->part_min[half] = interleave(_mm_srli_epi16(a, 4), _mm_srli_epi16(b, 4));
}

CPU_SPECIALISE void unpack_scales(const struct cpu_layout *l, const uint8_t *header,
                                  const uint8_t *block, int half, struct scales *s)
{
    const __m256 sign = _mm256_set1_ps(-0.0f);

    s->scale[half] = load_header(l, header, half);
    if (l->has_min) {
        s->min[half] = load_f16(header + cpu_layout_header_scales_bytes(l) + half * 16);
    }
    if (l->scales == CPU_SCALES_NONE) {
        return;
    }
    __m128i first = _mm_loadl_epi64((const __m128i *)(const void *)(block + half * 8));
    if (l->scales == CPU_SCALES_BLOCK) {
        s->scale[half] =
            _mm256_mul_ps(s->scale[half], _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(first)));
        return;
    }
    __m128i second =
        _mm_loadl_epi64((const __m128i *)(const void *)(block + CPU_STRIP_ROWS + half * 8));
    if (l->scales == CPU_SCALES_HALVES) {
        unpack_parts(l, first, second, half, s);
    } else if (l->scales == CPU_SCALES_HALVES_MIN) {
        unpack_nibbles(first, second, half, s);
        s->min[half] = _mm256_xor_ps(s->min[half], sign);
    } else {
        __m256 min = _mm256_mul_ps(s->min[half], _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(second)));
        s->scale[half] =
            _mm256_mul_ps(s->scale[half], _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(first)));
        s->min[half] = _mm256_xor_ps(min, sign);
    }
}

/* Pairs that 16 bits can hold, a power of two up to most. */
CPU_SPECIALISE int pairs_held(const struct cpu_layout *l, int most)
{
    int held = is_signed(l) ? 1 : INT16_MAX / (2 * 127 * (int)l->peak);

    return held >= most ? most : (held >= 4 ? 4 : (held >= 2 ? 2 : 1));
}

/* Where a block's vectors come from: unpacked once for several groups, or here and now. */
struct source {
    int is_unpacked; /* known when compiled */
    const struct unpacked *unpacked;
    __m256i levels;
    const uint8_t *lines;
};

/* Exact sums of n_rows rows with both halves of the outputs; the offset is not taken off. a's rows
 * lie side by side. */
CPU_SPECIALISE void dot(const struct cpu_layout *l, const struct source *from,
                        const struct scales *s, const int n_rows, const int8_t *a,
                        __m256i sums[GROUP_ROWS][2])
{
    const int parts = cpu_layout_has_halves(l) ? 2 : 1;
    const int held = pairs_held(l, 8 / parts);
    __m256i pairs[GROUP_ROWS][2] = {{_mm256_setzero_si256()}}; /* for loops that stay loops */

    CPU_UNROLL
    for (int v = 0; v < 8; v++) {
        __m256i q[2], peaks[2];
        CPU_UNROLL
        for (int half = 0; half < 2; half++) {
            q[half] = from->is_unpacked ? from->unpacked->q[v][half]
                                        : unpack_vector(l, from->levels, from->lines, v, half);
            peaks[half] = is_signed(l) ? _mm256_abs_epi8(q[half]) : q[half];
        }
        CPU_UNROLL
        for (int r = 0; r < n_rows; r++) {
            __m256i x = broadcast_dword(a + r * (int)CPU_BLOCK + 4 * v);
            CPU_UNROLL
            for (int half = 0; half < 2; half++) {
                __m256i p = _mm256_maddubs_epi16(peaks[half],
                                                 is_signed(l) ? _mm256_sign_epi8(x, q[half]) : x);
                pairs[r][half] = v % held == 0 ? p : _mm256_add_epi16(pairs[r][half], p);
                CPU_CHAIN(pairs[r][half]);
                if (v % held == held - 1) {
                    __m256i by = parts == 2 ? s->part_scale[v / 4][half] : _mm256_set1_epi16(1);
                    __m256i sum = _mm256_madd_epi16(pairs[r][half], by);
                    sums[r][half] = v < held ? sum : _mm256_add_epi32(sums[r][half], sum);
                    CPU_CHAIN(sums[r][half]);
                }
            }
        }
    }
}

/* Adds one block of n_rows rows, from row at on, to their outputs. */
CPU_SPECIALISE void multiply_block(const struct cpu_layout *l, const struct source *from,
                                   const struct scales *s, const int n_rows,
                                   const struct cpu_act_tile *tile, size_t at,
                                   __m256 acc[GROUP_ROWS][2])
{
    const int8_t *a = tile->q + at * CPU_BLOCK;
    __m256i sums[GROUP_ROWS][2];

    CPU_APART(a);
    dot(l, from, s, n_rows, a, sums);
    CPU_UNROLL
    for (int r = 0; r < n_rows; r++) {
        const __m256 a_scale = _mm256_broadcast_ss(tile->scale + at + r);
        CPU_UNROLL
        for (int half = 0; half < 2; half++) {
            __m256i sum = sums[r][half];
            if (l->scales == CPU_SCALES_HALVES) {
                __m256i halves = broadcast_dword(tile->halves + (at + (size_t)r) * 2);
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(halves, s->part_offset[half]));
            } else if (l->offset != 0 && !is_signed(l)) {
                __m256i minus = broadcast_dword(tile->minus + at + r);
                sum = _mm256_add_epi32(
                    sum, _mm256_slli_epi32(minus, __builtin_ctz((unsigned)l->offset)));
            }
            acc[r][half] = _mm256_fmadd_ps(_mm256_mul_ps(s->scale[half], a_scale),
                                           _mm256_cvtepi32_ps(sum), acc[r][half]);
            if (l->scales == CPU_SCALES_HALVES_MIN) {
                __m256i halves = broadcast_dword(tile->halves + (at + (size_t)r) * 2);
                __m256i mins = _mm256_madd_epi16(halves, s->part_min[half]);
                __m256 total = _mm256_mul_ps(a_scale, _mm256_cvtepi32_ps(mins));
                acc[r][half] = _mm256_fmadd_ps(s->min[half], total, acc[r][half]);
            } else if (l->has_min) {
                __m256 total = _mm256_broadcast_ss(tile->total + at + r);
                acc[r][half] = _mm256_fmadd_ps(s->min[half], total, acc[r][half]);
            }
        }
    }
}

/* Where a strip's block lies, and its unit's header. */
struct place {
    const uint8_t *header, *block;
};

CPU_SPECIALISE struct place enter_block(const struct cpu_layout *l, const uint8_t *strip,
                                        uint32_t b)
{
    const uint32_t unit_blocks = l->unit / CPU_BLOCK;
    const uint8_t *header = strip + (size_t)(b / unit_blocks) * cpu_layout_unit_bytes(l);
    const uint8_t *block =
        header + cpu_layout_header_bytes(l) + b % unit_blocks * cpu_layout_block_bytes(l);

    for (uint32_t i = 0; i < cpu_layout_block_bytes(l); i += CPU_BLOCK_LINE) {
        _mm_prefetch((const char *)block + PREFETCH_BYTES + i, _MM_HINT_T0);
    }
    return (struct place){header, block};
}

CPU_SPECIALISE void store(const int n_rows, __m256 acc[][2], float *out)
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
    struct source from = {0, NULL, load_levels(l), NULL};
    __m256 acc[GROUP_ROWS][2];

    CPU_UNROLL
    for (int i = 0; i < 2 * n_rows; i++) {
        acc[i / 2][i % 2] = _mm256_setzero_ps();
    }
    for (uint32_t b = 0; b < tile->n_blocks; b++) {
        struct place at = enter_block(l, strip, b);
        struct scales s;

        unpack_scales(l, at.header, at.block, 0, &s);
        unpack_scales(l, at.header, at.block, 1, &s);
        from.lines = at.block + cpu_layout_scales_bytes(l);
        multiply_block(l, &from, &s, n_rows, tile, (size_t)b * tile->n_tile_rows, acc);
    }
    store(n_rows, acc, out);
}

CPU_SPECIALISE void unpack_block(const struct cpu_layout *l, __m256i levels, const struct place *at,
                                 struct unpacked *w)
{
    CPU_UNROLL
    for (int half = 0; half < 2; half++) {
        unpack_scales(l, at->header, at->block, half, &w->scales);
        CPU_UNROLL
        for (int v = 0; v < 8; v++) {
            w->q[v][half] =
                unpack_vector(l, levels, at->block + cpu_layout_scales_bytes(l), v, half);
        }
    }
}

/* A tile of several groups: a block is unpacked once for all of them, and their outputs lie in the
 * first level. out (n_rows, 16) */
CPU_SPECIALISE void multiply_groups(const enum cpu_layout_id id, const struct cpu_act_tile *tile,
                                    const uint8_t *strip, float *out)
{
    const struct cpu_layout *l = &cpu_layouts[id];
    const __m256i levels = load_levels(l);
    struct unpacked memory, *w = &memory;
    __m256 acc[CPU_TILE_ROWS][2];

    memset(acc, 0, tile->n_rows * sizeof(acc[0]));
    for (uint32_t b = 0; b < tile->n_blocks; b++) {
        struct place place = enter_block(l, strip, b);
        size_t at = (size_t)b * tile->n_tile_rows;

        unpack_block(l, levels, &place, w);
        CPU_APART(w);
        const struct source from = {1, w, levels, NULL};
        for (uint32_t row = 0; row < tile->n_rows;) {
            uint32_t left = tile->n_rows - row;
            if (left >= GROUP_ROWS && left != GROUP_ROWS + 1) {
                multiply_block(l, &from, &w->scales, GROUP_ROWS, tile, at + row, acc + row);
                row += GROUP_ROWS;
            } else if (left >= 3) {
                multiply_block(l, &from, &w->scales, 3, tile, at + row, acc + row);
                row += 3;
            } else {
                multiply_block(l, &from, &w->scales, 2, tile, at + row, acc + row);
                row += 2;
            }
        }
    }
    for (uint32_t r = 0; r < tile->n_rows; r++) {
        store(1, acc + r, out + r * CPU_STRIP_ROWS);
    }
}

CPU_SPECIALISE void multiply(const enum cpu_layout_id id, const struct cpu_act_tile *tile,
                             const struct cpu_quant_strips *strips, float *out)
{
    for (uint32_t i = 0; i < strips->n; i++) {
        const uint8_t *strip = strips->first + i * strips->bytes;
        float *at = out + (size_t)i * tile->n_rows * CPU_STRIP_ROWS;

        switch (tile->n_rows) {
        case 1:
            multiply_group(id, 1, tile, strip, at);
            break;
        case 2:
            multiply_group(id, 2, tile, strip, at);
            break;
        case 3:
            multiply_group(id, 3, tile, strip, at);
            break;
        case 4:
            multiply_group(id, 4, tile, strip, at);
            break;
        default:
            multiply_groups(id, tile, strip, at);
            break;
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

/* Rounds 16 values to int8 at q; returns their sum. */
static int16_t quantise_16(__m256 low, __m256 high, __m256 inverse, int8_t *q)
{
    __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(low, inverse));
    __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(high, inverse));
    __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
    __m128i bytes =
        _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    __m256i sums = _mm256_add_epi32(a, b);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));

    _mm_storeu_si128((__m128i *)(void *)q, bytes);
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1));
    return (int16_t)_mm_cvtsi128_si32(four);
}

static void quantise(const float *x, const struct cpu_act_place *place)
{
    for (uint32_t b = 0; b < place->n_blocks; b++, x += CPU_BLOCK) {
        size_t at = (size_t)b * place->n_tile_rows;
        int8_t *q = place->q + at * CPU_BLOCK;
        int16_t *halves = place->halves + at * 2;
        __m256 v[4] = {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8), _mm256_loadu_ps(x + 16),
                       _mm256_loadu_ps(x + 24)};
        uint32_t peak_bits = peak_bits_of(v);
        float peak;

        memcpy(&peak, &peak_bits, sizeof(peak));
        if (peak_bits >= 0x7f800000 || peak < CPU_ACT_PEAK_MIN) {
            memset(q, 0, CPU_BLOCK);
            memset(halves, 0, 2 * sizeof(*halves));
            place->scale[at] = peak_bits >= 0x7f800000 ? NAN : 0.0f;
        } else {
            __m256 inverse = _mm256_set1_ps(127.0f / peak);
            halves[0] = quantise_16(v[0], v[1], inverse, q);
            halves[1] = quantise_16(v[2], v[3], inverse, q + 16);
            place->scale[at] = peak / 127.0f;
        }
        place->minus[at] = -(halves[0] + halves[1]);
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
