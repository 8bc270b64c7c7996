/* plugins/cpu/attention_avx512.c - grouped attention with 16 lanes of AVX-512.
 *
 * Scores: a lane is a token. One load of a K tile's row (16 tokens of one dimension) feeds one
 * multiply-add per query. Output: a lane is a dimension. One load of a V row feeds one multiply-add
 * per query. So K and V are read and converted once for up to 12 queries, whose sums stay in
 * registers; the sizes below keep up to 24 sums in flight, enough to hide the
 * multiply-add's latency.
 *
 * Every lane's sum is a chain of its own (dimensions or tokens ascending), so a query's bits do not
 * depend on how many others share its registers. */
#include "plugins/cpu/attention_avx512.h"
#include "plugins/cpu/attention_segment.h"

#include <math.h>

#define TOKENS GQA_ATTN_SEGMENT_TOKENS

/* How many of the queries that are left go through the registers next: 12, or 8 down to 1. */
CPU_SPECIALISE uint32_t take(uint32_t left)
{
    return left >= 12 ? 12 : left > 8 ? (left + 1) / 2 : left;
}

/* Calls f(n, ...) with n as a constant: the registers need to know it. */
#define WITH_COUNT(n, f, ...) \
    switch (n) {              \
    case 1:                   \
        f(1, __VA_ARGS__);    \
        break;                \
    case 2:                   \
        f(2, __VA_ARGS__);    \
        break;                \
    case 3:                   \
        f(3, __VA_ARGS__);    \
        break;                \
    case 4:                   \
        f(4, __VA_ARGS__);    \
        break;                \
    case 5:                   \
        f(5, __VA_ARGS__);    \
        break;                \
    case 6:                   \
        f(6, __VA_ARGS__);    \
        break;                \
    case 7:                   \
        f(7, __VA_ARGS__);    \
        break;                \
    case 8:                   \
        f(8, __VA_ARGS__);    \
        break;                \
    default:                  \
        f(12, __VA_ARGS__);   \
        break;                \
    }

/* Fetches what the caller wants next, if anything, and gives what comes bytes later. */
CPU_SPECIALISE const char *fetch(const char *ahead, const uint32_t bytes, size_t step)
{
    if (ahead == NULL) {
        return NULL;
    }
    CPU_UNROLL
    for (uint32_t line = 0; line < bytes; line += 64) {
        _mm_prefetch(ahead + line, _MM_HINT_T1);
    }
    return ahead + step;
}

/* ---- scores ------------------------------------------------------------------------------ */

/* Scores of nq queries and nt tiles of tokens. q (k_dim, q_stride), s (nq, TOKENS). ahead: what the
 * caller wants next, fetched at the pace at which k is read; or NULL. */
CPU_SPECIALISE void score_tiles(const uint32_t nq, const uint32_t nt, const uint32_t type,
                                const char *k, const char *ahead, uint32_t k_dim, const float *q,
                                uint32_t q_stride, float scale, float *s)
{
    const uint32_t row_bytes = LANES * bytes_of(type);
    const size_t tile_bytes = (size_t)k_dim * row_bytes;
    __m512 sum[12][4];

    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nt; j++) {
            sum[i][j] = _mm512_setzero_ps();
        }
    }
    for (uint32_t d = 0; d < k_dim; d++, k += row_bytes, q += q_stride) {
        __m512 tile[4];

        CPU_UNROLL
        for (uint32_t j = 0; j < nt; j++) {
            tile[j] = load_all(type, k + j * tile_bytes);
        }
        ahead = fetch(ahead, nt * row_bytes, nt * row_bytes);
        CPU_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            __m512 one = _mm512_set1_ps(q[i]);
            CPU_UNROLL
            for (uint32_t j = 0; j < nt; j++) {
                sum[i][j] = _mm512_fmadd_ps(one, tile[j], sum[i][j]);
            }
        }
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nt; j++) {
            _mm512_store_ps(s + i * TOKENS + j * LANES,
                            _mm512_mul_ps(sum[i][j], _mm512_set1_ps(scale)));
        }
    }
}

/* The same for a whole block: few queries take all four tiles at once, more of them two and two,
 * for want of registers; and so does a single one, which waits for memory and fares best reading
 * straight ahead. */
