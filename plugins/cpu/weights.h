/* plugins/cpu/weights.h - how the cpu backend lays out quantised weights: pack id "cpu-1".
 *
 * A weight of n outputs by k inputs becomes ceil(n / 16) strips, each of 16 outputs by all k, one
 * after the other in memory. All levels read the same bytes, so a packed file is good on any
 * processor. Outputs past n in the last strip are zeros. A weight of several matrices (experts:
 * three dimensions) is its matrices one after the other; their n is a multiple of 16.
 *
 *   strip = unit, unit, ...            a unit: 16 outputs x 32 k (plain types) or x 256 k (K types)
 *   unit  = | header | block | block ...                         a block: 16 outputs x 32 k
 *   header: 16 f16 scales, then for types with a minimum 16 f16 minimums
 *   block:  | integer scales | nibbles or bytes | high bits |
 *
 *   integer scales (K types): Q4_K, Q5_K: 16 x u8 scale, 16 x u8 minimum
 *                             Q6_K:       16 x s8 scale of k 0..15, 16 x s8 scale of k 16..31
 *
 * The 32 k of a block are eight vectors of 4 k. Vector v is 64 bytes: output o's k 4v..4v+3 lie at
 * bytes 4o..4o+3, which is what VPDPBUSD multiplies with a broadcast of four activations.
 *
 *   4 bits and more: 4 lines of 64 bytes; line i holds vector i in the low nibbles and vector i + 4
 *                    in the high nibbles
 *   fifth bits:      1 line; bit v of a byte belongs to vector v
 *   bits 4 and 5:    2 lines; bits 2i, 2i + 1 of line h belong to vector 4h + i
 *   8 bits:          8 lines; line v holds vector v as signed bytes
 */
#ifndef PLUGINS_CPU_WEIGHTS_H
#define PLUGINS_CPU_WEIGHTS_H

#include <gqa/plugin.h>

#define CPU_PACK_ID      "cpu-1"
#define CPU_STRIP_ROWS   16u
#define CPU_BLOCK        32u  /* k per block, and activations per scale */
#define CPU_SUPER_BLOCK  256u /* k per unit of the K types */
#define CPU_BLOCK_LINE   64u  /* one vector: 16 outputs x 4 k */
#define CPU_HEADER_BYTES 32u  /* 16 f16 */

enum cpu_layout_id {
    CPU_LAYOUT_Q4_0,
    CPU_LAYOUT_Q4_1,
    CPU_LAYOUT_Q5_0,
    CPU_LAYOUT_Q5_1,
    CPU_LAYOUT_Q8_0,
    CPU_LAYOUT_Q4_K,
    CPU_LAYOUT_Q5_K,
    CPU_LAYOUT_Q6_K,
    CPU_LAYOUT_COUNT
};

/* value = scale * (stored - offset) + minimum */
struct cpu_layout {
    uint32_t type;        /* enum gqa_type */
    uint32_t bits;        /* per stored value: 4, 5, 6 unsigned, or 8 signed */
    int32_t offset;       /* what the stored unsigned value has too much */
    uint32_t unit;        /* k per header: CPU_BLOCK or CPU_SUPER_BLOCK */
    uint32_t has_min;     /* the header holds minimums */
    uint32_t scale_bytes; /* integer scales in front of each block: 0 or 32 */
    uint32_t two_scales;  /* the integer scales are those of the block's halves */
};

/* In the header, so that every kernel's constants are known to the compiler. */
static const struct cpu_layout cpu_layouts[CPU_LAYOUT_COUNT] = {
    [CPU_LAYOUT_Q4_0] = {GQA_TYPE_Q4_0, 4, 8, CPU_BLOCK, 0, 0, 0},
    [CPU_LAYOUT_Q4_1] = {GQA_TYPE_Q4_1, 4, 0, CPU_BLOCK, 1, 0, 0},
    [CPU_LAYOUT_Q5_0] = {GQA_TYPE_Q5_0, 5, 16, CPU_BLOCK, 0, 0, 0},
    [CPU_LAYOUT_Q5_1] = {GQA_TYPE_Q5_1, 5, 0, CPU_BLOCK, 1, 0, 0},
    [CPU_LAYOUT_Q8_0] = {GQA_TYPE_Q8_0, 8, 0, CPU_BLOCK, 0, 0, 0},
    [CPU_LAYOUT_Q4_K] = {GQA_TYPE_Q4_K, 4, 0, CPU_SUPER_BLOCK, 1, 32, 0},
    [CPU_LAYOUT_Q5_K] = {GQA_TYPE_Q5_K, 5, 0, CPU_SUPER_BLOCK, 1, 32, 0},
    [CPU_LAYOUT_Q6_K] = {GQA_TYPE_Q6_K, 6, 32, CPU_SUPER_BLOCK, 0, 32, 1},
};

static inline uint32_t cpu_layout_header_bytes(const struct cpu_layout *l)
{
    return l->has_min ? 2 * CPU_HEADER_BYTES : CPU_HEADER_BYTES;
}

static inline uint32_t cpu_layout_block_bytes(const struct cpu_layout *l)
{
    return l->scale_bytes + l->bits * CPU_BLOCK_LINE;
}

static inline uint32_t cpu_layout_unit_bytes(const struct cpu_layout *l)
{
    return cpu_layout_header_bytes(l) + l->unit / CPU_BLOCK * cpu_layout_block_bytes(l);
}

/* The id of a type's layout, or CPU_LAYOUT_COUNT when the type is not packed. */
enum cpu_layout_id cpu_layout_of(uint32_t type);

/* Bytes of the packed weight; 0 when it is not one that is packed (its type, one dimension or more
 * than three, k no multiple of the unit, matrices of experts whose n is no multiple of
 * CPU_STRIP_ROWS, or no size that fits 64 bits). */
uint64_t cpu_weights_packed_bytes(const struct gqa_weight *weight);

/* Packs outputs [first_row, first_row + n_rows), which count on from one matrix to the next, into
 * their places in dst, the start of the whole packed weight. first_row is a multiple of
 * CPU_STRIP_ROWS; so is n_rows, unless the range reaches the end. Touches only those strips: ranges
 * may be packed by different threads. 0 or -EINVAL. */
int cpu_weights_pack(const struct gqa_weight *weight, uint64_t first_row, uint64_t n_rows,
                     void *dst);

#endif
