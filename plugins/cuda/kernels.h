/* plugins/cuda/kernels.h - what host code and kernels agree on: names, arguments, layouts.
 *
 * Every kernel takes one struct by value. Pointers in it are device addresses. Matrices of
 * activations are float32, row-major, `stride` floats from one row to the next.
 *
 * A product's operands lie in the order in which mma.sync wants them, so that every load is 128
 * bits of consecutive memory for each lane of a warp and nothing passes through shared memory. In
 * the following g = lane / 4 and t = lane % 4, as in the PTX ISA's figures of fragments.
 *
 * WEIGHTS, pack id "cuda-2": strips of 32 outputs; a strip is blocks of 32 k, ascending. Outputs
 * and k that the matrix does not have are zeros.
 *
 *   Q4_0         64 bytes of scales (f16, one an output), 512 of nibbles
 *   Q8_0         64 of scales, 1024 of bytes
 *   Q4_K         64 of scales, 64 of minimums (f16), 32 of integer scales, 32 of integer
 *                minimums (u8), 512 of nibbles
 *   Q6_K         64 of scales, 64 of integer scales (s8: outputs' first halves, then second),
 *                512 of nibbles, 256 of two bits
 *   MXFP4        32 of exponents (u8), 512 of levels
 *   F16, BF16    2048 of values
 *
 *   scales       and whatever else is one an output: that of outputs g, g + 8, g + 16 and
 *                g + 24 side by side, ascending g
 *   nibbles      lane's 16 bytes: words for outputs g, g + 8, g + 16, g + 24; byte j of a word
 *                has k = 4 t + j in its low half and k = 16 + 4 t + j in its high half
 *   bytes        two planes of 512, k 0..15 and 16..31: lane's 16 bytes: words for the same
 *                outputs, byte j is k = 4 t + j of the plane
 *   two bits     lane's 8 bytes: two words for k = 4 t + j and 16 + 4 t + j, in whose byte j
 *                output g + 8 i has the bits 2 i and 2 i + 1: they stand above the nibble's
 *   levels       lane's 16 bytes: words for the same outputs; nibbles j of a word, from the
 *                lowest, are k = 4 t + j, then k = 16 + 4 t + j
 *   values       four planes of 512: (16 outputs) x (16 k): lane's 16 bytes are the registers
 *                a0..a3 of m16n8k16, planes in order outputs 0..15 k 0..15, outputs 0..15
 *                k 16..31, then outputs 16..31
 *
 * ACTIVATIONS: tiles of 8 rows; a tile is blocks of 32 k.
 *
 *   int8    256 bytes: lane's 8 bytes are b0 (k = 4 t ..) and b1 (k = 16 + 4 t ..) of row g; beside
 *           them scales (8 floats) and sums (8 x 2 int32: of each half)
 *   halves  two planes of 512 bytes, values and what rounding took from them: lane's 16 are b0, b1
 *           of k 0..15, then of k 16..31; scales: one a row */
#ifndef PLUGINS_CUDA_KERNELS_H
#define PLUGINS_CUDA_KERNELS_H

#include <stdint.h>

#define CUDA_STRIP         32u /* outputs */
#define CUDA_BLOCK         32u /* k */
#define CUDA_SEGMENT       8u /* blocks whose products are summed from zero, then added to the total */
#define CUDA_TILE          8u  /* rows */
#define CUDA_WARPS         8u  /* of a block of a product */
#define CUDA_QUERIES       16u /* packed queries of an attention block */
#define CUDA_PAGE          64u /* tokens: a warp's work */
#define CUDA_SEGMENT_PAGES 4u
#define CUDA_GROUP_DIMS    64u /* dimensions of V that a warp computes at a time */
#define CUDA_DIM_MAX       256u
#define CUDA_NONE          0xffffffffu
/* Shared memory of a block of attend(). */
#define CUDA_ATTEND_SHARED_BYTES (52u << 10)

enum cuda_weight_type {
    CUDA_W_Q4_0,
    CUDA_W_Q8_0,
    CUDA_W_Q4_K,
    CUDA_W_Q6_K,
    CUDA_W_MXFP4,
    CUDA_W_F16,
    CUDA_W_BF16,
    CUDA_W_COUNT
};

/* Kernels by name; product has a variant per type and number of row tiles. */
#define CUDA_KERNELS(X) \
    X(quantise)         \
    X(halve)            \
    X(route)            \
    X(sort)             \
    X(combine)          \
    X(adapt_low)        \
    X(adapt_high)       \
    X(norm)             \
    X(rope)             \
    X(map)              \
    X(unpack)           \
    X(round_rows)       \
    X(scale_rows)       \
    X(append)           \
    X(attend)           \
    X(merge)            \
    X(observe_parts)    \
    X(observe_totals)   \
    X(observe_votes)

enum cuda_map_kind {
    CUDA_MAP_SCALE,   /* scale * a */
    CUDA_MAP_ADD,     /* a + scale * b */
    CUDA_MAP_SOFTCAP, /* scale * tanh(a / scale) */
    CUDA_MAP_SILU,    /* act(a) * b, or act(a) */
    CUDA_MAP_GELU_TANH,
    CUDA_MAP_GELU,
    CUDA_MAP_SWIGLU_OAI,
    CUDA_MAP_RELU
};

