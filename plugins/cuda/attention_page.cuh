/* plugins/cuda/attention_page.cuh - what attention does with a page: who sees which of its tokens,
 * and a warp's products with its K and V. attention.cu has the layout of operands, and the rest. */
#ifndef PLUGINS_CUDA_ATTENTION_PAGE_CUH
#define PLUGINS_CUDA_ATTENTION_PAGE_CUH

#include "plugins/cuda/device.cuh"

#include <gqa/tensor.h>

#define THREADS 128u
#define EMPTY   __uint_as_float(0xff800000u) /* minus infinity */

DEVICE bool quantised(uint32_t type)
{
    return type == GQA_TYPE_Q8_0 || type == GQA_TYPE_Q4_0;
}

/* What the tensor core multiplies: bf16, else f16. */
DEVICE uint32_t operand_bf16(uint32_t type)
{
    return type != GQA_TYPE_F16;
}

/* gqa_kv_rotate() of n_rows vectors, one after the other in memory of the block, by all of its
 * threads: the same operations on every value. */
DEVICE void rotate_rows(float *x, uint32_t n_rows, uint32_t dim)
{
    uint32_t n = dim & (~dim + 1), odd = 0;
    float norm = 1.0f;

    for (uint32_t i = 1; i < n; i *= 2, odd ^= 1) {
        norm *= odd ? 1.0f : 0.5f;
        __syncthreads();
        for (uint32_t pair = threadIdx.x; pair < n_rows * dim / 2; pair += THREADS) {
            uint32_t at = pair / i * 2 * i + pair % i;
            float a = x[at], b = x[at + i];
            x[at] = a + b;
            x[at + i] = a - b;
        }
    }
    norm *= odd ? 1.41421356f : 1.0f;
    __syncthreads();
    for (uint32_t j = threadIdx.x; j < n_rows * dim; j += THREADS) {
        x[j] *= norm;
    }
    __syncthreads();
}

/* ---- what a packed query sees ------------------------------------------------------------ */

struct sight {
    uint32_t row; /* of the batch, CUDA_NONE: no query */
    uint32_t head;
    uint32_t n_past, from, to; /* sees places [from, to), as far as the mask says so */
    const uint64_t *mask;      /* its row of the mask, or NULL */
    const uint32_t *depths;
};

DEVICE uint32_t window_start(uint32_t window, uint32_t position)
{
    return window != 0 && position >= window ? position - window + 1 : 0;
}

/* sinks: what a row that a view sets apart sees of these, else of all places that follow. */
DEVICE sight sight_of(const cuda_attn_layer &l, const cuda_attn_batch &b,
                      const cuda_attn_item &item, uint32_t query, uint32_t group, bool sinks)
{
    uint32_t r = l.n_heads / l.n_kv_heads, packed = item.first + query;
    sight s = {CUDA_NONE, 0, 0, 0, 0, NULL, NULL};

    if (packed >= item.n_packed) {
        return s;
    }
    s.row = item.first_row + packed / r;
    s.head = group * r + packed % r;
    const cuda_seq &seq = b.seqs[b.row_seq[s.row]];
    uint32_t i = s.row - seq.first_row, position = seq.n_past + i;
    bool apart = seq.recent != 0 && position >= seq.n_sinks + seq.recent;
    s.n_past = seq.n_past;
    if (sinks) {
        s.to = apart ? seq.n_sinks : 0;
        return s;
    }
    s.to = seq.mutual || seq.mask != CUDA_NONE ? seq.n_past + seq.n_rows : position + 1;
    if (seq.mask != CUDA_NONE) {
        s.mask = b.masks + seq.mask + (uint64_t)i * ((seq.n_rows + 63) / 64);
        s.depths = b.depths + seq.depths;
        position = seq.n_past + s.depths[i];
    } else if (seq.mutual && l.window != 0 && l.window < seq.n_rows - i) {
        s.to = position + l.window;
    }
    s.from = apart ? position - seq.recent + 1 : window_start(l.window, position);
    return s;
}

DEVICE bool sees(const sight &s, uint32_t place)
{
    if (place >= s.to) {
        return false;
    }
    if (s.mask == NULL || place < s.n_past) {
        return place >= s.from;
    }
    uint32_t j = place - s.n_past; /* counts by its own depth */
    return (s.mask[j / 64] >> j % 64 & 1) != 0 && s.n_past + s.depths[j] >= s.from;
}

