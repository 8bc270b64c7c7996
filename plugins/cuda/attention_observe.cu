/* plugins/cuda/attention_observe.cu - whom a sequence's last rows have looked at: SnapKV's votes.
 *
 * A query's weights need its largest score and its sum over all that it sees. So three kernels: parts
 * finds both for each segment of 256 tokens, totals joins these in ascending order, and votes computes
 * the scores once more and adds their weights. V is not read.
 *
 * A vote is one thread's: it adds the packed queries in their order, row after row and head after head,
 * so that its bits depend on neither batches nor blocks.
 *
 *   bytes  K twice, for each 16 packed queries
 *   flops  2 * 2 * 2 * tokens * n_heads * k_dim a row, with 16 rows' worth at least */
#include "plugins/cuda/attention_page.cuh"

struct observe_room {
    query_room queries;
    float m[4][CUDA_QUERIES], l[4][CUDA_QUERIES];
    /* Of load_queries(), then each warp's weights (4, 16, 64). */
    float scratch[CUDA_QUERIES * CUDA_DIM_MAX];
};

static_assert(4 * CUDA_PAGE <= CUDA_DIM_MAX, "a warp's weights are a quarter of the scratch");

DEVICE cuda_attn_item observed_item(const cuda_observe_args &p, uint32_t tile)
{
    return {p.first_row, p.n_packed, tile * CUDA_QUERIES, p.seq, 0, 0, 0, 0, CUDA_NONE};
}

/* A warp's page: s becomes its weights, before m and sum are those of more than the page. */
DEVICE void observe_page(const cuda_observe_args &p, const cuda_attn_item &item, uint32_t group,
                         uint32_t page, const query_room &queries, float s[8][4], float m[2],
                         float sum[2])
{
    const cuda_attn_layer &l = p.layer;
    uint32_t lane = threadIdx.x % 32, first = page * CUDA_PAGE;
    const sight row[2] = {sight_of(l, p.batch, item, lane / 4, group, false),
                          sight_of(l, p.batch, item, lane / 4 + 8, group, false)};

    if (!__any_sync(WARP_ALL, sees_page(row[0], first) || sees_page(row[1], first))) {
        return;
    }
    const uint8_t *at = (const uint8_t *)p.batch.pages[p.batch.seqs[p.seq].table + page];
    page_scores(l, queries, at + l.k_offset + group * l.k_head_bytes, lane, s);
    page_softmax(l, row, first, lane, s, m, sum);
}

/* Grid (tiles * n_segments, groups), 128 threads. */
KERNEL __launch_bounds__(128) gqa_observe_parts(const cuda_observe_args p)
{
    __shared__ observe_room room;
    uint32_t tile = blockIdx.x / p.n_segments, segment = blockIdx.x % p.n_segments;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = blockIdx.y;
    const cuda_attn_item item = observed_item(p, tile);
    float s[8][4] = {}, m[2] = {EMPTY, EMPTY}, sum[2] = {0.0f, 0.0f};

    load_queries(p.layer, p.batch, p.q, p.q_stride, item, group, false, room.queries, room.scratch);
    observe_page(p, item, group, segment * CUDA_SEGMENT_PAGES + warp, room.queries, s, m, sum);
    if (lane % 4 == 0) {
        for (int h = 0; h < 2; h++) {
            room.m[warp][lane / 4 + 8 * h] = m[h];
            room.l[warp][lane / 4 + 8 * h] = sum[h];
        }
    }
    __syncthreads();
    if (threadIdx.x < CUDA_QUERIES) {
        uint32_t query = threadIdx.x;
        float most = EMPTY, all = 0.0f;
        for (int w = 0; w < 4; w++) {
            most = fmaxf(most, room.m[w][query]);
        }
        for (int w = 0; w < 4; w++) {
            float part = room.m[w][query];
            all = part == EMPTY ? all : all + room.l[w][query] * expf(part - most);
        }
        uint64_t at = ((uint64_t)blockIdx.x * p.layer.n_kv_heads + group) * CUDA_QUERIES + query;
        p.parts[2 * at] = most;
        p.parts[2 * at + 1] = all;
    }
}