/* Rows of a mixture's products are slots: each is a row of the batch and one of the experts that it
 * chose, in an order by expert in which every expert begins a tile of its own. */
struct cuda_quantise_args {
    const float *src; /* (n_rows, k) */
    uint64_t stride;
    uint32_t n_rows, k, n_blocks; /* n_blocks: of 32, k rounded up */
    uint32_t bf16;                /* halve: bf16, else f16 */
    uint8_t *q;                   /* fragments, by tile and block */
    float *scales;                /* int8: (tile, block, 8); halves: (rows) */
    int32_t *sums;                /* int8: (tile, block, 8, 2) */
    const uint32_t *slots;        /* (n_rows) which row of q each is, or NULL: as they come */
    uint32_t n_each;              /* with slots: n_each of them read one row; 0: they read slots */
    uint32_t act; /* from CUDA_MAP_SILU on: what is laid out is act(src[k]) * src[k + up] */
    uint32_t up;  /* 0: act(src[k]) */
    float alpha, limit;
};

/* For cuBLASLt: a packed matrix of F16 or BF16 as plain rows; rows of activations as one half each,
 * and what those were divided by; results, which are multiplied by that again. */
struct cuda_unpack_args {
    const uint8_t *weight;
    uint16_t *dst;                /* (n_outs, k) */
    uint32_t n_outs, k, n_blocks; /* k: a multiple of 2 */
};

struct cuda_round_args {
    const float *src; /* (n_rows, k) */
    uint64_t stride;
    uint32_t k, bf16;
    uint16_t *dst; /* (n_rows, k) */
    float *scales; /* (n_rows) */
};

struct cuda_scale_rows_args {
    float *dst; /* (n_rows, width) */
    uint64_t stride;
    uint32_t width;
    const float *scales; /* (n_rows) */
    const float *bias;   /* (width) or NULL */
};

/* A block's rows and matrix, where there are several of those. */
struct cuda_product_item {
    uint32_t matrix;
    uint32_t tile;    /* the first of NT */
    uint32_t end_row; /* behind the matrix's last row; 0: nothing to do */
};

struct cuda_product_args {
    const uint8_t *weight;
    const uint8_t *q;
    const float *scales;
    const int32_t *sums;
    const float *bias; /* (n_outs), of each matrix, or NULL */
    float *dst;        /* (n_rows, n_outs) */
    uint64_t stride;
    uint32_t n_rows, n_outs, n_blocks;
    uint32_t split; /* warps of a block that share a strip's segments: 1, 2, 4 or 8 */
    /* By y of the grid, or NULL: one matrix for all rows. Matrices lie one after the other, so that
     * output o of matrix m is m * n_outs + o of the weight. */
    const struct cuda_product_item *items;
};

/* Logits come from the two halves of a float32 router, n_experts outputs each: high, and low times
 * CUDA_ROUTER_LOW. */
#define CUDA_ROUTER_LOW             2048.0f
#define CUDA_EXPERTS_MAX            4096u
#define CUDA_ROUTE_BYTES(n_experts) ((n_experts)*9u) /* shared: logits, keys, who is chosen */

struct cuda_route_args {
    const float *logits;                       /* (n_rows, 2 n_experts) */
    const float *router_bias, *selection_bias; /* (n_experts) or NULL */
    uint32_t *chosen;                          /* (n_rows, n_used) ascending */
    float *weights;                            /* (n_rows, n_used) */
    uint32_t n_experts, n_used;
    uint32_t gating, renormalise; /* gating: enum gqa_gating_kind */
    float weight_scale;
};

#define CUDA_SORT_THREADS_MAX 1024u

struct cuda_sort_args {
    const uint32_t *chosen;          /* (n) experts */
    uint32_t *slots;                 /* (n) */
    struct cuda_product_item *items; /* (n_items) matrix: the expert */
    uint32_t n, n_items, n_experts;
    uint32_t item_tiles; /* NT of the products */
    uint32_t n_threads;
};

/* dst = sum over a row's experts, ascending, of weight * y[slot], from zero. */
struct cuda_combine_args {
    const float *y;
    const uint32_t *slots; /* (rows, n_used) */
    const float *weights;
    float *dst;
    uint64_t y_stride, dst_stride;
    uint32_t width, n_used;
};

#define CUDA_ADAPT_RANKS 4u /* of a block of adapt_low */

/* What an adapter changes in a matrix. Factors are of types F32, F16 or BF16 (enum gqa_type). */
struct cuda_adapter {
    const void *a; /* (rank, n_in) */
    const void *b; /* (rank, n_out) */
    uint32_t rank; /* 0: nothing */
    uint32_t a_type, b_type;
    float scale;
};

/* Rows [first, first + n) of those that are sorted by adapter. */
struct cuda_adapter_tile {
    uint32_t first, n; /* n: up to CUDA_TILE; 0: none */
    uint32_t adapter;
};

