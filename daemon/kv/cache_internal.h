/* daemon/kv/cache_internal.h - what the files of the cache and of sequences share; private to them.
 * All functions are the engine thread's. */
#ifndef DAEMON_KV_CACHE_INTERNAL_H
#define DAEMON_KV_CACHE_INTERNAL_H

#include "daemon/kv/cache.h"
#include "daemon/kv/prefix.h"
#include "daemon/kv/store.h"

#include <pthread.h>
#include <stdatomic.h>

#define KV_SPACES_MAX  64 /* open at once; idle ones are closed above it */
#define KV_CLOSING_MAX 16 /* stores that the io thread has to close; more stay open meanwhile */

#define KV_CHECK_BYTES (64ull << 20) /* of restored blocks, in one go of the io thread */

#define KV_RESTORED_MAX 4096u /* blocks of an index that go into the tree between two steps */

/* For so long requests wait to know what a store holds; then they compute it. */
#define KV_OPEN_PATIENCE_NS (3ull * 1000000000u)

/* For what is being saved, when the cache ends: of the 45 s that a service has to end, requests may
 * take 30. */
#define KV_END_S 10u

enum kv_space_state {
    KV_SPACE_RAM,     /* nothing is kept on disk */
    KV_SPACE_OPENING, /* the io thread reads the store's index, or what it names is being added */
    KV_SPACE_OPEN,
    KV_SPACE_FAILED, /* to be tried again at retry_ns */
};

struct kv_space {
    struct kv_space *next;
    struct kv_cache *cache;
    char realm[KV_REALM_BYTES];
    struct kv_identity identity;
    struct kv_tree tree;
    uint32_t n_classes;
    uint32_t windows[KV_MAX_CLASSES];
    uint64_t block_bytes[KV_MAX_CLASSES];
    uint32_t n_holders; /* sequences */
    uint32_t n_pending; /* jobs on the io thread that will report back */
    uint64_t n_pinned;  /* nodes; by kv_space_pin() alone */
    uint64_t last_turn; /* of the cache's count of uses */

    enum kv_space_state state;
    bool awaits_purge;          /* OPENING: to be opened when the realm's purge has ended */
    bool overdue;               /* OPENING: nobody waits for it any longer */
    uint64_t opening_ns;        /* OPENING: since then */
    struct kv_store *store;     /* OPEN, or OPENING with an index that was read */
    struct kv_closing *closing; /* with the store: cache_open.c's, for its end */
    uint64_t retry_ns;          /* FAILED: open again; OPEN with a backlog: save again */
    bool backlog;               /* blocks could not be saved, or not yet */
    uint64_t written_bytes;     /* by the store, as last seen */
    uint64_t saved_bytes;       /* of SAVING and SAVED places */
    uint64_t synced_bytes;      /* of SAVED ones */
    char trouble[192];          /* why nothing is saved, or "" */
};

/* What the io thread has done, handed to the engine thread: the start of a larger struct. */
struct kv_news {
    struct kv_news *next;
    void (*take)(struct kv_news *news); /* on the engine thread; frees it */
};

struct kv_cache {
    struct kv_cache_options options;
    char *folder;
    struct kv_arena *arena;
    struct kv_space *spaces;
    struct kv_closed_store *closed; /* in the folder, not open; cache_folder.c's */
    uint64_t closed_bytes;
    struct purging *purges;          /* under way; cache_admin.c's */
    atomic_uint n_spaces, n_pending; /* written by the engine thread */
    uint32_t n_closing;              /* stores; of n_pending */
    uint64_t turn, faults_seen, n_news;
    pthread_mutex_t lock;  /* guards the mailbox */
    pthread_cond_t posted; /* for the end, which waits for the last news */
    struct kv_news *news, **news_end;
    atomic_bool closing;      /* nothing new is begun; written by the engine thread */
    uint64_t check_bytes_max; /* KV_CHECK_BYTES; tests take less */
    uint32_t n_restored_max;  /* KV_RESTORED_MAX; likewise */
    uint64_t patience_ns;     /* KV_OPEN_PATIENCE_NS; likewise */
    uint32_t end_s;           /* KV_END_S; likewise */

    /* Written by the engine thread, read by the loop for statistics. */
    _Atomic uint64_t n_nodes, queries, hits, n_evicted_arena, n_evicted_store, n_corrupt, n_faults;
    _Atomic uint64_t blocks_held; /* pages of running sequences */
    _Atomic uint64_t store_bytes_synced, store_bytes_written;
    _Atomic uint64_t store_bytes, n_saved_bytes, bytes_cached;
    char trouble[192]; /* the last one, or ""; under the lock */
};

uint64_t kv_now_ns(void);
uint64_t kv_now_s(void); /* since 1970 */

/* Any thread: puts news into the mailbox and wakes the engine. */
void kv_cache_post(struct kv_cache *c, struct kv_news *news);

/* A job on the io thread that points into the space has begun, or its news were taken in. */
static inline void kv_space_begin_job(struct kv_space *s)
{
    s->n_pending++;
    s->cache->n_pending++;
}

static inline void kv_space_end_job(struct kv_space *s)
{
    s->n_pending--;
    s->cache->n_pending--;
}

/* ---- cache_open.c ----------------------------------------------------------------------- */

