/* plugins/cpu/linear.h - products of activations with weight matrices.
 *
 * linear.c cuts the work into strips of 16 outputs and lends them to the host's workers; the levels
 * provide the kernels (linear_c.c is the truth).
 *
 * Quantised weights: activations become int8 per 32 values of k, products are exact int32 sums per
 * block of 32, and each output adds up its blocks in ascending k:
 *
 *     acc = fma(scale * a_scale, (float)sum(q * a), acc)
 *     acc = fma(minimum, a_scale * (float)sum(a), acc)            types with a minimum
 *
 * where scale is the header's, or the header's times the block's integer scale, and minimum the
 * header's f16, or -(header's times integer). Where the halves of a block have integers of their
 * own (Q2_K, Q3_K, Q6_K), sum(q * a) is scale0 * sum0 + scale1 * sum1 in int32, and Q2_K's sum(a)
 * alike min0 * half0 + min1 * half1, with the negated header's minimum in front. Every level
 * computes just that: results are the same bits everywhere.
 *
 * F32, F16 and BF16 weights: float32 products in 16 lanes, lane k % 16, ascending k, then one fixed
 * tree. Levels with FMA round once per step, the reference twice; within a level nothing depends on
 * the number of rows. */
#ifndef PLUGINS_CPU_LINEAR_H
#define PLUGINS_CPU_LINEAR_H

#include "plugins/cpu/isa.h"
#include "plugins/cpu/weights.h"

#include <gqa/plugin.h>
#include <stdatomic.h>

/* Rows that a kernel takes at once: a tile of quantised activations. */
#define CPU_TILE_ROWS 16u
/* Strips that a kernel takes at once, so that they share the reading of the activations. */
#define CPU_STRIPS_MAX 2u

/* Quantised activations: value = scale * q. Tiles of CPU_TILE_ROWS rows follow each other; a tile
 * of t rows (only the last has fewer) holds, block of k by block, its rows side by side:
 *
 *   q       (n_blocks, t, 32) int8
 *   scale   (n_blocks, t) float
 *   halves  (n_blocks, t, 2) int16: the sums of q over k 0..15 and 16..31 of the block
 *   minus   (n_blocks, t) int32: CPU_MINUS_UNIT times the sum of q, negated; times a type's offset
 *           in such units it is what the offset adds too much to sum(q * stored)
 *   total   (n_blocks, t) float: scale times the sum of q
 *   lanes   (n_blocks, t, 2, 2) int16: of each half of the block the sum of q over the k with k % 4
 *           below 2, negated, and that over the others. Of levels that read it: the others leave it
 *           as it is
 *
 * A block with a non-finite value gets scale NaN and zeros; one whose peak is below
 * CPU_ACT_PEAK_MIN gets zeros. */
struct cpu_acts {
    uint32_t n_rows, n_blocks;
    int8_t *q;
    float *scale;
    int16_t *halves;
    int32_t *minus;
    float *total;
    int16_t *lanes;
};

/* Q4_0's offset, which so costs no operation; the others', of types whose halves of k have no
 * scales of their own, are multiples of it. */
#define CPU_MINUS_UNIT 8

/* What an offset (a power of two) adds too much to sum(q * stored) is minus << cpu_minus_shift().
 */
static inline unsigned cpu_minus_shift(int32_t offset)
{
    return (unsigned)__builtin_ctz((unsigned)(offset / CPU_MINUS_UNIT));
}

/* 127 / peak would overflow below about 3.8e-37. */
#define CPU_ACT_PEAK_MIN 1e-36f

/* One tile as a kernel sees it: pointers to its first block's rows. Kernels that take rows in
 * smaller groups advance the pointers by rows; the distance of blocks stays n_tile_rows. */
struct cpu_act_tile {
    uint32_t n_rows; /* to compute */
    uint32_t n_tile_rows;
    uint32_t n_blocks;
    const int8_t *q;
    const float *scale;
    const int16_t *halves;
    const int32_t *minus;
    const float *total;
    const int16_t *lanes;
};

struct cpu_act_tile cpu_acts_tile(const struct cpu_acts *acts, uint32_t tile);

enum cpu_float_type { CPU_FLOAT_F32, CPU_FLOAT_F16, CPU_FLOAT_BF16, CPU_FLOAT_COUNT };

/* A strip of float weights as they lie in the file, and the rows that meet it. */
struct cpu_float_strip {
    const uint8_t *w; /* first output's row */
    size_t w_stride;  /* bytes */
    uint32_t n_outs;  /* 1..CPU_STRIP_ROWS */
    uint32_t k;
    const float *x; /* (n_rows, k), any alignment */
    size_t x_stride;
    uint32_t n_rows; /* 1..CPU_TILE_ROWS */
};

/* Where one row's quantised values go: its first block's, and the distance to the next block's. */
struct cpu_act_place {
    uint32_t n_blocks, n_tile_rows;
    int8_t *q;
    float *scale;
    int16_t *halves;
    int32_t *minus;
    float *total;
    int16_t *lanes;
};

/* Strips of quantised weights, one after the other in memory. */
struct cpu_quant_strips {
    const uint8_t *first;
    uint64_t bytes; /* of one */
    uint32_t n;     /* 1..CPU_STRIPS_MAX */
};

