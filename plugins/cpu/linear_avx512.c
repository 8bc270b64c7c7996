/* plugins/cpu/linear_avx512.c - products of quantised weights with AVX-512 VNNI.
 *
 * One register holds 16 outputs: VPDPBUSD multiplies a vector of the strip (16 outputs x 4 k) with
 * a broadcast of four activations, eight times a block. A strip is unpacked once for a group of up
 * to 16 rows, whose sums stay in registers for all of k. */
#include "plugins/cpu/linear.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

/* How far ahead of the block in work to ask for the strip's bytes: decode waits for memory, and the
 * hardware's own prefetch stops at each page. */
#define PREFETCH_BYTES 4096u

/* One block: vectors of unsigned values, and what its sums are multiplied with. */
struct block {
    __m512i q[8];
    __m512 scale, min;
    __m512 half_scale[2];
    __m512i half_min; /* pairs of 16 bits */
};

CPU_SPECIALISE __m512 load_f16(const uint8_t *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)at));
}

/* The levels in every lane, ready for VPSHUFB. */
CPU_SPECIALISE __m512i load_levels(const struct cpu_layout *l)
{
    if (l->levels == NULL) {
        return _mm512_setzero_si512();
    }
    return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *)(const void *)l->levels));
}

/* Adds a plane of width bits, at to at + width of every byte, to vector v. */
CPU_SPECIALISE __m512i add_plane(__m512i q, const uint8_t *lines, int width, int at, int v)
{
    int shift = v * width % 8 - at;
    __m512i line = _mm512_loadu_si512(lines + v * width / 8 * (int)CPU_BLOCK_LINE);

    line = shift < 0 ? _mm512_slli_epi32(line, (unsigned)-shift & 7)
                     : _mm512_srli_epi32(line, (unsigned)shift & 7);
    return _mm512_or_si512(
        q, _mm512_and_si512(line, _mm512_set1_epi8((char)(((1 << width) - 1) << at))));
}

/* Unsigned bytes: signed ones move up by 128, as offset_of says. */
CPU_SPECIALISE void unpack_values(const struct cpu_layout *l, __m512i levels, const uint8_t *lines,
                                  __m512i *q)
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
                q[v] = add_plane(q[v], lines + at * (int)CPU_BLOCK_LINE, width, at, v);
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
CPU_SPECIALISE __m512 load_header(const struct cpu_layout *l, const uint8_t *header)
{
    if (!l->has_exps) {
        return load_f16(header);
    }
    const __m512i one = _mm512_set1_epi32(1);
    __m512i e = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)header));
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_slli_epi32(_mm512_sub_epi32(e, one), 23),
                                                _mm512_slli_epi32(_mm512_add_epi32(e, one), 21)));
}

/* The scales and minimums of the halves of Q2_K, four bits each. */
CPU_SPECIALISE void unpack_nibbles(__m128i first, __m128i second, struct block *w)
{
    const __m512i low_half = _mm512_set1_epi32(0x0f);
    __m512i a = _mm512_cvtepu8_epi32(first), b = _mm512_cvtepu8_epi32(second);

    w->half_scale[0] = _mm512_cvtepi32_ps(_mm512_and_si512(a, low_half));
    w->half_scale[1] = _mm512_cvtepi32_ps(_mm512_and_si512(b, low_half));
    w->half_min =
        _mm512_or_si512(_mm512_srli_epi32(a, 4), _mm512_slli_epi32(_mm512_srli_epi32(b, 4), 16));
}

CPU_SPECIALISE void unpack_scales(const struct cpu_layout *l, const uint8_t *at,
                                  __m512 header_scale, __m512 header_min, struct block *w)
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
        unpack_nibbles(first, second, w);
        w->min = _mm512_xor_ps(header_min, sign);
    } else {
        __m512 min = _mm512_mul_ps(header_min, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(second)));
        w->scale = _mm512_mul_ps(header_scale, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(first)));
        w->min = _mm512_xor_ps(min, sign);
    }
}

CPU_SPECIALISE int32_t offset_of(const struct cpu_layout *l)
{
    return l->bits == 8 ? 128 : l->offset;
}

CPU_SPECIALISE __m512i broadcast_dword(const void *at)
{
    int32_t bits;
    memcpy(&bits, at, sizeof(bits));
    return _mm512_set1_epi32(bits);
}

/* Exact products of vectors [first, first + n) with one row's activations a (32), starting from
 * start. */
CPU_SPECIALISE __m512i dot(const struct block *w, int first, int n, const int8_t *a, __m512i start)
{
    CPU_UNROLL
    for (int v = first; v < first + n; v++) {
        start = _mm512_dpbusd_epi32(start, w->q[v], broadcast_dword(a + 4 * v));
    }
    return start;
}

/* Adds one block of one row to its outputs. The pair of 16-bit sums of the activations' halves,
 * times the offset that the stored values have too much, is one VPDPWSSD. Halves stay below 2^24
 * also when scaled (Q6_K: 65,024 x 128, and their sum): float32 adds them exactly. */