CPU_SPECIALISE void score_tokens(const uint32_t nq, const uint32_t type, const char *k,
                                 const char *ahead, uint32_t k_dim, const float *q,
                                 uint32_t q_stride, float scale, float *s)
{
    const uint32_t nt = nq > 1 && nq <= 4 ? 4 : 2;
    const size_t bytes = (size_t)k_dim * nt * LANES * bytes_of(type);

    for (uint32_t t = 0; t < 4; t += nt, k += bytes, ahead += bytes, s += nt * LANES) {
        score_tiles(nq, nt, type, k, ahead, k_dim, q, q_stride, scale, s);
    }
}

/* Scores of the pack with tokens [64 block, 64 block + 64) of the segment. */
CPU_SPECIALISE void score_block(const uint32_t type, const struct cpu_attn_pack *pack,
                                uint32_t block, const char *ahead)
{
    const struct gqa_attn_layer *layer = pack->layer;
    const char *k = pack->k[block];

    for (uint32_t i = 0, n; i < pack->n_queries; i += n) {
        float *s = pack->scores + (size_t)i * TOKENS + block * GQA_KV_BLOCK_TOKENS;

        n = take(pack->n_queries - i);
        WITH_COUNT(n, score_tokens, type, k, ahead, layer->k_dim, pack->q + i, pack->n_queries,
                   layer->scale, s);
    }
}

/* Scores of a tile that was widened. */
CPU_SPECIALISE void score_widened(const uint32_t nq, const float *tile, uint32_t k_dim,
                                  const float *q, uint32_t q_stride, float scale, float *s)
{
    score_tiles(nq, 1, GQA_TYPE_F32, (const char *)tile, NULL, k_dim, q, q_stride, scale, s);
}

/* The same of K in quants: a tile at a time is widened in the first-level cache, once for all
 * queries of the pack. */
CPU_SPECIALISE void score_quants(const uint32_t type, const struct cpu_attn_pack *pack,
                                 uint32_t block, const char *ahead)
{
    const struct gqa_attn_layer *layer = pack->layer;
    const size_t bytes = GQA_KV_TILE_TOKENS * gqa_kv_token_bytes(type, layer->k_dim);

    for (uint32_t t = 0; t < GQA_KV_BLOCK_TOKENS / GQA_KV_TILE_TOKENS; t++) {
        widen_tile(type, pack->k[block] + t * bytes, ahead + t * bytes, layer->k_dim, pack->tile);
        for (uint32_t i = 0, n; i < pack->n_queries; i += n) {
            float *s = pack->scores + (size_t)i * TOKENS + block * GQA_KV_BLOCK_TOKENS;

            n = take(pack->n_queries - i);
            WITH_COUNT(n, score_widened, pack->tile, layer->k_dim, pack->q + i, pack->n_queries,
                       layer->scale, s + t * GQA_KV_TILE_TOKENS);
        }
    }
}

static void score_block_of_type(const struct cpu_attn_pack *pack, uint32_t block, const char *ahead)
{
    switch (pack->layer->k_type) {
    case GQA_TYPE_F16:
        score_block(GQA_TYPE_F16, pack, block, ahead);
        break;
    case GQA_TYPE_BF16:
        score_block(GQA_TYPE_BF16, pack, block, ahead);
        break;
    case GQA_TYPE_Q8_0:
        score_quants(GQA_TYPE_Q8_0, pack, block, ahead);
        break;
    case GQA_TYPE_Q4_0:
        score_quants(GQA_TYPE_Q4_0, pack, block, ahead);
        break;
    default:
        score_block(GQA_TYPE_F32, pack, block, ahead);
        break;
    }
}

/* ---- softmax ----------------------------------------------------------------------------- */

static float max_of_lanes(__m512 x)
{
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    x = _mm512_max_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    x = _mm512_max_ps(x, _mm512_permute_ps(x, 0x4e));
    return _mm512_cvtss_f32(_mm512_max_ps(x, _mm512_permute_ps(x, 0xb1)));
}

