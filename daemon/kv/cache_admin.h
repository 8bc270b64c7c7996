/* daemon/kv/cache_admin.h - what is kept, told to people; and dropped or purged at their wish.
 *
 * realm NULL means every realm. Engine thread only. */
#ifndef DAEMON_KV_CACHE_ADMIN_H
#define DAEMON_KV_CACHE_ADMIN_H

#include "daemon/kv/cache.h"

struct kv_space_facts {
    char realm[KV_REALM_BYTES];
    char about[KV_ABOUT_BYTES];
    uint8_t id[16];
    uint32_t n_blocks, n_pinned; /* of 64 tokens */
    uint32_t n_prefixes;         /* blocks that nothing goes on from: ends of what was computed */
    uint32_t n_tokens_max;       /* of the longest prefix */
    uint64_t memory_bytes, store_bytes, hits;
    char trouble[192]; /* why nothing is saved, or "" */
};

/* Fills up to max entries of spaces that are open; returns how many there are. */
size_t kv_cache_list(const struct kv_cache *c, const char *realm, struct kv_space_facts *ret,
                     size_t max);

struct kv_removed {
    uint64_t n_blocks, bytes;
};

/* Lets go of what is kept of a realm, from memory and stores; pinned blocks and those that running
 * sequences hold stay. id: of one model identity (16 bytes), or NULL. The files' bytes are free for
 * other blocks, but not wiped. -ENOMEM: not all of it was dropped; *ret says what was. */
int kv_cache_drop(struct kv_cache *c, const char *realm, const uint8_t *id, struct kv_removed *ret);

/* Whether nothing of the realm is on its way to a store, from it, or being checked: drop and purge
 * then find all that there is. */
bool kv_cache_is_quiet(const struct kv_cache *c, const char *realm);

struct kv_purge {
    /* Engine thread, from kv_cache_poll(): every byte is gone, or -errno. */
    void (*done)(void *arg, int result, const struct kv_removed *removed);
    void *arg;
};

/* Removes everything of a realm, pins included: memory is freed, files are punched, synced and
 * removed, those of models that are not loaded too. done comes exactly once, unless this fails:
 * -EBUSY: the cache is not quiet, or a sequence holds blocks of the realm; -ENOMEM: nothing was
 * wiped, though some may have been dropped. */
int kv_cache_purge(struct kv_cache *c, const char *realm, const struct kv_purge *purge);

#endif
