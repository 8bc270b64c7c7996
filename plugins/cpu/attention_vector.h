/* plugins/cpu/attention_vector.h - grouped attention over vectors of floats: the body of every
 * vector level, which includes it once, after naming its vectors (attention_avx2.h,
 * attention_avx512.h).
 *
 * Scores: a lane is a token. One load of a K tile's row (16 tokens of one dimension) feeds one
 * multiply-add per query. Output: a lane is a dimension. One load of a V row feeds one multiply-add
 * per query. So K and V are read and converted once for all queries whose sums fit the registers,
 * and enough sums are in flight to hide a multiply-add's latency. A pack of more queries goes
 * through a block in parts, all but the first of which find it in the first-level cache.
 *
 * Quants are read as they are: their codes become floats in registers, and a scale, which is the
 * same for 32 codes, joins where that costs least: K's the sums over its 32 dimensions, V's the
 * weights.
 *
 * Every lane's sum is a chain of its own (dimensions or tokens ascending), so a query's bits do not
 * depend on how many others share its registers. */
#ifndef PLUGINS_CPU_ATTENTION_VECTOR_H
#define PLUGINS_CPU_ATTENTION_VECTOR_H

#include "plugins/cpu/attention_segment.h"

#include <math.h>

#define TOKENS     GQA_ATTN_SEGMENT_TOKENS
#define TILE_VECS  (GQA_KV_TILE_TOKENS / LANES)
#define BLOCK_VECS (GQA_KV_BLOCK_TOKENS / LANES)
/* Vectors of codes in a quant, and of those in the low halves of Q4_0. */
#define QUANT_VECS (GQA_KV_QUANT_DIMS / LANES)
#define LOW_VECS   (QUANT_VECS / 2)

/* Vectors of sums for each of nq queries. */
CPU_SPECIALISE uint32_t vecs_of(const uint32_t nq)
{
    return nq <= WIDE_QUERIES ? 4 : 2;
}

CPU_SPECIALISE uint32_t element_bytes(const uint32_t type)
{
    return type == GQA_TYPE_F32 ? 4 : 2;
}

/* Rows of codes in a tile's quant of K. */
CPU_SPECIALISE uint32_t code_rows(const uint32_t type)
{
    return type == GQA_TYPE_Q8_0 ? 32 : 16;
}

/* The next block's K is fetched straight ahead, as the processor's own prefetch likes it, or tile
 * by tile in the order in which lines are read, so that none comes late. Which is faster was
 * measured: quants of several queries, and floats of many, gain by the second. */
CPU_SPECIALISE int fetches_straight(const uint32_t nq)
{
    return nq < 3;
}

/* Asks for bytes of what is wanted next: a block ahead, into the first-level cache. */
CPU_SPECIALISE void fetch(const char *ahead, const uint32_t bytes)
{
    CPU_UNROLL
    for (uint32_t line = 0; line < bytes; line += 64) {
        _mm_prefetch(ahead + line, _MM_HINT_T0);
    }
}

CPU_SPECIALISE void set_zero(const uint32_t nq, const uint32_t nv, vec (*sum)[4])
{
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            sum[i][j] = vec_all(0.0f);
        }
    }
}

/* sum (nq, nv) += x (nq, stride) times row (nv) */
CPU_SPECIALISE void add_products(const uint32_t nq, const uint32_t nv, const float *x,
                                 const size_t stride, const vec *row, vec (*sum)[4])
{
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        vec one = vec_all(x[i * stride]);
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            sum[i][j] = vec_fma(one, row[j], sum[i][j]);
        }
    }
}

/* ---- scores ------------------------------------------------------------------------------ */

/* Scores of nq queries with nv vectors of tokens. q (k_dim, q_stride), s (nq, TOKENS). ahead: what
 * the caller wants next, fetched at the pace at which k is read. */