/* Quantises one row of 32 * n_blocks values. */
typedef void (*cpu_quantise_fn)(const float *x, const struct cpu_act_place *place);
/* out (strips->n, n_rows, 16) = tile x strips. */
typedef void (*cpu_quant_strips_fn)(const struct cpu_act_tile *tile,
                                    const struct cpu_quant_strips *strips, float *out);
/* out (n_rows, 16); columns past n_outs are left alone. */
typedef void (*cpu_float_strip_fn)(const struct cpu_float_strip *s, float *out);

struct cpu_linear_kernels {
    cpu_quantise_fn quantise;
    cpu_quant_strips_fn quant[CPU_LAYOUT_COUNT];
    cpu_float_strip_fn real[CPU_FLOAT_COUNT];
};

/* A level that has multiply(id, tile, strips, out) gets a function for each layout, and the entries
 * of its table. */
#define CPU_DEFINE_QUANT(type)                                                     \
    static void multiply_##type(const struct cpu_act_tile *tile,                   \
                                const struct cpu_quant_strips *strips, float *out) \
    {                                                                              \
        multiply(CPU_LAYOUT_##type, tile, strips, out);                            \
    }
#define CPU_QUANT_ENTRY(type) [CPU_LAYOUT_##type] = multiply_##type,

extern const struct cpu_linear_kernels cpu_linear_c, cpu_linear_avx2, cpu_linear_avxvnni,
    cpu_linear_avx512, cpu_linear_amx;

/* Float products that live in files of their own. */
void cpu_multiply_f32_avx2(const struct cpu_float_strip *s, float *out);
void cpu_multiply_f16_avx2(const struct cpu_float_strip *s, float *out);
void cpu_multiply_bf16_avx2(const struct cpu_float_strip *s, float *out);
void cpu_multiply_f32_avx512(const struct cpu_float_strip *s, float *out);
void cpu_multiply_f16_avx512(const struct cpu_float_strip *s, float *out);
void cpu_multiply_bf16_avx512(const struct cpu_float_strip *s, float *out);

/* The level's table; entries that it lacks are the next lower level's (cpu_isa_below). */
void cpu_linear_kernels(enum cpu_isa isa, struct cpu_linear_kernels *ret);

/* A weight matrix ready to multiply. */
struct cpu_matrix {
    uint32_t k, n;
    enum cpu_layout_id layout; /* CPU_LAYOUT_COUNT: a float type */
    enum cpu_float_type real;
    const uint8_t *data;  /* packed strips, or the file's rows */
    uint64_t strip_bytes; /* from one strip of 16 outputs to the next */
    const float *bias;    /* (n) or NULL; owned by the caller */
};

/* 0; -ENOTSUP for a type without kernel; -EINVAL for a weight whose packed form is missing or has
 * another size, or dimensions that do not fit. Reason says which, without naming the op. */
int cpu_matrix_init(struct cpu_matrix *ret, const struct gqa_weight *weight,
                    struct gqa_reason *reason);

/* One worker's share of a job: tasks [next, end), which lie one after the other in memory. On a
 * cache line of its own, since every task moves it on. */
struct cpu_share {
    _Alignas(64) _Atomic uint32_t next;
    uint32_t end;
};

/* What a series of products needs: made once for a program. */
struct cpu_linear {
    const struct gqa_host *host;
    struct cpu_linear_kernels kernels;
    uint32_t max_rows, max_k;
    void *memory; /* of quantised activations */
    size_t memory_bytes;
    struct cpu_share *shares; /* (host->n_threads) */
};

/* max_k: of quantised matrices only; 0 when there are none. 0 or -ENOMEM; lin can be finished in
 * both cases. */
int cpu_linear_init(struct cpu_linear *lin, const struct gqa_host *host, enum cpu_isa isa,
                    uint32_t max_rows, uint32_t max_k);
void cpu_linear_finish(struct cpu_linear *lin);

struct cpu_product {
    const struct cpu_matrix *matrix;
    float *dst; /* (n_rows of the group, matrix->n) */
    size_t dst_stride;
    uint32_t group; /* of cpu_linear_run_groups; else 0 */
    /* Set by the run: the first of its tasks, and the strips that each takes. */
    uint32_t first_task, task_strips;
};

/* Every product's dst = x (n_rows, k) x matrix^T + bias; all quantised matrices have the same k.
 * The dst do not overlap each other nor x. At most max_rows rows, and one product at least. */
void cpu_linear_run(struct cpu_linear *lin, const float *x, size_t x_stride, uint32_t n_rows,
                    struct cpu_product *products, uint32_t n_products);

/* The same with products that take some rows each: group g is x's rows [first_rows[g] -
 * first_rows[0], first_rows[g + 1] - first_rows[0]), and its products' dst begin with the first of
 * them. first_rows (n_groups + 1) ascends; a group that has products has rows. All groups' rows are
 * quantised at once and all products are one set of tasks. At most max_rows rows in all. */
void cpu_linear_run_groups(struct cpu_linear *lin, const float *x, size_t x_stride,
                           const uint32_t *first_rows, uint32_t n_groups,
                           struct cpu_product *products, uint32_t n_products);

#endif