/* Whether any place of a page may be seen. Masked rows look at all new places. */
DEVICE bool sees_page(const sight &s, uint32_t first)
{
    uint32_t from = s.mask != NULL ? min(s.from, s.n_past) : s.from;
    return s.row != CUDA_NONE && first < s.to && first + CUDA_PAGE > from;
}

/* ---- a warp and its page ----------------------------------------------------------------- */

/* Queries of a block as registers of A, high and low halves: (k / 16, lane, 8 halves). */
struct query_room {
    uint16_t high[CUDA_DIM_MAX / 16 * 32 * 8];
    uint16_t low[CUDA_DIM_MAX / 16 * 32 * 8];
};

/* Cosines and sines by which a row's queries are turned back to meet the sinks, or NULL. */
DEVICE const float *turn_of(const cuda_attn_layer &l, const cuda_attn_batch &b, uint32_t row)
{
    const cuda_seq &seq = b.seqs[b.row_seq[row]];
    uint32_t place = seq.n_past + row - seq.first_row, full = seq.n_sinks + seq.recent;

    if (seq.turns == CUDA_NONE || place < full) {
        return NULL;
    }
    uint32_t first = max(full, seq.n_past); /* the first row that is apart */
    return b.turns + (uint64_t)(seq.turns + place - first) * 2 * l.n_freqs;
}

/* Dimension d of a query, turned back where turn is not NULL. */
DEVICE float query_value(const cuda_attn_layer &l, const float *q, const float *turn, uint32_t d)
{
    uint32_t n = l.n_freqs;

    if (turn == NULL || d >= 2 * n) {
        return q[d];
    }
    uint32_t i = l.rope_neighbour ? d / 2 : d % n, x = l.rope_neighbour ? 2 * i : i;
    float a = q[x], b = q[l.rope_neighbour ? x + 1 : x + n];
    return d == x ? a * turn[i] + b * turn[n + i] : b * turn[i] - a * turn[n + i];
}

/* Splits an item's queries into halves. sinks: as they meet these. scratch: (16, k_dim) floats of the
 * block's, for types that rotate. The room's last readers must be done; it may be read at once. */
DEVICE void load_queries(const cuda_attn_layer &l, const cuda_attn_batch &b, const float *q,
                         uint64_t q_stride, const cuda_attn_item &item, uint32_t group, bool sinks,
                         query_room &room, float *scratch)
{
    uint32_t r = l.n_heads / l.n_kv_heads, k_pad = (l.k_dim + 15) / 16 * 16;
    bool rotates = gqa_kv_rotates(l.k_type);

    for (uint32_t i = threadIdx.x; rotates && i < CUDA_QUERIES * l.k_dim; i += THREADS) {
        uint32_t packed = item.first + i / l.k_dim, row = item.first_row + packed / r;
        scratch[i] = 0.0f;
        if (packed < item.n_packed) {
            const float *from = q + row * q_stride + (group * r + packed % r) * l.k_dim;
            scratch[i] = query_value(l, from, sinks ? turn_of(l, b, row) : NULL, i % l.k_dim);
        }
    }
    if (rotates) {
        rotate_rows(scratch, CUDA_QUERIES, l.k_dim);
    }
    for (uint32_t i = threadIdx.x; i < CUDA_QUERIES * k_pad; i += THREADS) {
        uint32_t query = i / k_pad, d = i % k_pad, packed = item.first + query;
        uint32_t j = d % 16 / 4, reg = (query < 8 ? 0 : 1) + j / 2 * 2;
        uint32_t at = ((d / 16 * 32) + query % 8 * 4 + d % 4) * 8 + reg * 2 + j % 2;
        uint32_t high = 0, low = 0, row = item.first_row + packed / r;
        if (packed < item.n_packed && d < l.k_dim) {
            const float *from = q + row * q_stride + (group * r + packed % r) * l.k_dim;
            float x = rotates ? scratch[query * l.k_dim + d]
                              : query_value(l, from, sinks ? turn_of(l, b, row) : NULL, d);
            split_halves(x * l.scale, operand_bf16(l.k_type), high, low);
        }
        room.high[at] = (uint16_t)high;
        room.low[at] = (uint16_t)low;
    }
    __syncthreads();
}

/* The block's queries for dimensions 16 step on. */
DEVICE void take_queries(const query_room &room, uint32_t step, uint32_t lane, uint32_t high[4],
                         uint32_t low[4])
{
#pragma unroll
    for (int j = 0; j < 4; j++) {
        high[j] = ((const uint32_t *)room.high)[(step * 32 + lane) * 4 + j];
        low[j] = ((const uint32_t *)room.low)[(step * 32 + lane) * 4 + j];
    }
}

