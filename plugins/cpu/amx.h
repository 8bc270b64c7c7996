/* plugins/cpu/amx.h - the tile unit: the one place that names its intrinsics.
 *
 * A thread has eight tiles of up to 16 rows x 64 bytes. Their shapes are set for all at once
 * (amx_configure) and given back when the work is done (amx_release), so that the kernel need not
 * save 8 KiB with every switch of threads. Numbers of tiles are literals, which gcc pastes into the
 * instruction as they are written: no parentheses.
 *
 * gcc 12's intrinsics are assembly that tells the compiler of no memory: what they read may be
 * written after them, what they write be read before, and a shape that lies on the stack may never
 * be written at all. Hence the barriers.
 *
 * Source of the instructions' semantics: Intel 64 and IA-32 Architectures Software Developer's
 * Manual, volume 2 (LDTILECFG, TDPBSSD, TDPBF16PS). */
#ifndef PLUGINS_CPU_AMX_H
#define PLUGINS_CPU_AMX_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define AMX_TILES     8u
#define AMX_ROWS      16u
#define AMX_ROW_BYTES 64u

/* What LDTILECFG reads. */
struct amx_shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
_Static_assert(sizeof(struct amx_shapes) == 64, "LDTILECFG reads 64 bytes");

#define AMX_BARRIER() __asm__ volatile("" ::: "memory")

static inline struct amx_shapes amx_no_shapes(void)
{
    struct amx_shapes s;

    memset(&s, 0, sizeof(s));
    s.palette = 1;
    return s;
}

static inline void amx_shape(struct amx_shapes *s, uint32_t tile, uint32_t rows, uint32_t row_bytes)
{
    s->rows[tile] = (uint8_t)rows;
    s->row_bytes[tile] = (uint16_t)row_bytes;
}

static inline void amx_configure(const struct amx_shapes *s)
{
    AMX_BARRIER();
    _tile_loadconfig(s);
    AMX_BARRIER();
}

static inline void amx_release(void)
{
    AMX_BARRIER();
    _tile_release();
}

/* tile = rows from at on, stride bytes from one to the next. */
#define amx_load(tile, at, stride)       \
    do {                                 \
        AMX_BARRIER();                   \
        _tile_loadd(tile, (at), stride); \
    } while (0)

#define amx_store(tile, at, stride)       \
    do {                                  \
        _tile_stored(tile, (at), stride); \
        AMX_BARRIER();                    \
    } while (0)

#define amx_zero(tile) _tile_zero(tile)

/* sums (m, n) int32 += a (m, 4 k) int8 x b (k, n, 4) int8, exact. */
#define amx_multiply_int8(sums, a, b) _tile_dpbssd(sums, a, b)

/* sums (m, n) float += a (m, 2 k) bf16 x b (k, n, 2) bf16: for each k first the product of the
 * even, then that of the odd values is added, each by a fused multiply-add that rounds to nearest
 * even; subnormal numbers count as zeros. */
#define amx_multiply_bf16(sums, a, b) _tile_dpbf16ps(sums, a, b)

#endif
