#include "tests/unit/engine/feed.h"

#include <errno.h>
#include <string.h>

int feed_tokens(struct model *m, struct kv_sequence *kv, const int32_t *tokens, uint32_t n,
                uint32_t chunk, float *ret_logits)
{
    uint32_t n_vocab = model_shape(m)->n_vocab;
    int rc = chunk > 0 && chunk <= FEED_ROWS ? 0 : -EINVAL;
    while (rc == 0 && kv->n_tokens < n) {
        uint32_t past = kv->n_tokens, rows = n - past < chunk ? n - past : chunk;
        uint32_t positions[FEED_ROWS], out_rows[FEED_ROWS];
        uint8_t row_class[FEED_ROWS] = {0};
        for (uint32_t i = 0; i < rows; i++) {
            positions[i] = past + i;
            out_rows[i] = i;
        }
        rc = kv_sequence_reserve(kv, rows);
        struct gqa_attn_seq seq = {.n_rows = rows, .n_past = past, .tables = kv->tables};
        struct gqa_attn_batch attention = {
            .struct_size = sizeof(attention),
            .n_rows = rows,
            .n_seqs = 1,
            .commit = 1,
            .seqs = &seq,
            .row_class = row_class,
        };
        struct model_batch batch = {rows,     rows,       tokens + past,     positions,
                                    out_rows, &attention, MODEL_WANTS_LOGITS};
        struct model_outputs out = {NULL};
        rc = rc < 0 ? rc : model_step(m, &batch, &out);
        if (rc == 0) {
            memcpy(ret_logits + (size_t)past * n_vocab, out.logits,
                   (size_t)rows * n_vocab * sizeof(*out.logits));
            kv_sequence_commit(kv, rows, NULL);
        }
    }
    return rc;
}

int feed_all(struct model *m, const int32_t *tokens, uint32_t n, uint32_t chunk, float *ret_logits)
{
    const struct kv_cache_options options = {.arena_bytes_max = 64u << 20};
    struct kv_cache *cache;
    struct kv_sequence kv;
    int rc = kv_cache_create(&options, &cache);
    if (rc < 0) {
        return rc;
    }
    kv_sequence_init(&kv, model_kv_layout(m), cache, NULL, false);
    rc = feed_tokens(m, &kv, tokens, n, chunk, ret_logits);
    kv_sequence_finish(&kv);
    kv_cache_destroy(cache);
    return rc;
}
