/* plugins/cpu/attention_vector_scores.h - scores: a lane is a token. */
#ifndef PLUGINS_CPU_ATTENTION_VECTOR_SCORES_H
#define PLUGINS_CPU_ATTENTION_VECTOR_SCORES_H

#include "plugins/cpu/attention_vector_rows.h"

/* Scores of nq queries with nv vectors of tokens, from vector first of k's tile on. q (k_dim,
 * q_stride), s (nq, TOKENS). ahead: what the caller wants next, fetched at the pace at which k is
 * read. */
CPU_SPECIALISE void score_floats(const uint32_t nq, const uint32_t nv, const uint32_t first,
                                 const uint32_t type, const char *k, const char *ahead,
                                 uint32_t k_dim, const float *q, uint32_t q_stride, float scale,
                                 float *s)
{
    const uint32_t vec_bytes = LANES * element_bytes(type), row_bytes = TILE_VECS * vec_bytes;
    const size_t tile_bytes = (size_t)k_dim * row_bytes;
    const uint32_t n_tiles = nv / TILE_VECS;
    vec sum[QUERIES_MAX][VECS_MAX];

    set_zero(nq, nv, sum);
    STEP_UNROLL
    for (uint32_t d = 0; d < k_dim; d++, k += row_bytes, q += q_stride) {
        const struct row row = {
            .kind = ROW_OF_FLOATS, .type = type, .at = k, .far = tile_bytes, .first = first};
        vec whole[VECS_MAX];

        load_whole(nq, nv, &row, whole);
        if (fetches_straight(nq, type) || n_tiles == 1) {
            fetch(ahead + d * nv * vec_bytes, nv * vec_bytes);
        } else {
            fetch(ahead + d % n_tiles * tile_bytes + d * row_bytes, 1);
        }
        add_products(nq, nv, 0, nv, q, 1, &row, whole, sum);
    }
    KEEP_OUT_OF_REGISTERS(scale);
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
CPU_SPECIALISE void add_codes(const uint32_t nq, const uint32_t nv, const uint32_t first,
                              const uint32_t type, const int high, const char *codes,
                              const char *ahead, size_t tile_bytes, uint32_t n, const float *q,
                              uint32_t q_stride, vec (*sum)[VECS_MAX])
{
    const uint32_t step = nv * LANES;

    STEP_UNROLL
    for (uint32_t i = 0; i < n; i++, codes += GQA_KV_TILE_TOKENS, q += q_stride) {
        const struct row row = {.kind = ROW_OF_K_CODES,
                                .type = type,
                                .at = codes,
                                .far = tile_bytes,
                                .first = first,
                                .high = high};
        vec whole[VECS_MAX];

        load_whole(nq, nv, &row, whole);
        if (high || type == UNPACKED) {
            /* nothing is left to fetch */
        } else if (fetches_straight(nq, type)) {
            fetch(ahead + i * step, 1);
        } else {
            const uint32_t per_tile = code_rows(type) / (nv / TILE_VECS);
            fetch(ahead + i / per_tile * tile_bytes + i % per_tile * step, 1);
        }
        add_products(nq, nv, 0, nv, q, 1, &row, whole, sum);
    }
}

/* score_floats() of quants. Each tile's sums over the 32 dimensions of one of its quants are scaled
 * into s, which holds those of n_before dimensions already. */
CPU_SPECIALISE void score_codes(const uint32_t nq, const uint32_t nv, const uint32_t first,
                                const uint32_t type, const char *k, const char *ahead,
                                uint32_t k_dim, uint32_t n_before, const float *q,
                                uint32_t q_stride, float scale, float *s)
{
    const uint32_t n_rows = code_rows(type), n_tiles = nv / TILE_VECS;
    const uint32_t scales_bytes = 2 * GQA_KV_TILE_TOKENS;
    const uint32_t bytes = scales_bytes + n_rows * GQA_KV_TILE_TOKENS;
    const size_t tile_bytes = GQA_KV_TILE_TOKENS * token_bytes(type, k_dim);

    for (uint32_t d = 0; d < k_dim; d += GQA_KV_QUANT_DIMS, k += bytes) {
        const uint32_t n = k_dim - d < GQA_KV_QUANT_DIMS ? k_dim - d : GQA_KV_QUANT_DIMS;
        vec sum[QUERIES_MAX][VECS_MAX];

        set_zero(nq, nv, sum);
        if (type == UNPACKED) {
            /* its scales are at hand, too */
        } else if (fetches_straight(nq, type)) {
            fetch(ahead, nv * 2 * LANES);
            ahead += nv * 2 * LANES;
        } else {
            CPU_UNROLL
            for (uint32_t j = 0; j < n_tiles; j++) {
                fetch(ahead + j * tile_bytes, 1);
            }
            ahead += scales_bytes;
        }
        add_codes(nq, nv, first, type, 0, k + scales_bytes, ahead, tile_bytes,
                  n < n_rows ? n : n_rows, q, q_stride, sum);
        if (n > n_rows) {
            add_codes(nq, nv, first, type, 1, k + scales_bytes, ahead, tile_bytes, n - n_rows,
                      q + (size_t)n_rows * q_stride, q_stride, sum);
        }
        ahead += n_rows * (fetches_straight(nq, type) ? nv * LANES : GQA_KV_TILE_TOKENS);
        q += (size_t)n * q_stride;
        KEEP_OUT_OF_REGISTERS(scale);
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            const uint32_t v = first + j;
            const size_t at = v / TILE_VECS * tile_bytes + 2 * LANES * (v % TILE_VECS);
            vec factor = vec_mul(load_all(GQA_TYPE_F16, k + at), vec_all(scale));
            CPU_UNROLL
            for (uint32_t i = 0; i < nq; i++) {
                float *to = s + i * TOKENS + j * LANES;
                vec x = vec_mul(sum[i][j], factor);
                vec_store(to, d + n_before == 0 ? x : vec_add(vec_load(to), x));
            }
        }
    }
}

