/* daemon/kv/prefix.h - the tree of computed prefixes of one space (a realm's blocks of one model).
 *
 * A node is a block of 64 tokens after a certain prefix; its key is a chain hash over all tokens up
 * to its end. Whoever computes the keys of a prompt finds its blocks without walking from the root,
 * and compares the tokens themselves on every hit. A node says, for every layer class, where that
 * class's block is: in the arena, in the store, in both, or (windowed classes) nowhere.
 *
 *        root --- [You are a ...] --- [... assistant.] --+-- [What is ...]
 *                                                        +-- [Tell me ...] --- [...]
 *
 * The tree decides nothing: cache.c says what is kept, saved and evicted. Engine thread only. */
#ifndef DAEMON_KV_PREFIX_H
#define DAEMON_KV_PREFIX_H

#include "daemon/kv/arena.h"
#include "daemon/kv/key.h"

#include <gqa/tensor.h>
#include <stdbool.h>

enum kv_place_state {
    KV_UNSAVED, /* not in the store */
    KV_SAVING,  /* being written */
    KV_SAVED,   /* in the store, synced */
};

struct kv_place {           /* one layer class's block of a node */
    struct kv_block *block; /* the arena's copy, with a reference of the tree's; or NULL */
    uint8_t state;          /* enum kv_place_state */
    bool verified;          /* SAVED: its bytes are known to be what its checksum says */
    bool checking;          /* SAVED: somebody is finding that out */
    bool wanted;            /* UNSAVED: it was to be saved, and could not be yet */
    uint32_t slot;          /* SAVED: where in the store */
    uint64_t checksum;
};

struct kv_node {
    struct kv_key key;
    struct kv_node *parent; /* the tree's root for first blocks; NULL: the parent is not known */
    struct kv_node *first_child, *next_sibling, *prev_sibling;
    struct kv_node *next_in_bucket;
    uint32_t position; /* tokens [64 position, 64 position + 64) of its sequences */
    uint32_t flags;    /* KV_BLOCK_... */
    uint32_t users;    /* running sequences that hold it: it is not evicted */
    uint32_t hits;     /* how often it spared computing it */
    uint64_t used_s;   /* when last, in seconds since 1970 */
    int32_t tokens[GQA_KV_BLOCK_TOKENS];
    struct kv_place places[]; /* (n_classes) */
};

struct kv_tree {
    uint32_t n_classes;
    /* A block's numerics depend on whether a prompt (class P) or a generation made it: then that is
     * a part of its key. Else the flag is only remembered. */
    bool classes_differ;
    struct kv_node *root; /* holds nothing; parent of the first blocks */
    struct kv_node **buckets;
    uint32_t n_buckets, n_nodes;
};

/* seed: the space's identity, a part of every key. -ENOMEM. */
int kv_tree_init(struct kv_tree *t, struct kv_key seed, uint32_t n_classes, bool classes_differ);
void kv_tree_finish(struct kv_tree *t); /* all nodes must be gone, but for the root */

/* The key of the block that holds these 64 tokens after the block with key parent. */
struct kv_key kv_tree_next_key(const struct kv_tree *t, struct kv_key parent, const int32_t *tokens,
                               uint32_t flags);

/* The node with that key and those very tokens, or NULL. */
struct kv_node *kv_tree_find(const struct kv_tree *t, struct kv_key key, const int32_t *tokens);

/* Adds a node without any place. parent NULL: it is looked up by parent_key; it may be unknown.
 * -EEXIST with the node that is there; -ENOMEM. It is not pinned, whatever the flags say: whoever
 * pins it counts that. */
int kv_tree_insert(struct kv_tree *t, struct kv_key key, struct kv_key parent_key,
                   uint32_t position, uint32_t flags, const int32_t *tokens, struct kv_node **ret);

/* Makes buckets for so many nodes, so that none of the insertions has all of them move. */
void kv_tree_reserve(struct kv_tree *t, uint32_t n_nodes);

/* Takes it out and frees it. Its children stay, without a parent. The places must be empty. */
void kv_tree_remove(struct kv_tree *t, struct kv_node *n);

/* Gives nodes whose parent was not known when they came a parent, where it is known now. */
void kv_tree_link_orphans(struct kv_tree *t, const struct kv_key *parent_keys,
                          struct kv_node *const *nodes, size_t n);

/* The next node of all, in no order: start with bucket 0 and NULL. For scans. */
struct kv_node *kv_tree_next(const struct kv_tree *t, uint32_t *bucket, struct kv_node *n);

typedef bool (*kv_node_filter_fn)(const void *arg, const struct kv_node *n);

/* All nodes that are wanted (NULL: all), those of the first positions first; malloc'ed, NULL
 * without memory (*ret_count is 0 then). */
struct kv_node **kv_tree_by_position(const struct kv_tree *t, kv_node_filter_fn wanted,
                                     const void *arg, size_t *ret_count);

static inline bool kv_place_is_there(const struct kv_place *p)
{
    return p->block != NULL || p->state == KV_SAVED;
}

#endif
