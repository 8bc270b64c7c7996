/* tests/emulated/include/tiles.h - the tile unit (AMX) in portable C: the intrinsics that
 * plugins/cpu/amx.h wraps.
 *
 * Stricter than the processor is told to be: a use of a tile that has no shape, or of shapes that
 * do not fit each other, ends the test, as the instruction would fault. Tiles live in each file
 * that includes this: whoever configures them uses them. */
#ifndef TESTS_EMULATED_TILES_H
#define TESTS_EMULATED_TILES_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct emulated_tile {
    int rows, row_bytes; /* 0: has no shape */
    uint8_t bytes[16][64];
};

static __attribute__((unused)) _Thread_local struct emulated_tile emulated_tiles[8];

static inline void emulated_tile_check(int good, const char *what)
{
    if (!good) {
        fprintf(stderr, "emulated tiles: %s\n", what);
        abort();
    }
}

static inline void _tile_release(void)
{
    memset(emulated_tiles, 0, sizeof(emulated_tiles));
}

static inline void _tile_loadconfig(const void *config)
{
    const uint8_t *c = (const uint8_t *)config;

    emulated_tile_check(c[0] == 1 && c[1] == 0, "palette or start row");
    for (int i = 2; i < 16; i++) {
        emulated_tile_check(c[i] == 0, "reserved bytes");
    }
    _tile_release();
    for (int t = 0; t < 8; t++) {
        uint16_t row_bytes;
        memcpy(&row_bytes, c + 16 + 2 * t, sizeof(row_bytes));
        emulated_tile_check(row_bytes <= 64 && c[48 + t] <= 16, "a shape too large");
        emulated_tile_check((row_bytes == 0) == (c[48 + t] == 0), "half a shape");
        emulated_tiles[t].rows = c[48 + t];
        emulated_tiles[t].row_bytes = row_bytes;
    }
}

static inline struct emulated_tile *emulated_tile_at(int tile)
{
    emulated_tile_check(tile >= 0 && tile < 8 && emulated_tiles[tile].rows > 0, "no such tile");
    return &emulated_tiles[tile];
}

static inline void _tile_zero(int tile)
{
    memset(emulated_tile_at(tile)->bytes, 0, sizeof(emulated_tiles[tile].bytes));
}

static inline void _tile_loadd(int tile, const void *from, size_t stride)
{
    struct emulated_tile *t = emulated_tile_at(tile);

    _tile_zero(tile);
    for (int r = 0; r < t->rows; r++) {
        memcpy(t->bytes[r], (const uint8_t *)from + (size_t)r * stride, (size_t)t->row_bytes);
    }
}

static inline void _tile_stored(int tile, void *to, size_t stride)
{
    const struct emulated_tile *t = emulated_tile_at(tile);

    for (int r = 0; r < t->rows; r++) {
        memcpy((uint8_t *)to + (size_t)r * stride, t->bytes[r], (size_t)t->row_bytes);
    }
}

/* sums (m, n), a (m, k), b (k, n), all of four bytes. */
static inline void emulated_tiles_check_product(const struct emulated_tile *sums,
                                                const struct emulated_tile *a,
                                                const struct emulated_tile *b)
{
    emulated_tile_check(sums != a && sums != b && a != b, "a tile used twice");
    emulated_tile_check(sums->rows == a->rows && sums->row_bytes == b->row_bytes &&
                            a->row_bytes == 4 * b->rows,
                        "shapes that do not fit");
}

static inline void _tile_dpbssd(int sums, int a, int b)
{
    struct emulated_tile *c = emulated_tile_at(sums);
    const struct emulated_tile *x = emulated_tile_at(a), *y = emulated_tile_at(b);

    emulated_tiles_check_product(c, x, y);
    for (int m = 0; m < c->rows; m++) {
        int32_t sum[16];

        memcpy(sum, c->bytes[m], sizeof(sum));
        for (int k = 0; k < y->rows; k++) {
            const int8_t *four = (const int8_t *)x->bytes[m] + 4 * k;
            for (int n = 0; n < 16; n++) {
                const int8_t *by = (const int8_t *)y->bytes[k] + 4 * n;
                sum[n] += four[0] * by[0] + four[1] * by[1] + four[2] * by[2] + four[3] * by[3];
            }
        }
        memcpy(c->bytes[m], sum, sizeof(sum));
    }
}

/* A bf16's value; subnormal numbers are zeros to the unit. */
static inline float emulated_bf16(const uint8_t *at)
{
    uint16_t half;
    float value;

    memcpy(&half, at, sizeof(half));
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&value, &bits, sizeof(value));
    return fabsf(value) < 0x1p-126f ? copysignf(0.0f, value) : value;
}

static inline float emulated_flush(float value)
{
    return fabsf(value) < 0x1p-126f ? copysignf(0.0f, value) : value;
}

/* Even and odd k are summed apart, by fused multiply-adds; then their sum joins what was there. */
static inline void _tile_dpbf16ps(int sums, int a, int b)
{
    struct emulated_tile *c = emulated_tile_at(sums);
    const struct emulated_tile *x = emulated_tile_at(a), *y = emulated_tile_at(b);

    emulated_tiles_check_product(c, x, y);
    for (int m = 0; m < c->rows; m++) {
        float old[16], even[16] = {0}, odd[16] = {0};

        memcpy(old, c->bytes[m], sizeof(old));
        for (int k = 0; k < y->rows; k++) {
            float first = emulated_bf16(x->bytes[m] + 4 * k);
            float second = emulated_bf16(x->bytes[m] + 4 * k + 2);
            for (int n = 0; n < 16; n++) {
                even[n] = emulated_flush(fmaf(first, emulated_bf16(y->bytes[k] + 4 * n), even[n]));
                odd[n] =
                    emulated_flush(fmaf(second, emulated_bf16(y->bytes[k] + 4 * n + 2), odd[n]));
            }
        }
        for (int n = 0; n < 16; n++) {
            old[n] = emulated_flush(emulated_flush(old[n]) + emulated_flush(even[n] + odd[n]));
        }
        memcpy(c->bytes[m], old, (size_t)c->row_bytes);
    }
}

#endif
