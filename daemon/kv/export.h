/* daemon/kv/export.h - a prompt's cached prefix, held while it is read out.
 *
 * An export holds the nodes of a prefix's whole blocks as a sequence does, so that they are neither
 * evicted nor overwritten. The bytes are read by another thread (they may lie in a mapped file, and
 * reading that can wait for a disk); everything else belongs to the engine thread. */
#ifndef DAEMON_KV_EXPORT_H
#define DAEMON_KV_EXPORT_H

#include "daemon/kv/sequence.h"

#include <pthread.h>

/* One layer class's block of 64 tokens, in the order of positions, then classes. */
struct kv_export_block {
    const void *data; /* NULL with bytes 0: no class needs its block of this position */
    uint64_t bytes;
    uint32_t layer_class, position;
    uint32_t flags; /* KV_BLOCK_GENERATED */
    bool is_saved;  /* the store knows its checksum */
    uint64_t checksum;
};

struct kv_export {
    struct kv_export *next; /* the engine's list */
    uint32_t uid;           /* whose */
    struct kv_sequence sequence;
    struct kv_layout layout; /* the classes alone; the model may go */
    uint64_t news_seen;

    /* Constant once kv_export_find() has returned 0. */
    int32_t *tokens; /* (n_tokens) */
    uint32_t n_tokens;
    struct kv_export_block *blocks; /* (n_blocks) */
    uint32_t n_blocks;
    uint64_t bytes;
    uint64_t arena_bytes; /* of the arena's bound: held, so that nobody can evict them */

    uint64_t committed_bytes; /* the engine's: what it has counted of that */
    pthread_mutex_t lock;     /* held while blocks are read */
    bool released;            /* under the lock: they are not to be read any more */
};

/* Copies the tokens. -ENOMEM. */
int kv_export_create(struct kv_cache *cache, struct kv_space *space, const struct kv_layout *layout,
                     const int32_t *tokens, size_t n_tokens, struct kv_export **ret);

/* Finds and holds what is cached of the tokens' whole blocks; windowed classes only as far as a
 * continuation needs them. 0, with n_tokens what was found (0: sequence.miss says why). -EAGAIN:
 * the space's store is being opened, or blocks are being checked; call again after the cache's next
 * news. -ENOMEM. */
int kv_export_find(struct kv_export *x);

/* Whether its blocks are of that realm. */
bool kv_export_is_of(const struct kv_export *x, const char *realm);

/* Lets go of the blocks. False: they are being read just now; ask again when that has ended. */
bool kv_export_release(struct kv_export *x);
/* Nobody may be reading. NULL is legal. */
void kv_export_destroy(struct kv_export *x);

/* ---- one reading thread at a time --------------------------------------------------------------
 * -ECANCELED: the blocks have been released (purged). */

/* The block's XXH3-64. -EBADMSG: it is not what was once written; the prefix is of no use. */
int kv_export_checksum(struct kv_export *x, uint32_t index, uint64_t *ret);
int kv_export_read(struct kv_export *x, uint32_t index, uint64_t offset, size_t bytes, void *to);

#endif
