/* plugins/cpu/attention_vector_output.h - weights times V: a lane is a dimension. */
#ifndef PLUGINS_CPU_ATTENTION_VECTOR_OUTPUT_H
#define PLUGINS_CPU_ATTENTION_VECTOR_OUTPUT_H

#include "plugins/cpu/attention_vector_rows.h"

/* Where a pass over n tokens of rows looks ahead: at its own vectors d bytes into the rows of the
 * next block; or at its share of that block, so that all passes together go straight through it. */
CPU_SPECIALISE const char *ahead_of(const char *ahead, size_t d, uint32_t n)
{
    return ahead + (FETCHES_V_STRAIGHT ? n * d : d);
}

/* o (nq, o_stride) += p (nq, TOKENS) x v over n tokens, for nv vectors of dimensions; v, p and
 * ahead are at the first token. A single vector may have fewer lanes, and nothing past them is
 * read. */
CPU_SPECIALISE void weigh_vectors(const uint32_t nq, const uint32_t nv, const uint32_t type,
                                  const char *v, const char *ahead, size_t row_bytes, uint32_t n,
                                  uint32_t n_lanes, const float *p, float *o, size_t o_stride)
{
    const uint32_t vec_bytes = LANES * element_bytes(type);
    const size_t step = FETCHES_V_STRAIGHT ? nv * vec_bytes : row_bytes;
    vec sum[QUERIES_MAX][VECS_MAX];

    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            sum[i][j] = vec_load(o + i * o_stride + j * LANES);
        }
    }
    STEP_UNROLL
    for (uint32_t t = 0; t < n; t++, v += row_bytes, ahead += step, p++) {
        const struct row row = {.kind = nv == 1 ? ROW_END : ROW_OF_FLOATS,
                                .type = type,
                                .at = v,
                                .far = TILE_VECS * vec_bytes,
                                .n_lanes = n_lanes};
        vec whole[VECS_MAX];

        load_whole(nq, nv, &row, whole);
        fetch(ahead, nv * vec_bytes);
        add_products(nq, nv, 0, nv, p, TOKENS, &row, whole, sum);
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
    const uint32_t bytes = element_bytes(type), nv = vecs_of(nq), wide = nv * LANES;
    const size_t o_stride = cpu_attn_part_floats(v_dim);
    uint32_t d = 0;

    /* Four vectors are two and two, not three and one. */
    for (; d + wide <= v_dim && (nv != 3 || v_dim - d != 4 * LANES); d += wide) {
        weigh_vectors(nq, nv, type, v + d * bytes, ahead_of(ahead, d * bytes, n), row_bytes, n,
                      LANES, p, o + d, o_stride);
    }
    for (; nv > 2 && d + 2 * LANES <= v_dim; d += 2 * LANES) {
        weigh_vectors(nq, 2, type, v + d * bytes, ahead_of(ahead, d * bytes, n), row_bytes, n,
                      LANES, p, o + d, o_stride);
    }
    for (; d < v_dim; d += LANES) {
        weigh_vectors(nq, 1, type, v + d * bytes, ahead_of(ahead, d * bytes, n), row_bytes, n,
                      v_dim - d, p, o + d, o_stride);
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

/* One block's V as its quants are met: tokens [from, to), counted in the block. */
struct quants {
    const char *v,
        *ahead; /* the block, or some neighbouring quants of it; what is fetched meanwhile */
    size_t row_bytes;
    uint32_t from, to;
    const uint16_t *scales; /* (quants, GQA_KV_BLOCK_TOKENS), where they were gathered */
};

/* From one quant to the next in a row, and where its codes begin. */
CPU_SPECIALISE uint32_t quant_bytes_of(const uint32_t type)
{
    return type == UNPACKED ? GQA_KV_QUANT_DIMS : (uint32_t)gqa_kv_token_bytes(type, 1);
}

CPU_SPECIALISE uint32_t codes_at(const uint32_t type)
{
    return type == UNPACKED ? 0 : sizeof(uint16_t);
}

/* Weights of LANES tokens s (nq, TOKENS) times their scales. p (nq, p_stride). */
CPU_SPECIALISE void scale_weights(const uint32_t nq, const uint32_t p_stride, const float *s,
                                  vec scale, float *p)
{
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        vec_store(p + i * p_stride, vec_mul(vec_load(s + i * TOKENS), scale));
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
    const uint32_t quant_bytes = quant_bytes_of(type);
    _Alignas(64) float p[QUERIES_MAX * LANES];
    vec sum[QUERIES_MAX][VECS_MAX];

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

        CPU_UNROLL
        for (uint32_t g = 0; g < n_quants; g++) {
            scale_weights(nq, LANES, s + t, load_scales(v + g * quant_bytes, b->row_bytes),
                          p + g * nq * LANES);
        }
        for (uint32_t k = from; k < to; k++, codes += b->row_bytes, ahead += b->row_bytes) {
            const struct row row = {.kind = ROW_OF_V_CODES,
                                    .type = type,
                                    .at = codes,
                                    .far = quant_bytes,
                                    .first = first};
            vec whole[VECS_MAX];

            load_whole(nq, n_quants * nv, &row, whole);
            CPU_UNROLL
            for (uint32_t g = 0; g < n_quants; g++) {
                fetch(ahead + g * quant_bytes, 1);
                add_products(nq, n_quants * nv, g * nv, (g + 1) * nv, p + g * nq * LANES + k, LANES,
                             &row, whole, sum);
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

/* The same for nv of the vectors of one quant or of two neighbours, with weights that are scaled.
 * p (quants, nq, GQA_KV_BLOCK_TOKENS). ahead: for every token step bytes more. */
CPU_SPECIALISE void weigh_scaled(const uint32_t nq, const uint32_t nv, const uint32_t first,
                                 const uint32_t type, const struct quants *b, size_t skip,
                                 const char *ahead, size_t step, const float *p, float *o,
                                 size_t o_stride)
{
    const char *codes = b->v + b->from * b->row_bytes + skip + codes_at(type);
    vec sum[QUERIES_MAX][VECS_MAX];

    o += first * LANES;
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            sum[i][j] = vec_load(o + i * o_stride + j * LANES);
        }
    }
    STEP_UNROLL
    for (uint32_t t = b->from; t < b->to; t++, codes += b->row_bytes, ahead += step) {
        const struct row row = {.kind = ROW_OF_V_CODES,
                                .type = type,
                                .at = codes,
                                .far = quant_bytes_of(type),
                                .first = first};
        const uint32_t second = first < QUANT_VECS ? QUANT_VECS - first : 0;
        const uint32_t set = nq * GQA_KV_BLOCK_TOKENS;
        vec whole[VECS_MAX];

        load_whole(nq, nv, &row, whole);
        if (type != UNPACKED) {
            fetch(ahead, (uint32_t)step);
        }
        if (second > 0) {
            add_products(nq, nv, 0, nv < second ? nv : second, p + t, GQA_KV_BLOCK_TOKENS, &row,
                         whole, sum);
        }
        if (second < nv) {
            add_products(nq, nv, second, nv, p + set + t, GQA_KV_BLOCK_TOKENS, &row, whole, sum);
        }
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            vec_store(o + i * o_stride + j * LANES, sum[i][j]);
        }
    }
}

/* n_quants neighbouring quants from number quant on, of which n_vecs vectors are there, in passes
 * of as many vectors as the registers have sums for: weights are scaled once and serve all of them.
 * o: at the first of the quants. */
CPU_SPECIALISE void weigh_in_passes(const uint32_t nq, const uint32_t quant,
                                    const uint32_t n_quants, const uint32_t n_vecs,
                                    const uint32_t type, const struct quants *b, const float *s,
                                    float *o, size_t o_stride)
{
    const uint32_t nv = vecs_of(nq) < n_vecs ? vecs_of(nq) : n_vecs;
    const uint32_t step = n_quants * quant_bytes_of(type) * nv / n_vecs;
    const uint32_t skip = quant * quant_bytes_of(type);
    const char *ahead = b->ahead + GQA_KV_BLOCK_TOKENS * skip;
    _Alignas(64) float p[2 * QUERIES_MAX * GQA_KV_BLOCK_TOKENS];

    for (uint32_t t = b->from / LANES * LANES; t < b->to; t += LANES) {
        CPU_UNROLL
        for (uint32_t g = 0; g < n_quants; g++) {
            const uint16_t *scales = b->scales + (quant + g) * GQA_KV_BLOCK_TOKENS + t;
            scale_weights(nq, GQA_KV_BLOCK_TOKENS, s + t,
                          load_all(GQA_TYPE_F16, (const char *)scales),
                          p + g * nq * GQA_KV_BLOCK_TOKENS + t);
        }
    }
#define PASS(n, first)                                                                           \
    weigh_scaled(nq, n, first, type, b, skip, ahead + (first) / nv * GQA_KV_BLOCK_TOKENS * step, \
                 step, p, o, o_stride)
    if (nv == 3 && n_vecs == 4) { /* rather than three and one */
        PASS(2, 0);
        PASS(2, 2);
        return;
    }
    PASS(nv, 0);
    if (nv == 3) {
        PASS(3, 3);
        PASS(2, 6);
    }
    if (nv < 3 && n_vecs > 2) {
        PASS(2, 2);
    }
    if (nv < 3 && n_vecs > 4) {
        PASS(2, 4);
        PASS(2, 6);
    }
    if (nv == 4 && n_vecs > 4) {
        PASS(4, 4);
    }
#undef PASS
}

/* Up to two quants of the rows, n_vecs vectors of dimensions. */
CPU_SPECIALISE void weigh_pair(const uint32_t nq, const uint32_t type, const struct quants *b,
                               const float *s, uint32_t n_vecs, float *o, size_t o_stride)
{
    if (n_vecs >= 2 * QUANT_VECS) {
        weigh_in_passes(nq, 0, 2, 2 * QUANT_VECS, type, b, s, o, o_stride);
        return;
    }
    if (n_vecs < QUANT_VECS) {
        weigh_in_passes(nq, 0, 1, 2, type, b, s, o, o_stride);
        return;
    }
    weigh_in_passes(nq, 0, 1, QUANT_VECS, type, b, s, o, o_stride);
    if (n_vecs > QUANT_VECS) {
        weigh_in_passes(nq, 1, 1, 2, type, b, s, o + GQA_KV_QUANT_DIMS, o_stride);
    }
}

/* All quants of the rows, n_vecs vectors of dimensions, whose scales are met with their codes. Few
 * queries take two quants at once, so that enough sums are in flight. */
CPU_SPECIALISE void weigh_quants(const uint32_t nq, const uint32_t type, const struct quants *b,
                                 const float *s, uint32_t n_vecs, float *o, size_t o_stride)
{
    const size_t quant_bytes = quant_bytes_of(type);
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
    const struct quants b = {.v = pack->v[block],
                             .ahead = ahead,
                             .row_bytes = gqa_kv_token_bytes(type, v_dim),
                             .from = from - first,
                             .to = to - first};

    for (uint32_t i = query, n; i < query + n_queries; i += n) {
        n = take(query + n_queries - i);
        WITH_MET_COUNT(n, weigh_quants, type, &b, pack->scores + (size_t)i * TOKENS + first,
                       cpu_attn_v_pad(v_dim) / LANES, pack->parts + i * o_stride, o_stride);
    }
}

#if GATHERS_QUANTS
/* Two quants of each of a block's tokens: Q4_0's codes, and the scales by quant. */
struct pairs {
    _Alignas(64) char rows[GQA_KV_BLOCK_TOKENS][2 * GQA_KV_QUANT_DIMS];
    _Alignas(64) uint16_t scales[2][GQA_KV_BLOCK_TOKENS];
};

/* Fills in tokens [from, to) of n_quants neighbouring quants, the first of which is at v in a
 * block's first token. */
CPU_SPECIALISE void gather_pairs(const uint32_t n_quants, const uint32_t type, const char *v,
                                 const char *ahead, size_t row_bytes, uint32_t from, uint32_t to,
                                 struct pairs *ret)
{
    const size_t quant_bytes = gqa_kv_token_bytes(type, 1);

    v += from * row_bytes;
    ahead += from * n_quants * quant_bytes;
    for (uint32_t t = from; t < to; t++, v += row_bytes, ahead += n_quants * quant_bytes) {
        if (type == GQA_TYPE_Q4_0) {
            fetch(ahead, 1);
        }
        CPU_UNROLL
        for (uint32_t g = 0; g < n_quants; g++) {
            const char *quant = v + g * quant_bytes;

            ret->scales[g][t] = cpu_kv_scale(quant, 0);
            if (type == GQA_TYPE_Q4_0) {
                unpack_16(quant + sizeof(uint16_t), ret->rows[t] + g * GQA_KV_QUANT_DIMS);
            }
        }
    }
}

/* weigh_quant_block() two quants after the other, of which scales are gathered, and codes unpacked,
 * once for all queries. */
CPU_SPECIALISE void weigh_pairs(const uint32_t type, const struct cpu_attn_pack *pack,
                                uint32_t query, uint32_t n_queries, uint32_t from, uint32_t to,
                                const char *ahead)
{
    const uint32_t v_dim = pack->layer->v_dim, block = from / GQA_KV_BLOCK_TOKENS;
    const uint32_t first = block * GQA_KV_BLOCK_TOKENS, n_vecs = cpu_attn_v_pad(v_dim) / LANES;
    const size_t o_stride = cpu_attn_part_floats(v_dim);
    const size_t row_bytes = gqa_kv_token_bytes(type, v_dim);
    const uint32_t codes = type == GQA_TYPE_Q4_0 ? UNPACKED : type;
    struct pairs pairs;
    struct quants b = {.v = pairs.rows[0],
                       .row_bytes = type == GQA_TYPE_Q4_0 ? sizeof(pairs.rows[0]) : row_bytes,
                       .from = from - first,
                       .to = to - first,
                       .scales = pairs.scales[0]};
    /* Whole vectors of tokens, whose scales are read together. */
    const uint32_t begin = b.from / LANES * LANES, end = (b.to + LANES - 1) / LANES * LANES;

    for (uint32_t j = 0; j < n_vecs; j += 2 * QUANT_VECS) {
        const size_t skip = j / QUANT_VECS * gqa_kv_token_bytes(type, 1);
        const uint32_t n = n_vecs - j < 2 * QUANT_VECS ? n_vecs - j : 2 * QUANT_VECS;

        b.ahead = ahead + GQA_KV_BLOCK_TOKENS * skip;
        if (n > QUANT_VECS) {
            gather_pairs(2, type, pack->v[block] + skip, b.ahead, row_bytes, begin, end, &pairs);
        } else {
            gather_pairs(1, type, pack->v[block] + skip, b.ahead, row_bytes, begin, end, &pairs);
        }
        if (type != GQA_TYPE_Q4_0) {
            b.v = pack->v[block] + skip;
        }
        for (uint32_t i = query, nq; i < query + n_queries; i += nq) {
            nq = take(query + n_queries - i);
            WITH_COUNT(nq, weigh_pair, codes, &b, pack->scores + (size_t)i * TOKENS + first, n,
                       pack->parts + i * o_stride + j * LANES, o_stride);
        }
    }
}
#endif

CPU_SPECIALISE void weigh_type(const uint32_t type, const struct cpu_attn_pack *pack,
                               uint32_t query, uint32_t n_queries, uint32_t from, uint32_t to,
                               const char *ahead)
{
#if GATHERS_QUANTS
    if (cpu_kv_is_quant(type) && n_queries > MET_QUERIES_MAX) {
        weigh_pairs(type, pack, query, n_queries, from, to, ahead);
        return;
    }
#endif
    if (cpu_kv_is_quant(type)) {
        weigh_quant_block(type, pack, query, n_queries, from, to, ahead);
    } else {
        weigh_float_block(type, pack, query, n_queries, from, to, ahead);
    }
}

#define DEFINE(type)                                                                              \
    APART void weigh_##type(const struct cpu_attn_pack *pack, uint32_t query, uint32_t n_queries, \
                            uint32_t from, uint32_t to, const char *ahead)                        \
    {                                                                                             \
        weigh_type(GQA_TYPE_##type, pack, query, n_queries, from, to, ahead);                     \
    }
FOR_EACH_TYPE(DEFINE)
#undef DEFINE

static void weigh(const struct cpu_attn_pack *pack, uint32_t query, uint32_t n_queries,
                  uint32_t from, uint32_t to, const char *ahead)
{
    WITH_TYPE(pack->layer->v_type, weigh, pack, query, n_queries, from, to, ahead);
}

#endif
