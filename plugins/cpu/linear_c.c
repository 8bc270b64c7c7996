/* plugins/cpu/linear_c.c - the reference products: short, in the order that linear.h defines. */
#include "plugins/cpu/linear.h"

#include "format/types.h"

#include <math.h>
#include <string.h>

/* Adding and subtracting this rounds a float of magnitude below 2^22 to the nearest integer, ties
 * to even: what the vector units' conversions do. */
#define ROUND_MAGIC 12582912.0f

static uint32_t bits_of(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

static void quantise_block(const float *x, int8_t *q, float *ret_scale, int16_t *halves)
{
    uint32_t peak_bits = 0;
    float peak;

    for (uint32_t i = 0; i < CPU_BLOCK; i++) {
        uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
        peak_bits = magnitude > peak_bits ? magnitude : peak_bits;
    }
    memcpy(&peak, &peak_bits, sizeof(peak));
    memset(halves, 0, 2 * sizeof(*halves));
    if (peak_bits >= 0x7f800000 || peak < CPU_ACT_PEAK_MIN) {
        memset(q, 0, CPU_BLOCK);
        *ret_scale = peak_bits >= 0x7f800000 ? NAN : 0.0f;
        return;
    }
    float inverse = 127.0f / peak;
    for (uint32_t i = 0; i < CPU_BLOCK; i++) {
        float rounded = (x[i] * inverse + ROUND_MAGIC) - ROUND_MAGIC;
        q[i] = (int8_t)rounded;
        halves[i / 16] = (int16_t)(halves[i / 16] + q[i]);
    }
    *ret_scale = peak / 127.0f;
}

static void quantise(const float *x, const struct cpu_act_place *place)
{
    for (uint32_t b = 0; b < place->n_blocks; b++) {
        size_t at = (size_t)b * place->n_tile_rows;
        int16_t *halves = place->halves + at * 2;

        quantise_block(x + b * CPU_BLOCK, place->q + at * CPU_BLOCK, place->scale + at, halves);
        place->minus[at] = -CPU_MINUS_UNIT * (halves[0] + halves[1]);
        place->total[at] = place->scale[at] * (float)(halves[0] + halves[1]);
    }
}

/* A block of a strip in plain numbers. */
struct block {
    float scale[CPU_STRIP_ROWS];
    float min[CPU_STRIP_ROWS];
    int32_t half_scale[2][CPU_STRIP_ROWS]; /* ones where the halves share the block's */
    int32_t half_min[2][CPU_STRIP_ROWS];
    int16_t q[CPU_STRIP_ROWS][CPU_BLOCK]; /* the offset already taken off */
};

static float load_f16(const uint8_t *at)
{
    uint16_t bits;
    memcpy(&bits, at, sizeof(bits));
    return fmt_f16_to_f32(bits);
}

/* 2^(e - 128): levels are doubled. The smallest two are subnormal. */
static float half_of_exponent(uint8_t e)
{
    uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float scale;
    memcpy(&scale, &bits, sizeof(scale));
    return scale;
}

static int16_t unpack_value(const struct cpu_layout *l, const uint8_t *lines, uint32_t o,
                            uint32_t k)
{
    uint32_t vector = k / 4, at = 4 * o + k % 4, below = 0;
    int32_t q = 0;

    for (uint32_t width = 8; width > 0; width /= 2) {
        if (l->bits & width) {
            uint32_t byte = lines[vector * width / 8 * CPU_BLOCK_LINE + at];
            q |= (int32_t)((byte >> vector * width % 8 & ((1u << width) - 1)) << below);
            lines += width * CPU_BLOCK_LINE;
            below += width;
        }
    }
    if (l->bits == 8) {
        q = (int8_t)q;
    }
    return (int16_t)((l->levels != NULL ? l->levels[q] : q) - l->offset);
}

/* Output o's scales and minimums of a block, from the block's integers and the header's numbers. */
static void unpack_scales(const struct cpu_layout *l, uint32_t o, const uint8_t *header,
                          const uint8_t *block, struct block *ret)
{
    const uint8_t *mins = header + cpu_layout_header_scales_bytes(l);
    uint8_t first = block[o], second = block[CPU_STRIP_ROWS + o]; /* where there are any */
    float scale = l->has_exps ? half_of_exponent(header[o]) : load_f16(header + 2 * o);
    float min = l->has_min ? load_f16(mins + 2 * o) : 0.0f;

    ret->half_scale[0][o] = ret->half_scale[1][o] = 1;
    ret->half_min[0][o] = ret->half_min[1][o] = 1;
    switch (l->scales) {
    case CPU_SCALES_NONE:
        break;
    case CPU_SCALES_BLOCK:
        scale = scale * (float)(int8_t)first;
        break;
    case CPU_SCALES_BLOCK_MIN:
        scale = scale * (float)first;
        min = -(min * (float)second);
        break;
    case CPU_SCALES_HALVES:
        ret->half_scale[0][o] = (int8_t)first;
        ret->half_scale[1][o] = (int8_t)second;
        break;
    case CPU_SCALES_HALVES_MIN:
        ret->half_scale[0][o] = first & 0xf;
        ret->half_scale[1][o] = second & 0xf;
        ret->half_min[0][o] = first >> 4;
        ret->half_min[1][o] = second >> 4;
        min = -min;
        break;
    }
    ret->scale[o] = scale;
    ret->min[o] = min;
}

static void unpack_block(const struct cpu_layout *l, const uint8_t *header, const uint8_t *block,
                         struct block *ret)
{
    for (uint32_t o = 0; o < CPU_STRIP_ROWS; o++) {
        unpack_scales(l, o, header, block, ret);
        for (uint32_t k = 0; k < CPU_BLOCK; k++) {
            ret->q[o][k] = unpack_value(l, block + cpu_layout_scales_bytes(l), o, k);
        }
    }
}

static int32_t dot16(const int16_t *a, const int8_t *b)
{
    int32_t sum = 0;
    for (uint32_t i = 0; i < 16; i++) {
        sum += a[i] * b[i];
    }
    return sum;
}

/* Adds one block of one row to its 16 outputs. */
static void multiply_block(const struct block *w, uint32_t has_min, const int8_t *a, float a_scale,
                           const int16_t *a_halves, float *out)
{
    for (uint32_t o = 0; o < CPU_STRIP_ROWS; o++) {
        int32_t dot = w->half_scale[0][o] * dot16(w->q[o], a) +
                      w->half_scale[1][o] * dot16(w->q[o] + 16, a + 16);
        out[o] = fmaf(w->scale[o] * a_scale, (float)dot, out[o]);
        if (has_min) {
            int32_t sum = w->half_min[0][o] * a_halves[0] + w->half_min[1][o] * a_halves[1];
            out[o] = fmaf(w->min[o], a_scale * (float)sum, out[o]);
        }
    }
}

static void multiply_strip(enum cpu_layout_id id, const struct cpu_act_tile *tile,
                           const uint8_t *strip, float *out)
{
    const struct cpu_layout *l = &cpu_layouts[id];
    uint32_t unit_blocks = l->unit / CPU_BLOCK;

    memset(out, 0, tile->n_rows * CPU_STRIP_ROWS * sizeof(*out));
    for (uint32_t b = 0; b < tile->n_blocks; b++) {
        const uint8_t *header = strip + (size_t)(b / unit_blocks) * cpu_layout_unit_bytes(l);
        const uint8_t *block =
            header + cpu_layout_header_bytes(l) + b % unit_blocks * cpu_layout_block_bytes(l);
        struct block w;

        unpack_block(l, header, block, &w);
        for (uint32_t r = 0; r < tile->n_rows; r++) {
            size_t at = (size_t)b * tile->n_tile_rows + r;
            multiply_block(&w, l->has_min, tile->q + at * CPU_BLOCK, tile->scale[at],
                           tile->halves + at * 2, out + r * CPU_STRIP_ROWS);
        }
    }
}

static void multiply(enum cpu_layout_id id, const struct cpu_act_tile *tile,
                     const struct cpu_quant_strips *strips, float *out)
{
    for (uint32_t i = 0; i < strips->n; i++) {
        multiply_strip(id, tile, strips->first + i * strips->bytes,
                       out + (size_t)i * tile->n_rows * CPU_STRIP_ROWS);
    }
}

CPU_EACH_LAYOUT(CPU_DEFINE_QUANT)

/* Lanes of a float product, and values of a weight row converted at a time. */
#define LANES      16u
#define PIECE_LONG 256u

static void widen(enum cpu_float_type type, const uint8_t *src, uint32_t n, float *dst)
{
    uint16_t half;

    if (type == CPU_FLOAT_F32) {
        memcpy(dst, src, n * sizeof(*dst));
        return;
    }
    for (uint32_t i = 0; i < n; i++) {
        memcpy(&half, src + 2 * i, sizeof(half));
        dst[i] = type == CPU_FLOAT_F16 ? fmt_f16_to_f32(half) : fmt_bf16_to_f32(half);
    }
}

static float sum_lanes(float *lanes)
{
    for (uint32_t half = LANES / 2; half > 0; half /= 2) {
        for (uint32_t i = 0; i < half; i++) {
            lanes[i] += lanes[i + half];
        }
    }
    return lanes[0];
}

static void multiply_floats(enum cpu_float_type type, const struct cpu_float_strip *s, float *out)
{
    uint32_t value_bytes = type == CPU_FLOAT_F32 ? 4 : 2;

    for (uint32_t o = 0; o < s->n_outs; o++) {
        float lanes[CPU_TILE_ROWS][LANES] = {{0}};

        for (uint32_t k = 0; k < s->k; k += PIECE_LONG) {
            uint32_t n = s->k - k < PIECE_LONG ? s->k - k : PIECE_LONG;
            float w[PIECE_LONG];

            widen(type, s->w + o * s->w_stride + (size_t)k * value_bytes, n, w);
            for (uint32_t r = 0; r < s->n_rows; r++) {
                const float *x = s->x + r * s->x_stride + k;
                for (uint32_t i = 0; i < n; i++) {
                    lanes[r][i % LANES] += w[i] * x[i];
                }
            }
        }
        for (uint32_t r = 0; r < s->n_rows; r++) {
            out[r * CPU_STRIP_ROWS + o] = sum_lanes(lanes[r]);
        }
    }
}

static void multiply_f32(const struct cpu_float_strip *s, float *out)
{
    multiply_floats(CPU_FLOAT_F32, s, out);
}

static void multiply_f16(const struct cpu_float_strip *s, float *out)
{
    multiply_floats(CPU_FLOAT_F16, s, out);
}

static void multiply_bf16(const struct cpu_float_strip *s, float *out)
{
    multiply_floats(CPU_FLOAT_BF16, s, out);
}

const struct cpu_linear_kernels cpu_linear_c = {
    .quantise = quantise,
    .quant = {CPU_EACH_LAYOUT(CPU_QUANT_ENTRY)},
    .real =
        {
            [CPU_FLOAT_F32] = multiply_f32,
            [CPU_FLOAT_F16] = multiply_f16,
            [CPU_FLOAT_BF16] = multiply_bf16,
        },
};