CPU_SPECIALISE __m512 multiply_block(const struct cpu_layout *l, const struct block *w,
                                     const int8_t *a, float a_scale, const int16_t *a_halves,
                                     float a_total, __m512 acc)
{
    const __m512i zero = _mm512_setzero_si512();
    const uint32_t low = (uint32_t)-offset_of(l) & 0xffff;
    __m512i halves = broadcast_dword(a_halves);
    __m512 products;

    if (cpu_layout_has_halves(l)) {
        __m512i first = _mm512_dpwssd_epi32(zero, halves, _mm512_set1_epi32((int32_t)low));
        __m512i second = _mm512_dpwssd_epi32(zero, halves, _mm512_set1_epi32((int32_t)(low << 16)));
        __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(dot(w, 0, 4, a, first)), w->half_scale[0]);
        products =
            _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot(w, 4, 4, a, second)), w->half_scale[1], scaled);
    } else {
        __m512i both = _mm512_set1_epi32((int32_t)(low << 16 | low));
        __m512i start = low != 0 ? _mm512_dpwssd_epi32(zero, halves, both) : zero;
        products = _mm512_cvtepi32_ps(dot(w, 0, 8, a, start));
    }
    acc = _mm512_fmadd_ps(_mm512_mul_ps(w->scale, _mm512_set1_ps(a_scale)), products, acc);
    if (l->scales == CPU_SCALES_HALVES_MIN) {
        __m512i sums = _mm512_dpwssd_epi32(zero, halves, w->half_min);
        __m512 total = _mm512_mul_ps(_mm512_set1_ps(a_scale), _mm512_cvtepi32_ps(sums));
        return _mm512_fmadd_ps(w->min, total, acc);
    }
    return l->has_min ? _mm512_fmadd_ps(w->min, _mm512_set1_ps(a_total), acc) : acc;
}

/* n_rows rows of the tile from first on. out (n_rows, 16) */
CPU_SPECIALISE void multiply_rows(const enum cpu_layout_id id, const int n_rows,
                                  const struct cpu_act_tile *tile, uint32_t first,
                                  const uint8_t *strip, float *out)
{
    const struct cpu_layout *l = &cpu_layouts[id];
    const uint32_t unit_blocks = l->unit / CPU_BLOCK;
    const int8_t *a = tile->q + (size_t)first * CPU_BLOCK;
    const float *a_scale = tile->scale + first;
    const float *a_total = tile->total + first;
    const int16_t *a_halves = tile->halves + (size_t)first * 2;
    const __m512i levels = load_levels(l);
    __m512 acc[CPU_TILE_ROWS];

    CPU_UNROLL
    for (int r = 0; r < n_rows; r++) {
        acc[r] = _mm512_setzero_ps();
    }
    for (uint32_t unit = 0; unit < tile->n_blocks / unit_blocks; unit++) {
        __m512 scale = load_header(l, strip);
        __m512 min =
            l->has_min ? load_f16(strip + cpu_layout_header_scales_bytes(l)) : _mm512_setzero_ps();

        strip += cpu_layout_header_bytes(l);
        for (uint32_t b = 0; b < unit_blocks; b++) {
            struct block w;

            for (uint32_t i = 0; i < cpu_layout_block_bytes(l); i += CPU_BLOCK_LINE) {
                _mm_prefetch((const char *)strip + PREFETCH_BYTES + i, _MM_HINT_T0);
            }
            unpack_scales(l, strip, scale, min, &w);
            unpack_values(l, levels, strip + cpu_layout_scales_bytes(l), w.q);
            CPU_UNROLL
            for (int r = 0; r < n_rows; r++) {
                acc[r] = multiply_block(l, &w, a + r * CPU_BLOCK, a_scale[r], a_halves + r * 2,
                                        a_total[r], acc[r]);
            }
            strip += cpu_layout_block_bytes(l);
            a += tile->n_tile_rows * CPU_BLOCK;
            a_scale += tile->n_tile_rows;
            a_halves += tile->n_tile_rows * 2;
            a_total += tile->n_tile_rows;
        }
    }
    CPU_UNROLL
    for (int r = 0; r < n_rows; r++) {
        _mm512_storeu_ps(out + r * CPU_STRIP_ROWS, acc[r]);
    }
}

/* All rows of a tile, in groups whose sums fit the registers. */
CPU_SPECIALISE void multiply_tile(const enum cpu_layout_id id, const struct cpu_act_tile *tile,
                                  const uint8_t *strip, float *out)
{
    uint32_t row = 0;

    if (tile->n_rows == 16) {
        multiply_rows(id, 16, tile, 0, strip, out);
        return;
    }
    for (; tile->n_rows - row >= 8; row += 8) {
        multiply_rows(id, 8, tile, row, strip, out + row * CPU_STRIP_ROWS);
    }
    for (; tile->n_rows - row >= 4; row += 4) {
        multiply_rows(id, 4, tile, row, strip, out + row * CPU_STRIP_ROWS);
    }
    for (; tile->n_rows - row >= 2; row += 2) {
        multiply_rows(id, 2, tile, row, strip, out + row * CPU_STRIP_ROWS);
    }
    if (row < tile->n_rows) {
        multiply_rows(id, 1, tile, row, strip, out + row * CPU_STRIP_ROWS);
    }
}

