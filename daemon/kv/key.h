/* daemon/kv/key.h - the name of a KV block's content.
 *
 * A block's key is a chain hash: over what makes blocks interchangeable, over the keys of the
 * blocks before it, and over its own tokens. Whoever finds a block by its key compares the tokens
 * too: a key is a way to find, not a proof. No state, any thread. */
#ifndef DAEMON_KV_KEY_H
#define DAEMON_KV_KEY_H

#include <stdbool.h>
#include <stdint.h>

#define KV_BLOCK_TOKENS 64u

struct kv_key { /* both zero: none, the parent of a first block */
    uint64_t low, high;
};
_Static_assert(sizeof(struct kv_key) == 16, "a key lies in files");

static inline bool kv_key_equal(struct kv_key a, struct kv_key b)
{
    return a.low == b.low && a.high == b.high;
}

static inline bool kv_key_is_none(struct kv_key k)
{
    return k.low == 0 && k.high == 0;
}

#endif
