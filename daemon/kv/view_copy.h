/* daemon/kv/view_copy.h - one token of one layer and group, from block to block. */
#ifndef DAEMON_KV_VIEW_COPY_H
#define DAEMON_KV_VIEW_COPY_H

#include "daemon/kv/layout.h"

struct kv_place_of {
    void *page; /* of the layer's class */
    uint32_t token;
};

/* Copies K and V, bit for bit; nothing else of the block is touched. */
void kv_copy_token(const struct kv_layout *l, uint32_t layer, uint32_t group,
                   struct kv_place_of from, struct kv_place_of to);

#endif