CPU_SPECIALISE void score_floats(const uint32_t nq, const uint32_t nv, const uint32_t type,
                                 const char *k, const char *ahead, uint32_t k_dim, const float *q,
                                 uint32_t q_stride, float scale, float *s)
{
    const uint32_t vec_bytes = LANES * element_bytes(type), row_bytes = TILE_VECS * vec_bytes;
    const size_t tile_bytes = (size_t)k_dim * row_bytes;
    const uint32_t n_tiles = nv / TILE_VECS;
    vec sum[QUERIES_MAX][4];

    set_zero(nq, nv, sum);
    for (uint32_t d = 0; d < k_dim; d++, k += row_bytes, q += q_stride) {
        vec row[4];

        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            row[j] = load_all(type, k + j / TILE_VECS * tile_bytes + j % TILE_VECS * vec_bytes);
        }
        if (n_tiles == 1 || nq <= WIDE_QUERIES) {
            fetch(ahead + d * nv * vec_bytes, nv * vec_bytes);
        } else {
            fetch(ahead + d % n_tiles * tile_bytes + d * row_bytes, 1);
        }
        add_products(nq, nv, q, 1, row, sum);
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            vec_store(s + i * TOKENS + j * LANES, vec_mul(sum[i][j], vec_all(scale)));
        }
    }
}

/* Adds codes times q for n dimensions, which have a row of 16 tokens' codes each. ahead: of the
 * lines to fetch meanwhile, with the low halves of codes, which come first. */
CPU_SPECIALISE void add_codes(const uint32_t nq, const uint32_t nv, const uint32_t type,
                              const int high, const char *codes, const char *ahead,
                              size_t tile_bytes, uint32_t n, const float *q, uint32_t q_stride,
                              vec (*sum)[4])
{
    const uint32_t n_tiles = nv / TILE_VECS, per_tile = code_rows(type) / n_tiles;
    const uint32_t step = n_tiles * GQA_KV_TILE_TOKENS;

    for (uint32_t i = 0; i < n; i++, codes += GQA_KV_TILE_TOKENS, q += q_stride) {
        vec row[4];

        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            row[j] =
                load_codes(type, codes + j / TILE_VECS * tile_bytes + j % TILE_VECS * LANES, high);
        }
        if (!high && fetches_straight(nq)) {
            fetch(ahead + i * step, 1);
        } else if (!high) {
            fetch(ahead + i / per_tile * tile_bytes + i % per_tile * step, 1);
        }
        add_products(nq, nv, q, 1, row, sum);
    }
}

/* score_floats() of quants. Each tile's sums over the 32 dimensions of one of its quants are scaled
 * into s. */
CPU_SPECIALISE void score_codes(const uint32_t nq, const uint32_t nv, const uint32_t type,
                                const char *k, const char *ahead, uint32_t k_dim, const float *q,
                                uint32_t q_stride, float scale, float *s)
{
    const uint32_t n_rows = code_rows(type), n_tiles = nv / TILE_VECS;
    const uint32_t scales_bytes = 2 * GQA_KV_TILE_TOKENS;
    const uint32_t bytes = scales_bytes + n_rows * GQA_KV_TILE_TOKENS;
    const size_t tile_bytes = GQA_KV_TILE_TOKENS * gqa_kv_token_bytes(type, k_dim);

    for (uint32_t d = 0; d < k_dim; d += GQA_KV_QUANT_DIMS, k += bytes) {
        const uint32_t n = k_dim - d < GQA_KV_QUANT_DIMS ? k_dim - d : GQA_KV_QUANT_DIMS;
        vec sum[QUERIES_MAX][4];

        set_zero(nq, nv, sum);
        if (fetches_straight(nq)) {
            fetch(ahead, n_tiles * scales_bytes);
            ahead += n_tiles * scales_bytes;
        } else {
            CPU_UNROLL
            for (uint32_t j = 0; j < n_tiles; j++) {
                fetch(ahead + j * tile_bytes, 1);
            }
            ahead += scales_bytes;
        }
        add_codes(nq, nv, type, 0, k + scales_bytes, ahead, tile_bytes, n < n_rows ? n : n_rows, q,
                  q_stride, sum);
        if (n > n_rows) {
            add_codes(nq, nv, type, 1, k + scales_bytes, ahead, tile_bytes, n - n_rows,
                      q + (size_t)n_rows * q_stride, q_stride, sum);
        }
        ahead += n_rows * GQA_KV_TILE_TOKENS * (fetches_straight(nq) ? n_tiles : 1);
        q += (size_t)n * q_stride;
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            const size_t at = j / TILE_VECS * tile_bytes + 2 * LANES * (j % TILE_VECS);
            vec factor = vec_mul(load_all(GQA_TYPE_F16, k + at), vec_all(scale));
            CPU_UNROLL
            for (uint32_t i = 0; i < nq; i++) {
                float *to = s + i * TOKENS + j * LANES;
                vec x = vec_mul(sum[i][j], factor);
                vec_store(to, d == 0 ? x : vec_add(vec_load(to), x));
            }
        }
    }
}