/* s[i] += queries (16 x 16) times 16 dimensions of 64 tokens; rows[j]: 8 tokens of a dimension. */
DEVICE void add_scores(const uint32_t high[4], const uint32_t low[4], const uint32_t rows[4][4],
                       uint32_t bf16, float s[8][4])
{
#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint32_t pick = i % 2 ? 0x7632 : 0x5410;
        uint32_t b0 = __byte_perm(rows[0][i / 2], rows[1][i / 2], pick);
        uint32_t b1 = __byte_perm(rows[2][i / 2], rows[3][i / 2], pick);
        mma_half(s[i], high, b0, b1, bf16);
        mma_half(s[i], low, b0, b1, bf16);
    }
}

DEVICE void scores_of_halves(const cuda_attn_layer &l, const query_room &room, const uint16_t *k,
                             uint32_t lane, float s[8][4])
{
    uint32_t g = lane / 4, t = lane % 4;

    for (uint32_t step = 0; step < (l.k_dim + 15) / 16; step++) {
        uint32_t rows[4][4], high[4], low[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            uint32_t d = step * 16 + 4 * j + t;
            rows[j][0] = rows[j][1] = rows[j][2] = rows[j][3] = 0;
            if (d < l.k_dim) {
                load_16(k + ((uint64_t)(g / 2) * l.k_dim + d) * 16 + g % 2 * 8, rows[j]);
            }
        }
        take_queries(room, step, lane, high, low);
        add_scores(high, low, rows, operand_bf16(l.k_type), s);
    }
}

/* Codes of four bytes, which stand above zero by bias - 2^23, as bf16: exactly. */
DEVICE void codes_to_bf16(uint32_t bytes, float bias, uint32_t ret[2])
{
    uint32_t f[4];

#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t code = bytes >> 8 * i & 0xffu;
        f[i] = __float_as_uint(__uint_as_float(0x4b000000u | code) - bias);
    }
    ret[0] = __byte_perm(f[0], f[1], 0x7632);
    ret[1] = __byte_perm(f[2], f[3], 0x7632);
}

/* Four codes of type, in stored order; Q4_0: the low or high halves of their bytes. */
DEVICE void take_codes(uint32_t type, uint32_t bytes, bool is_high, uint32_t ret[2])
{
    if (type == GQA_TYPE_Q8_0) {
        codes_to_bf16(bytes ^ 0x80808080u, 8388736.0f, ret); /* 2^23 + 128 */
    } else {
        codes_to_bf16((is_high ? bytes >> 4 : bytes) & 0x0f0f0f0fu, 8388616.0f, ret);
    }
}

/* Scores as products with the codes of 32 dimensions, then times the tokens' scales of these. */
DEVICE void scores_of_quants(const cuda_attn_layer &l, const query_room &room, const uint8_t *k,
                             uint32_t lane, float s[8][4])
{
    uint32_t g = lane / 4, t = lane % 4, type = l.k_type;

    for (uint32_t first = 0; first < l.k_dim; first += GQA_KV_QUANT_DIMS) {
        uint32_t scales[2][4]; /* of this lane's 16 tokens: token_of() */
        float sums[8][4] = {};
        for (uint32_t step = first / 16; step < first / 16 + 2 && step * 16 < l.k_dim; step++) {
            uint32_t rows[4][4] = {}, high[4], low[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t d = step * 16 + 4 * j + t, bytes[2];
                if (d < l.k_dim) {
                    load_8(k + gqa_k_quant_byte(type, l.k_dim, 8 * g, d), bytes);
                    take_codes(type, bytes[0], d % 32 >= 16, rows[j]);
                    take_codes(type, bytes[1], d % 32 >= 16, rows[j] + 2);
                }
            }
            take_queries(room, step, lane, high, low);
            add_scores(high, low, rows, 1, sums);
        }
        load_16(k + gqa_k_quant_scale(type, l.k_dim, 16 * t, first), scales[0]);
        load_16(k + gqa_k_quant_scale(type, l.k_dim, 16 * t + 8, first), scales[1]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                uint32_t scale = scales[c % 2][i / 2] >> i % 2 * 16 & 0xffffu;
                s[i][c] = fmaf(sums[i][c], f16_to_float(scale), s[i][c]);
            }
        }
    }
}

