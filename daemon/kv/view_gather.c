/* daemon/kv/view_gather.c - see view_gather.h.
 *
 * K lies in tiles of 16 tokens (gqa/tensor.h). To whoever moves tokens, a tile of any type is a row
 * of lanes; a lane has a value of each token, side by side:
 *
 *     F32, F16, BF16   a lane of 4 or 2 bytes for each dimension
 *     Q8_0, Q4_0       for 32 dimensions each, a lane of 2 (scales), then 32 or 16 of 1 byte
 *
 * A tile is filled lane by lane from up to 16 tokens of anywhere: it is written once, in order. */
#include "daemon/kv/view_gather.h"

#include <gqa/tensor.h>
#include <string.h>

#define BLOCK GQA_KV_BLOCK_TOKENS
#define TILE  GQA_KV_TILE_TOKENS

/* A tile that is being filled. */
struct tile {
    uint32_t n;             /* tokens, at its first places */
    const char *from[TILE]; /* the tiles that they lie in, */
    uint32_t place[TILE];   /* and where */
    char *to;
};

/* Inlined with value_bytes constant, so that a value is one move. */
static inline void gather_lanes(const struct tile *t, size_t offset, uint32_t n_lanes,
                                size_t value_bytes)
{
    for (uint32_t lane = 0; lane < n_lanes; lane++, offset += TILE * value_bytes) {
        for (uint32_t i = 0; i < t->n; i++) {
            memcpy(t->to + offset + i * value_bytes,
                   t->from[i] + offset + t->place[i] * value_bytes, value_bytes);
        }
    }
}

static void gather_quants(const struct tile *t, uint32_t type, uint32_t k_dim)
{
    size_t quant_bytes = TILE * gqa_kv_token_bytes(type, GQA_KV_QUANT_DIMS);
    uint32_t n_bytes = type == GQA_TYPE_Q8_0 ? 32 : 16;
    for (uint32_t d = 0; d < k_dim; d += GQA_KV_QUANT_DIMS) {
        size_t offset = d / GQA_KV_QUANT_DIMS * quant_bytes;
        gather_lanes(t, offset, 1, 2);
        gather_lanes(t, offset + TILE * 2, n_bytes, 1);
    }
}

static void gather_tile(const struct tile *t, uint32_t type, uint32_t k_dim)
{
    switch (type) {
    case GQA_TYPE_F32:
        gather_lanes(t, 0, k_dim, 4);
        break;
    case GQA_TYPE_F16:
    case GQA_TYPE_BF16:
        gather_lanes(t, 0, k_dim, 2);
        break;
    default:
        gather_quants(t, type, k_dim);
    }
}

static void gather_k(const struct gqa_attn_layer *a, size_t k_offset, void *const *from,
                     const uint32_t *tokens, uint32_t n, struct kv_block *const *to)
{
    size_t tile_bytes = TILE * gqa_kv_token_bytes(a->k_type, a->k_dim);
    for (uint32_t slot = 0; slot < n; slot += TILE) {
        struct tile t = {.n = n - slot < TILE ? n - slot : TILE};
        t.to = (char *)to[slot / BLOCK]->data + k_offset + slot % BLOCK / TILE * tile_bytes;
        for (uint32_t i = 0; i < t.n; i++) {
            uint32_t token = tokens[slot + i];
            t.from[i] =
                (const char *)from[token / BLOCK] + k_offset + token % BLOCK / TILE * tile_bytes;
            t.place[i] = token % TILE;
        }
        gather_tile(&t, a->k_type, a->k_dim);
    }
}

static void gather_v(const struct gqa_attn_layer *a, size_t v_offset, void *const *from,
                     const uint32_t *tokens, uint32_t n, struct kv_block *const *to)
{
    size_t bytes = gqa_kv_token_bytes(a->v_type, a->v_dim);
    for (uint32_t slot = 0; slot < n; slot++) {
        uint32_t token = tokens[slot];
        memcpy((char *)to[slot / BLOCK]->data + v_offset + slot % BLOCK * bytes,
               (const char *)from[token / BLOCK] + v_offset + token % BLOCK * bytes, bytes);
    }
}

void kv_gather(const struct kv_layout *l, uint32_t layer, uint32_t group, void *const *from,
               const uint32_t *tokens, uint32_t n, struct kv_block *const *to)
{
    struct gqa_attn_layer a = {.struct_size = sizeof(a)};
    kv_layout_describe(l, layer, &a);
    gather_k(&a, a.k_offset + group * a.k_head_bytes, from, tokens, n, to);
    gather_v(&a, a.v_offset + group * a.v_head_bytes, from, tokens, n, to);
}