static float sum_of_lanes(__m512 x)
{
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0x4e));
    x = _mm512_add_ps(x, _mm512_shuffle_f32x4(x, x, 0xb1));
    x = _mm512_add_ps(x, _mm512_permute_ps(x, 0x4e));
    return _mm512_cvtss_f32(_mm512_add_ps(x, _mm512_permute_ps(x, 0xb1)));
}

/* Turns one query's scores s (TOKENS) into weights; end[0..1] = maximum and sum. Lanes outside
 * [begin, n) or without their bit in mask are chosen away before anything is computed from them and
 * add exact zeros: the sum does not depend on them. */
static void softmax(const struct gqa_attn_layer *layer, const uint64_t *mask, float *s,
                    uint32_t begin, uint32_t n, float *end)
{
    uint32_t first = begin / LANES * LANES;
    __m512 infinity = _mm512_set1_ps(INFINITY);
    __m512 lowest = _mm512_sub_ps(_mm512_setzero_ps(), infinity);
    __m512 max = lowest, sum = _mm512_setzero_ps();

    for (uint32_t t = first; t < n; t += LANES) {
        __m512 x = _mm512_load_ps(s + t);
        __mmask16 seen = first_lanes(n - t);

        if (t >= begin && t + LANES <= n && layer->softcap == 0.0f && mask == NULL) {
            max = _mm512_max_ps(max, x); /* nearly always: nothing to change */
            continue;
        }
        if (t < begin) {
            seen &= (__mmask16)~first_lanes(begin - t);
        }
        if (mask != NULL) {
            seen &= (__mmask16)(mask[t / GQA_KV_BLOCK_TOKENS] >> t % GQA_KV_BLOCK_TOKENS);
        }
        if (layer->softcap > 0.0f) {
            __m512 cap = _mm512_set1_ps(layer->softcap);
            x = _mm512_mul_ps(cap, tanh_all(_mm512_div_ps(x, cap)));
        }
        x = _mm512_mask_mov_ps(lowest, seen, x);
        _mm512_store_ps(s + t, x);
        max = _mm512_max_ps(max, x);
    }
    end[0] = max_of_lanes(max);
    /* Scores that are all -inf have no maximum to subtract: they weigh nothing. */
    max = _mm512_set1_ps(end[0] == -INFINITY ? 0.0f : end[0]);
    for (uint32_t t = first; t < n; t += LANES) {
        __m512 p = exp_negative(_mm512_sub_ps(_mm512_load_ps(s + t), max));
        _mm512_store_ps(s + t, p);
        sum = _mm512_add_ps(sum, p);
    }
    end[1] = sum_of_lanes(sum);
}

/* ---- output ------------------------------------------------------------------------------ */

/* o (nq, o_stride) += p (nq, TOKENS) x v over n tokens, for nv vectors of dimensions; v, p and
 * ahead are at the first token. With nv == 1, lanes outside mask are neither read nor kept. */
CPU_SPECIALISE void weigh_rows(const uint32_t nq, const uint32_t nv, const uint32_t type,
                               const char *v, const char *ahead, size_t row_bytes, uint32_t n,
                               __mmask16 mask, const float *p, float *o, size_t o_stride)
{
    const uint32_t vector_bytes = LANES * bytes_of(type);
    __m512 sum[12][2];

    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            sum[i][j] = _mm512_load_ps(o + i * o_stride + j * LANES);
        }
    }
    for (uint32_t t = 0; t < n; t++, v += row_bytes, p++) {
        __m512 row[2];

        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            row[j] = nv == 1 ? load_some(type, v, mask) : load_all(type, v + j * vector_bytes);
        }
        ahead = fetch(ahead, nv * vector_bytes, row_bytes);
        CPU_UNROLL
        for (uint32_t i = 0; i < nq; i++) {
            __m512 one = _mm512_set1_ps(p[i * TOKENS]);
            CPU_UNROLL
            for (uint32_t j = 0; j < nv; j++) {
                sum[i][j] = _mm512_fmadd_ps(one, row[j], sum[i][j]);
            }
        }
    }
    CPU_UNROLL
    for (uint32_t i = 0; i < nq; i++) {
        CPU_UNROLL
        for (uint32_t j = 0; j < nv; j++) {
            _mm512_store_ps(o + i * o_stride + j * LANES, sum[i][j]);
        }
    }
}

