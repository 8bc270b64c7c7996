/* plugins/cuda/attention_observe.c - starts the kernels of attention_observe.cu, and brings votes
 * to the device and back. */
#include "plugins/cuda/attention.h"

/* Floats of the three things that the kernels write, one behind the other. */
struct sizes {
    uint64_t parts, totals, votes;
};

static int launch(struct cuda_context *c, enum cuda_kernel kernel, uint32_t blocks, uint32_t groups,
                  struct cuda_observe_args *args)
{
    return cuda_launch(c, c->kernels[kernel], (struct cuda_grid){blocks, groups, 128, 0}, args);
}

static int run(struct cuda_context *c, struct cuda_observe_args *args)
{
    uint32_t n_tiles = (args->n_packed + CUDA_QUERIES - 1) / CUDA_QUERIES;
    uint32_t n_vote_segments =
        (args->n_votes + GQA_ATTN_SEGMENT_TOKENS - 1) / GQA_ATTN_SEGMENT_TOKENS;
    uint32_t groups = args->layer.n_kv_heads;

    int r = launch(c, CUDA_KERNEL_observe_parts, n_tiles * args->n_segments, groups, args);
    r = r < 0 ? r : launch(c, CUDA_KERNEL_observe_totals, (n_tiles + 7) / 8, groups, args);
    return r < 0 ? r : launch(c, CUDA_KERNEL_observe_votes, n_vote_segments, groups, args);
}

/* What was counted before, to the device; of a prompt's first rows that is nothing, and not copied.
 */
static int put_votes(struct cuda_context *c, CUdeviceptr to, const float *votes, uint64_t n)
{
    uint32_t seen = 0;

    for (uint64_t i = 0; i < n; i++) {
        seen |= gqa_float_bits(votes[i]);
    }
    if (seen != 0) {
        return cuda_upload(c, to, votes, n * sizeof(*votes));
    }
    return cuda_check(c, CUDA(&c->driver, cuMemsetD8Async)(to, 0, n * sizeof(*votes), c->stream),
                      "clearing votes");
}

int cuda_plan_observe(struct cuda_context *c, struct cuda_plan *plan,
                      const struct gqa_attn_layer *host_layer, const struct cuda_attn_layer *layer,
                      const struct gqa_attn_batch *batch, const struct gqa_attn_io *io,
                      uint32_t seq, uint32_t n_observed, uint32_t n_votes, float *votes)
{
    const struct gqa_attn_seq *s = &batch->seqs[seq];
    uint32_t groups = layer->n_kv_heads, n_packed = n_observed * (layer->n_heads / groups);
    uint64_t n_tiles = (n_packed + CUDA_QUERIES - 1) / CUDA_QUERIES;
    uint64_t n_tokens = (uint64_t)plugin_past(host_layer, s) + s->n_rows;
    uint64_t n_segments = (n_tokens + GQA_ATTN_SEGMENT_TOKENS - 1) / GQA_ATTN_SEGMENT_TOKENS;
    struct sizes n = {.parts = n_tiles * n_segments * groups * CUDA_QUERIES * 2,
                      .totals = n_tiles * groups * CUDA_QUERIES * 2,
                      .votes = (uint64_t)groups * n_votes};

    int r = cuda_buffer_reserve(c, &plan->observed, (n.parts + n.totals + n.votes) * sizeof(float));
    CUdeviceptr at = plan->observed.at;
    CUdeviceptr votes_at = at + (n.parts + n.totals) * sizeof(float);
    struct cuda_observe_args args = {
        .layer = *layer,
        .batch = plan->batch,
        .q = io->q,
        .q_stride = io->q_stride,
        .seq = seq,
        .first_row = s->first_row + s->n_rows - n_observed,
        .n_packed = n_packed,
        .n_segments = (uint32_t)n_segments,
        .n_votes = n_votes,
        .parts = cuda_pointer(at),
        .totals = cuda_pointer(at + n.parts * sizeof(float)),
        .votes = cuda_pointer(votes_at),
    };
    r = r < 0 ? r : put_votes(c, votes_at, votes, n.votes);
    r = r < 0 ? r : run(c, &args);
    r = r < 0 ? r : cuda_download(c, votes, votes_at, n.votes * sizeof(float));
    return r < 0 ? r : cuda_synchronise(c);
}
