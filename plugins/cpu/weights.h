/* plugins/cpu/weights.h - how the cpu backend lays out quantised weights: pack id "cpu-2".
 *
 * A weight of n outputs by k inputs becomes ceil(n / 16) strips, each of 16 outputs by all k, one
 * after the other in memory. All levels read the same bytes, so a packed file is good on any
 * processor. Outputs past n in the last strip are zeros. A weight of several matrices (experts:
 * three dimensions) is its matrices one after the other; their n is a multiple of 16.
 *
 *   strip = unit, unit, ...            a unit: 16 outputs x 32 k (plain types) or x 256 k (K types)
 *   unit  = | header | block | block ...                         a block: 16 outputs x 32 k
 *   header: 16 f16 scales, for types with a minimum also 16 f16 minimums; MXFP4: 16 exponents
 *   block:  | integer scales | planes |
 *
 *   integer scales:  IQ4_XS:     16 x s8 scale
 *                    Q4_K, Q5_K: 16 x u8 scale, 16 x u8 minimum
 *                    Q3_K, Q6_K: 16 x s8 scale of k 0..15, 16 x s8 scale of k 16..31
 *                    Q2_K:       16 x u8 of k 0..15, 16 x u8 of k 16..31: scale in the low nibble,
 *                                minimum in the high one
 *
 * The 32 k of a block are eight vectors of 4 k. Vector v is 64 bytes: output o's k 4v..4v+3 lie at
 * bytes 4o..4o+3, which is what VPDPBUSD multiplies with a broadcast of four activations.
 *
 * A stored value of n bits is cut into planes as n is into powers of two, the widest first: it
 * holds the lowest bits. A plane of w bits is w lines of 64 bytes, and vector v of it lies in line
 * v w / 8 at bits v w % 8 of each byte:
 *
 *   8: line v                     4: line v / 2, low nibbles for even v, high nibbles for odd
 *   2: line v / 4, bits 2 (v % 4)..                              1: the one line, bit v
 *
 * So 5 bits are four lines of nibbles and one of fifth bits. Stored values of 8 bits are signed,
 * the others unsigned. */
#ifndef PLUGINS_CPU_WEIGHTS_H
#define PLUGINS_CPU_WEIGHTS_H

#include <gqa/plugin.h>

#define CPU_PACK_ID     "cpu-2"
#define CPU_STRIP_ROWS  16u
#define CPU_BLOCK       32u  /* k per block, and activations per scale */
#define CPU_SUPER_BLOCK 256u /* k per unit of the K types */
#define CPU_BLOCK_LINE  64u  /* one vector: 16 outputs x 4 k */

/* The types that are packed: whatever is done for each of them is done by this list. */
/* clang-format off */
#define CPU_EACH_LAYOUT(X) \
    X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q8_0) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) \
    X(IQ4_NL) X(IQ4_XS) X(MXFP4)
/* clang-format on */

#define CPU_LAYOUT_ID(type) CPU_LAYOUT_##type,
enum cpu_layout_id { CPU_EACH_LAYOUT(CPU_LAYOUT_ID) CPU_LAYOUT_COUNT };

/* The integer scales in front of each block. */
enum cpu_scales {
    CPU_SCALES_NONE,
    CPU_SCALES_BLOCK,      /* a signed scale */
    CPU_SCALES_BLOCK_MIN,  /* an unsigned scale and minimum */
    CPU_SCALES_HALVES,     /* two signed scales, one for each half of the block */
    CPU_SCALES_HALVES_MIN, /* two pairs of four bits: scale and minimum of each half */
};

/* value = scale * (stored - offset) + minimum, where levels, if there are any, say what a stored
 * value stands for. */
struct cpu_layout {
    uint32_t type;     /* enum gqa_type */
    uint32_t unit;     /* k per header: CPU_BLOCK or CPU_SUPER_BLOCK */
    uint32_t bits;     /* per stored value: 2..6 unsigned, or 8 signed */
    uint32_t peak;     /* the largest magnitude of stored values or of levels */
    int32_t offset;    /* what these have too much: 0 or a power of two */
    uint32_t has_min;  /* the header holds minimums */
    uint32_t has_exps; /* the header's scales are exponents */
    enum cpu_scales scales;
    const uint8_t *levels; /* (16) or NULL */
};

