/* plugins/cpu/linear_float_avx2.c - products of F32, F16 and BF16 weights with AVX2 and FMA.
 *
 * The 16 lanes of one output of one row are two registers. Tiles share their loads: 2 outputs x 3
 * or 2 rows, or 4 outputs x 1 row. A tile's shape changes no sum. */
#include "plugins/cpu/linear.h"
#include "plugins/cpu/unroll.h"

#include <immintrin.h>
#include <string.h>

#define LANES    16u
#define OUTS_MAX 4
#define ROWS_MAX 3

struct lanes {
    __m256 half[2];
};

CPU_SPECIALISE uint32_t value_bytes(const enum cpu_float_type type)
{
    return type == CPU_FLOAT_F32 ? 4 : 2;
}

/* Eight weights: one half of the lanes. */
CPU_SPECIALISE __m256 load_weights(const enum cpu_float_type type, const uint8_t *at, int half)
{
    if (type == CPU_FLOAT_F32) {
        return _mm256_loadu_ps((const float *)(const void *)(at + half * 32));
    }
    __m128i words = _mm_loadu_si128((const __m128i *)(const void *)(at + half * 16));
    return type == CPU_FLOAT_F16
               ? _mm256_cvtph_ps(words)
               : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
}

/* linear.h's tree: halves onto each other. */
CPU_SPECIALISE float sum_lanes(const struct lanes *v)
{
    __m256 eight = _mm256_add_ps(v->half[0], v->half[1]);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

/* 16 values of k for a tile: acc[r][o] += w[o] * x[r]. Strides in bytes and floats. */
CPU_SPECIALISE void step(const enum cpu_float_type type, const int n_rows, const int n_outs,
                         const uint8_t *w, size_t w_stride, const float *x, size_t x_stride,
                         struct lanes acc[ROWS_MAX][OUTS_MAX])
{
    CPU_UNROLL
    for (int i = 0; i < 2; i++) {
        __m256 weights[OUTS_MAX];
        CPU_UNROLL
        for (int o = 0; o < n_outs; o++) {
            weights[o] = load_weights(type, w + (size_t)o * w_stride, i);
        }
        CPU_UNROLL
        for (int r = 0; r < n_rows; r++) {
            __m256 values = _mm256_loadu_ps(x + (size_t)r * x_stride + i * 8);
            CPU_UNROLL
            for (int o = 0; o < n_outs; o++) {
                acc[r][o].half[i] = _mm256_fmadd_ps(weights[o], values, acc[r][o].half[i]);
            }
        }
    }
}

/* The last k % 16 values, from copies that zeros make 16 long. */
CPU_SPECIALISE void last_step(const enum cpu_float_type type, const int n_rows, const int n_outs,
                              const struct cpu_float_strip *s, const uint8_t *w, const float *x,
                              uint32_t n, struct lanes acc[ROWS_MAX][OUTS_MAX])
{
    uint8_t w_copy[OUTS_MAX][LANES * sizeof(float)] = {{0}};
    float x_copy[ROWS_MAX][LANES] = {{0}};

    for (int o = 0; o < n_outs; o++) {
        memcpy(w_copy[o], w + (size_t)o * s->w_stride, (size_t)n * value_bytes(type));
    }
    for (int r = 0; r < n_rows; r++) {
        memcpy(x_copy[r], x + (size_t)r * s->x_stride, n * sizeof(float));
    }
    step(type, n_rows, n_outs, w_copy[0], sizeof(w_copy[0]), x_copy[0], LANES, acc);
}

CPU_SPECIALISE void multiply_small(const enum cpu_float_type type, const int n_rows,
                                   const int n_outs, const struct cpu_float_strip *s,
                                   uint32_t first_row, uint32_t first_out, float *out)
{
    const uint8_t *w = s->w + (size_t)first_out * s->w_stride;
    const float *x = s->x + (size_t)first_row * s->x_stride;
    struct lanes acc[ROWS_MAX][OUTS_MAX];
    uint32_t k = 0;

    CPU_UNROLL
    for (int i = 0; i < n_rows * n_outs; i++) {
        acc[i / n_outs][i % n_outs].half[0] = _mm256_setzero_ps();
        acc[i / n_outs][i % n_outs].half[1] = _mm256_setzero_ps();
    }
    for (; s->k - k >= LANES; k += LANES) {
        step(type, n_rows, n_outs, w, s->w_stride, x, s->x_stride, acc);
        w += LANES * value_bytes(type);
        x += LANES;
    }
    if (k < s->k) {
        last_step(type, n_rows, n_outs, s, w, x, s->k - k, acc);
    }
    out += first_row * CPU_STRIP_ROWS + first_out;
    CPU_UNROLL
    for (int i = 0; i < n_rows * n_outs; i++) {
        out[i / n_outs * (int)CPU_STRIP_ROWS + i % n_outs] =
            sum_lanes(&acc[i / n_outs][i % n_outs]);
    }
}

/* All outputs of n_rows rows. */
CPU_SPECIALISE void multiply_rows(const enum cpu_float_type type, const int n_rows,
                                  const struct cpu_float_strip *s, uint32_t first_row, float *out)
{
    const int n_outs = n_rows == 1 ? OUTS_MAX : 2;
    uint32_t o = 0;

    for (; s->n_outs - o >= (uint32_t)n_outs; o += (uint32_t)n_outs) {
        multiply_small(type, n_rows, n_outs, s, first_row, o, out);
    }
    for (; o < s->n_outs; o++) {
        multiply_small(type, n_rows, 1, s, first_row, o, out);
    }
}

CPU_SPECIALISE void multiply(const enum cpu_float_type type, const struct cpu_float_strip *s,
                             float *out)
{
    for (uint32_t row = 0; row < s->n_rows;) {
        uint32_t left = s->n_rows - row;
        if (left == 1) {
            multiply_rows(type, 1, s, row, out);
            row += 1;
        } else if (left == 2 || left == 4) {
            multiply_rows(type, 2, s, row, out);
            row += 2;
        } else {
            multiply_rows(type, ROWS_MAX, s, row, out);
            row += ROWS_MAX;
        }
    }
}

void cpu_multiply_f32_avx2(const struct cpu_float_strip *s, float *out)
{
    multiply(CPU_FLOAT_F32, s, out);
}

void cpu_multiply_f16_avx2(const struct cpu_float_strip *s, float *out)
{
    multiply(CPU_FLOAT_F16, s, out);
}

void cpu_multiply_bf16_avx2(const struct cpu_float_strip *s, float *out)
{
    multiply(CPU_FLOAT_BF16, s, out);
}
