/* plugins/cuda/attention.h - gqa.attention.0 on host memory, and the plans of batches that it
 * shares with programs.
 *
 * Between two calls of the interface pages may change in ways that nobody tells: append() stores on
 * the host, attend() copies what it needs to the device. That is for tests and for mixed plans; in
 * a program K and V stay on the device (pages.h). */
#ifndef PLUGINS_CUDA_ATTENTION_H
#define PLUGINS_CUDA_ATTENTION_H

#include "plugins/common/sight.h"
#include "plugins/cuda/context.h"

#define CUDA_ATTENTION_NUMERICS 1u
#define CUDA_ATTENTION_CAPS                                                                   \
    (GQA_ATTN_CAP_SHARED | GQA_ATTN_CAP_SPARSE | GQA_ATTN_CAP_TREE | GQA_ATTN_CAP_NO_COMMIT | \
     GQA_ATTN_CAP_OBSERVE | GQA_ATTN_CAP_MUTUAL)

int cuda_attention_create(struct cuda_context *c, struct cuda_attention **ret);
void cuda_attention_destroy(struct cuda_attention *a);

int cuda_attention_supports(const struct gqa_attn_layer *layer, struct gqa_reason *reason);
int cuda_attention_append(struct cuda_context *c, const struct gqa_attn_layer *layer,
                          const struct gqa_attn_batch *batch, const struct gqa_attn_io *io);
int cuda_attention_attend(struct cuda_context *c, const struct gqa_attn_layer *layer,
                          const struct gqa_attn_batch *batch, const struct gqa_attn_io *io);
int cuda_attention_observe(struct cuda_context *c, const struct gqa_attn_layer *layer,
                           const struct gqa_attn_batch *batch, const struct gqa_attn_io *io,
                           uint32_t seq, uint32_t n_observed, uint32_t n_votes, float *votes);

static inline bool cuda_kv_is_quantised(uint32_t type)
{
    return type == GQA_TYPE_Q8_0 || type == GQA_TYPE_Q4_0;
}

/* What append() writes to the log for a row: K and V of all groups, bytes. */
static inline uint64_t cuda_log_row_bytes(const struct gqa_attn_layer *l)
{
    return l->n_kv_heads *
           (gqa_kv_token_bytes(l->k_type, l->k_dim) + gqa_kv_token_bytes(l->v_type, l->v_dim));
}

/* ---- plans ------------------------------------------------------------------------------- */

/* What the kernels need to know of a batch for layers of one kind (heads, groups, dimensions,
 * window, rope and class alike), on the device. */
struct cuda_plan {
    struct cuda_buffer device, parts, observed;
    char *host; /* what was uploaded; owned */
    size_t host_bytes;
    struct cuda_attn_batch batch;
    const struct cuda_attn_item *items;
    const struct cuda_merge_row *merge_rows;
    uint32_t n_items, n_rows;
    bool merges;
};

/* pages[i]: device addresses of sequence i's pages, up to its last new row; 0 where the table has
 * none. */
int cuda_plan_make(struct cuda_context *c, struct cuda_plan *plan,
                   const struct gqa_attn_layer *layer, const struct gqa_attn_batch *batch,
                   const uint64_t *const *pages);
void cuda_plan_finish(struct cuda_context *c, struct cuda_plan *plan);

/* The layer's numbers; sinks on the device, or 0. */
struct cuda_attn_layer cuda_layer_of(const struct gqa_attn_layer *layer, CUdeviceptr sinks);

/* io with device addresses. log: see struct cuda_append_args. */
int cuda_plan_append(struct cuda_context *c, const struct cuda_plan *plan,
                     const struct cuda_attn_layer *layer, const struct gqa_attn_io *io,
                     CUdeviceptr log);
int cuda_plan_attend(struct cuda_context *c, const struct cuda_plan *plan,
                     const struct cuda_attn_layer *layer, const struct gqa_attn_io *io);

/* gqa_attention.observe for a batch whose plan this is; io->q on the device, votes on the host,
 * where they are when this returns. What is asked must be checked: plugin_check_observed(). */
int cuda_plan_observe(struct cuda_context *c, struct cuda_plan *plan,
                      const struct gqa_attn_layer *host_layer, const struct cuda_attn_layer *layer,
                      const struct gqa_attn_batch *batch, const struct gqa_attn_io *io,
                      uint32_t seq, uint32_t n_observed, uint32_t n_votes, float *votes);

/* Pages that hold a sequence's past and new rows in the layer's class. */
static inline uint32_t cuda_seq_pages(const struct gqa_attn_layer *l, const struct gqa_attn_seq *s)
{
    return (uint32_t)(((uint64_t)plugin_past(l, s) + s->n_rows + CUDA_PAGE - 1) / CUDA_PAGE);
}

/* Whether any of the sequence's rows may see something of its page i. */
static inline bool cuda_page_is_seen(const struct gqa_attn_layer *l, const struct gqa_attn_seq *s,
                                     uint32_t i)
{
    bool apart = plugin_first_apart(l, s) < s->n_rows;

    return (uint64_t)(i + 1) * CUDA_PAGE > plugin_first_seen(l, s, 0) ||
           (apart && (uint64_t)i * CUDA_PAGE < plugin_table(l, s)->n_sinks);
}

#endif