/* Scores of nq queries with nv vectors of tokens of a block, from vector first on. */
CPU_SPECIALISE void score_vectors(const uint32_t nq, const uint32_t nv, const uint32_t first,
                                  const uint32_t type, const char *k, const char *ahead,
                                  uint32_t k_dim, uint32_t n_before, const float *q,
                                  uint32_t q_stride, float scale, float *s)
{
    const size_t bytes = token_bytes(type, k_dim) * LANES, tile = first / TILE_VECS;
    const uint32_t in_tile = first % TILE_VECS;

    k += tile * TILE_VECS * bytes;
    ahead += first * bytes;
    s += first * LANES;
    if (type == UNPACKED || cpu_kv_is_quant(type)) {
        score_codes(nq, nv, in_tile, type, k, ahead, k_dim, n_before, q, q_stride, scale, s);
    } else {
        score_floats(nq, nv, in_tile, type, k, ahead, k_dim, q, q_stride, scale, s);
    }
}

/* Scores of nq queries with a whole block, of which k_dim dimensions are at k. */
CPU_SPECIALISE void score_queries(const uint32_t nq, const uint32_t type, const char *k,
                                  const char *ahead, uint32_t k_dim, uint32_t n_before,
                                  const float *q, uint32_t q_stride, float scale, float *s)
{
    const uint32_t nv = vecs_of(nq);
    const size_t bytes = token_bytes(type, k_dim) * nv * LANES;

    if (nv == 3) { /* eight vectors are three, three and two */
        score_vectors(nq, 3, 0, type, k, ahead, k_dim, n_before, q, q_stride, scale, s);
        score_vectors(nq, 3, 3, type, k, ahead, k_dim, n_before, q, q_stride, scale, s);
        score_vectors(nq, 2, 6, type, k, ahead, k_dim, n_before, q, q_stride, scale, s);
        return;
    }
    for (uint32_t v = 0; v < BLOCK_VECS; v += nv, k += bytes, ahead += bytes, s += nv * LANES) {
        score_vectors(nq, nv, 0, type, k, ahead, k_dim, n_before, q, q_stride, scale, s);
    }
}