/* IQ4_NL's and IQ4_XS's levels plus 128. */
_Alignas(16) static const uint8_t cpu_levels_iq4[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                        129, 141, 153, 166, 181, 197, 217, 241};
/* Twice the values of a 4-bit float (sign, two bits of exponent, one of mantissa) plus 16. */
_Alignas(16) static const uint8_t cpu_levels_e2m1[16] = {16, 17, 18, 19, 20, 22, 24, 28,
                                                         16, 15, 14, 13, 12, 10, 8,  4};

/* In the header, so that every kernel's constants are known to the compiler. */
static const struct cpu_layout cpu_layouts[CPU_LAYOUT_COUNT] = {
    [CPU_LAYOUT_Q4_0] = {GQA_TYPE_Q4_0, CPU_BLOCK, 4, 15, 8, 0, 0, CPU_SCALES_NONE, NULL},
    [CPU_LAYOUT_Q4_1] = {GQA_TYPE_Q4_1, CPU_BLOCK, 4, 15, 0, 1, 0, CPU_SCALES_NONE, NULL},
    [CPU_LAYOUT_Q5_0] = {GQA_TYPE_Q5_0, CPU_BLOCK, 5, 31, 16, 0, 0, CPU_SCALES_NONE, NULL},
    [CPU_LAYOUT_Q5_1] = {GQA_TYPE_Q5_1, CPU_BLOCK, 5, 31, 0, 1, 0, CPU_SCALES_NONE, NULL},
    [CPU_LAYOUT_Q8_0] = {GQA_TYPE_Q8_0, CPU_BLOCK, 8, 128, 0, 0, 0, CPU_SCALES_NONE, NULL},
    [CPU_LAYOUT_Q2_K] = {GQA_TYPE_Q2_K, CPU_SUPER_BLOCK, 2, 3, 0, 1, 0, CPU_SCALES_HALVES_MIN,
                         NULL},
    [CPU_LAYOUT_Q3_K] = {GQA_TYPE_Q3_K, CPU_SUPER_BLOCK, 3, 7, 4, 0, 0, CPU_SCALES_HALVES, NULL},
    [CPU_LAYOUT_Q4_K] = {GQA_TYPE_Q4_K, CPU_SUPER_BLOCK, 4, 15, 0, 1, 0, CPU_SCALES_BLOCK_MIN,
                         NULL},
    [CPU_LAYOUT_Q5_K] = {GQA_TYPE_Q5_K, CPU_SUPER_BLOCK, 5, 31, 0, 1, 0, CPU_SCALES_BLOCK_MIN,
                         NULL},
    [CPU_LAYOUT_Q6_K] = {GQA_TYPE_Q6_K, CPU_SUPER_BLOCK, 6, 63, 32, 0, 0, CPU_SCALES_HALVES, NULL},
    [CPU_LAYOUT_IQ4_NL] = {GQA_TYPE_IQ4_NL, CPU_BLOCK, 4, 241, 128, 0, 0, CPU_SCALES_NONE,
                           cpu_levels_iq4},
    [CPU_LAYOUT_IQ4_XS] = {GQA_TYPE_IQ4_XS, CPU_SUPER_BLOCK, 4, 241, 128, 0, 0, CPU_SCALES_BLOCK,
                           cpu_levels_iq4},
    [CPU_LAYOUT_MXFP4] = {GQA_TYPE_MXFP4, CPU_BLOCK, 4, 28, 16, 0, 1, CPU_SCALES_NONE,
                          cpu_levels_e2m1},
};

static inline uint32_t cpu_layout_scales_bytes(const struct cpu_layout *l)
{
    switch (l->scales) {
    case CPU_SCALES_NONE:
        return 0;
    case CPU_SCALES_BLOCK:
        return CPU_STRIP_ROWS;
    default:
        return 2 * CPU_STRIP_ROWS;
    }
}

/* Whether the halves of a block have scales of their own. */
static inline int cpu_layout_has_halves(const struct cpu_layout *l)
{
    return l->scales == CPU_SCALES_HALVES || l->scales == CPU_SCALES_HALVES_MIN;
}

/* Bytes of the header's scales: its minimums follow. */
static inline uint32_t cpu_layout_header_scales_bytes(const struct cpu_layout *l)
{
    return l->has_exps ? CPU_STRIP_ROWS : 2 * CPU_STRIP_ROWS;
}

static inline uint32_t cpu_layout_header_bytes(const struct cpu_layout *l)
{
    return cpu_layout_header_scales_bytes(l) * (l->has_min ? 2 : 1);
}

static inline uint32_t cpu_layout_block_bytes(const struct cpu_layout *l)
{
    return cpu_layout_scales_bytes(l) + l->bits * CPU_BLOCK_LINE;
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
