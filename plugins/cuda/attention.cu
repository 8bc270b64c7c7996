/* plugins/cuda/attention.cu - paged grouped attention on tensor cores, from decode to prompts.
 *
 * Queries are packed: packed query i of some rows is head i % r (r heads share a group's K and V) of
 * row i / r, so that all heads of a group are rows of one product and K and V are read once for
 * them. A block of four warps takes 16 packed queries of one group through segments of 256 tokens;
 * each warp has one of a segment's four pages:
 *
 *   S = Q K^T     (16 x 64)   K comes straight from the page: a lane loads 8 tokens of one dimension
 *   P = exp(S - max)          in registers, where the next product wants it
 *   O = P V       (16 x 64 dims at a time)   a lane loads 8 dimensions of one token
 *
 * Which token or dimension stands in which column of a tensor core's operand is free, as long as
 * both operands agree. It is chosen so that pages are read in runs of 128 bits and P never moves:
 *
 *   S's column n of tile i   token 8 n + i               so lane (g, t) loads tokens 8 g ..
 *   Q's and K's k            dims 16 s + 4 j + t, j = 0..3, for lane t
 *   P's and V's k            tokens 16 t + 4 s + j for lane t, which has just these in S
 *   O's column n of tile i   dimension 8 n + i of 64; quants: 4 n + i % 4 of the 32 of quant i / 4
 *
 * The four parts (O, m, l) merge in ascending pages into the segment's, segments in ascending order
 * into the state: in a block that walks over all segments, or by merge() where every segment has
 * its own block (split KV). Both run the same operations: a row's bits do not depend on it.
 *
 * Queries and probabilities are split in two halves each, high and low, so that the tensor core's
 * operands keep 22 bits (bf16: 16). Quants become bf16 of their codes, which is exact; K's scales
 * multiply sums over 32 dimensions, V's the probabilities (attention_page.cuh).
 *
 *   bytes  2 * tokens * n_kv_heads * (k_dim + v_dim) for each 16 packed queries
 *   flops  2 * 2 * tokens * n_heads * (k_dim + v_dim) a row, with 16 rows' worth at least */
#include "plugins/cuda/attention_page.cuh"

/* ---- append ------------------------------------------------------------------------------ */

/* One token's K or V (dim), rounded to halves step apart, and into the log. */
DEVICE void append_halves(uint32_t type, const float *x, uint32_t dim, uint16_t *to, uint32_t step,
                          uint8_t *log)
{
    for (uint32_t d = threadIdx.x; d < dim; d += THREADS) {
        uint16_t h = (uint16_t)to_half(x[d], type == GQA_TYPE_BF16);
        to[d * step] = h;
        if (log != NULL) {
            ((uint16_t *)log)[d] = h;
        }
    }
}

/* The same as quants: a thread for each. K and V differ in where bytes go, which gqa/tensor.h says. */
DEVICE void append_quants(uint32_t type, const float *x, uint32_t dim, bool is_k, uint8_t *head,
                          uint32_t token, uint8_t *log)
{
    uint32_t n_bytes = type == GQA_TYPE_Q8_0 ? 32 : 16, step = is_k ? GQA_KV_TILE_TOKENS : 1;

    for (uint32_t d = threadIdx.x * GQA_KV_QUANT_DIMS; d < dim; d += THREADS * GQA_KV_QUANT_DIMS) {
        struct gqa_kv_quant quant;
        gqa_kv_quantise(type, x + d, min(dim - d, GQA_KV_QUANT_DIMS), &quant);
        uint8_t *scale = head + (is_k ? gqa_k_quant_scale(type, dim, token, d)
                                      : gqa_v_quant_scale(type, dim, token, d));
        uint8_t *bytes = head + (is_k ? gqa_k_quant_byte(type, dim, token, d)
                                      : gqa_v_quant_byte(type, dim, token, d));
        *(uint16_t *)scale = quant.scale;
        for (uint32_t i = 0; i < n_bytes; i++) {
            bytes[i * step] = quant.q[i];
        }
        if (log != NULL) {
            uint8_t *to = log + d / GQA_KV_QUANT_DIMS * (n_bytes + 2);
            *(uint16_t *)to = quant.scale;
            for (uint32_t i = 0; i < n_bytes; i++) {
                to[2 + i] = quant.q[i];
            }
        }
    }
}

/* x: (dim), in memory of the block, where it is rotated if the type wants that. */
DEVICE void append_one(uint32_t type, float *x, const float *from, uint32_t dim, bool is_k,
                       uint8_t *head, uint32_t token, uint8_t *log)
{
    for (uint32_t d = threadIdx.x; d < dim; d += THREADS) {
        x[d] = from[d];
    }
    if (gqa_kv_rotates(type)) {
        rotate_rows(x, 1, dim);
    }
    __syncthreads();
    if (quantised(type)) {
        append_quants(type, x, dim, is_k, head, token, log);
    } else if (is_k) {
        append_halves(type, x, dim, (uint16_t *)head + gqa_k_index(dim, token, 0),
                      GQA_KV_TILE_TOKENS, log);
    } else {
        append_halves(type, x, dim, (uint16_t *)head + gqa_v_index(dim, token, 0), 1, log);
    }
    __syncthreads();
}