/* Scores of nq queries with a whole block. */
CPU_SPECIALISE void score_queries(const uint32_t nq, const uint32_t type, const char *k,
                                  const char *ahead, uint32_t k_dim, const float *q,
                                  uint32_t q_stride, float scale, float *s)
{
    const uint32_t nv = vecs_of(nq);
    const size_t bytes = gqa_kv_token_bytes(type, k_dim) * nv * LANES;

    for (uint32_t v = 0; v < BLOCK_VECS; v += nv, k += bytes, ahead += bytes, s += nv * LANES) {
        if (cpu_kv_is_quant(type)) {
            score_codes(nq, nv, type, k, ahead, k_dim, q, q_stride, scale, s);
        } else {
            score_floats(nq, nv, type, k, ahead, k_dim, q, q_stride, scale, s);
        }
    }
}

CPU_SPECIALISE void score_type(const uint32_t type, const struct cpu_attn_pack *pack,
                               uint32_t block, const char *ahead)
{
    const struct gqa_attn_layer *layer = pack->layer;
    const char *k = pack->k[block];

    for (uint32_t i = 0, n; i < pack->n_queries; i += n) {
        float *s = pack->scores + (size_t)i * TOKENS + block * GQA_KV_BLOCK_TOKENS;

        n = take(pack->n_queries - i);
        WITH_COUNT(n, score_queries, type, k, ahead, layer->k_dim, pack->q + i, pack->n_queries,
                   layer->scale, s);
    }
}

/* Calls f(type, ...) with the type as a constant. */
#define WITH_TYPE(type, f, ...)        \
    switch (type) {                    \
    case GQA_TYPE_F16:                 \
        f(GQA_TYPE_F16, __VA_ARGS__);  \
        break;                         \
    case GQA_TYPE_BF16:                \
        f(GQA_TYPE_BF16, __VA_ARGS__); \
        break;                         \
    case GQA_TYPE_Q8_0:                \
        f(GQA_TYPE_Q8_0, __VA_ARGS__); \
        break;                         \
    case GQA_TYPE_Q4_0:                \
        f(GQA_TYPE_Q4_0, __VA_ARGS__); \
        break;                         \
    default:                           \
        f(GQA_TYPE_F32, __VA_ARGS__);  \
        break;                         \
    }

static void score(const struct cpu_attn_pack *pack, uint32_t block, const char *ahead)
{
    WITH_TYPE(pack->layer->k_type, score_type, pack, block, ahead);
}

/* ---- softmax ----------------------------------------------------------------------------- */

/* A bit for each of 64 places from at on that is in [begin, end). */
static inline uint64_t places_between(uint32_t at, uint32_t begin, uint32_t end)
{
    uint64_t bits = end - at >= 64 ? ~(uint64_t)0 : ((uint64_t)1 << (end - at)) - 1;

    return at < begin ? bits >> (begin - at) << (begin - at) : bits;
}

/* Turns the scores s (nq, TOKENS) of queries that see the same into weights; ends (nq, end_stride)
 * = maximum and sum of each. Several go at once, so that they need not wait for their own maximum
 * and sum. Lanes outside [begin, end) or without their bit in mask are chosen away before anything
 * is computed from them and add exact zeros: the sum does not depend on them. */
