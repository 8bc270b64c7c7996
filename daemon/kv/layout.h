/* daemon/kv/layout.h - the geometry of a model's KV blocks.
 *
 * A layer class is a set of layers with equal window, types, heads and dimensions. A block holds 64
 * tokens of all layers of one class: the layers' parts lie one after another, each K of all groups,
 * then V of all groups (gqa/tensor.h says how one group's K and V lie). docs/kv-layout.md draws it.
 */
#ifndef DAEMON_KV_LAYOUT_H
#define DAEMON_KV_LAYOUT_H

#include <gqa/plugin.h>
#include <stdbool.h>

#define KV_MAX_CLASSES 8
#define KV_ALIGN_BYTES 64u

struct kv_layer_desc { /* what makes layers equal */
    uint32_t window;
    uint32_t n_kv_heads, k_dim, v_dim;
    uint32_t k_type, v_type; /* enum gqa_type */
};

struct kv_class {
    struct kv_layer_desc desc;
    uint32_t n_layers;
    uint64_t k_head_bytes, v_head_bytes; /* one group's part of one layer */
    uint64_t layer_bytes;                /* one layer's part of a block */
    uint64_t block_bytes;
};

struct kv_layout {
    uint32_t n_classes;
    uint32_t n_layers;
    struct kv_class classes[KV_MAX_CLASSES];
    uint32_t *layer_class;  /* (n_layers) */
    uint64_t *layer_offset; /* (n_layers) bytes from the block's start to the layer's part */
};

/* -EINVAL: no layer, or dimensions out of range; -ENOTSUP: a type that has no layout; -E2BIG: too
 * many classes; -EOVERFLOW; -ENOMEM. */
int kv_layout_init(struct kv_layout *l, const struct kv_layer_desc *layers, uint32_t n_layers);
void kv_layout_finish(struct kv_layout *l);

/* Fills the KV fields of a layer's attention description (class, types, offsets, strides). */
void kv_layout_describe(const struct kv_layout *l, uint32_t layer, struct gqa_attn_layer *ret);

/* Bytes that one token takes over all classes, ignoring windows. */
uint64_t kv_layout_token_bytes(const struct kv_layout *l);

/* "f16" and the like; -EINVAL for other names. */
int kv_type_by_name(const char *name, uint32_t *ret);
const char *kv_type_name(uint32_t type);

#endif
