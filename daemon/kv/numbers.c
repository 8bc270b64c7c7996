#include "daemon/kv/numbers.h"

#include <string.h>

#define TILES (GQA_KV_BLOCK_TOKENS / GQA_KV_TILE_TOKENS)

/* Of finite numbers below 2^16 the exponent's field is less. */
#define F32_LIMIT  ((127u + KV_NUMBER_BITS_MAX) << 23)
#define BF16_LIMIT ((127u + KV_NUMBER_BITS_MAX) << 7)
#define F16_LIMIT  (31u << 10)

/* Loops without a way out, so that compilers make vectors of them. */
static bool words_below(const char *at, size_t n, uint32_t limit)
{
    uint32_t over = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, at + 4 * i, sizeof(bits));
        over |= (bits & 0x7fffffffu) >= limit;
    }
    return over == 0;
}

static bool halves_below(const char *at, size_t n, uint32_t limit)
{
    uint32_t over = 0;
    for (size_t i = 0; i < n; i++) {
        uint16_t bits;
        memcpy(&bits, at + 2 * i, sizeof(bits));
        over |= (bits & 0x7fffu) >= limit;
    }
    return over == 0;
}

static bool floats_are_sound(const char *at, size_t n, uint32_t type)
{
    return type == GQA_TYPE_F32
               ? words_below(at, n, F32_LIMIT)
               : halves_below(at, n, type == GQA_TYPE_F16 ? F16_LIMIT : BF16_LIMIT);
}

static bool is_quant(uint32_t type)
{
    return type != GQA_TYPE_F32 && type != GQA_TYPE_F16 && type != GQA_TYPE_BF16;
}

/* One group's K of a layer. */
static bool k_is_sound(const char *k, const struct kv_layer_desc *d)
{
    bool sound = true;
    if (!is_quant(d->k_type)) {
        return floats_are_sound(k, (size_t)GQA_KV_BLOCK_TOKENS * d->k_dim, d->k_type);
    }
    for (uint32_t tile = 0; tile < TILES; tile++) {
        for (uint32_t dim = 0; dim < d->k_dim; dim += GQA_KV_QUANT_DIMS) {
            const char *scales =
                k + gqa_k_quant_scale(d->k_type, d->k_dim, tile * GQA_KV_TILE_TOKENS, dim);
            sound &= halves_below(scales, GQA_KV_TILE_TOKENS, F16_LIMIT);
        }
    }
    return sound;
}

static bool v_is_sound(const char *v, const struct kv_layer_desc *d)
{
    bool sound = true;
    if (!is_quant(d->v_type)) {
        return floats_are_sound(v, (size_t)GQA_KV_BLOCK_TOKENS * d->v_dim, d->v_type);
    }
    for (uint32_t token = 0; token < GQA_KV_BLOCK_TOKENS; token++) {
        for (uint32_t dim = 0; dim < d->v_dim; dim += GQA_KV_QUANT_DIMS) {
            sound &=
                halves_below(v + gqa_v_quant_scale(d->v_type, d->v_dim, token, dim), 1, F16_LIMIT);
        }
    }
    return sound;
}

bool kv_numbers_are_sound(const struct kv_layout *l, uint32_t layer_class, const void *block)
{
    const struct kv_class *c = &l->classes[layer_class];
    bool sound = true;
    for (uint32_t i = 0; i < c->n_layers; i++) {
        const char *k = (const char *)block + i * c->layer_bytes;
        const char *v = k + c->desc.n_kv_heads * c->k_head_bytes;
        for (uint32_t g = 0; g < c->desc.n_kv_heads; g++) {
            sound &= k_is_sound(k + g * c->k_head_bytes, &c->desc);
            sound &= v_is_sound(v + g * c->v_head_bytes, &c->desc);
        }
    }
    return sound;
}