CPU_SPECIALISE void softmax_queries(const uint32_t nq, const struct gqa_attn_layer *layer,
                                    const uint64_t *mask, float *s, uint32_t begin, uint32_t end,
                                    float *ends, size_t end_stride)
{
    const uint32_t first = begin / LANES * LANES;
    const vec lowest = vec_all(-INFINITY);
    vec max[4], sum[4];

    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        max[i] = lowest;
        sum[i] = vec_all(0.0f);
    }
    for (uint32_t t = first; t < end; t += LANES) {
        const int whole = t >= begin && t + LANES <= end && layer->softcap == 0.0f && mask == NULL;
        uint64_t seen = places_between(t, begin, end);

        if (mask != NULL) {
            seen &= mask[t / GQA_KV_BLOCK_TOKENS] >> t % GQA_KV_BLOCK_TOKENS;
        }
        CPU_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            vec x = vec_load(s + i * TOKENS + t);

            if (!whole) {
                if (layer->softcap > 0.0f) {
                    vec cap = vec_all(layer->softcap);
                    x = vec_mul(cap, tanh_all(vec_div(x, cap)));
                }
                x = vec_choose((uint32_t)seen & ((1u << LANES) - 1), x, lowest);
                vec_store(s + i * TOKENS + t, x);
            }
            max[i] = vec_max(max[i], x);
        }
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        float most = max_of_lanes(max[i]);
        ends[i * end_stride] = most;
        /* Scores that are all -inf have no maximum to subtract: they weigh nothing. */
        max[i] = vec_all(most == -INFINITY ? 0.0f : most);
    }
    for (uint32_t t = first; t < end; t += LANES) {
        CPU_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            vec p = exp_negative(vec_sub(vec_load(s + i * TOKENS + t), max[i]));
            vec_store(s + i * TOKENS + t, p);
            sum[i] = vec_add(sum[i], p);
        }
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        ends[i * end_stride + 1] = sum_of_lanes(sum[i]);
    }
}

static void softmax(const struct gqa_attn_layer *layer, const uint64_t *mask, uint32_t n_queries,
                    float *s, uint32_t begin, uint32_t end, float *ends, size_t end_stride)
{
    for (uint32_t n; n_queries > 0; n_queries -= n, s += n * TOKENS, ends += n * end_stride) {
        n = n_queries >= 4 ? 4 : n_queries >= 2 ? 2 : 1;
        if (n == 4) {
            softmax_queries(4, layer, mask, s, begin, end, ends, end_stride);
        } else if (n == 2) {
            softmax_queries(2, layer, mask, s, begin, end, ends, end_stride);
        } else {
            softmax_queries(1, layer, mask, s, begin, end, ends, end_stride);
        }
    }
}

/* ---- output ------------------------------------------------------------------------------ */

/* o (nq, o_stride) += p (nq, TOKENS) x v over n tokens, for nv vectors of dimensions; v, p and
 * ahead are at the first token. A single vector may have fewer lanes, and nothing past them is
 * read. */
CPU_SPECIALISE void weigh_vectors(const uint32_t nq, const uint32_t nv, const uint32_t type,
                                  const char *v, const char *ahead, size_t row_bytes, uint32_t n,
                                  uint32_t n_lanes, const float *p, float *o, size_t o_stride)
{
    const uint32_t vec_bytes = LANES * element_bytes(type);
    vec sum[QUERIES_MAX][4];

    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            sum[i][j] = vec_load(o + i * o_stride + j * LANES);
        }
    }
    for (uint32_t t = 0; t < n; t++, v += row_bytes, ahead += row_bytes, p++) {
        vec row[4];

        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            row[j] = nv == 1 ? load_some(type, v, n_lanes) : load_all(type, v + j * vec_bytes);
        }
        fetch(ahead, nv * vec_bytes);
        add_products(nq, nv, p, TOKENS, row, sum);
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            vec_store(o + i * o_stride + j * LANES, sum[i][j]);
        }
    }
}

