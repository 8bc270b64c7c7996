#include "daemon/kv/layout.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    uint32_t type;
} kv_types[] = {
    {"f32", GQA_TYPE_F32},   {"f16", GQA_TYPE_F16},   {"bf16", GQA_TYPE_BF16},
    {"q8_0", GQA_TYPE_Q8_0}, {"q4_0", GQA_TYPE_Q4_0},
};

#define N_KV_TYPES (sizeof(kv_types) / sizeof(kv_types[0]))

int kv_type_by_name(const char *name, uint32_t *ret)
{
    for (size_t i = 0; i < N_KV_TYPES; i++) {
        if (strcmp(name, kv_types[i].name) == 0) {
            *ret = kv_types[i].type;
            return 0;
        }
    }
    return -EINVAL;
}

const char *kv_type_name(uint32_t type)
{
    for (size_t i = 0; i < N_KV_TYPES; i++) {
        if (kv_types[i].type == type) {
            return kv_types[i].name;
        }
    }
    return "unknown";
}

static bool same_desc(const struct kv_layer_desc *a, const struct kv_layer_desc *b)
{
    return a->window == b->window && a->n_kv_heads == b->n_kv_heads && a->k_dim == b->k_dim &&
           a->v_dim == b->v_dim && a->k_type == b->k_type && a->v_type == b->v_type;
}

static uint64_t align_up(uint64_t bytes)
{
    return (bytes + KV_ALIGN_BYTES - 1) & ~(uint64_t)(KV_ALIGN_BYTES - 1);
}

/* Below 2^16 each, so that no product here can overflow 64 bits. */
static int class_init(struct kv_class *c, const struct kv_layer_desc *desc)
{
    if (gqa_kv_token_bytes(desc->k_type, 1) == 0 || gqa_kv_token_bytes(desc->v_type, 1) == 0) {
        return -ENOTSUP;
    }
    if (desc->n_kv_heads == 0 || desc->n_kv_heads > 1u << 16 || desc->k_dim == 0 ||
        desc->k_dim > 1u << 16 || desc->v_dim == 0 || desc->v_dim > 1u << 16) {
        return -EINVAL;
    }
    c->desc = *desc;
    c->n_layers = 0;
    c->k_head_bytes = align_up(gqa_kv_head_bytes(desc->k_type, desc->k_dim));
    c->v_head_bytes = align_up(gqa_kv_head_bytes(desc->v_type, desc->v_dim));
    c->layer_bytes = desc->n_kv_heads * (c->k_head_bytes + c->v_head_bytes);
    c->block_bytes = 0;
    return 0;
}

static int find_or_add_class(struct kv_layout *l, const struct kv_layer_desc *desc)
{
    for (uint32_t i = 0; i < l->n_classes; i++) {
        if (same_desc(&l->classes[i].desc, desc)) {
            return (int)i;
        }
    }
    if (l->n_classes == KV_MAX_CLASSES) {
        return -E2BIG;
    }
    int rc = class_init(&l->classes[l->n_classes], desc);
    return rc < 0 ? rc : (int)l->n_classes++;
}

int kv_layout_init(struct kv_layout *l, const struct kv_layer_desc *layers, uint32_t n_layers)
{
    struct kv_layout made = {.n_layers = n_layers};
    if (n_layers == 0) {
        return -EINVAL;
    }
    made.layer_class = calloc(n_layers, sizeof(*made.layer_class));
    made.layer_offset = calloc(n_layers, sizeof(*made.layer_offset));
    if (made.layer_class == NULL || made.layer_offset == NULL) {
        kv_layout_finish(&made);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < n_layers; i++) {
        int index = find_or_add_class(&made, &layers[i]);
        if (index < 0) {
            kv_layout_finish(&made);
            return index;
        }
        struct kv_class *c = &made.classes[index];
        made.layer_class[i] = (uint32_t)index;
        made.layer_offset[i] = c->block_bytes;
        if (__builtin_add_overflow(c->block_bytes, c->layer_bytes, &c->block_bytes)) {
            kv_layout_finish(&made);
            return -EOVERFLOW;
        }
        c->n_layers++;
    }
    *l = made;
    return 0;
}

void kv_layout_finish(struct kv_layout *l)
{
    free(l->layer_class);
    free(l->layer_offset);
    memset(l, 0, sizeof(*l));
}

void kv_layout_describe(const struct kv_layout *l, uint32_t layer, struct gqa_attn_layer *ret)
{
    const struct kv_class *c = &l->classes[l->layer_class[layer]];
    ret->layer_class = l->layer_class[layer];
    ret->n_kv_heads = c->desc.n_kv_heads;
    ret->k_dim = c->desc.k_dim;
    ret->v_dim = c->desc.v_dim;
    ret->k_type = c->desc.k_type;
    ret->v_type = c->desc.v_type;
    ret->window = c->desc.window;
    ret->k_offset = l->layer_offset[layer];
    ret->v_offset = l->layer_offset[layer] + c->desc.n_kv_heads * c->k_head_bytes;
    ret->k_head_bytes = c->k_head_bytes;
    ret->v_head_bytes = c->v_head_bytes;
}

uint64_t kv_layout_token_bytes(const struct kv_layout *l)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < l->n_classes; i++) {
        bytes += l->classes[i].block_bytes / GQA_KV_BLOCK_TOKENS;
    }
    return bytes;
}