/* Rounds the new rows' K and V and stores them in their pages. Grid (rows, groups). */
KERNEL __launch_bounds__(128) gqa_append(const cuda_append_args p)
{
    __shared__ float x[CUDA_DIM_MAX];
    const cuda_attn_layer &l = p.layer;
    uint32_t row = blockIdx.x, group = blockIdx.y;
    const cuda_seq &seq = p.batch.seqs[p.batch.row_seq[row]];
    uint32_t place = seq.n_past + row - seq.first_row, token = place % CUDA_PAGE;
    uint8_t *page = (uint8_t *)p.batch.pages[seq.table + place / CUDA_PAGE];
    size_t k_bytes = gqa_kv_token_bytes(l.k_type, l.k_dim);
    size_t v_bytes = gqa_kv_token_bytes(l.v_type, l.v_dim);
    uint8_t *log = p.log;

    if (log != NULL) {
        log += ((uint64_t)row * l.n_kv_heads + group) * (k_bytes + v_bytes);
    }
    append_one(l.k_type, x, p.k + row * p.k_stride + group * l.k_dim, l.k_dim, true,
               page + l.k_offset + group * l.k_head_bytes, token, log);
    append_one(l.v_type, x, p.v + row * p.v_stride + group * l.v_dim, l.v_dim, false,
               page + l.v_offset + group * l.v_head_bytes, token,
               log != NULL ? log + k_bytes : NULL);
}

/* ---- merging ----------------------------------------------------------------------------- */

/* Weights of a state and of a part that comes to it; false: the part is empty. */
DEVICE bool merge_weights(float state_m, float m, float l, float &ret_m, float &ret_state,
                          float &ret_part)
{
    if (m == EMPTY && l == 0.0f) {
        return false;
    }
    ret_m = fmaxf(state_m, m);
    ret_state = expf(state_m - ret_m);
    ret_part = expf(m - ret_m);
    return true;
}

DEVICE float merged(float state, float state_weight, float part, float part_weight)
{
    return state * state_weight + part * part_weight;
}

DEVICE float finished(const cuda_attn_layer &l, uint32_t head, float o, float m, float sum)
{
    float weight = 1.0f;

    if (l.sinks != NULL && l.sinks[head] != EMPTY) {
        float sink = l.sinks[head], top = fmaxf(m, sink);
        weight = expf(m - top);
        sum = sum * weight + expf(sink - top);
    }
    return sum == 0.0f ? 0.0f : o * weight / sum;
}

/* ---- a block ----------------------------------------------------------------------------- */

struct attend_room {
    query_room queries;
    float o[4][CUDA_QUERIES * CUDA_GROUP_DIMS]; /* the pages' parts of 64 dimensions */
    float m[4][CUDA_QUERIES], l[4][CUDA_QUERIES];
    /* By query: the weights of the pages in the segment, and of state and segment in the state. */
    float page_weight[4][CUDA_QUERIES], state_weight[CUDA_QUERIES], part_weight[CUDA_QUERIES];
    float state_m[CUDA_QUERIES], state_l[CUDA_QUERIES];
    float state[CUDA_QUERIES * CUDA_DIM_MAX]; /* (16, v_dim) */
};

static_assert(sizeof(attend_room) <= CUDA_ATTEND_SHARED_BYTES, "kernels.h says how much");

/* A query's pages become its segment, and that joins the state; O's come later with the weights
 * that are told here. */
DEVICE void merge_segment(attend_room &room, uint32_t query)
{
    float m = EMPTY, l = 0.0f, top;

    for (int w = 0; w < 4; w++) {
        m = fmaxf(m, room.m[w][query]);
    }
    for (int w = 0; w < 4; w++) {
        bool empty = room.m[w][query] == EMPTY && room.l[w][query] == 0.0f;
        room.page_weight[w][query] = empty ? -1.0f : expf(room.m[w][query] - m);
        l = empty ? l : merged(l, 1.0f, room.l[w][query], room.page_weight[w][query]);
    }
    if (!merge_weights(room.state_m[query], m, l, top, room.state_weight[query],
                       room.part_weight[query])) {
        room.state_weight[query] = 1.0f;
        room.part_weight[query] = -1.0f;
        return;
    }
    room.state_m[query] = top;
    room.state_l[query] =
        merged(room.state_l[query], room.state_weight[query], l, room.part_weight[query]);
}

