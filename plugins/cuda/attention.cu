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
 *   O's column n of tile i   dimension 8 n + i of 64
 *
 * The four parts (O, m, l) merge in ascending pages into the segment's, segments in ascending order
 * into the state: in a block that walks over all segments, or by merge() where every segment has
 * its own block (split KV). Both run the same operations: a row's bits do not depend on it.
 *
 * Queries and probabilities are split in two halves each, high and low, so that the tensor core's
 * operands keep 22 bits (bf16: 16).
 *
 *   bytes  2 * tokens * n_kv_heads * (k_dim + v_dim) for each 16 packed queries
 *   flops  2 * 2 * tokens * n_heads * (k_dim + v_dim) a row, with 16 rows' worth at least */
#include "plugins/cuda/device.cuh"

#define THREADS 128u
#define EMPTY   __uint_as_float(0xff800000u) /* minus infinity */

/* ---- append ------------------------------------------------------------------------------ */

/* Rounds the new rows' K and V and stores them in their pages. Grid (rows, groups). */
KERNEL __launch_bounds__(128) gqa_append(const cuda_append_args p)
{
    const cuda_attn_layer &l = p.layer;
    uint32_t row = blockIdx.x, group = blockIdx.y;
    const cuda_seq &seq = p.batch.seqs[p.batch.row_seq[row]];
    uint32_t place = seq.n_past + row - seq.first_row, token = place % CUDA_PAGE;
    uint8_t *page = (uint8_t *)p.batch.pages[seq.table + place / CUDA_PAGE];
    uint16_t *k = (uint16_t *)(page + l.k_offset + group * l.k_head_bytes);
    uint16_t *v = (uint16_t *)(page + l.v_offset + group * l.v_head_bytes);
    uint16_t *log = p.log;

    if (log != NULL) {
        log += ((uint64_t)row * l.n_kv_heads + group) * (l.k_dim + l.v_dim);
    }
    for (uint32_t d = threadIdx.x; d < l.k_dim + l.v_dim; d += THREADS) {
        uint32_t is_v = d >= l.k_dim, i = is_v ? d - l.k_dim : d;
        float x = is_v ? p.v[row * p.v_stride + group * l.v_dim + i]
                       : p.k[row * p.k_stride + group * l.k_dim + i];
        uint16_t h = (uint16_t)to_half(x, l.bf16);
        if (is_v) {
            v[token * l.v_dim + i] = h;
        } else {
            k[(token / 16 * l.k_dim + i) * 16 + token % 16] = h;
        }
        if (log != NULL) {
            log[d] = h;
        }
    }
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

DEVICE sight sight_of(const cuda_attn_layer &l, const cuda_attn_batch &b,
                      const cuda_attn_item &item, uint32_t query, uint32_t group)
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
    s.n_past = seq.n_past;
    s.to = seq.mutual || seq.mask != CUDA_NONE ? seq.n_past + seq.n_rows : position + 1;
    if (seq.mask != CUDA_NONE) {
        s.mask = b.masks + seq.mask + (uint64_t)i * ((seq.n_rows + 63) / 64);
        s.depths = b.depths + seq.depths;
        position = seq.n_past + s.depths[i];
    } else if (seq.mutual && l.window != 0 && l.window < seq.n_rows - i) {
        s.to = position + l.window;
    }
    s.from = window_start(l.window, position);
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

DEVICE void load_queries(const cuda_attend_args &p, const cuda_attn_item &item, uint32_t group,
                         query_room &room)
{
    const cuda_attn_layer &l = p.layer;
    uint32_t r = l.n_heads / l.n_kv_heads, k_pad = (l.k_dim + 15) / 16 * 16;

    for (uint32_t i = threadIdx.x; i < CUDA_QUERIES * k_pad; i += THREADS) {
        uint32_t query = i / k_pad, d = i % k_pad, packed = item.first + query;
        uint32_t j = d % 16 / 4, reg = (query < 8 ? 0 : 1) + j / 2 * 2;
        uint32_t at = ((d / 16 * 32) + query % 8 * 4 + d % 4) * 8 + reg * 2 + j % 2;
        uint32_t high = 0, low = 0;
        if (packed < item.n_packed && d < l.k_dim) {
            uint64_t row = item.first_row + packed / r;
            float x = p.q[row * p.q_stride + (group * r + packed % r) * l.k_dim + d];
            split_halves(x * l.scale, l.bf16, high, low);
        }
        room.high[at] = (uint16_t)high;
        room.low[at] = (uint16_t)low;
    }
}

/* s[i] = scores of the page's tokens 8 n + i. */
DEVICE void page_scores(const cuda_attn_layer &l, const query_room &room, const uint16_t *k,
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
#pragma unroll
        for (int j = 0; j < 4; j++) {
            high[j] = ((const uint32_t *)room.high)[(step * 32 + lane) * 4 + j];
            low[j] = ((const uint32_t *)room.low)[(step * 32 + lane) * 4 + j];
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t pick = i % 2 ? 0x7632 : 0x5410;
            uint32_t b0 = __byte_perm(rows[0][i / 2], rows[1][i / 2], pick);
            uint32_t b1 = __byte_perm(rows[2][i / 2], rows[3][i / 2], pick);
            mma_half(s[i], high, b0, b1, l.bf16);
            mma_half(s[i], low, b0, b1, l.bf16);
        }
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

/* o[i] = dimensions first_dim + 8 n + i of P V, without what is not finite in V; returns whether there
 * was any. */
DEVICE bool page_values(const cuda_attn_layer &l, const uint16_t *v, uint32_t first_dim,
                        uint32_t lane, const float p[8][4], float o[8][4])
{
    uint32_t t = lane % 4, dim = first_dim + lane / 4 * 8;
    bool odd = false;

#pragma unroll
    for (int s = 0; s < 4; s++) {
        uint32_t rows[4][4], high[4], low[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            rows[j][0] = rows[j][1] = rows[j][2] = rows[j][3] = 0;
            if (dim < l.v_dim) {
                load_16(v + (uint64_t)(16 * t + 4 * s + j) * l.v_dim + dim, rows[j]);
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                odd = take_out(rows[j][i], l.bf16) || odd;
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) { /* a0..a3: rows g, g + 8, g, g + 8 */
            uint32_t a, b, c, d;
            split_halves(p[s % 2 * 4 + j / 2 * 2][j % 2 * 2 + s / 2], l.bf16, a, b);
            split_halves(p[s % 2 * 4 + j / 2 * 2 + 1][j % 2 * 2 + s / 2], l.bf16, c, d);
            high[j] = a | c << 16;
            low[j] = b | d << 16;
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            uint32_t pick = i % 2 ? 0x7632 : 0x5410;
            uint32_t b0 = __byte_perm(rows[0][i / 2], rows[1][i / 2], pick);
            uint32_t b1 = __byte_perm(rows[2][i / 2], rows[3][i / 2], pick);
            mma_half(o[i], high, b0, b1, l.bf16);
            mma_half(o[i], low, b0, b1, l.bf16);
        }
    }
    return __any_sync(WARP_ALL, odd);
}

/* Adds what page_values() took out to the rows that see it. room: (16, 64) of the warp. */
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
            uint32_t dim = first_dim + token_of(lane, i, c); /* O's columns are laid out alike */
            const float *weights = room + (lane / 4 + c / 2 * 8) * CUDA_PAGE;
            for (uint32_t token = 0; dim < l.v_dim && token < CUDA_PAGE; token++) {
                float x = from_half(v[token * l.v_dim + dim], l.bf16);
                if (!isfinite(x) && row[c / 2].row != CUDA_NONE &&
                    sees(row[c / 2], first + token)) {
                    o[i][c] = fmaf(weights[token], x, o[i][c]);
                }
            }
        }
    }
    __syncwarp();
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
    const uint16_t *v = NULL;

    wanted = __any_sync(WARP_ALL, wanted);
    if (wanted) {
        const uint8_t *at = (const uint8_t *)p.batch.pages[p.batch.seqs[item.seq].table + page];
        v = (const uint16_t *)(at + l.v_offset + group * l.v_head_bytes);
        page_scores(l, room.queries, (const uint16_t *)(at + l.k_offset + group * l.k_head_bytes),
                    lane, s);
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
        if (wanted && page_values(l, v, dim, lane, s, o)) {
            add_taken_out(l, row, first, v, dim, lane, s, o, room.o[warp]);
        }
        for (int i = 0; wanted && i < 8; i++) {
            for (int c = 0; c < 4; c++) {
                room.o[warp][(lane / 4 + c / 2 * 8) * CUDA_GROUP_DIMS + token_of(lane, i, c)] =
                    o[i][c];
            }
        }
        __syncthreads();
        merge_outputs(room, l.v_dim, dim);
        __syncthreads();
    }
}

