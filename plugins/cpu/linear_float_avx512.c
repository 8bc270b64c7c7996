/* plugins/cpu/linear_float_avx512.c - products of F32, F16 and BF16 weights with AVX-512.
 *
 * One register is the 16 lanes of one output of one row. Tiles of 4 outputs x 4 rows share their
 * loads; a tile's shape changes no sum. */
#include "plugins/cpu/linear.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>

#define LANES     16u
#define TILE_OUTS 4
#define TILE_ROWS 4

/* The weights at k..k + 15 of a row; lanes outside mask are zeros and not read. */
CPU_SPECIALISE __m512 load_weights(const enum cpu_float_type type, const uint8_t *row, uint32_t k,
                                   __mmask16 mask)
{
    if (type == CPU_FLOAT_F32) {
        return _mm512_maskz_loadu_ps(mask, row + (size_t)k * 4);
    }
    __m256i half = _mm256_maskz_loadu_epi16(mask, row + (size_t)k * 2);
    if (type == CPU_FLOAT_F16) {
        return _mm512_cvtph_ps(half);
    }
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

/* linear.h's tree: halves onto each other. */
CPU_SPECIALISE float sum_lanes(__m512 v)
{
    __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* One step of k for a tile: acc[r][o] += w[o] * x[r]. */
CPU_SPECIALISE void step(const enum cpu_float_type type, const int n_rows, const int n_outs,
                         const struct cpu_float_strip *s, const uint8_t *w, const float *x,
                         uint32_t k, __mmask16 mask, __m512 acc[TILE_ROWS][TILE_OUTS])
{
    __m512 weights[TILE_OUTS];

    CPU_UNROLL
    for (int o = 0; o < n_outs; o++) {
        weights[o] = load_weights(type, w + (size_t)o * s->w_stride, k, mask);
    }
    CPU_UNROLL
    for (int r = 0; r < n_rows; r++) {
        __m512 values = _mm512_maskz_loadu_ps(mask, x + (size_t)r * s->x_stride + k);
        CPU_UNROLL
        for (int o = 0; o < n_outs; o++) {
            acc[r][o] = _mm512_fmadd_ps(weights[o], values, acc[r][o]);
        }
    }
}

CPU_SPECIALISE void multiply_small(const enum cpu_float_type type, const int n_rows,
                                   const int n_outs, const struct cpu_float_strip *s,
                                   uint32_t first_row, uint32_t first_out, float *out)
{
    const uint8_t *w = s->w + (size_t)first_out * s->w_stride;
    const float *x = s->x + (size_t)first_row * s->x_stride;
    __m512 acc[TILE_ROWS][TILE_OUTS];
    uint32_t k = 0;

    CPU_UNROLL
    for (int i = 0; i < n_rows * n_outs; i++) {
        acc[i / n_outs][i % n_outs] = _mm512_setzero_ps();
    }
    for (; s->k - k >= LANES; k += LANES) {
        step(type, n_rows, n_outs, s, w, x, k, 0xffff, acc);
    }
    if (k < s->k) {
        step(type, n_rows, n_outs, s, w, x, k, (__mmask16)((1u << (s->k - k)) - 1), acc);
    }
    out += first_row * CPU_STRIP_ROWS + first_out;
    CPU_UNROLL
    for (int i = 0; i < n_rows * n_outs; i++) {
        out[i / n_outs * (int)CPU_STRIP_ROWS + i % n_outs] = sum_lanes(acc[i / n_outs][i % n_outs]);
    }
}

/* All outputs of n_rows rows. */
CPU_SPECIALISE void multiply_rows(const enum cpu_float_type type, const int n_rows,
                                  const struct cpu_float_strip *s, uint32_t first_row, float *out)
{
    uint32_t o = 0;

    for (; s->n_outs - o >= TILE_OUTS; o += TILE_OUTS) {
        multiply_small(type, n_rows, TILE_OUTS, s, first_row, o, out);
    }
    for (; o < s->n_outs; o++) {
        multiply_small(type, n_rows, 1, s, first_row, o, out);
    }
}

CPU_SPECIALISE void multiply(const enum cpu_float_type type, const struct cpu_float_strip *s,
                             float *out)
{
    uint32_t row = 0;

    for (; s->n_rows - row >= TILE_ROWS; row += TILE_ROWS) {
        multiply_rows(type, TILE_ROWS, s, row, out);
    }
    for (; row < s->n_rows; row++) {
        multiply_rows(type, 1, s, row, out);
    }
}

void cpu_multiply_f32_avx512(const struct cpu_float_strip *s, float *out)
{
    multiply(CPU_FLOAT_F32, s, out);
}

void cpu_multiply_f16_avx512(const struct cpu_float_strip *s, float *out)
{
    multiply(CPU_FLOAT_F16, s, out);
}

void cpu_multiply_bf16_avx512(const struct cpu_float_strip *s, float *out)
{
    multiply(CPU_FLOAT_BF16, s, out);
}
