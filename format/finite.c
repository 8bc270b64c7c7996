/* format/finite.c - finding values that are no numbers, at the speed of reading.
 *
 * A quantised value is an integer times a scale of its block, so a block is finite if its scales
 * are. The quick look may suspect too much, never too little: what it suspects is converted. */
#include "format/types.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#define RUN 64u /* blocks or values per decision: a loop that compilers turn into vectors */

/* Where the scales lie in a block. */
enum scale_kind { SCALE_F16, SCALE_E8M0 };

static const struct {
    uint32_t type;
    enum scale_kind kind;
    uint32_t n, at[2]; /* offsets in bytes */
} scales[] = {
    {FMT_TYPE_Q4_0, SCALE_F16, 1, {0, 0}},   {FMT_TYPE_Q4_1, SCALE_F16, 2, {0, 2}},
    {FMT_TYPE_Q5_0, SCALE_F16, 1, {0, 0}},   {FMT_TYPE_Q5_1, SCALE_F16, 2, {0, 2}},
    {FMT_TYPE_Q8_0, SCALE_F16, 1, {0, 0}},   {FMT_TYPE_Q2_K, SCALE_F16, 2, {80, 82}},
    {FMT_TYPE_Q3_K, SCALE_F16, 1, {108, 0}}, {FMT_TYPE_Q4_K, SCALE_F16, 2, {0, 2}},
    {FMT_TYPE_Q5_K, SCALE_F16, 2, {0, 2}},   {FMT_TYPE_Q6_K, SCALE_F16, 1, {208, 0}},
    {FMT_TYPE_IQ4_NL, SCALE_F16, 1, {0, 0}}, {FMT_TYPE_IQ4_XS, SCALE_F16, 1, {0, 0}},
    {FMT_TYPE_MXFP4, SCALE_E8M0, 1, {0, 0}},
};

#define N_SCALES (sizeof(scales) / sizeof(scales[0]))

/* Adding one at the exponent's lowest bit carries into the sign's place only from an exponent of
 * ones. */
static bool floats_suspect(const uint8_t *src, size_t n)
{
    uint32_t bits[RUN], carry = 0;
    memcpy(bits, src, n * sizeof(bits[0]));
    for (size_t i = n; i < RUN; i++) {
        bits[i] = 0;
    }
    for (size_t i = 0; i < RUN; i++) {
        carry |= (bits[i] & 0x7fffffffu) + 0x00800000u;
    }
    return carry >> 31 != 0;
}

static bool halves_suspect(const uint8_t *src, size_t n, uint16_t lowest_exponent_bit)
{
    uint16_t bits[RUN], carry = 0;
    memcpy(bits, src, n * sizeof(bits[0]));
    for (size_t i = n; i < RUN; i++) {
        bits[i] = 0;
    }
    for (size_t i = 0; i < RUN; i++) {
        carry |= (uint16_t)((bits[i] & 0x7fff) + lowest_exponent_bit);
    }
    return carry >> 15 != 0;
}

static bool scales_suspect(size_t row, const uint8_t *src, size_t n, size_t block_bytes)
{
    uint32_t carry = 0;
    for (uint32_t s = 0; s < scales[row].n; s++) {
        const uint8_t *at = src + scales[row].at[s];
        for (size_t i = 0; i < n; i++, at += block_bytes) {
            if (scales[row].kind == SCALE_E8M0) {
                /* Times at most 12 / 2: from 2^125 on float32 may not hold it; 255 is no number. */
                carry |= (uint32_t)(*at >= 252) << 15;
            } else {
                uint16_t bits;
                memcpy(&bits, at, sizeof(bits));
                carry |= (bits & 0x7fffu) + 0x0400u;
            }
        }
    }
    return (carry & 0x8000u) != 0;
}

static bool run_suspect(const struct fmt_type_info *info, const uint8_t *src, size_t n)
{
    switch (info->type) {
    case FMT_TYPE_F32:
        return floats_suspect(src, n);
    case FMT_TYPE_F16:
        return halves_suspect(src, n, 0x0400);
    case FMT_TYPE_BF16:
        return halves_suspect(src, n, 0x0080);
    default:
        for (size_t row = 0; row < N_SCALES; row++) {
            if (scales[row].type == info->type) {
                return scales_suspect(row, src, n, info->block_bytes);
            }
        }
        return true;
    }
}

/* Converts n blocks and looks at every value. A shared exponent of all ones is no number whatever
 * the values are. */
static bool run_finite(const struct fmt_type_info *info, const uint8_t *src, size_t n,
                       uint64_t *ret_index)
{
    float values[FMT_MAX_BLOCK_VALUES];
    assert(info->n_block <= FMT_MAX_BLOCK_VALUES);
    for (size_t i = 0; i < n; i++, src += info->block_bytes) {
        info->dequantise(src, values, info->n_block);
        bool no_number = info->type == FMT_TYPE_MXFP4 && *src == 255;
        for (uint32_t v = 0; v < info->n_block; v++) {
            if (no_number || !isfinite(values[v])) {
                *ret_index = i * info->n_block + v;
                return false;
            }
        }
    }
    return true;
}

bool fmt_type_finite(const struct fmt_type_info *info, const void *src, uint64_t n,
                     uint64_t *ret_index)
{
    const uint8_t *at = src;
    uint64_t n_blocks = n / info->n_block;
    for (uint64_t done = 0; done < n_blocks; done += RUN, at += (size_t)RUN * info->block_bytes) {
        size_t run = n_blocks - done < RUN ? (size_t)(n_blocks - done) : RUN;
        if (run_suspect(info, at, run) && info->dequantise != NULL) {
            uint64_t index;
            if (!run_finite(info, at, run, &index)) {
                *ret_index = done * info->n_block + index;
                return false;
            }
        }
    }
    return true;
}
