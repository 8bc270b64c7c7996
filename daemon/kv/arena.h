/* daemon/kv/arena.h - anonymous memory for KV blocks, bounded over all models.
 *
 * The only place where blocks are written. Memory comes in slabs of huge-page size, kept out of
 * core dumps; a slab holds blocks of one size. Blocks are reference counted, so that sequences can
 * share sealed ones. Engine thread only; the counters may be read from anywhere. */
#ifndef DAEMON_KV_ARENA_H
#define DAEMON_KV_ARENA_H

#include <stddef.h>
#include <stdint.h>

struct kv_arena;
struct kv_slab;

struct kv_block { /* one block of one layer class */
    void *data;
    uint32_t refs;
    uint64_t version;     /* no two allocations have the same; below 2^63 */
    struct kv_slab *slab; /* the mapping that it is a part of; the arena's own */
    struct kv_block *next_free;
};

int kv_arena_create(uint64_t bytes_max, struct kv_arena **ret);
void kv_arena_destroy(struct kv_arena *a); /* all blocks must be released; NULL is legal */

/* A block of that size with one reference, contents undefined. -ENOMEM when the bound is reached or
 * the system has none. */
int kv_arena_alloc(struct kv_arena *a, uint64_t block_bytes, struct kv_block **ret);
struct kv_block *kv_block_ref(struct kv_block *b);
void kv_block_unref(struct kv_arena *a, struct kv_block *b); /* NULL is legal */

/* Bytes of the bound that so many blocks of that size can take, whole slabs counted; UINT64_MAX
 * where 64 bits do not hold them. */
uint64_t kv_arena_bytes_for(uint64_t block_bytes, uint64_t n_blocks);

/* Memory of somebody's own, beside the blocks, counts in the bound. -ENOMEM: it is reached. */
int kv_arena_set_aside(struct kv_arena *a, uint64_t bytes);
void kv_arena_give_aside(struct kv_arena *a, uint64_t bytes);

/* Gives slabs without blocks in use back to the system. */
void kv_arena_trim(struct kv_arena *a);

uint64_t kv_arena_bytes_used(const struct kv_arena *a); /* with what is set aside */
uint64_t kv_arena_bytes_max(const struct kv_arena *a);
uint64_t kv_arena_blocks_used(const struct kv_arena *a);

#endif