DEVICE void store_state(const cuda_attend_args &p, const cuda_attn_item &item, uint32_t group,
                        const attend_room &room)
{
    const cuda_attn_layer &l = p.layer;
    uint32_t r = l.n_heads / l.n_kv_heads, part_floats = l.v_dim + 2;

    for (uint32_t i = threadIdx.x; i < CUDA_QUERIES * l.v_dim; i += THREADS) {
        uint32_t query = i / l.v_dim, dim = i % l.v_dim, packed = item.first + query;
        if (packed >= item.n_packed) {
            continue;
        }
        if (item.part != CUDA_NONE) {
            float *part = p.parts + (((uint64_t)item.part * l.n_kv_heads + group) * CUDA_QUERIES +
                                     query) * part_floats;
            part[dim] = room.state[i];
            if (dim == 0) {
                part[l.v_dim] = room.state_m[query];
                part[l.v_dim + 1] = room.state_l[query];
            }
            continue;
        }
        uint32_t head = group * r + packed % r;
        uint64_t row = item.first_row + packed / r;
        p.out[row * p.out_stride + head * l.v_dim + dim] =
            finished(l, head, room.state[i], room.state_m[query], room.state_l[query]);
    }
}

/* Grid (items, groups), 128 threads, CUDA_ATTEND_SHARED_BYTES of dynamic shared memory. */
KERNEL __launch_bounds__(128) gqa_attend(const cuda_attend_args p)
{
    DYNAMIC_SHARED(shared_memory);
    attend_room &room = *(attend_room *)shared_memory;
    const cuda_attn_item item = p.items[blockIdx.x];
    uint32_t group = blockIdx.y, lane = threadIdx.x % 32;

    if (item.n_packed == 0) { /* one that only rounds up their number */
        return;
    }
    load_queries(p, item, group, room.queries);
    for (uint32_t i = threadIdx.x; i < CUDA_QUERIES * p.layer.v_dim; i += THREADS) {
        room.state[i] = 0.0f;
    }
    if (threadIdx.x < CUDA_QUERIES) {
        room.state_m[threadIdx.x] = EMPTY;
        room.state_l[threadIdx.x] = 0.0f;
    }
    const sight row[2] = {sight_of(p.layer, p.batch, item, lane / 4, group),
                          sight_of(p.layer, p.batch, item, lane / 4 + 8, group)};
    __syncthreads();
    for (uint32_t segment = item.seg_first; segment < item.seg_last; segment++) {
        attend_segment(p, item, row, group, segment, room);
    }
    store_state(p, item, group, room);
}