/* A thread for each packed query. Grid (tiles / 8, groups), 128 threads. */
KERNEL __launch_bounds__(128) gqa_observe_totals(const cuda_observe_args p)
{
    const cuda_attn_layer &l = p.layer;
    uint32_t packed = blockIdx.x * THREADS + threadIdx.x, group = blockIdx.y;
    uint32_t tile = packed / CUDA_QUERIES, r = l.n_heads / l.n_kv_heads;
    uint32_t n_padded = (p.n_packed + CUDA_QUERIES - 1) / CUDA_QUERIES * CUDA_QUERIES;

    if (packed >= p.n_packed) {
        return;
    }
    float m = l.sinks != NULL ? l.sinks[group * r + packed % r] : EMPTY;
    float sum = m != EMPTY ? 1.0f : 0.0f;
    for (uint32_t s = 0; s < p.n_segments; s++) {
        uint64_t at = ((uint64_t)tile * p.n_segments + s) * l.n_kv_heads + group;
        const float *part = p.parts + 2 * (at * CUDA_QUERIES + packed % CUDA_QUERIES);
        if (part[0] != EMPTY) {
            float top = fmaxf(m, part[0]);
            sum = (m == EMPTY ? 0.0f : sum * expf(m - top)) + part[1] * expf(part[0] - top);
            m = top;
        }
    }
    float *to = p.totals + 2 * ((uint64_t)group * n_padded + packed);
    to[0] = m;
    to[1] = sum == 0.0f ? 0.0f : 1.0f / sum;
}

/* A warp's weights of a page, (16, 64), as shares of all that each query sees. */
DEVICE void store_weights(const cuda_observe_args &p, uint32_t tile, uint32_t group,
                          const float s[8][4], const float m[2], float *to)
{
    uint32_t lane = threadIdx.x % 32;
    uint32_t n_padded = (p.n_packed + CUDA_QUERIES - 1) / CUDA_QUERIES * CUDA_QUERIES;

    for (int h = 0; h < 2; h++) {
        uint32_t query = lane / 4 + 8 * h, packed = tile * CUDA_QUERIES + query;
        float share = 0.0f;
        if (packed < p.n_packed && m[h] != EMPTY) {
            const float *total = p.totals + 2 * ((uint64_t)group * n_padded + packed);
            share = expf(m[h] - total[0]) * total[1];
        }
        for (int c = 2 * h; c < 2 * h + 2; c++) {
            for (int i = 0; i < 8; i++) {
                to[query * CUDA_PAGE + token_of(lane, i, c)] = s[i][c] * share;
            }
        }
    }
}

/* A warp for each page of slots, two slots a thread. Grid (segments of the votes, groups), 128 threads. */
KERNEL __launch_bounds__(128) gqa_observe_votes(const cuda_observe_args p)
{
    __shared__ observe_room room;
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = blockIdx.y;
    uint32_t page = blockIdx.x * CUDA_SEGMENT_PAGES + warp, first = page * CUDA_PAGE;
    uint32_t n_tiles = (p.n_packed + CUDA_QUERIES - 1) / CUDA_QUERIES;
    float *votes = p.votes + (uint64_t)group * p.n_votes, sums[2] = {0.0f, 0.0f};
    float *weights = room.scratch + warp * CUDA_QUERIES * CUDA_PAGE;

    for (int k = 0; k < 2; k++) {
        uint32_t slot = first + lane + 32 * k;
        sums[k] = slot < p.n_votes ? votes[slot] : 0.0f;
    }
    for (uint32_t tile = 0; tile < n_tiles; tile++) {
        const cuda_attn_item item = observed_item(p, tile);
        float s[8][4] = {}, m[2] = {EMPTY, EMPTY}, sum[2] = {0.0f, 0.0f};
        __syncthreads(); /* the last tile's queries and weights are read */
        load_queries(p.layer, p.batch, p.q, p.q_stride, item, group, false, room.queries,
                     room.scratch);
        if (first >= p.n_votes) {
            continue;
        }
        observe_page(p, item, group, page, room.queries, s, m, sum);
        store_weights(p, tile, group, s, m, weights);
        __syncwarp();
        for (uint32_t query = 0; query < CUDA_QUERIES; query++) {
            sums[0] += weights[query * CUDA_PAGE + lane];
            sums[1] += weights[query * CUDA_PAGE + lane + 32];
        }
    }
    for (int k = 0; k < 2; k++) {
        uint32_t slot = first + lane + 32 * k;
        if (slot < p.n_votes) {
            votes[slot] = sums[k];
        }
    }
}
