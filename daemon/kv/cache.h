/* daemon/kv/cache.h - everything that is kept of what was computed: the arena, the prefix trees,
 * the stores behind them.
 *
 * A space is one realm's blocks of one model identity: its prefix tree and, where there is a folder
 * for it, its store. Blocks live in the arena while they are written and until the store has them;
 * then they are served from the store's read-only mapping. What no running sequence holds may be
 * evicted: from the arena when it is full, from the store when its bound is reached.
 *
 * Engine thread only, but for kv_cache_stats(). The store works on the io thread; its news wait in
 * a mailbox, and kv_cache_poll() takes them in between two steps. */
#ifndef DAEMON_KV_CACHE_H
#define DAEMON_KV_CACHE_H

#include "daemon/kv/arena.h"
#include "daemon/kv/key.h"
#include "daemon/kv/layout.h"

struct io;
struct kv_cache;
struct kv_space;
struct pool;

#define KV_REALM_BYTES 64 /* with the NUL */
#define KV_ABOUT_BYTES 128

struct kv_cache_options {
    uint64_t arena_bytes_max;
    /* The store; folder NULL: nothing is kept on disk. The io thread outlives the cache. */
    const char *folder; /* absolute; made with mode 0700 where it is missing */
    struct io *io;
    uint64_t store_bytes_max, store_bytes_per_realm; /* 0: no bound */
    struct pool *pool; /* checks restored blocks while nothing else runs, copies views; or NULL */
    /* News are in the mailbox. Any thread; must only wake the engine. */
    void (*wake)(void *arg);
    void *wake_arg;
};

int kv_cache_create(const struct kv_cache_options *options, struct kv_cache **ret);
/* All sequences must be finished. Waits, within a bound, for what is being saved. NULL is legal.
 * False: the disk does not answer (it is logged). Then nothing was freed, since the io thread's
 * jobs use it, but wake comes no more; the io thread must not be waited for either, as long as
 * another call has not returned true. */
bool kv_cache_destroy(struct kv_cache *c);
/* For a process that is about to end without destroying it: waits, within the same bound, for what
 * is being saved, and begins nothing more. False: not all is done (it is logged). */
bool kv_cache_settle(struct kv_cache *c);

/* What makes blocks of two requests interchangeable, beyond their tokens. */
struct kv_identity {
    uint8_t id[16];      /* hash over weights, rotary tables, cache types, layout, numerics */
    bool classes_differ; /* rows of class P and D are computed differently */
    char about[KV_ABOUT_BYTES]; /* for people */
};

/* The space of that realm and identity, made where there is none; its store is being opened then.
 * NULL: no memory. It stays until the cache is destroyed or, when too many are open, until no
 * sequence uses it: take it anew for every request. */
struct kv_space *kv_cache_space(struct kv_cache *c, const char *realm,
                                const struct kv_identity *identity, const struct kv_layout *layout);
/* Whether what its store holds is known, or has been waited for long enough: a disk may never
 * answer. A request that waits for that loses no more than a few seconds; what is found later,
 * others have. */
bool kv_space_is_ready(const struct kv_space *s);

/* Takes in what the io thread has done. Call between steps. */
void kv_cache_poll(struct kv_cache *c);
/* Counts the news taken in: what waits for some need not look again before it has changed. */
uint64_t kv_cache_news(const struct kv_cache *c);
/* Whether the io thread is at work for the cache: memory may come free without anybody's end. */
bool kv_cache_is_busy(const struct kv_cache *c);
/* Milliseconds until kv_cache_poll() should be called although there was no news (something is to
 * be tried again), or -1. */
int kv_cache_timeout_ms(const struct kv_cache *c);

/* A block of the arena; what is merely kept makes room for it. -ENOMEM. */
int kv_cache_alloc(struct kv_cache *c, uint64_t block_bytes, struct kv_block **ret);

/* Bytes of the arena's bound for memory that lies beside it, likewise; they go back to the arena
 * (kv_arena_give_aside). */
int kv_cache_set_aside(struct kv_cache *c, uint64_t bytes);

/* Gives memory without use back to the system. */
void kv_cache_trim(struct kv_cache *c);

struct kv_arena *kv_cache_arena(struct kv_cache *c);

/* Whether mapped files could not be read since the last call of kv_cache_drop_faulty(): the step
 * that just ended must not be believed, and every sequence that has mapped pages begins anew
 * (kv_sequence_reset). Cheap when there were none: a system call for every file in use. */
bool kv_cache_has_faults(const struct kv_cache *c);
/* Forgets the blocks in question, when no sequence reads them any more. */
void kv_cache_drop_faulty(struct kv_cache *c);

/* A prompt of so many tokens found so many of them: for the statistics. */
void kv_cache_count(struct kv_cache *c, uint64_t n_tokens, uint64_t n_found);

struct kv_cache_stats {
    uint64_t n_spaces, n_nodes;
    uint64_t n_pending;          /* jobs that the io thread has */
    uint64_t queries, hits;      /* prompt tokens looked for, and found */
    uint64_t blocks_held;        /* by running sequences; shared ones count for each */
    uint64_t arena_bytes_cached; /* of the arena: held by the trees */
    uint64_t store_bytes, store_bytes_max, store_bytes_written;
    uint64_t store_bytes_synced; /* of store_bytes: no crash loses them */
    uint64_t n_evicted_arena, n_evicted_store, n_corrupt, n_faults;
    uint64_t n_saved_bytes; /* of blocks, since the start: written / saved is the write ratio */
    char store_state[192];  /* "ok", "off", or why nothing is saved */
};
void kv_cache_stats(struct kv_cache *c, struct kv_cache_stats *ret);

#endif