/* The same for all dimensions of the rows. */
CPU_SPECIALISE void weigh_tokens(const uint32_t nq, const uint32_t type, const char *v,
                                 const char *ahead, size_t row_bytes, uint32_t v_dim, uint32_t n,
                                 const float *p, float *o)
{
    const uint32_t bytes = bytes_of(type);
    const size_t o_stride = cpu_attn_part_floats(v_dim);
    uint32_t d = 0;

    for (; d + 2 * LANES <= v_dim; d += 2 * LANES) {
        weigh_rows(nq, 2, type, v + d * bytes, ahead != NULL ? ahead + d * bytes : NULL, row_bytes,
                   n, 0xffff, p, o + d, o_stride);
    }
    for (; d < v_dim; d += LANES) {
        weigh_rows(nq, 1, type, v + d * bytes, ahead != NULL ? ahead + d * bytes : NULL, row_bytes,
                   n, first_lanes(v_dim - d), p, o + d, o_stride);
    }
}

/* Adds tokens [from, to) of one block, all of which queries [query, query + n_queries) see. */
CPU_SPECIALISE void weigh_block(const uint32_t type, const struct cpu_attn_pack *pack,
                                uint32_t query, uint32_t n_queries, uint32_t from, uint32_t to,
                                const char *ahead)
{
    const uint32_t v_dim = pack->layer->v_dim;
    const size_t skip = (size_t)(from % GQA_KV_BLOCK_TOKENS) * v_dim * bytes_of(type);
    const char *v = pack->v[from / GQA_KV_BLOCK_TOKENS] + skip;

    for (uint32_t i = query, n; i < query + n_queries; i += n) {
        const float *p = pack->scores + (size_t)i * TOKENS + from;
        float *o = pack->parts + (size_t)i * cpu_attn_part_floats(v_dim);

        n = take(query + n_queries - i);
        WITH_COUNT(n, weigh_tokens, type, v, ahead + skip, (size_t)v_dim * bytes_of(type), v_dim,
                   to - from, p, o);
    }
}

/* The same of V in quants: a tile's tokens at a time are widened in the first-level cache, once for
 * all queries. */
CPU_SPECIALISE void weigh_quants(const uint32_t type, const struct cpu_attn_pack *pack,
                                 uint32_t query, uint32_t n_queries, uint32_t from, uint32_t to,
                                 const char *ahead)
{
    const uint32_t v_dim = pack->layer->v_dim;
    const size_t bytes = gqa_kv_token_bytes(type, v_dim);
    const size_t width = (v_dim + GQA_KV_QUANT_DIMS - 1) / GQA_KV_QUANT_DIMS * GQA_KV_QUANT_DIMS;

    for (uint32_t t = from, n_tokens; t < to; t += n_tokens) {
        const size_t skip = t % GQA_KV_BLOCK_TOKENS * bytes;

        n_tokens = to - t < GQA_KV_TILE_TOKENS ? to - t : GQA_KV_TILE_TOKENS;
        for (uint32_t j = 0; j < n_tokens; j++) {
            const size_t at = skip + j * bytes;

            widen_row(type, pack->v[t / GQA_KV_BLOCK_TOKENS] + at, v_dim, pack->tile + j * width);
            for (size_t line = 0; line < bytes; line += 64) {
                _mm_prefetch(ahead + at + line, _MM_HINT_T1);
            }
        }
        for (uint32_t i = query, n; i < query + n_queries; i += n) {
            const float *p = pack->scores + (size_t)i * TOKENS + t;
            float *o = pack->parts + (size_t)i * cpu_attn_part_floats(v_dim);

            n = take(query + n_queries - i);
            WITH_COUNT(n, weigh_tokens, GQA_TYPE_F32, (const char *)pack->tile, NULL,
                       width * sizeof(float), v_dim, n_tokens, p, o);
        }
    }
}

