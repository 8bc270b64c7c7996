/* daemon/kv/sequence.h - the KV of one running sequence: its blocks in every layer class.
 *
 * Grows by whole blocks; windowed classes give back blocks that no later token can see. A sequence
 * with a space adopts blocks that others have computed, and gives its own full blocks to the tree;
 * full blocks are never written again, so any number of sequences may hold them. A page is the data
 * of an arena's block that the sequence has a reference to or, for adopted blocks, a place in the
 * store's mapping, which the tree keeps while the node has users. Engine thread only. */
#ifndef DAEMON_KV_SEQUENCE_H
#define DAEMON_KV_SEQUENCE_H

#include "daemon/kv/cache.h"
#include "daemon/kv/view.h"

struct kv_node;

/* Why adoption ended where it did. */
enum kv_miss {
    KV_MISS_NONE,    /* all that may be reused was */
    KV_MISS_OFF,     /* the sequence shares nothing */
    KV_MISS_NEW,     /* nobody has computed these tokens */
    KV_MISS_EVICTED, /* somebody had, but it is gone */
    KV_MISS_WINDOW,  /* the windowed layers' part of it is gone */
    KV_MISS_INEXACT, /* a generation made it, and only prompts' blocks will do */
};
const char *kv_miss_text(enum kv_miss miss);

struct kv_sequence {
    const struct kv_layout *layout;
    struct kv_cache *cache;
    struct kv_space *space; /* NULL: neither takes nor gives */
    bool exact;             /* adopts only what is bit-identical to computing it here */
    bool whole_blocks;      /* adopts no part of a block: nothing is to be computed behind it */
    uint32_t n_tokens;      /* committed */
    struct kv_block_list {
        struct kv_block **blocks; /* (n) NULL: given back, or in the store's mapping */
        void **pages;             /* (n) the blocks' data, as attention wants them */
        uint64_t *versions;       /* (n) of what is there, for backends that keep copies */
        uint32_t n, capacity;
        uint32_t first_live; /* blocks before it have been given back, but for a view's sinks */
        uint32_t n_dropped;  /* tokens that have no place in it any more: a view's */
    } lists[KV_MAX_CLASSES];
    struct gqa_page_table tables[KV_MAX_CLASSES];
    struct kv_view view; /* its policy is the owner's to set, before the first token */

    /* Its full blocks in the tree. */
    struct kv_node **nodes; /* (n_sealed) */
    uint32_t n_sealed, nodes_capacity;
    struct kv_key last_key; /* of the last full block */
    bool detached;          /* shares nothing any more, until it ends */
    bool sealing_failed;    /* further blocks are not shared: one before them is not in the tree */

    bool took_generated; /* where the prompt is, blocks that a generation made */

    /* What adoption gave so far. */
    uint32_t n_adopted_tokens, n_adopted_blocks, n_from_store;
    enum kv_miss miss;
};

/* The tokens of a sequence as its owner keeps them. */
struct kv_text {
    const int32_t *tokens;
    size_t n_tokens; /* at least all committed ones */
    size_t n_prompt; /* the first so many; the prompt's whole blocks are of class P */
};

/* layout and cache outlive the sequence; so does the space, which its holder count protects. */
void kv_sequence_init(struct kv_sequence *s, const struct kv_layout *layout, struct kv_cache *cache,
                      struct kv_space *space, bool exact);
void kv_sequence_finish(struct kv_sequence *s); /* releases all blocks */
/* Back to no token: what it computed may still be in the tree, to be adopted again. */
void kv_sequence_reset(struct kv_sequence *s);

/* Its K and V are no longer what its space promises, or will not be: from now on it neither takes
 * blocks nor gives any. What it has it keeps. */
void kv_sequence_detach(struct kv_sequence *s);

/* Makes room for tokens [n_tokens, n_tokens + n_new) in every class; at most kv_view_rows_max(). On
 * -ENOMEM nothing that was there is lost, and the call may be repeated. */
int kv_sequence_reserve(struct kv_sequence *s, uint32_t n_new);

/* The tokens were written: they count from now on, full blocks go to the tree, and blocks before a
 * class's window go back. */
void kv_sequence_commit(struct kv_sequence *s, uint32_t n_new, const struct kv_text *text);

/* Takes over what is known of tokens [n_tokens, limit), from a block's start on: whole blocks, then
 * a copy of the beginning of one more. Counts in n_tokens. -EAGAIN: blocks are being checked; call
 * again after the cache's next news. alone: nothing else runs, so the check may take the pool. */
int kv_sequence_adopt(struct kv_sequence *s, const struct kv_text *text, uint32_t limit,
                      bool alone);

/* Tokens of the text's beginning whose blocks are known in the space, in memory or on disk. Nothing
 * is held or checked. */
uint32_t kv_space_known_tokens(const struct kv_space *s, const struct kv_text *text, bool exact);

/* Whether other is about to compute the very block that s would compute next, so that waiting for
 * it spares the work. The limits are where their adoption or, for other, prompt ends. */
bool kv_sequence_follows(const struct kv_sequence *s, const struct kv_text *text, uint32_t limit,
                         const struct kv_sequence *other, const struct kv_text *other_text,
                         uint32_t other_limit);

/* Whether s may begin with the first n_tokens of another, which goes on; and that beginning. Whole
 * blocks are shared, the rest of the last one is copied (or, without memory, left to be computed).
 * s holds no block, and is of the same layout and space. -ENOMEM: it still holds none. */
bool kv_sequence_can_fork(const struct kv_sequence *s, const struct kv_sequence *from,
                          uint32_t n_tokens);
int kv_sequence_fork(struct kv_sequence *s, const struct kv_sequence *from, uint32_t n_tokens);

/* The prompt is computed, or the sequence ends: what its windowed classes hold now is worth saving,
 * since others will go on from here. */
void kv_sequence_checkpoint(struct kv_sequence *s);

/* Keeps the blocks of the first n_tokens (whole blocks only) until they are unpinned. Returns how
 * many tokens that are: fewer, where half of what may be kept is pinned already. */
uint32_t kv_sequence_pin(struct kv_sequence *s, uint32_t n_tokens, bool pinned);

/* How long a sequence gets, and what it keeps of that. */
struct kv_extent {
    const struct kv_policy *policy;
    uint64_t n_prompt; /* of which a policy chooses */
    uint64_t n_tokens;
    uint32_t step_rows; /* it is computed in steps of at most so many */
    bool begun;         /* its view has */
};

/* Bytes beside the blocks that such a sequence has in the arena's bound: for votes. */
uint64_t kv_sequence_aside_bytes(const struct kv_layout *layout, const struct kv_extent *extent);

/* Bytes of the blocks that such a sequence holds, not counting the rest of slabs. */
uint64_t kv_sequence_block_bytes(const struct kv_layout *layout, const struct kv_extent *extent);

/* Bytes of an arena's bound that such a sequence can take; UINT64_MAX where 64 bits do not hold
 * them. */
uint64_t kv_sequence_bytes_for(const struct kv_layout *layout, const struct kv_extent *extent);

#endif