/* Merges the parts of each row and head, in ascending segments. Grid (rows, heads). */
KERNEL __launch_bounds__(128) gqa_merge(const cuda_merge_args p)
{
    const cuda_attn_layer &l = p.layer;
    uint32_t row = blockIdx.x, head = blockIdx.y, r = l.n_heads / l.n_kv_heads;
    const cuda_merge_row &from = p.rows[row];

    for (uint32_t dim = threadIdx.x; dim < l.v_dim; dim += THREADS) {
        float o = 0.0f, m = EMPTY, sum = 0.0f;
        for (uint32_t i = 0; i < 2; i++) {
            uint32_t packed = (row - from.run[i].first_row) * r + head % r;
            uint32_t part = from.run[i].part + packed / CUDA_QUERIES * from.run[i].n_segs;
            for (uint32_t s = 0; s < from.run[i].n_segs; s++) {
                const float *at = p.parts + (((uint64_t)(part + s) * l.n_kv_heads + head / r) *
                                             CUDA_QUERIES + packed % CUDA_QUERIES) * (l.v_dim + 2);
                float top, a, b;
                if (merge_weights(m, at[l.v_dim], at[l.v_dim + 1], top, a, b)) {
                    m = top;
                    o = merged(o, a, at[dim], b);
                    sum = merged(sum, a, at[l.v_dim + 1], b);
                }
            }
        }
        if (from.run[0].n_segs + from.run[1].n_segs > 0) {
            p.out[row * p.out_stride + head * l.v_dim + dim] = finished(l, head, o, m, sum);
        }
    }
}
