/* plugins/cpu/linear_avx512.c - products of quantised weights with AVX-512 VNNI.
 *
 * One register holds 16 outputs: VPDPBUSD multiplies a vector of the strip (16 outputs x 4 k) with
 * a broadcast of four activations, eight times a block. A strip is unpacked once for a group of up
 * to 16 rows, whose sums stay in registers for all of k. */
#include "plugins/cpu/linear.h"
#include "plugins/cpu/strip_avx512.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

/* How far ahead of the block in work to ask for the strip's bytes: decode waits for memory, and the
 * hardware's own prefetch stops at each page. */
#define PREFETCH_BYTES 4096u

/* Rows whose sums, with those of two strips, stay in registers for all of k. */
#define ROWS_MAX 8

/* Where the exact sums of a row begin, so that they end as those of values without offset: of the
 * whole block, or of each half. */
CPU_SPECIALISE void start_sums(const struct cpu_layout *l, const int16_t *a_halves,
                               const int32_t *a_minus, __m512i *ret)
{
    const uint32_t low = (uint32_t)-cpu_offset_of(l) & 0xffff;

    ret[0] = ret[1] = _mm512_setzero_si512();
    if (low == 0) {
        return;
    }
    if (cpu_layout_has_halves(l)) {
        __m512i halves = cpu_broadcast_dword(a_halves);
        ret[0] = _mm512_dpwssd_epi32(ret[0], halves, _mm512_set1_epi32((int32_t)low));
        ret[1] = _mm512_dpwssd_epi32(ret[1], halves, _mm512_set1_epi32((int32_t)(low << 16)));
    } else {
        const unsigned shift = cpu_minus_shift(cpu_offset_of(l));
        ret[0] = cpu_broadcast_dword(a_minus);
        if (shift != 0) {
            ret[0] = _mm512_slli_epi32(ret[0], shift);
        }
    }
}

/* Exact products of n vectors from first on with one row's activations a (32), added to the sums of
 * each strip. */
CPU_SPECIALISE void dot(const int n_strips, const struct cpu_block *w, int first, int n,
                        const int8_t *a, __m512i *sums)
{
    CPU_UNROLL
    for (int v = first; v < first + n; v++) {
        __m512i four = cpu_broadcast_dword(a + 4 * v);
        CPU_UNROLL
        for (int s = 0; s < n_strips; s++) {
            sums[s] = _mm512_dpbusd_epi32(sums[s], w[s].q[v], four);
        }
    }
}

/* Adds one block of one row to its outputs. acc (n_strips) */
CPU_SPECIALISE void multiply_block(const struct cpu_layout *l, const int n_strips,
                                   const struct cpu_block *w, const struct cpu_row *row,
                                   __m512 *acc)
{
    const int parts = cpu_layout_has_halves(l) ? 2 : 1;
    __m512i starts[2], sums[2][CPU_STRIPS_MAX];

    start_sums(l, row->halves, row->minus, starts);
    CPU_UNROLL
    for (int part = 0; part < parts; part++) {
        CPU_UNROLL
        for (int s = 0; s < n_strips; s++) {
            sums[part][s] = starts[part];
        }
        dot(n_strips, w, part * 4, 8 / parts, row->q, sums[part]);
    }
    CPU_UNROLL
    for (int s = 0; s < n_strips; s++) {
        const __m512i both[2] = {sums[0][s], sums[parts - 1][s]};
        acc[s] = cpu_add_block(l, &w[s], both, row, acc[s]);
    }
}

/* Memory is read best as one stream. So one strip's bytes are asked for some way ahead; of two that
 * are read side by side those of the next two, in the order in which they lie. Asked for into the
 * second level only, they would push the activations out of it, and with that out of the first. */
CPU_SPECIALISE const uint8_t *prefetch_block(const struct cpu_layout *l, const int n_strips,
                                             const uint8_t *ahead)
{
    const uint32_t bytes = (uint32_t)n_strips * cpu_layout_unit_bytes(l) / (l->unit / CPU_BLOCK);

    for (uint32_t i = 0; i < bytes; i += CPU_BLOCK_LINE) {
        _mm_prefetch((const char *)ahead + i, _MM_HINT_T0);
    }
    return ahead + bytes;
}