/* All dimensions of rows of floats. p (nq, TOKENS). */
CPU_SPECIALISE void weigh_floats(const uint32_t nq, const uint32_t type, const char *v,
                                 const char *ahead, size_t row_bytes, uint32_t v_dim, uint32_t n,
                                 const float *p, float *o)
{
    const uint32_t bytes = element_bytes(type), wide = vecs_of(nq) * LANES;
    const size_t o_stride = cpu_attn_part_floats(v_dim);
    uint32_t d = 0;

    for (; d + wide <= v_dim; d += wide) {
        weigh_vectors(nq, vecs_of(nq), type, v + d * bytes, ahead + d * bytes, row_bytes, n, LANES,
                      p, o + d, o_stride);
    }
    for (; vecs_of(nq) > 2 && d + 2 * LANES <= v_dim; d += 2 * LANES) {
        weigh_vectors(nq, 2, type, v + d * bytes, ahead + d * bytes, row_bytes, n, LANES, p, o + d,
                      o_stride);
    }
    for (; d < v_dim; d += LANES) {
        weigh_vectors(nq, 1, type, v + d * bytes, ahead + d * bytes, row_bytes, n, v_dim - d, p,
                      o + d, o_stride);
    }
}

/* Tokens [from, to) of one block, all of which queries [query, query + n_queries) see. */
CPU_SPECIALISE void weigh_float_block(const uint32_t type, const struct cpu_attn_pack *pack,
                                      uint32_t query, uint32_t n_queries, uint32_t from,
                                      uint32_t to, const char *ahead)
{
    const uint32_t v_dim = pack->layer->v_dim;
    const size_t row_bytes = gqa_kv_token_bytes(type, v_dim);
    const size_t skip = from % GQA_KV_BLOCK_TOKENS * row_bytes;
    const char *v = pack->v[from / GQA_KV_BLOCK_TOKENS] + skip;

    for (uint32_t i = query, n; i < query + n_queries; i += n) {
        const float *p = pack->scores + (size_t)i * TOKENS + from;
        float *o = pack->parts + (size_t)i * cpu_attn_part_floats(v_dim);

        n = take(query + n_queries - i);
        WITH_COUNT(n, weigh_floats, type, v, ahead + skip, row_bytes, v_dim, to - from, p, o);
    }
}

/* Vector j of the quant whose codes begin at codes. */
CPU_SPECIALISE vec load_quant(const uint32_t type, const char *codes, const uint32_t j)
{
    if (type == GQA_TYPE_Q8_0) {
        return load_codes(type, codes + j * LANES, 0);
    }
    return load_codes(type, codes + j % LOW_VECS * LANES, j >= LOW_VECS);
}

/* One block's V as its quants are met: tokens [from, to), counted in the block. */
struct quants {
    const char *v, *ahead; /* the block; what is fetched meanwhile */
    size_t row_bytes;
    uint32_t from, to;
};

/* Weights of LANES tokens s (nq, TOKENS) times their scales of n_quants neighbouring quants, the
 * first of which is at v in the first token. p (n_quants, nq, LANES). */
CPU_SPECIALISE void scale_weights(const uint32_t nq, const uint32_t n_quants,
                                  const uint32_t quant_bytes, const char *v, size_t row_bytes,
                                  const float *s, float *p)
{
    CPU_UNROLL
    for (uint32_t g = 0; g < n_quants; g++) {
        vec scale = load_scales(v + g * quant_bytes, row_bytes);
        CPU_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            vec_store(p + (g * nq + i) * LANES, vec_mul(vec_load(s + i * TOKENS), scale));
        }
    }
}

/* o (nq, o_stride) += s (nq, TOKENS) x V of a block's tokens, for nv vectors of dimensions from
 * first on in each of n_quants neighbouring quants, the first of which is skip bytes into a row.
 * Scales are read LANES tokens at a time, hardly before the codes: what is fetched ahead has the
 * time of a block to come. */
