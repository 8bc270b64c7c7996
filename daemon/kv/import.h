/* daemon/kv/import.h - blocks that another cache has computed, on their way into a space.
 *
 * An import collects a prefix's blocks in the arena, beside the tree: nothing of it can be adopted
 * before all of it has come and every checksum agreed. What is dropped half-way leaves nothing.
 *
 * Pieces come in the order in which an export tells them: positions ascending from 0, classes
 * ascending within, offsets without gaps. Everything is checked again here, whatever the sender
 * says of itself. Engine thread only, but for the bytes themselves: kv_import_take() says where
 * they go, and another thread may write them there until the import's next call. */
#ifndef DAEMON_KV_IMPORT_H
#define DAEMON_KV_IMPORT_H

#include "daemon/kv/cache.h"
#include "format/error.h"

#define KV_IMPORT_IDLE_NS (30ull * 1000000000u) /* one that no piece comes for is dropped */

struct kv_import;

struct kv_import_piece {
    uint32_t layer_class, position;
    uint32_t flags;        /* KV_BLOCK_GENERATED or 0 */
    const int32_t *tokens; /* (GQA_KV_BLOCK_TOKENS) of that position */
    uint64_t bytes;        /* of the whole block; 0: the class's block is not needed */
    uint64_t checksum;     /* XXH3-64 of the whole block */
    uint64_t offset;       /* of this piece in it */
    uint64_t data_bytes;   /* of this piece */
};

/* -ENOMEM. The space is held until the end. */
int kv_import_create(struct kv_cache *cache, struct kv_space *space, struct kv_import **ret);
void kv_import_destroy(struct kv_import *im); /* drops what was not kept; NULL is legal */

/* Whether its blocks are of that identity. */
bool kv_import_is_of(const struct kv_import *im, const struct kv_identity *identity);

bool kv_import_is_for(const struct kv_import *im, const char *realm);

/* Bytes of the arena's bound that it would hold once it has taken this piece, too. */
uint64_t kv_import_bytes_with(const struct kv_import *im, const struct kv_import_piece *piece);

/* Takes a piece's place in: *ret_to is where its bytes go (NULL: it has none). positions_max: of
 * the model's context. -EINVAL with a sentence: it cannot be the next piece; -ENOMEM. */
int kv_import_take(struct kv_import *im, const struct kv_import_piece *piece,
                   uint32_t positions_max, void **ret_to, struct fmt_error *err);

/* Whether what has come is a whole prefix. -EINVAL with a sentence. */
int kv_import_check(const struct kv_import *im, struct fmt_error *err);

/* Gives a bounded number of blocks to the tree, of a prefix that was checked. -EAGAIN: there are
 * more; 0: all are there, *ret_tokens of prefix, *ret_new of them not known before. -ENOMEM: what
 * was given so far is a sound prefix, and stays. */
int kv_import_keep(struct kv_import *im, uint32_t *ret_tokens, uint32_t *ret_new);

/* Any thread: whether a block's bytes are what its checksum says. */
bool kv_import_is_sound(const void *block, uint64_t bytes, uint64_t checksum);

#endif