/* n_rows rows of the tile from first on, and n_strips strips. */
CPU_SPECIALISE void multiply_rows(const enum cpu_layout_id id, const int n_strips, const int n_rows,
                                  const struct cpu_act_tile *tile, uint32_t first,
                                  const struct cpu_quant_strips *strips, float *out)
{
    const struct cpu_layout *l = &cpu_layouts[id];
    const uint32_t unit_blocks = l->unit / CPU_BLOCK;
    const __m512i levels = cpu_load_levels(l);
    struct cpu_row row = cpu_tile_row(tile, first);
    const uint8_t *ahead =
        strips->first + (n_strips == 1 ? PREFETCH_BYTES : CPU_STRIPS_MAX * strips->bytes);
    struct cpu_place places[CPU_STRIPS_MAX] = {{NULL, _mm512_setzero_ps(), _mm512_setzero_ps()}};
    __m512 acc[ROWS_MAX][CPU_STRIPS_MAX];

    CPU_UNROLL
    for (int i = 0; i < n_rows * n_strips; i++) {
        acc[i / n_strips][i % n_strips] = _mm512_setzero_ps();
    }
    CPU_UNROLL
    for (int s = 0; s < n_strips; s++) {
        places[s].at = strips->first + (size_t)s * strips->bytes;
    }
    for (uint32_t b = 0; b < tile->n_blocks; b++) {
        struct cpu_block w[CPU_STRIPS_MAX];

        ahead = prefetch_block(l, n_strips, ahead);
        CPU_UNROLL
        for (int s = 0; s < n_strips; s++) {
            if (b % unit_blocks == 0) {
                cpu_enter_unit(l, &places[s]);
            }
            cpu_unpack_block(l, levels, &places[s], &w[s]);
        }
        CPU_KEEP(row.q);
        CPU_KEEP(row.scale);
        CPU_UNROLL
        for (int r = 0; r < n_rows; r++) {
            const struct cpu_row one = cpu_row_at(&row, (uint32_t)r);
            multiply_block(l, n_strips, w, &one, acc[r]);
        }
        row = cpu_row_after(&row, tile->n_tile_rows);
    }
    CPU_UNROLL
    for (int i = 0; i < n_rows * n_strips; i++) {
        size_t at = (size_t)(i % n_strips) * tile->n_rows + first + (size_t)(i / n_strips);
        _mm512_storeu_ps(out + at * CPU_STRIP_ROWS, acc[i / n_strips][i % n_strips]);
    }
}

/* Three rows or more have enough to do with two strips at once; fewer take one after the other. */
CPU_SPECIALISE void multiply_group(const enum cpu_layout_id id, const int n_rows,
                                   const struct cpu_act_tile *tile, uint32_t first,
                                   const struct cpu_quant_strips *strips, float *out)
{
    if (strips->n == 2 && n_rows > 2) {
        multiply_rows(id, 2, n_rows, tile, first, strips, out);
        return;
    }
    for (uint32_t i = 0; i < strips->n; i++) {
        const struct cpu_quant_strips one = {strips->first + i * strips->bytes, strips->bytes, 1};
        multiply_rows(id, 1, n_rows, tile, first, &one,
                      out + (size_t)i * tile->n_rows * CPU_STRIP_ROWS);
    }
}

/* A tile goes in one group of rows or in two of about the same size: each reads the strips. */
CPU_SPECIALISE void multiply(const enum cpu_layout_id id, const struct cpu_act_tile *tile,
                             const struct cpu_quant_strips *strips, float *out)
{
    for (uint32_t row = 0, n; row < tile->n_rows; row += n) {
        uint32_t left = tile->n_rows - row;

        n = left <= ROWS_MAX ? left : (left + 1) / 2;
        switch (n) {
        case 1:
            multiply_group(id, 1, tile, row, strips, out);
            break;
        case 2:
            multiply_group(id, 2, tile, row, strips, out);
            break;
        case 3:
            multiply_group(id, 3, tile, row, strips, out);
            break;
        case 4:
            multiply_group(id, 4, tile, row, strips, out);
            break;
        case 5:
            multiply_group(id, 5, tile, row, strips, out);
            break;
        case 6:
            multiply_group(id, 6, tile, row, strips, out);
            break;
        case 7:
            multiply_group(id, 7, tile, row, strips, out);
            break;
        default:
            multiply_group(id, 8, tile, row, strips, out);
            break;
        }
    }
}

CPU_EACH_LAYOUT(CPU_DEFINE_QUANT)

/* Rounds 32 values to int8 at q; halves get the sums of 16. VPSADBW adds eight bytes, which must be
 * unsigned: each is 128 too much. */
CPU_SPECIALISE void quantise_32(__m512 low, __m512 high, __m512 inverse, int8_t *q, int16_t *halves)
{
    __m128i first = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(low, inverse)));
    __m128i second = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(high, inverse)));
    const __m128i sign = _mm_set1_epi8((char)0x80), zero = _mm_setzero_si128();
    __m128i a = _mm_sad_epu8(_mm_xor_si128(first, sign), zero);
    __m128i b = _mm_sad_epu8(_mm_xor_si128(second, sign), zero);
    __m128i sums = _mm_add_epi64(_mm_unpacklo_epi64(a, b), _mm_unpackhi_epi64(a, b));

    _mm_storeu_si128((__m128i *)(void *)q, first);
    _mm_storeu_si128((__m128i *)(void *)(q + 16), second);
    halves[0] = (int16_t)(_mm_cvtsi128_si32(sums) - 16 * 128);
    halves[1] = (int16_t)(_mm_cvtsi128_si32(_mm_unpackhi_epi64(sums, sums)) - 16 * 128);
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
            quantise_32(low, high, _mm512_set1_ps(127.0f / peak), q, halves);
            place->scale[at] = peak / 127.0f;
        }
        place->minus[at] = -CPU_MINUS_UNIT * (halves[0] + halves[1]);
        place->total[at] = place->scale[at] * (float)(halves[0] + halves[1]);
    }
}

const struct cpu_linear_kernels cpu_linear_avx512 = {
    .quantise = quantise,
    .quant = {CPU_EACH_LAYOUT(CPU_QUANT_ENTRY)},
    .real =
        {
            [CPU_FLOAT_F32] = cpu_multiply_f32_avx512,
            [CPU_FLOAT_F16] = cpu_multiply_f16_avx512,
            [CPU_FLOAT_BF16] = cpu_multiply_bf16_avx512,
        },
};
