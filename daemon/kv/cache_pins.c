/* daemon/kv/cache_pins.c - what stays whatever comes, and how much of that one realm may have. */
#include "daemon/kv/cache_internal.h"

#include <string.h>

void kv_space_pin(struct kv_space *s, struct kv_node *n, bool pinned)
{
    if (pinned == ((n->flags & KV_BLOCK_PINNED) != 0)) {
        return;
    }
    n->flags ^= KV_BLOCK_PINNED;
    s->n_pinned += pinned ? 1 : -1;
}

static uint64_t less(uint64_t a, uint64_t b)
{
    return a > b ? a - b : 0;
}

/* Half of what may be kept, of all and of the realm: the rest is for those who come. A realm
 * without a bound of its own leaves as much as it takes for the pins of others. */
uint64_t kv_space_room_for_pins(const struct kv_space *s)
{
    const struct kv_cache_options *o = &s->cache->options;
    bool in_store = s->cache->folder != NULL && o->store_bytes_max != 0;
    uint64_t all = (in_store ? o->store_bytes_max : o->arena_bytes_max) / 2;
    uint64_t own = 0, others = 0;
    for (const struct kv_space *each = s->cache->spaces; each != NULL; each = each->next) {
        uint64_t bytes = each->n_pinned * kv_space_node_bytes(each);
        *(strcmp(each->realm, s->realm) == 0 ? &own : &others) += bytes;
    }
    uint64_t of_all = less(all, others);
    uint64_t of_own =
        in_store && o->store_bytes_per_realm != 0 ? o->store_bytes_per_realm / 2 : of_all / 2;
    return less(of_own < of_all ? of_own : of_all, own);
}