#define DEFINE_QUANT(name, id)                                                          \
    static void name(const struct cpu_act_tile *tile, const uint8_t *strip, float *out) \
    {                                                                                   \
        multiply_tile(id, tile, strip, out);                                            \
    }

DEFINE_QUANT(multiply_q4_0, CPU_LAYOUT_Q4_0)
DEFINE_QUANT(multiply_q4_1, CPU_LAYOUT_Q4_1)
DEFINE_QUANT(multiply_q5_0, CPU_LAYOUT_Q5_0)
DEFINE_QUANT(multiply_q5_1, CPU_LAYOUT_Q5_1)
DEFINE_QUANT(multiply_q8_0, CPU_LAYOUT_Q8_0)
DEFINE_QUANT(multiply_q2_k, CPU_LAYOUT_Q2_K)
DEFINE_QUANT(multiply_q3_k, CPU_LAYOUT_Q3_K)
DEFINE_QUANT(multiply_q4_k, CPU_LAYOUT_Q4_K)
DEFINE_QUANT(multiply_q5_k, CPU_LAYOUT_Q5_K)
DEFINE_QUANT(multiply_q6_k, CPU_LAYOUT_Q6_K)
DEFINE_QUANT(multiply_iq4_nl, CPU_LAYOUT_IQ4_NL)
DEFINE_QUANT(multiply_iq4_xs, CPU_LAYOUT_IQ4_XS)
DEFINE_QUANT(multiply_mxfp4, CPU_LAYOUT_MXFP4)

/* Rounds 16 values to int8 at q; returns their sum. */
CPU_SPECIALISE int32_t quantise_16(__m512 x, __m512 inverse, int8_t *q)
{
    __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(x, inverse));
    _mm_storeu_si128((__m128i *)(void *)q, _mm512_cvtepi32_epi8(rounded));
    return _mm512_reduce_add_epi32(rounded);
}

static void quantise(const float *x, const struct cpu_act_place *place)
{
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);

    for (uint32_t b = 0; b < place->n_blocks; b++, x += CPU_BLOCK) {
        size_t at = (size_t)b * place->n_tile_rows;
        int8_t *q = place->q + at * CPU_BLOCK;
        int16_t *halves = place->halves + at * 2;
        __m512 low = _mm512_loadu_ps(x), high = _mm512_loadu_ps(x + 16);
        int32_t peak_bits = _mm512_reduce_max_epi32(
            _mm512_max_epi32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                             _mm512_and_si512(_mm512_castps_si512(high), magnitude)));
        float peak;

        memcpy(&peak, &peak_bits, sizeof(peak));
        if (peak_bits >= 0x7f800000 || peak < CPU_ACT_PEAK_MIN) {
            memset(q, 0, CPU_BLOCK);
            memset(halves, 0, 2 * sizeof(*halves));
            place->scale[at] = peak_bits >= 0x7f800000 ? NAN : 0.0f;
        } else {
            __m512 inverse = _mm512_set1_ps(127.0f / peak);
            halves[0] = (int16_t)quantise_16(low, inverse, q);
            halves[1] = (int16_t)quantise_16(high, inverse, q + 16);
            place->scale[at] = peak / 127.0f;
        }
        place->total[at] = place->scale[at] * (float)(halves[0] + halves[1]);
    }
}

const struct cpu_linear_kernels cpu_linear_avx512 = {
    .quantise = quantise,
    .quant =
        {
            [CPU_LAYOUT_Q4_0] = multiply_q4_0,
            [CPU_LAYOUT_Q4_1] = multiply_q4_1,
            [CPU_LAYOUT_Q5_0] = multiply_q5_0,
            [CPU_LAYOUT_Q5_1] = multiply_q5_1,
            [CPU_LAYOUT_Q8_0] = multiply_q8_0,
            [CPU_LAYOUT_Q2_K] = multiply_q2_k,
            [CPU_LAYOUT_Q3_K] = multiply_q3_k,
            [CPU_LAYOUT_Q4_K] = multiply_q4_k,
            [CPU_LAYOUT_Q5_K] = multiply_q5_k,
            [CPU_LAYOUT_Q6_K] = multiply_q6_k,
            [CPU_LAYOUT_IQ4_NL] = multiply_iq4_nl,
            [CPU_LAYOUT_IQ4_XS] = multiply_iq4_xs,
            [CPU_LAYOUT_MXFP4] = multiply_mxfp4,
        },
    .real =
        {
            [CPU_FLOAT_F32] = cpu_multiply_f32_avx512,
            [CPU_FLOAT_F16] = cpu_multiply_f16_avx512,
            [CPU_FLOAT_BF16] = cpu_multiply_bf16_avx512,
        },
};
