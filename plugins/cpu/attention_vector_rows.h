/* plugins/cpu/attention_vector_rows.h - what scores and output have in common: rows of K or V in
 * registers, and the products that sums take from them. */
#ifndef PLUGINS_CPU_ATTENTION_VECTOR_ROWS_H
#define PLUGINS_CPU_ATTENTION_VECTOR_ROWS_H

#include "plugins/cpu/attention_segment.h"

/* What a level decides, beside naming its vectors and their arithmetic; all of it was measured:
 *
 *     QUERIES_MAX, VECS_MAX   most queries, and vectors of each, whose sums registers hold at once
 *     vecs_of()               vectors of sums for each of so many queries
 *     take()                  how many of the queries that are left come next
 *     takes_rows_whole()      whether a row's vectors are all loaded before the first is used
 *     fetches_straight()      whether the next block's K is fetched straight ahead, as the
 *                             processor's own prefetch likes it, or tile by tile in the order in
 *                             which lines are read, so that none comes late
 *     FETCHES_V_STRAIGHT      the same of V's rows, of which a pass reads a part
 *     FETCH_HINT              the cache that is fetched to
 *     GATHERS_QUANTS          whether Q4_0's codes become bytes, and V's scales are gathered, once
 *                             for a pack's queries instead of in registers for every few of them,
 *                             where there are more than MET_QUERIES_MAX
 *     WITH_MET_COUNT()        WITH_COUNT() of queries that meet codes and scales as they lie
 *     STEP_UNROLL             stands before loops over dimensions or tokens
 *     APART                   stands before functions of one type
 *     KEEP_OUT_OF_REGISTERS() keeps a number in memory through such loops */

#define TOKENS     GQA_ATTN_SEGMENT_TOKENS
#define TILE_VECS  (GQA_KV_TILE_TOKENS / LANES)
#define BLOCK_VECS (GQA_KV_BLOCK_TOKENS / LANES)
/* Vectors of codes in a quant, and of those in the low halves of Q4_0. */
#define QUANT_VECS (GQA_KV_QUANT_DIMS / LANES)
#define LOW_VECS   (QUANT_VECS / 2)

/* The type of Q4_0's codes that have been unpacked into bytes, as Q8_0 has them, on the stack:
 * there is nothing to fetch with them. */
#define UNPACKED (GQA_TYPE_Q8_0 | 0x100u)

CPU_SPECIALISE size_t token_bytes(const uint32_t type, uint32_t dim)
{
    return gqa_kv_token_bytes(type == UNPACKED ? GQA_TYPE_Q8_0 : type, dim);
}

CPU_SPECIALISE uint32_t element_bytes(const uint32_t type)
{
    return type == GQA_TYPE_F32 ? 4 : 2;
}

/* Rows of codes in a tile's quant of K. */
CPU_SPECIALISE uint32_t code_rows(const uint32_t type)
{
    return type == GQA_TYPE_Q4_0 ? 16 : 32;
}

/* Asks for bytes of what is wanted next: a block ahead, into the first-level cache. */
CPU_SPECIALISE void fetch(const char *ahead, const uint32_t bytes)
{
    CPU_UNROLL
    for (uint32_t line = 0; line < bytes; line += 64) {
        _mm_prefetch(ahead + line, FETCH_HINT);
    }
}

CPU_SPECIALISE void set_zero(const uint32_t nq, const uint32_t nv, vec (*sum)[VECS_MAX])
{
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            sum[i][j] = vec_all(0.0f);
        }
    }
}

/* What one step of a sum needs of K or V: a row of vectors. */
enum row_kind {
    ROW_OF_FLOATS, /* one after the other, or in K's tiles */
    ROW_END,       /* one vector of V that may have fewer lanes */
    ROW_OF_K_CODES,
    ROW_OF_V_CODES,
};

struct row {
    enum row_kind kind; /* constants, as is first */
    uint32_t type;
    const char *at;
    size_t far;       /* from one tile or quant to the next */
    uint32_t first;   /* vectors of the first tile or quant that are left out */
    int high;         /* of K: the high halves of Q4_0's codes */
    uint32_t n_lanes; /* of ROW_END */
};

/* Vector j of the quant whose codes begin at codes. */
CPU_SPECIALISE vec load_quant(const uint32_t type, const char *codes, const uint32_t j)
{
    if (type == GQA_TYPE_Q4_0) {
        return load_codes(type, codes + j % LOW_VECS * LANES, j >= LOW_VECS);
    }
    return load_codes(type, codes + j * LANES, 0);
}

CPU_SPECIALISE vec load_row(const struct row *row, const uint32_t j)
{
    const uint32_t in_tile = j % TILE_VECS * LANES;

    switch (row->kind) {
    case ROW_END:
        return load_some(row->type, row->at, row->n_lanes);
    case ROW_OF_K_CODES:
        return load_codes(row->type, row->at + j / TILE_VECS * row->far + in_tile, row->high);
    case ROW_OF_V_CODES:
        return load_quant(row->type, row->at + j / QUANT_VECS * row->far, j % QUANT_VECS);
    default:
        return load_all(row->type,
                        row->at + j / TILE_VECS * row->far + in_tile * element_bytes(row->type));
    }
}

/* A row's nv vectors, where registers hold them beside the sums; others are loaded one by one. */
CPU_SPECIALISE void load_whole(const uint32_t nq, const uint32_t nv, const struct row *row,
                               vec *whole)
{
    if (takes_rows_whole(nq, nv)) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            whole[j] = load_row(row, row->first + j);
        }
    }
}

/* sum (nq, nv) += x (nq, stride) times vectors [from, to) of a row, which were given to
 * load_whole(). */
CPU_SPECIALISE void add_products(const uint32_t nq, const uint32_t nv, const uint32_t from,
                                 const uint32_t to, const float *x, const size_t stride,
                                 const struct row *row, const vec *whole, vec (*sum)[VECS_MAX])
{
    vec one[QUERIES_MAX];

    if (takes_rows_whole(nq, nv)) {
        CPU_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            one[0] = vec_all(x[i * stride]);
            CPU_UNROLL
            for (uint32_t j = from; j < to; j++) {
                sum[i][j] = vec_fma(one[0], whole[j], sum[i][j]);
            }
        }
        return;
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        one[i] = vec_all(x[i * stride]);
    }
    CPU_UNROLL
    for (uint32_t j = from; j < to; j++) {
        vec part = load_row(row, row->first + j);
        CPU_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            sum[i][j] = vec_fma(one[i], part, sum[i][j]);
        }
    }
}

/* What a level has one function for each type of. Each stands APART, where the compiler would else
 * have to find registers for all of them together, and keep a loop's pointers in memory. */
#define FOR_EACH_TYPE(DEFINE) DEFINE(F32) DEFINE(F16) DEFINE(BF16) DEFINE(Q8_0) DEFINE(Q4_0)

/* Calls f_F32() or so, by the type. */
#define WITH_TYPE(type, f, ...) \
    switch (type) {             \
    case GQA_TYPE_F16:          \
        f##_F16(__VA_ARGS__);   \
        break;                  \
    case GQA_TYPE_BF16:         \
        f##_BF16(__VA_ARGS__);  \
        break;                  \
    case GQA_TYPE_Q8_0:         \
        f##_Q8_0(__VA_ARGS__);  \
        break;                  \
    case GQA_TYPE_Q4_0:         \
        f##_Q4_0(__VA_ARGS__);  \
        break;                  \
    default:                    \
        f##_F32(__VA_ARGS__);   \
        break;                  \
    }

#endif
