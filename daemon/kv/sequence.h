/* daemon/kv/sequence.h - the KV of one running sequence: its blocks in every layer class.
 *
 * Grows by whole blocks; windowed classes give back blocks that no later token can see. This is
 * where a prefix that other requests have computed will be adopted: a sequence may start with
 * blocks that it shares. Engine thread only. */
#ifndef DAEMON_KV_SEQUENCE_H
#define DAEMON_KV_SEQUENCE_H

#include "daemon/kv/arena.h"
#include "daemon/kv/layout.h"

struct kv_sequence {
    const struct kv_layout *layout;
    struct kv_arena *arena;
    uint32_t n_tokens; /* committed */
    struct kv_block_list {
        struct kv_block **blocks; /* (n) NULL: given back, before the window */
        void **pages;             /* (n) the blocks' data, as attention wants them */
        uint32_t n, capacity;
        uint32_t first_live; /* blocks before it have been given back */
    } lists[KV_MAX_CLASSES];
    struct gqa_page_table tables[KV_MAX_CLASSES];
};

/* layout and arena outlive the sequence. */
void kv_sequence_init(struct kv_sequence *s, const struct kv_layout *layout,
                      struct kv_arena *arena);
void kv_sequence_finish(struct kv_sequence *s); /* releases all blocks */

/* Makes room for tokens [n_tokens, n_tokens + n_new) in every class. On -ENOMEM nothing that was
 * there is lost, and the call may be repeated. */
int kv_sequence_reserve(struct kv_sequence *s, uint32_t n_new);

/* The tokens were written: they count from now on, and blocks before a class's window go back. */
void kv_sequence_commit(struct kv_sequence *s, uint32_t n_new);

/* Bytes of an arena's bound that a sequence of so many tokens can take; UINT64_MAX where 64 bits do
 * not hold them. */
uint64_t kv_sequence_bytes_for(const struct kv_layout *layout, uint64_t n_tokens);

#endif