/* What the files of its store are called. */
void kv_space_store_name(const struct kv_space *s, char name[KV_STORE_NAME_MAX + 1]);
/* Begins to open the space's store; while its realm is being purged that waits. */
void kv_space_open(struct kv_space *s);
/* Has the io thread close the store, so that the space may go at once; what opens or removes it
 * comes behind that. Nothing of the space may be pending. False: too many are being closed. */
bool kv_space_begin_close(struct kv_space *s);

/* ---- cache_store.c ---------------------------------------------------------------------- */

/* Notes why nothing is saved ("": it is), and logs it once. */
void kv_space_set_trouble(struct kv_space *s, const char *why);
/* A block of the class is, or is no longer, in the store or on its way there; and on the disk for
 * good. */
void kv_space_count_saved(struct kv_space *s, uint32_t layer_class, bool more);
void kv_space_count_synced(struct kv_space *s, uint32_t layer_class, bool more);
/* Begins to save one block of the arena; where that cannot be now, the space has a backlog. */
void kv_space_save(struct kv_space *s, struct kv_node *n, uint32_t layer_class);
/* Saves what could not be saved before. */
void kv_space_save_backlog(struct kv_space *s);
/* Saves the windowed classes' blocks that a continuation after node n needs. */
void kv_space_save_windows(struct kv_space *s, struct kv_node *n);
/* Has the store remember when the node was used, or its flags. */
void kv_space_note_use(struct kv_space *s, const struct kv_node *n);
void kv_space_note_flags(struct kv_space *s, const struct kv_node *n);
/* The place's block in the store is gone, or not to be believed. */
void kv_space_forget(struct kv_space *s, struct kv_node *n, uint32_t layer_class);

/* ---- cache_admin.c ---------------------------------------------------------------------- */

/* Whether a purge that concerns the realm is under way: what its files hold is to go. */
bool kv_cache_is_purging(const struct kv_cache *c, const char *realm);

/* ---- cache_check.c ---------------------------------------------------------------------- */

/* Finds out whether saved blocks are what their checksums say: all places of the nodes that are
 * needed from the store and not verified. alone: nothing else runs, so a part of it is done at
 * once, on the pool. Returns true when nothing needs (or needed) waiting; else there are news when
 * it is to be called again. */
bool kv_space_check(struct kv_space *s, struct kv_node *const *nodes, const uint32_t *first_needed,
                    uint32_t n, bool alone);

/* ---- cache_folder.c --------------------------------------------------------------------- */

/* Begins to find out which stores lie in the folder. */
void kv_folder_list(struct kv_cache *c);
/* The space's store is not among the closed ones any more. */
void kv_folder_opened(struct kv_cache *c, const struct kv_space *s);
/* It is about to be, with all that it holds. */
void kv_folder_closes(struct kv_cache *c, const struct kv_space *s);
/* The realm's closed stores (NULL: all) were removed by others. */
void kv_folder_wiped(struct kv_cache *c, const char *realm);
/* Removes closed stores, the oldest first, until so many bytes more fit the bound, or none is
 * left. */
void kv_folder_make_room(struct kv_cache *c, uint64_t bytes);
void kv_folder_finish(struct kv_cache *c);

/* ---- cache_evict.c ---------------------------------------------------------------------- */

/* Lets go of the arena's copy where the store has the block and no sequence holds it. */
void kv_space_release_saved(struct kv_space *s, struct kv_node *n, uint32_t layer_class);
/* Lets go of the arena's copy; running sequences keep theirs. */
void kv_space_drop_copy(struct kv_space *s, struct kv_node *n, uint32_t layer_class);
/* Frees a node that says nothing any more; true: it did. */
bool kv_space_drop_if_empty(struct kv_space *s, struct kv_node *n);
/* The same, and then for its parents, which may have waited for it. Returns the first that stays,
 * or NULL: none is known. */
struct kv_node *kv_space_prune(struct kv_space *s, struct kv_node *n);
/* Makes room in the arena. Returns bytes that came free, 0: there is nothing to evict. */
uint64_t kv_cache_evict_arena(struct kv_cache *c, uint64_t bytes);
/* Makes room in the stores, for one realm or (NULL) for all. */
uint64_t kv_cache_evict_store(struct kv_cache *c, const char *realm, uint64_t bytes);
/* Makes room in one store for blocks of one class, whose files give none to the others; in leaves
 * that keep those from going, where there are only such. */
uint64_t kv_space_evict_store(struct kv_space *s, uint32_t layer_class, uint64_t bytes);
/* Removes every node that no sequence uses, from memory alone. */
void kv_space_clear(struct kv_space *s);

/* ---- cache_pins.c ----------------------------------------------------------------------- */

/* Pins the node, or lets it go; whoever frees it lets it go first. */
void kv_space_pin(struct kv_space *s, struct kv_node *n, bool pinned);
/* Bytes of nodes that the space's realm may pin beside those that it has pinned. */
uint64_t kv_space_room_for_pins(const struct kv_space *s);

/* What a node takes with all its classes' blocks. */
static inline uint64_t kv_space_node_bytes(const struct kv_space *s)
{
    uint64_t bytes = 0;
    for (uint32_t c = 0; c < s->n_classes; c++) {
        bytes += s->block_bytes[c];
    }
    return bytes;
}

/* First block that a windowed class needs for the token at position n_tokens; 0 without a window.*/
static inline uint32_t kv_first_needed(uint32_t window, uint32_t n_tokens)
{
    return window == 0 || n_tokens < window ? 0 : (n_tokens - window + 1) / GQA_KV_BLOCK_TOKENS;
}

#endif
