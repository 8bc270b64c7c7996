/* tests/kernels/attention_stored.c - what a cache makes of K and V, by docs/kv-layout.md. */
#include "tests/kernels/attention_stored.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* x rounded to a number of significant bits and a least power of two, to nearest even. */
static double round_bits(double x, int bits, int least)
{
    int exponent;

    if (x == 0.0 || !isfinite(x)) {
        return x;
    }
    frexp(x, &exponent); /* x = m 2^exponent, 0.5 <= |m| < 1 */
    int unit = exponent - bits < least ? least : exponent - bits;
    return ldexp(nearbyint(ldexp(x, -unit)), unit);
}

static double round_f16(double x)
{
    return round_bits(x, 11, -24);
}

/* The two bytes of a number that F16 has. */
static uint16_t f16_bytes(double x)
{
    int exponent;
    double a = fabs(x);
    uint16_t sign = signbit(x) ? 0x8000 : 0;

    if (isnan(x)) {
        return 0x7e00;
    }
    if (a < 0x1p-14) {
        return (uint16_t)(sign | (int)(a * 0x1p24));
    }
    frexp(a, &exponent);
    return (uint16_t)(sign | ((exponent + 14) * 1024 + (int)ldexp(a, 11 - exponent) - 1024));
}

size_t attn_token_bytes(uint32_t type, uint32_t dim)
{
    switch (type) {
    case GQA_TYPE_Q8_0:
        return (dim + 31) / 32 * (2 + 32);
    case GQA_TYPE_Q4_0:
        return (dim + 31) / 32 * (2 + 16);
    case GQA_TYPE_F32:
        return 4 * (size_t)dim;
    default:
        return 2 * (size_t)dim;
    }
}

/* ---- quants ------------------------------------------------------------------------------ */

struct quant {
    double scale;
    int codes[32];
};

static struct quant quantise(uint32_t type, const float *x, uint32_t n)
{
    struct quant made = {.scale = 0};
    int least = type == GQA_TYPE_Q8_0 ? -127 : -8, most = type == GQA_TYPE_Q8_0 ? 127 : 7;
    float peak = 0;

    for (uint32_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            made.scale = NAN;
            return made;
        }
        peak = fabsf(x[i]) > fabsf(peak) ? x[i] : peak;
    }
    made.scale = round_f16(type == GQA_TYPE_Q8_0 ? fabsf(peak) / 127.0f : peak / -8.0f);
    made.scale = made.scale > 65504 ? 65504 : made.scale < -65504 ? -65504 : made.scale;
    if (made.scale == 0) {
        made.scale = 0; /* no negative zero */
        return made;
    }
    float inverse = 1.0f / (float)made.scale;
    for (uint32_t i = 0; i < n; i++) {
        float y = x[i] * inverse;
        double code = nearbyint(y);
        made.codes[i] = code < least ? least : code > most ? most : (int)code;
    }
    return made;
}

static unsigned char byte_of(uint32_t type, const struct quant *q, uint32_t i)
{
    return type == GQA_TYPE_Q8_0 ? (unsigned char)(q->codes[i] & 255)
                                 : (unsigned char)((q->codes[i] + 8) | (q->codes[i + 16] + 8) << 4);
}

void attn_store_k(uint32_t type, const float *x, uint32_t dim, uint32_t token, unsigned char *k)
{
    size_t n_rows = type == GQA_TYPE_Q8_0 ? 32 : 16, quant_bytes = 16 * (2 + n_rows);
    unsigned char *tile = k + token / 16 * (quant_bytes * ((dim + 31) / 32));

    for (uint32_t b = 0; b < (dim + 31) / 32; b++, tile += quant_bytes) {
        struct quant q = quantise(type, x + 32 * b, dim - 32 * b < 32 ? dim - 32 * b : 32);
        uint16_t scale = f16_bytes(q.scale);

        tile[token % 16 * 2] = (unsigned char)(scale & 255);
        tile[token % 16 * 2 + 1] = (unsigned char)(scale >> 8);
        for (uint32_t i = 0; i < n_rows; i++) {
            tile[32 + 16 * i + token % 16] = byte_of(type, &q, i);
        }
    }
}

void attn_store_v(uint32_t type, const float *x, uint32_t dim, uint32_t token, unsigned char *v)
{
    size_t n_bytes = type == GQA_TYPE_Q8_0 ? 32 : 16;
    unsigned char *at = v + token * ((dim + 31) / 32) * (2 + n_bytes);

    for (uint32_t b = 0; b < (dim + 31) / 32; b++) {
        struct quant q = quantise(type, x + 32 * b, dim - 32 * b < 32 ? dim - 32 * b : 32);
        uint16_t scale = f16_bytes(q.scale);

        *at++ = (unsigned char)(scale & 255);
        *at++ = (unsigned char)(scale >> 8);
        for (uint32_t i = 0; i < n_bytes; i++) {
            *at++ = byte_of(type, &q, i);
        }
    }
}

/* ---- rotation ---------------------------------------------------------------------------- */

uint32_t attn_rotation_size(uint32_t dim)
{
    uint32_t n = 1;

    while (dim % (2 * n) == 0) {
        n *= 2;
    }
    return n;
}

void attn_rotate(double *x, uint32_t dim)
{
    uint32_t n = attn_rotation_size(dim);
    double *from = malloc(n * sizeof(*from));

    for (uint32_t first = 0; first < dim; first += n) {
        memcpy(from, x + first, n * sizeof(*from));
        for (uint32_t i = 0; i < n; i++) {
            x[first + i] = 0;
            for (uint32_t j = 0; j < n; j++) {
                double sign = __builtin_popcount(i & j) % 2 ? -1 : 1;
                x[first + i] += sign * from[j] / sqrt(n);
            }
        }
    }
    free(from);
}

/* In float32, halves first: sums and differences of neighbours come before those of strangers. */
static void rotate_run(float *x, uint32_t n)
{
    if (n == 1) {
        return;
    }
    rotate_run(x, n / 2);
    rotate_run(x + n / 2, n / 2);
    for (uint32_t i = 0; i < n / 2; i++) {
        float sum = x[i] + x[n / 2 + i], difference = x[i] - x[n / 2 + i];
        x[i] = sum;
        x[n / 2 + i] = difference;
    }
}

static void rotate_as_stored(float *x, uint32_t dim)
{
    uint32_t n = attn_rotation_size(dim);
    float norm = (float)(1 / sqrt(n));

    for (uint32_t first = 0; first < dim; first += n) {
        rotate_run(x + first, n);
    }
    for (uint32_t i = 0; i < dim; i++) {
        x[i] *= norm;
    }
}

/* ---- all types --------------------------------------------------------------------------- */

void attn_as_stored(uint32_t type, int rotated, const float *x, uint32_t dim, double *out)
{
    float *copy = malloc(dim * sizeof(*copy));

    memcpy(copy, x, dim * sizeof(*copy));
    if (rotated) {
        rotate_as_stored(copy, dim);
    }
    for (uint32_t d = 0; d < dim; d++) {
        out[d] = type == GQA_TYPE_F16    ? round_f16(copy[d])
                 : type == GQA_TYPE_BF16 ? round_bits(copy[d], 8, -133)
                                         : copy[d];
    }
    for (uint32_t d = 0; (type == GQA_TYPE_Q8_0 || type == GQA_TYPE_Q4_0) && d < dim; d += 32) {
        struct quant q = quantise(type, copy + d, dim - d < 32 ? dim - d : 32);
        for (uint32_t i = 0; i < 32 && d + i < dim; i++) {
            out[d + i] = q.scale * q.codes[i];
        }
    }
    free(copy);
}
