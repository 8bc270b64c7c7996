/* daemon/kv/view_gather.h - tokens of one layer and group, from a sequence's blocks into others. */
#ifndef DAEMON_KV_VIEW_GATHER_H
#define DAEMON_KV_VIEW_GATHER_H

#include "daemon/kv/arena.h"
#include "daemon/kv/layout.h"

/* Copies K and V of tokens (n) in from, the pages of the layer's class, to the first n places of
 * to, bit for bit; nothing else of these blocks is touched. Layers and groups may be copied at
 * once, by several threads. */
void kv_gather(const struct kv_layout *l, uint32_t layer, uint32_t group, void *const *from,
               const uint32_t *tokens, uint32_t n, struct kv_block *const *to);

#endif