/* s[i] = scores of the page's tokens 8 n + i. */
DEVICE void page_scores(const cuda_attn_layer &l, const query_room &room, const uint8_t *k,
                        uint32_t lane, float s[8][4])
{
    if (quantised(l.k_type)) {
        scores_of_quants(l, room, k, lane, s);
    } else {
        scores_of_halves(l, room, (const uint16_t *)k, lane, s);
    }
}

/* The place within the page of s[i][c]. */
DEVICE uint32_t token_of(uint32_t lane, int i, int c)
{
    return lane % 4 * 16 + c % 2 * 8 + i;
}

/* Scores to weights; m and l of the rows g and g + 8. */
DEVICE void page_softmax(const cuda_attn_layer &l, const sight row[2], uint32_t first,
                         uint32_t lane, float s[8][4], float m[2], float sum[2])
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        m[h] = EMPTY;
        sum[h] = 0.0f;
#pragma unroll
        for (int c = 2 * h; c < 2 * h + 2; c++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                bool seen = row[h].row != CUDA_NONE && sees(row[h], first + token_of(lane, i, c));
                if (l.softcap > 0.0f) {
                    s[i][c] = l.softcap * tanhf(s[i][c] / l.softcap);
                }
                s[i][c] = seen ? s[i][c] : EMPTY;
                m[h] = fmaxf(m[h], s[i][c]);
            }
        }
        m[h] = fmaxf(m[h], __shfl_xor_sync(WARP_ALL, m[h], 1));
        m[h] = fmaxf(m[h], __shfl_xor_sync(WARP_ALL, m[h], 2));
#pragma unroll
        for (int c = 2 * h; c < 2 * h + 2; c++) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                s[i][c] = s[i][c] == EMPTY ? 0.0f : expf(s[i][c] - m[h]);
                sum[h] += s[i][c];
            }
        }
        sum[h] += __shfl_xor_sync(WARP_ALL, sum[h], 1);
        sum[h] += __shfl_xor_sync(WARP_ALL, sum[h], 2);
    }
}

/* Takes out of a pair of halves what is not finite; returns whether there was any. A weight of zero
 * times that would spoil the sums of rows that do not see the token. */
DEVICE bool take_out(uint32_t &pair, uint32_t bf16)
{
    uint32_t carry = ((pair & 0x7fff7fffu) + (bf16 ? 0x00800080u : 0x04000400u)) & 0x80008000u;

    if (carry == 0) {
        return false;
    }
    pair &= ~((carry >> 15) * 0xffffu);
    return true;
}

/* P as the registers of A for tokens 16 t + 4 s + 0..3, times the weight of each of these. */
DEVICE void take_weights(const float p[8][4], int s, const float weights[4], uint32_t bf16,
                         uint32_t high[4], uint32_t low[4])
{
#pragma unroll
    for (int j = 0; j < 4; j++) { /* a0..a3: rows g, g + 8, g, g + 8 */
        float halves[2];
        uint32_t a[2], b[2];
#pragma unroll
        for (int e = 0; e < 2; e++) {
            float x = p[s % 2 * 4 + j / 2 * 2 + e][j % 2 * 2 + s / 2];
            /* A token that the row does not see may have any scale, also one that is no number. */
            halves[e] = weights == NULL || x == 0.0f ? x : x * weights[j / 2 * 2 + e];
            split_halves(halves[e], bf16, a[e], b[e]);
        }
        high[j] = a[0] | a[1] << 16;
        low[j] = b[0] | b[1] << 16;
    }
}

/* o[i] += P times tile i of rows[j] (of four tokens, 8 values of each); first, last: which tiles. */
DEVICE void add_values(const uint32_t high[4], const uint32_t low[4], const uint32_t rows[4][4],
                       uint32_t bf16, int first, int last, float o[8][4])
{
#pragma unroll
    for (int i = first; i < last; i++) {
        uint32_t pick = i % 2 ? 0x7632 : 0x5410;
        uint32_t b0 = __byte_perm(rows[0][i / 2], rows[1][i / 2], pick);
        uint32_t b1 = __byte_perm(rows[2][i / 2], rows[3][i / 2], pick);
        mma_half(o[i], high, b0, b1, bf16);
        mma_half(o[i], low, b0, b1, bf16);
    }
}

/* o[i] = dimensions first_dim + 8 n + i of P V, without what is not finite in V; returns whether there
 * was any. */