DEVICE void merge_outputs(attend_room &room, uint32_t v_dim, uint32_t first_dim)
{
    for (uint32_t i = threadIdx.x; i < CUDA_QUERIES * CUDA_GROUP_DIMS; i += THREADS) {
        uint32_t query = i / CUDA_GROUP_DIMS, dim = first_dim + i % CUDA_GROUP_DIMS;
        float o = 0.0f;
        if (dim >= v_dim || room.part_weight[query] < 0.0f) {
            continue;
        }
        for (int w = 0; w < 4; w++) {
            float weight = room.page_weight[w][query];
            o = weight < 0.0f ? o : merged(o, 1.0f, room.o[w][i], weight);
        }
        float *state = &room.state[query * v_dim + dim];
        *state = merged(*state, room.state_weight[query], o, room.part_weight[query]);
    }
}

/* The block's four pages, and their merge into the state. */
DEVICE void attend_segment(const cuda_attend_args &p, const cuda_attn_item &item,
                           const sight row[2], uint32_t group, uint32_t segment, attend_room &room)
{
    const cuda_attn_layer &l = p.layer;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint32_t page = segment * CUDA_SEGMENT_PAGES + warp, first = page * CUDA_PAGE;
    bool wanted = sees_page(row[0], first) || sees_page(row[1], first);
    float s[8][4] = {}, m[2] = {EMPTY, EMPTY}, sum[2] = {0.0f, 0.0f};
    const uint8_t *v = NULL;

    wanted = __any_sync(WARP_ALL, wanted);
    if (wanted) {
        const uint8_t *at = (const uint8_t *)p.batch.pages[p.batch.seqs[item.seq].table + page];
        v = at + l.v_offset + group * l.v_head_bytes;
        page_scores(l, room.queries, at + l.k_offset + group * l.k_head_bytes, lane, s);
        page_softmax(l, row, first, lane, s, m, sum);
    }
    if (lane % 4 == 0) {
        for (int h = 0; h < 2; h++) {
            room.m[warp][lane / 4 + 8 * h] = m[h];
            room.l[warp][lane / 4 + 8 * h] = sum[h];
        }
    }
    __syncthreads();
    if (threadIdx.x < CUDA_QUERIES) {
        merge_segment(room, threadIdx.x);
    }
    for (uint32_t dim = 0; dim < l.v_dim; dim += CUDA_GROUP_DIMS) {
        float o[8][4] = {};
        if (wanted) {
            page_values(l, row, first, v, dim, lane, s, o, room.o[warp]);
        }
        for (int i = 0; wanted && i < 8; i++) {
            for (int c = 0; c < 4; c++) {
                room.o[warp][(lane / 4 + c / 2 * 8) * CUDA_GROUP_DIMS +
                             dim_of(l.v_type, lane, i, c)] = o[i][c];
            }
        }
        __syncthreads();
        merge_outputs(room, l.v_dim, dim);
        __syncthreads();
    }
}

/* A split segment's part. */
DEVICE void store_part(const cuda_attend_args &p, const cuda_attn_item &item, uint32_t group,
                       const attend_room &room)
{
    const cuda_attn_layer &l = p.layer;

    for (uint32_t i = threadIdx.x; i < CUDA_QUERIES * l.v_dim; i += THREADS) {
        uint32_t query = i / l.v_dim, dim = i % l.v_dim;
        float *part = p.parts + (((uint64_t)item.part * l.n_kv_heads + group) * CUDA_QUERIES +
                                 query) * (l.v_dim + 2);
        if (item.first + query < item.n_packed) {
            part[dim] = room.state[i];
            if (dim == 0) {
                part[l.v_dim] = room.state_m[query];
                part[l.v_dim + 1] = room.state_l[query];
            }
        }
    }
}

DEVICE void store_state(const cuda_attend_args &p, const cuda_attn_item &item, uint32_t group,
                        attend_room &room)
{
    const cuda_attn_layer &l = p.layer;
    uint32_t r = l.n_heads / l.n_kv_heads;

    for (uint32_t i = threadIdx.x; i < CUDA_QUERIES * l.v_dim; i += THREADS) {
        uint32_t query = i / l.v_dim, head = group * r + (item.first + query) % r;
        room.state[i] =
            finished(l, head, room.state[i], room.state_m[query], room.state_l[query]);
    }
    if (gqa_kv_rotates(l.v_type)) {
        rotate_rows(room.state, CUDA_QUERIES, l.v_dim);
    }
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < CUDA_QUERIES * l.v_dim; i += THREADS) {
        uint32_t packed = item.first + i / l.v_dim;
        uint64_t row = item.first_row + packed / r;
        if (packed < item.n_packed) {
            p.out[row * p.out_stride + (group * r + packed % r) * l.v_dim + i % l.v_dim] =
                room.state[i];
        }
    }
}