struct cuda_adapt_args {
    const struct cuda_adapter *adapters;
    const struct cuda_adapter_tile *tiles;
    const uint32_t *rows; /* of src and dst, sorted by adapter */
    const float *src;
    float *dst, *low; /* low: (sorted rows, low_stride) */
    uint64_t src_stride, dst_stride, low_stride;
    uint32_t n_in, n_out;
};

struct cuda_norm_args {
    const float *src;
    float *dst;
    const float *weight, *bias; /* (dim) or NULL */
    uint64_t src_stride, dst_stride;
    uint32_t width, dim, layer; /* groups of dim; layer: subtract the mean too */
    float eps;
};

struct cuda_rope_args {
    float *dst;
    uint64_t stride;
    const float *cosines, *sines; /* (rows, n_freqs) */
    uint32_t width, head_dim, n_freqs, half;
};

/* dst[i] = f(a[i], b[i]); rows: NULL, or the row of a for each row of dst. */
struct cuda_map_args {
    const float *a, *b;
    float *dst;
    const uint32_t *rows;
    uint64_t a_stride, b_stride, dst_stride;
    uint32_t width, kind;
    float scale, alpha, limit;
};

/* A sequence of a batch, on the device. Places are slots, where it has a view. */
struct cuda_seq {
    uint32_t first_row, n_rows, n_past, mutual;
    uint32_t table;           /* of this layer class: first of its pages in pages[] */
    uint32_t mask;            /* first word of its mask in masks[], or CUDA_NONE */
    uint32_t depths;          /* first of its rows' depths, where it has a mask */
    uint32_t n_sinks, recent; /* of a view; recent 0: rows see all */
    uint32_t turns; /* of its first row that is apart, in turns[]; CUDA_NONE: they do not turn */
};

/* One layer, as kernels see it. Offsets and head bytes as in struct gqa_attn_layer. */
struct cuda_attn_layer {
    uint32_t n_heads, n_kv_heads, k_dim, v_dim, window;
    uint32_t k_type, v_type; /* enum gqa_type: F16, BF16, Q8_0, Q4_0 */
    float scale, softcap;
    uint64_t k_offset, v_offset, k_head_bytes, v_head_bytes;
    const float *sinks;               /* (n_heads) or NULL */
    uint32_t n_freqs, rope_neighbour; /* pairs that turn: (i, i + n_freqs), or (2 i, 2 i + 1) */
};

/* What the kernels of attention know of a batch. */
struct cuda_attn_batch {
    const struct cuda_seq *seqs;
    const uint32_t *row_seq; /* (n_rows) */
    const uint64_t *pages;   /* device addresses */
    const uint64_t *masks;
    const uint32_t *depths;
    const float *turns; /* (n, 2 n_freqs): cosines and sines of rows that are turned back */
};

struct cuda_append_args {
    struct cuda_attn_layer layer;
    struct cuda_attn_batch batch;
    const float *k, *v;
    uint64_t k_stride, v_stride;
    /* What was stored, for the host, or NULL: (n_rows, n_kv_heads), of each K and then V as a
     * token's V lies in a page. */
    uint8_t *log;
};

/* A block's work: 16 packed queries (row * r + head of the group) over some segments: first those
 * of the sinks, for rows that a view sets apart from these, then those of the places that follow.
 */
struct cuda_attn_item {
    uint32_t first_row, n_packed; /* the packed queries are of rows from here on */
    uint32_t first;               /* packed query of the block's first */
    uint32_t seq;                 /* whose page table */
    uint32_t seg_first, seg_last; /* [first, last) */
    uint32_t sink_first, sink_last;
    uint32_t part; /* its 16 parts (of each group), or CUDA_NONE: writes out */
};

struct cuda_attend_args {
    struct cuda_attn_layer layer;
    struct cuda_attn_batch batch;
    const struct cuda_attn_item *items;
    const float *q;
    float *out;
    uint64_t q_stride, out_stride;
    float *parts; /* (part, n_kv_heads, 16, v_dim + 2): O, m, l */
};

/* Where a row's parts are: up to two runs, in ascending segments. */
struct cuda_merge_row {
    struct {
        uint32_t first_row, n_segs, part; /* n_segs 0: none */
    } run[2];
};

struct cuda_merge_args {
    struct cuda_attn_layer layer;
    const struct cuda_merge_row *rows; /* (n_rows) */
    const float *parts;
    float *out;
    uint64_t out_stride;
};

/* Votes of packed queries of one sequence; tiles are 16 of them. */
struct cuda_observe_args {
    struct cuda_attn_layer layer;
    struct cuda_attn_batch batch;
    const float *q;
    uint64_t q_stride;
    uint32_t seq, first_row, n_packed; /* the packed queries are of rows from first_row on */
    uint32_t n_segments;               /* that they see */
    uint32_t n_votes;
    float *parts;  /* (tile, n_segments, n_kv_heads, 16, 2): largest score, sum of weights */
    float *totals; /* (n_kv_heads, tiles * 16, 2): largest score, one over the sum */
    float *votes;  /* (n_kv_heads, n_votes) */
};

#endif