CPU_SPECIALISE void weigh_codes(const uint32_t nq, const uint32_t n_quants, const uint32_t nv,
                                const uint32_t first, const uint32_t type, const struct quants *b,
                                size_t skip, const float *s, float *o, size_t o_stride)
{
    const uint32_t quant_bytes = (uint32_t)gqa_kv_token_bytes(type, 1);
    _Alignas(64) float p[QUERIES_MAX * LANES];
    vec sum[QUERIES_MAX][4];

    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < n_quants * nv; j++) {
            const uint32_t at = j / nv * QUANT_VECS + first + j % nv;
            sum[i][j] = vec_load(o + i * o_stride + at * LANES);
        }
    }
    for (uint32_t t = b->from / LANES * LANES; t < b->to; t += LANES) {
        const uint32_t from = t < b->from ? b->from - t : 0;
        const uint32_t to = b->to - t < LANES ? b->to - t : LANES;
        const char *v = b->v + t * b->row_bytes + skip;
        const char *codes = v + from * b->row_bytes + sizeof(uint16_t);
        const char *ahead = b->ahead + (t + from) * b->row_bytes + skip;

        scale_weights(nq, n_quants, quant_bytes, v, b->row_bytes, s + t, p);
        for (uint32_t k = from; k < to; k++, codes += b->row_bytes, ahead += b->row_bytes) {
            vec row[4];

            CPU_UNROLL
            for (uint32_t j = 0; j < n_quants * nv; j++) {
                row[j] = load_quant(type, codes + j / nv * quant_bytes, first + j % nv);
            }
            CPU_UNROLL
            for (uint32_t g = 0; g < n_quants; g++) {
                fetch(ahead + g * quant_bytes, 1);
                CPU_UNROLL
                for (uint32_t i = 0; i < nq; i++) {
                    vec one = vec_all(p[(g * nq + i) * LANES + k]);
                    CPU_UNROLL
                    for (uint32_t j = g * nv; j < (g + 1) * nv; j++) {
                        sum[i][j] = vec_fma(one, row[j], sum[i][j]);
                    }
                }
            }
        }
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < n_quants * nv; j++) {
            const uint32_t at = j / nv * QUANT_VECS + first + j % nv;
            vec_store(o + i * o_stride + at * LANES, sum[i][j]);
        }
    }
}

/* All quants of the rows, n_vecs vectors of dimensions. Few queries take two quants at once, so
 * that enough sums are in flight. */
CPU_SPECIALISE void weigh_quants(const uint32_t nq, const uint32_t type, const struct quants *b,
                                 const float *s, uint32_t n_vecs, float *o, size_t o_stride)
{
    const size_t quant_bytes = gqa_kv_token_bytes(type, 1);
    size_t skip = 0;

    for (; vecs_of(nq) >= 2 * QUANT_VECS && n_vecs >= 2 * QUANT_VECS; n_vecs -= 2 * QUANT_VECS) {
        weigh_codes(nq, 2, QUANT_VECS, 0, type, b, skip, s, o, o_stride);
        skip += 2 * quant_bytes;
        o += 2 * GQA_KV_QUANT_DIMS;
    }
    for (; vecs_of(nq) >= QUANT_VECS && n_vecs >= QUANT_VECS; n_vecs -= QUANT_VECS) {
        weigh_codes(nq, 1, QUANT_VECS, 0, type, b, skip, s, o, o_stride);
        skip += quant_bytes;
        o += GQA_KV_QUANT_DIMS;
    }
    for (; n_vecs > 0; n_vecs -= n_vecs < QUANT_VECS ? n_vecs : QUANT_VECS) {
        if (n_vecs < 2) {
            weigh_codes(nq, 1, 1, 0, type, b, skip, s, o, o_stride);
        } else {
            weigh_codes(nq, 1, 2, 0, type, b, skip, s, o, o_stride);
        }
        if (n_vecs > 2 && QUANT_VECS > 2) {
            weigh_codes(nq, 1, 2, QUANT_VECS - 2, type, b, skip, s, o, o_stride);
        }
        skip += quant_bytes;
        o += GQA_KV_QUANT_DIMS;
    }
}

/* weigh_float_block() of quants. */
CPU_SPECIALISE void weigh_quant_block(const uint32_t type, const struct cpu_attn_pack *pack,
                                      uint32_t query, uint32_t n_queries, uint32_t from,
                                      uint32_t to, const char *ahead)
{
    const uint32_t v_dim = pack->layer->v_dim, block = from / GQA_KV_BLOCK_TOKENS;
    const uint32_t first = block * GQA_KV_BLOCK_TOKENS;
    const size_t o_stride = cpu_attn_part_floats(v_dim);
    const struct quants b = {pack->v[block], ahead, gqa_kv_token_bytes(type, v_dim), from - first,
                             to - first};

    for (uint32_t i = query, n; i < query + n_queries; i += n) {
        n = take(query + n_queries - i);
        WITH_COUNT(n, weigh_quants, type, &b, pack->scores + (size_t)i * TOKENS + first,
                   cpu_attn_v_pad(v_dim) / LANES, pack->parts + i * o_stride, o_stride);
    }
}