#if GATHERS_QUANTS
/* The codes of one of Q4_0's quants in each tile of a block, as Q8_0's tiles have them: to (4,
 * GQA_KV_TILE_TOKENS of them). */
CPU_SPECIALISE void unpack_k(const char *k, const char *ahead, size_t tile_bytes, char *to)
{
    const uint32_t scales_bytes = 2 * GQA_KV_TILE_TOKENS, half = 16 * GQA_KV_TILE_TOKENS;

    for (uint32_t tile = 0; tile < GQA_KV_BLOCK_TOKENS / GQA_KV_TILE_TOKENS; tile++) {
        fetch(ahead, scales_bytes + half);
        memcpy(to, k, scales_bytes);
        to += scales_bytes;
        for (uint32_t i = 0; i < half; i += 32) {
            unpack_32(k + scales_bytes + i, to + i, to + half + i);
        }
        to += 2 * half;
        k += tile_bytes;
        ahead += scales_bytes + half;
    }
}

/* Scores with Q4_0, of which 32 dimensions are unpacked once for all queries. */
CPU_SPECIALISE void score_unpacked(const struct cpu_attn_pack *pack, uint32_t block,
                                   const char *ahead)
{
    const struct gqa_attn_layer *layer = pack->layer;
    const size_t quant_bytes = gqa_kv_token_bytes(GQA_TYPE_Q4_0, 1);
    const char *k = pack->k[block];
    _Alignas(64) char tiles[GQA_KV_BLOCK_TOKENS * sizeof(struct gqa_kv_quant)];

    for (uint32_t d = 0; d < layer->k_dim; d += GQA_KV_QUANT_DIMS) {
        const uint32_t left = layer->k_dim - d;
        const float *q = pack->q + (size_t)d * pack->n_queries;

        unpack_k(k, ahead, GQA_KV_TILE_TOKENS * gqa_kv_token_bytes(GQA_TYPE_Q4_0, layer->k_dim),
                 tiles);
        k += GQA_KV_TILE_TOKENS * quant_bytes;
        ahead += GQA_KV_BLOCK_TOKENS * quant_bytes;
        for (uint32_t i = 0, n; i < pack->n_queries; i += n) {
            float *s = pack->scores + (size_t)i * TOKENS + block * GQA_KV_BLOCK_TOKENS;

            n = take(pack->n_queries - i);
            WITH_COUNT(n, score_queries, UNPACKED, tiles, tiles,
                       left < GQA_KV_QUANT_DIMS ? left : GQA_KV_QUANT_DIMS, d, q + i,
                       pack->n_queries, layer->scale, s);
        }
    }
}
#endif

CPU_SPECIALISE void score_type(const uint32_t type, const struct cpu_attn_pack *pack,
                               uint32_t block, const char *ahead)
{
    const struct gqa_attn_layer *layer = pack->layer;
    const char *k = pack->k[block];

#if GATHERS_QUANTS
    if (type == GQA_TYPE_Q4_0 && pack->n_queries > MET_QUERIES_MAX) {
        score_unpacked(pack, block, ahead);
        return;
    }
#endif
    for (uint32_t i = 0, n; i < pack->n_queries; i += n) {
        float *s = pack->scores + (size_t)i * TOKENS + block * GQA_KV_BLOCK_TOKENS;

        n = take(pack->n_queries - i);
        if (type == GQA_TYPE_Q4_0) {
            WITH_MET_COUNT(n, score_queries, type, k, ahead, layer->k_dim, 0, pack->q + i,
                           pack->n_queries, layer->scale, s);
        } else {
            WITH_COUNT(n, score_queries, type, k, ahead, layer->k_dim, 0, pack->q + i,
                       pack->n_queries, layer->scale, s);
        }
    }
}

#define DEFINE(type)                                                                             \
    APART void score_##type(const struct cpu_attn_pack *pack, uint32_t block, const char *ahead) \
    {                                                                                            \
        score_type(GQA_TYPE_##type, pack, block, ahead);                                         \
    }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

static void score(const struct cpu_attn_pack *pack, uint32_t block, const char *ahead)
{
    WITH_TYPE(pack->layer->k_type, score, pack, block, ahead);
}

#endif