static void weigh_block_of_type(const struct cpu_attn_pack *pack, uint32_t query,
                                uint32_t n_queries, uint32_t from, uint32_t to, const char *ahead)
{
    switch (pack->layer->v_type) {
    case GQA_TYPE_F16:
        weigh_block(GQA_TYPE_F16, pack, query, n_queries, from, to, ahead);
        break;
    case GQA_TYPE_BF16:
        weigh_block(GQA_TYPE_BF16, pack, query, n_queries, from, to, ahead);
        break;
    case GQA_TYPE_Q8_0:
        weigh_quants(GQA_TYPE_Q8_0, pack, query, n_queries, from, to, ahead);
        break;
    case GQA_TYPE_Q4_0:
        weigh_quants(GQA_TYPE_Q4_0, pack, query, n_queries, from, to, ahead);
        break;
    default:
        weigh_block(GQA_TYPE_F32, pack, query, n_queries, from, to, ahead);
        break;
    }
}

/* ---- the table --------------------------------------------------------------------------- */

static const struct cpu_attn_steps steps_avx512 = {
    .score = score_block_of_type,
    .softmax = softmax,
    .weigh = weigh_block_of_type,
};

static void segment_avx512(const struct cpu_attn_pack *pack)
{
    cpu_attn_segment_by_blocks(&steps_avx512, pack);
}

static void merge_avx512(float *state, const float *part, uint32_t v_dim)
{
    uint32_t v_pad = cpu_attn_v_pad(v_dim);
    float *state_end = state + v_pad;
    const float *part_end = part + v_pad;
    float max = state_end[0] > part_end[0] ? state_end[0] : part_end[0];

    if (part_end[0] == -INFINITY && part_end[1] == 0.0f) {
        return; /* an empty part; two of them would make NaN of -inf minus -inf */
    }
    float a = exp_one(state_end[0] - max), b = exp_one(part_end[0] - max);
    for (uint32_t d = 0; d < v_pad; d += LANES) {
        __m512 x = _mm512_mul_ps(_mm512_load_ps(part + d), _mm512_set1_ps(b));
        x = _mm512_fmadd_ps(_mm512_load_ps(state + d), _mm512_set1_ps(a), x);
        _mm512_store_ps(state + d, x);
    }
    state_end[0] = max;
    state_end[1] = state_end[1] * a + part_end[1] * b;
}

static void finish_avx512(const float *state, const float *sink, uint32_t v_dim, float *out)
{
    const float *end = state + cpu_attn_v_pad(v_dim);
    float weight = 1.0f, sum = end[1];

    if (sink != NULL && *sink != -INFINITY) {
        float max = end[0] > *sink ? end[0] : *sink;
        weight = exp_one(end[0] - max);
        sum = sum * weight + exp_one(*sink - max);
    }
    /* Nothing seen: zero over one, not over zero. */
    __m512 divisor = _mm512_set1_ps(sum == 0.0f ? 1.0f : sum);
    for (uint32_t d = 0; d < v_dim; d += LANES) {
        __m512 x = _mm512_mul_ps(_mm512_load_ps(state + d), _mm512_set1_ps(weight));
        _mm512_mask_storeu_ps(out + d, first_lanes(v_dim - d), _mm512_div_ps(x, divisor));
    }
}

/* float32 to bfloat16, rounded to nearest even; NaN stays NaN. */
static __m256i bf16_of(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));

    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}

static void store_avx512(uint32_t type, const float *src, void *dst, size_t n)
{
    uint32_t bytes = bytes_of(type);

    for (size_t i = 0; i < n; i += LANES) {
        __mmask16 mask = first_lanes(n - i < LANES ? (uint32_t)(n - i) : LANES);
        __m512 x = _mm512_maskz_loadu_ps(mask, src + i);
        char *to = (char *)dst + i * bytes;

        if (type == GQA_TYPE_F16) {
            _mm256_mask_storeu_epi16(to, mask, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
        } else if (type == GQA_TYPE_BF16) {
            _mm256_mask_storeu_epi16(to, mask, bf16_of(x));
        } else {
            _mm512_mask_storeu_ps(to, mask, x);
        }
    }
}

const struct cpu_attn_kernels cpu_attn_kernels_avx512 = {
    .isa = CPU_ISA_AVX512,
    .segment = segment_avx512,
    .merge = merge_avx512,
    .finish = finish_avx512,
    .store = store_avx512,
};
