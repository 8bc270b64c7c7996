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
    vec sum[QUERIES_MAX][4];

    set_zero(nq, nv, sum);
    for (uint32_t d = 0; d < k_dim; d++, k += row_bytes, q += q_stride) {
        vec row[4];

        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            row[j] = load_all(type, k + j / TILE_VECS * tile_bytes + j % TILE_VECS * vec_bytes);
        }
        fetch(ahead, nv * vec_bytes);
        ahead += nv * vec_bytes;
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

/* Adds codes times q for n dimensions, which have a row of 16 tokens' codes each. */
CPU_SPECIALISE void add_codes(const uint32_t nq, const uint32_t nv, const uint32_t type,
                              const int high, const char *codes, size_t tile_bytes, uint32_t n,
                              const float *q, uint32_t q_stride, vec (*sum)[4])
{
    for (uint32_t i = 0; i < n; i++, codes += GQA_KV_TILE_TOKENS, q += q_stride) {
        vec row[4];

        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            row[j] =
                load_codes(type, codes + j / TILE_VECS * tile_bytes + j % TILE_VECS * LANES, high);
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
    const uint32_t n_rows = type == GQA_TYPE_Q8_0 ? 32 : 16; /* of codes */
    const uint32_t bytes = GQA_KV_TILE_TOKENS * (2 + n_rows);
    const size_t tile_bytes = GQA_KV_TILE_TOKENS * gqa_kv_token_bytes(type, k_dim);

    for (uint32_t d = 0; d < k_dim; d += GQA_KV_QUANT_DIMS, k += bytes) {
        const uint32_t n = k_dim - d < GQA_KV_QUANT_DIMS ? k_dim - d : GQA_KV_QUANT_DIMS;
        const char *codes = k + 2 * GQA_KV_TILE_TOKENS;
        vec sum[QUERIES_MAX][4];

        fetch(ahead, nv / TILE_VECS * bytes);
        ahead += nv / TILE_VECS * bytes;
        set_zero(nq, nv, sum);
        add_codes(nq, nv, type, 0, codes, tile_bytes, n < n_rows ? n : n_rows, q, q_stride, sum);
        if (n > n_rows) {
            add_codes(nq, nv, type, 1, codes, tile_bytes, n - n_rows, q + (size_t)n_rows * q_stride,
                      q_stride, sum);
        }
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

/* Vector j of a V row's piece. Of quants it is one of the quant's, whose codes begin at v; a single
 * vector of floats may have fewer lanes, and nothing past them is read. */
CPU_SPECIALISE vec load_v(const uint32_t nv, const uint32_t type, const char *v, const uint32_t j,
                          uint32_t n_lanes)
{
    if (type == GQA_TYPE_Q8_0) {
        return load_codes(type, v + j * LANES, 0);
    }
    if (type == GQA_TYPE_Q4_0) {
        return load_codes(type, v + j % LOW_VECS * LANES, j >= LOW_VECS);
    }
    return nv == 1 ? load_some(type, v, n_lanes)
                   : load_all(type, v + j * LANES * element_bytes(type));
}

/* o (nq, o_stride) += p (nq, p_stride) x v over n tokens, for vectors [first, first + nv) of
 * dimensions; v, p and ahead are at the first token. */
CPU_SPECIALISE void weigh_vectors(const uint32_t nq, const uint32_t nv, const uint32_t first,
                                  const uint32_t type, const char *v, const char *ahead,
                                  size_t row_bytes, uint32_t n, uint32_t n_lanes, const float *p,
                                  const size_t p_stride, float *o, size_t o_stride)
{
    const uint32_t bytes = cpu_kv_is_quant(type) ? 1 : nv * LANES * element_bytes(type);
    vec sum[QUERIES_MAX][4];

    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            sum[i][j] = vec_load(o + i * o_stride + (first + j) * LANES);
        }
    }
    for (uint32_t t = 0; t < n; t++, v += row_bytes, ahead += row_bytes, p++) {
        vec row[4];

        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            row[j] = load_v(nv, type, v, first + j, n_lanes);
        }
        fetch(ahead, bytes);
        add_products(nq, nv, p, p_stride, row, sum);
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            vec_store(o + i * o_stride + (first + j) * LANES, sum[i][j]);
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
        weigh_vectors(nq, vecs_of(nq), 0, type, v + d * bytes, ahead + d * bytes, row_bytes, n,
                      LANES, p, TOKENS, o + d, o_stride);
    }
    for (; vecs_of(nq) > 2 && d + 2 * LANES <= v_dim; d += 2 * LANES) {
        weigh_vectors(nq, 2, 0, type, v + d * bytes, ahead + d * bytes, row_bytes, n, LANES, p,
                      TOKENS, o + d, o_stride);
    }
    for (; d < v_dim; d += LANES) {
        weigh_vectors(nq, 1, 0, type, v + d * bytes, ahead + d * bytes, row_bytes, n, v_dim - d, p,
                      TOKENS, o + d, o_stride);
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

/* Tokens [from, to) of a block, counted in it, for one quant of their rows: the first of them at v.
 * scales (GQA_KV_BLOCK_TOKENS): its scale in each token. s: the block's weights. They are scaled
 * into scratch first (nq, GQA_KV_BLOCK_TOKENS). n_vecs: of the quant, so many are dimensions. */
CPU_SPECIALISE void weigh_quant(const uint32_t nq, const uint32_t type, const char *v,
                                const char *ahead, size_t row_bytes, uint32_t from, uint32_t to,
                                const uint16_t *scales, const float *s, float *scratch,
                                uint32_t n_vecs, float *o, size_t o_stride)
{
    const float *p = scratch + from;
    const char *codes = v + sizeof(*scales);

    for (uint32_t t = from / LANES * LANES; t < to; t += LANES) {
        vec scale = load_all(GQA_TYPE_F16, (const char *)(scales + t));
        CPU_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            vec_store(scratch + i * GQA_KV_BLOCK_TOKENS + t,
                      vec_mul(vec_load(s + i * TOKENS + t), scale));
        }
    }
    if (n_vecs < 2) {
        weigh_vectors(nq, 1, 0, type, codes, ahead, row_bytes, to - from, LANES, p,
                      GQA_KV_BLOCK_TOKENS, o, o_stride);
        return;
    }
    if (vecs_of(nq) == QUANT_VECS && n_vecs == QUANT_VECS) {
        weigh_vectors(nq, QUANT_VECS, 0, type, codes, ahead, row_bytes, to - from, LANES, p,
                      GQA_KV_BLOCK_TOKENS, o, o_stride);
        return;
    }
    weigh_vectors(nq, 2, 0, type, codes, ahead, row_bytes, to - from, LANES, p, GQA_KV_BLOCK_TOKENS,
                  o, o_stride);
    if (n_vecs > 2) {
        weigh_vectors(nq, 2, QUANT_VECS - 2, type, codes, ahead, row_bytes, to - from, LANES, p,
                      GQA_KV_BLOCK_TOKENS, o, o_stride);
    }
}

/* weigh_float_block() of quants. */
CPU_SPECIALISE void weigh_quant_block(const uint32_t type, const struct cpu_attn_pack *pack,
                                      uint32_t query, uint32_t n_queries, uint32_t from,
                                      uint32_t to, const char *ahead)
{
    const uint32_t v_dim = pack->layer->v_dim, v_pad = cpu_attn_v_pad(v_dim);
    const uint32_t block = from / GQA_KV_BLOCK_TOKENS, first = block * GQA_KV_BLOCK_TOKENS;
    const size_t quant_bytes = gqa_kv_token_bytes(type, 1);
    const size_t row_bytes = gqa_kv_token_bytes(type, v_dim);
    const size_t skip = (from - first) * row_bytes, o_stride = cpu_attn_part_floats(v_dim);
    const char *v = pack->v[block] + skip;
    uint16_t scales[GQA_KV_BLOCK_TOKENS];

    for (uint32_t g = 0; g * GQA_KV_QUANT_DIMS < v_dim; g++) {
        const uint32_t d = g * GQA_KV_QUANT_DIMS;
        const uint32_t n_vecs = v_pad - d < GQA_KV_QUANT_DIMS ? (v_pad - d) / LANES : QUANT_VECS;

        for (uint32_t t = from; t < to; t++) {
            scales[t - first] = cpu_kv_scale(v + (t - from) * row_bytes, g * quant_bytes);
        }
        for (uint32_t i = query, n; i < query + n_queries; i += n) {
            n = take(query + n_queries - i);
            WITH_COUNT(n, weigh_quant, type, v + g * quant_bytes, ahead + skip + g * quant_bytes,
                       row_bytes, from - first, to - first, scales,
                       pack->scores + (size_t)i * TOKENS + first, pack->weights, n_vecs,
                       pack->parts + i * o_stride + d, o_stride);
        }
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