/* Segments [first, last) into the state. What the pages' parts are put into serves as scratch before
 * there are any; attend_segment() ends with a barrier, so nobody reads the last walk's queries. */
DEVICE void walk(const cuda_attend_args &p, const cuda_attn_item &item, uint32_t group, bool sinks,
                 uint32_t first, uint32_t last, attend_room &room)
{
    uint32_t lane = threadIdx.x % 32;

    if (first >= last) {
        return;
    }
    load_queries(p.layer, p.batch, p.q, p.q_stride, item, group, sinks, room.queries, room.o[0]);
    const sight row[2] = {sight_of(p.layer, p.batch, item, lane / 4, group, sinks),
                          sight_of(p.layer, p.batch, item, lane / 4 + 8, group, sinks)};
    for (uint32_t segment = first; segment < last; segment++) {
        attend_segment(p, item, row, group, segment, room);
    }
}

/* Grid (items, groups), 128 threads, CUDA_ATTEND_SHARED_BYTES of dynamic shared memory. */
KERNEL __launch_bounds__(128) gqa_attend(const cuda_attend_args p)
{
    DYNAMIC_SHARED(shared_memory);
    attend_room &room = *(attend_room *)shared_memory;
    const cuda_attn_item item = p.items[blockIdx.x];
    uint32_t group = blockIdx.y;

    if (item.n_packed == 0) { /* one that only rounds up their number */
        return;
    }
    for (uint32_t i = threadIdx.x; i < CUDA_QUERIES * p.layer.v_dim; i += THREADS) {
        room.state[i] = 0.0f;
    }
    if (threadIdx.x < CUDA_QUERIES) {
        room.state_m[threadIdx.x] = EMPTY;
        room.state_l[threadIdx.x] = 0.0f;
    }
    __syncthreads();
#pragma unroll 1 /* one copy of the code for both */
    for (int own = 0; own < 2; own++) {
        walk(p, item, group, own == 0, own ? item.seg_first : item.sink_first,
             own ? item.seg_last : item.sink_last, room);
    }
    if (item.part != CUDA_NONE) {
        store_part(p, item, group, room);
    } else {
        store_state(p, item, group, room);
    }
}

/* Parts that merge() loads before it adds the first of them. */
#define MERGE_AHEAD 8u

struct merge_part {
    float o, m, l;
};

/* Merges the parts of each row and head, in ascending segments. Grid (rows, heads). */
KERNEL __launch_bounds__(128) gqa_merge(const cuda_merge_args p)
{
    __shared__ float out[CUDA_DIM_MAX];
    const cuda_attn_layer &l = p.layer;
    uint32_t row = blockIdx.x, head = blockIdx.y, r = l.n_heads / l.n_kv_heads;
    const cuda_merge_row &from = p.rows[row];

    if (from.run[0].n_segs + from.run[1].n_segs == 0) {
        return;
    }
    for (uint32_t dim = threadIdx.x; dim < l.v_dim; dim += THREADS) {
        float o = 0.0f, m = EMPTY, sum = 0.0f;
        for (uint32_t i = 0; i < 2; i++) {
            uint32_t packed = (row - from.run[i].first_row) * r + head % r;
            uint32_t part = from.run[i].part + packed / CUDA_QUERIES * from.run[i].n_segs;
            for (uint32_t s = 0; s < from.run[i].n_segs; s += MERGE_AHEAD) {
                merge_part parts[MERGE_AHEAD]; /* all loads first, so that they wait together */
#pragma unroll
                for (uint32_t j = 0; j < MERGE_AHEAD; j++) {
                    uint64_t at = (uint64_t)(part + min(s + j, from.run[i].n_segs - 1)) *
                                  l.n_kv_heads + head / r;
                    const float *values =
                        p.parts + (at * CUDA_QUERIES + packed % CUDA_QUERIES) * (l.v_dim + 2);
                    parts[j] = {values[dim], values[l.v_dim], values[l.v_dim + 1]};
                }
#pragma unroll
                for (uint32_t j = 0; j < MERGE_AHEAD; j++) {
                    float top, a, b;
                    if (s + j < from.run[i].n_segs &&
                        merge_weights(m, parts[j].m, parts[j].l, top, a, b)) {
                        m = top;
                        o = merged(o, a, parts[j].o, b);
                        sum = merged(sum, a, parts[j].l, b);
                    }
                }
            }
        }
        out[dim] = finished(l, head, o, m, sum);
    }
    if (gqa_kv_rotates(l.v_type)) {
        rotate_rows(out, 1, l.v_dim);
    }
    for (uint32_t dim = threadIdx.x; dim < l.v_dim; dim += THREADS) {
        p.out[row * p.out_stride + head * l.v_dim + dim] = out[dim];
    }
}
