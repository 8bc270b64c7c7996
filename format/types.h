/* format/types.h - tensor types of GGUF files: names, block geometry, reference conversion.
 *
 * A quantised row is a sequence of blocks: every block holds n_block values in block_bytes bytes.
 * The numbers are those that GGUF files store. The reference conversions are the truth for every
 * kernel: dequantising yields bit-identical float32 values to what the format's authors define. */
#ifndef FORMAT_TYPES_H
#define FORMAT_TYPES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum fmt_type {
    FMT_TYPE_F32 = 0,
    FMT_TYPE_F16 = 1,
    FMT_TYPE_Q4_0 = 2,
    FMT_TYPE_Q4_1 = 3,
    FMT_TYPE_Q5_0 = 6,
    FMT_TYPE_Q5_1 = 7,
    FMT_TYPE_Q8_0 = 8,
    FMT_TYPE_Q2_K = 10,
    FMT_TYPE_Q3_K = 11,
    FMT_TYPE_Q4_K = 12,
    FMT_TYPE_Q5_K = 13,
    FMT_TYPE_Q6_K = 14,
    FMT_TYPE_IQ4_NL = 20,
    FMT_TYPE_IQ4_XS = 23,
    FMT_TYPE_BF16 = 30,
    FMT_TYPE_MXFP4 = 39,
};

struct fmt_type_info {
    const char *name;     /* "Q4_0" */
    uint32_t type;        /* enum fmt_type */
    uint32_t n_block;     /* values per block */
    uint32_t block_bytes; /* bytes per block */
    /* Converts n values (a multiple of n_block). NULL where the direction is not implemented. */
    void (*dequantise)(const void *src, float *dst, size_t n);
    void (*quantise)(const float *src, void *dst, size_t n);
};

/* The entry of a type, or NULL when this build does not know it. */
const struct fmt_type_info *fmt_type_info(uint32_t type);

/* The entry with that name, case-insensitive ("q4_0"), or NULL. */
const struct fmt_type_info *fmt_type_by_name(const char *name);

/* The i-th known type, or NULL past the end: for error messages that list them. */
const struct fmt_type_info *fmt_type_at(size_t i);

/* Bytes of n values of a type; 0 when n is not a multiple of its block or the size overflows. */
uint64_t fmt_type_bytes(const struct fmt_type_info *info, uint64_t n);

/* Whether all of n values (a multiple of the block) are numbers. If not, *ret_index is the first
 * one that is infinite or no number. Costs a look at the scales of quantised blocks, not at every
 * value; types that finite.c has no row for are converted. */
bool fmt_type_finite(const struct fmt_type_info *info, const void *src, uint64_t n,
                     uint64_t *ret_index);

#define FMT_MAX_BLOCK_VALUES 256u
#define FMT_MAX_BLOCK_BYTES  512u /* far above any type's */

float fmt_f16_to_f32(uint16_t h);
uint16_t fmt_f32_to_f16(float f); /* round to nearest even; NaN stays NaN */
float fmt_bf16_to_f32(uint16_t h);
uint16_t fmt_f32_to_bf16(float f); /* round to nearest even; NaN stays NaN */

#endif