CPU_SPECIALISE void weigh_type(const uint32_t type, const struct cpu_attn_pack *pack,
                               uint32_t query, uint32_t n_queries, uint32_t from, uint32_t to,
                               const char *ahead)
{
    if (cpu_kv_is_quant(type)) {
        weigh_quant_block(type, pack, query, n_queries, from, to, ahead);
    } else {
        weigh_float_block(type, pack, query, n_queries, from, to, ahead);
    }
}

static void weigh(const struct cpu_attn_pack *pack, uint32_t query, uint32_t n_queries,
                  uint32_t from, uint32_t to, const char *ahead)
{
    WITH_TYPE(pack->layer->v_type, weigh_type, pack, query, n_queries, from, to, ahead);
}

/* ---- the table --------------------------------------------------------------------------- */

static void segment(const struct cpu_attn_pack *packs, uint32_t n_packs)
{
    static const struct cpu_attn_steps steps = {score, softmax, weigh};

    cpu_attn_segment_by_blocks(&steps, packs, n_packs);
}

static float exp_one(float x)
{
    return max_of_lanes(exp_negative(vec_all(x))); /* which are all alike */
}

/* What up to LANES states and their parts weigh when they meet. */
struct weights {
    _Alignas(64) float max[LANES];
    _Alignas(64) float state[LANES];
    _Alignas(64) float part[LANES];
};

/* ends, part_ends (n, stride): maxima, that is. */
static void find_weights(const float *ends, const float *part_ends, uint32_t n, size_t stride,
                         struct weights *ret)
{
    for (uint32_t i = 0; i < n && i < LANES; i++) {
        ret->state[i] = ends[i * stride];
        ret->part[i] = part_ends[i * stride];
    }
    vec a = vec_load(ret->state), b = vec_load(ret->part), max = vec_max(a, b);
    vec_store(ret->max, max);
    vec_store(ret->state, exp_negative(vec_sub(a, max)));
    vec_store(ret->part, exp_negative(vec_sub(b, max)));
}

static void merge(float *states, const float *parts, uint32_t n, uint32_t v_dim)
{
    const uint32_t v_pad = cpu_attn_v_pad(v_dim);
    const size_t stride = cpu_attn_part_floats(v_dim);
    struct weights w = {0};

    for (uint32_t i = 0; i < n; i++, states += stride, parts += stride) {
        float *end = states + v_pad;
        const float *part_end = parts + v_pad;

        if (i % LANES == 0) {
            find_weights(end, part_end, n - i, stride, &w);
        }
        if (part_end[0] == -INFINITY && part_end[1] == 0.0f) {
            continue; /* an empty part; two of them make NaN of -inf minus -inf */
        }
        vec a = vec_all(w.state[i % LANES]), b = vec_all(w.part[i % LANES]);
        for (uint32_t d = 0; d < v_pad; d += LANES) {
            vec x = vec_mul(vec_load(parts + d), b);
            vec_store(states + d, vec_fma(vec_load(states + d), a, x));
        }
        /* The sums go the same way, beside the maximum and the padding. */
        vec x = vec_mul(vec_load(part_end), b);
        vec_store(end, vec_fma(vec_load(end), a, x));
        end[0] = w.max[i % LANES];
    }
}

static void finish(const float *state, const float *sink, uint32_t v_dim, float *out)
{
    const float *end = state + cpu_attn_v_pad(v_dim);
    float weight = 1.0f, sum = end[1];

    if (sink != NULL && *sink != -INFINITY) {
        float max = end[0] > *sink ? end[0] : *sink;
        weight = exp_one(end[0] - max);
        sum = sum * weight + exp_one(*sink - max);
    }
    /* Nothing seen: zero over one, not over zero. */
    vec divisor = vec_all(sum == 0.0f ? 1.0f : sum);
    for (uint32_t d = 0; d < v_dim; d += LANES) {
        vec x = vec_mul(vec_load(state + d), vec_all(weight));
        store_some(out + d, vec_div(x, divisor), v_dim - d);
    }
}

#endif