DEVICE bool values_of_halves(const cuda_attn_layer &l, const uint16_t *v, uint32_t first_dim,
                             uint32_t lane, const float p[8][4], float o[8][4])
{
    uint32_t t = lane % 4, dim = first_dim + lane / 4 * 8, bf16 = operand_bf16(l.v_type);
    bool odd = false;

#pragma unroll
    for (int s = 0; s < 4; s++) {
        uint32_t rows[4][4] = {}, high[4], low[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (dim < l.v_dim) {
                load_16(v + (uint64_t)(16 * t + 4 * s + j) * l.v_dim + dim, rows[j]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                odd = take_out(rows[j][i], bf16) || odd;
            }
        }
        take_weights(p, s, NULL, bf16, high, low);
        add_values(high, low, rows, bf16, 0, 8, o);
    }
    return __any_sync(WARP_ALL, odd);
}

/* o[4 h + e] = dimensions first_dim + 32 h + 4 n + e of P V. A token's scale multiplies its column of
 * P, once for each quant; its bytes lie at any even address. */
DEVICE void values_of_quants(const cuda_attn_layer &l, const uint8_t *v, uint32_t first_dim,
                             uint32_t lane, const float p[8][4], float o[8][4])
{
    uint32_t g = lane / 4, t = lane % 4, type = l.v_type;

    for (int s = 0; s < 4; s++) {
        uint32_t rows[4][4] = {}, high[4], low[4];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint32_t dim = first_dim + h * GQA_KV_QUANT_DIMS;
            float scales[4];
            if (dim >= l.v_dim) {
                break;
            }
#pragma unroll
            for (int j = 0; j < 4; j++) {
                uint32_t token = 16 * t + 4 * s + j;
                const uint16_t *bytes =
                    (const uint16_t *)(v + gqa_v_quant_byte(type, l.v_dim, token, dim + 4 * g));
                scales[j] = f16_to_float(
                    *(const uint16_t *)(v + gqa_v_quant_scale(type, l.v_dim, token, dim)));
                take_codes(type, bytes[0] | (uint32_t)bytes[1] << 16, g >= 4, rows[j] + 2 * h);
            }
            take_weights(p, s, scales, 1, high, low);
            add_values(high, low, rows, 1, 4 * h, 4 * h + 4, o);
        }
    }
}

/* The dimension within 64 of o[i][c]. */
DEVICE uint32_t dim_of(uint32_t type, uint32_t lane, int i, int c)
{
    uint32_t column = lane % 4 * 2 + c % 2;

    return quantised(type) ? i / 4 * GQA_KV_QUANT_DIMS + 4 * column + i % 4 : 8 * column + i;
}

/* Adds what values_of_halves() took out to the rows that see it. room: (16, 64) of the warp. */
DEVICE void add_taken_out(const cuda_attn_layer &l, const sight row[2], uint32_t first,
                               const uint16_t *v, uint32_t first_dim, uint32_t lane,
                               const float p[8][4], float o[8][4], float *room)
{
    __syncwarp();
    for (int i = 0; i < 8; i++) {
        for (int c = 0; c < 4; c++) {
            room[(lane / 4 + c / 2 * 8) * CUDA_PAGE + token_of(lane, i, c)] = p[i][c];
        }
    }
    __syncwarp();
    for (int i = 0; i < 8; i++) {
        for (int c = 0; c < 4; c++) {
            uint32_t dim = first_dim + dim_of(l.v_type, lane, i, c);
            const float *weights = room + (lane / 4 + c / 2 * 8) * CUDA_PAGE;
            for (uint32_t token = 0; dim < l.v_dim && token < CUDA_PAGE; token++) {
                float x = from_half(v[token * l.v_dim + dim], operand_bf16(l.v_type));
                if (!isfinite(x) && row[c / 2].row != CUDA_NONE &&
                    sees(row[c / 2], first + token)) {
                    o[i][c] = fmaf(weights[token], x, o[i][c]);
                }
            }
        }
    }
    __syncwarp();
}

/* o = P V for 64 dimensions from first_dim on, laid out as dim_of() says. room: as above. */
DEVICE void page_values(const cuda_attn_layer &l, const sight row[2], uint32_t first,
                        const uint8_t *v, uint32_t first_dim, uint32_t lane, const float p[8][4],
                        float o[8][4], float *room)
{
    const uint16_t *halves = (const uint16_t *)v;

    if (quantised(l.v_type)) {
        values_of_quants(l, v, first_dim, lane, p, o);
    } else if (values_of_halves(l, halves, first_dim, lane, p, o)) {
        add_taken_out(l, row, first, halves, first_dim, lane, p, o, room);
    }
}

#endif
