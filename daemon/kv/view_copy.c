#include "daemon/kv/view_copy.h"

#include <gqa/tensor.h>
#include <string.h>

/* K lies in tiles of 16 tokens, the tokens side by side: docs/kv-layout.md. */
static void copy_k_values(size_t value_bytes, uint32_t k_dim, const char *from, uint32_t from_token,
                          char *to, uint32_t to_token)
{
    from += gqa_k_index(k_dim, from_token, 0) * value_bytes;
    to += gqa_k_index(k_dim, to_token, 0) * value_bytes;
    for (size_t d = 0; d < k_dim; d++) {
        size_t at = d * GQA_KV_TILE_TOKENS * value_bytes;
        memcpy(to + at, from + at, value_bytes);
    }
}

static void copy_k_quants(uint32_t type, uint32_t k_dim, const char *from, uint32_t from_token,
                          char *to, uint32_t to_token)
{
    uint32_t n_bytes = type == GQA_TYPE_Q8_0 ? 32 : 16;
    for (uint32_t d = 0; d < k_dim; d += GQA_KV_QUANT_DIMS) {
        const char *bytes = from + gqa_k_quant_byte(type, k_dim, from_token, d);
        char *to_bytes = to + gqa_k_quant_byte(type, k_dim, to_token, d);
        memcpy(to + gqa_k_quant_scale(type, k_dim, to_token, d),
               from + gqa_k_quant_scale(type, k_dim, from_token, d), 2);
        for (size_t i = 0; i < n_bytes; i++) {
            to_bytes[i * GQA_KV_TILE_TOKENS] = bytes[i * GQA_KV_TILE_TOKENS];
        }
    }
}

void kv_copy_token(const struct kv_layout *l, uint32_t layer, uint32_t group,
                   struct kv_place_of from, struct kv_place_of to)
{
    struct gqa_attn_layer a = {.struct_size = sizeof(a)};
    kv_layout_describe(l, layer, &a);
    const char *k = (const char *)from.page + a.k_offset + group * a.k_head_bytes;
    const char *v = (const char *)from.page + a.v_offset + group * a.v_head_bytes;
    char *to_k = (char *)to.page + a.k_offset + group * a.k_head_bytes;
    char *to_v = (char *)to.page + a.v_offset + group * a.v_head_bytes;
    size_t v_bytes = gqa_kv_token_bytes(a.v_type, a.v_dim);

    if (a.k_type == GQA_TYPE_Q8_0 || a.k_type == GQA_TYPE_Q4_0) {
        copy_k_quants(a.k_type, a.k_dim, k, from.token, to_k, to.token);
    } else {
        copy_k_values(gqa_kv_token_bytes(a.k_type, 1), a.k_dim, k, from.token, to_k, to.token);
    }
    memcpy(to_v + to.token * v_bytes, v + from.token * v_bytes, v_bytes);
}
