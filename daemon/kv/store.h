/* daemon/kv/store.h - KV blocks in files: written once, named by an index, read through a mapping.
 *
 * One store holds the blocks of one realm and one identity: NAME.index, one data file per layer
 * class (NAME.c0, ...), and NAME.lock. docs/kv-layout.md, "On disk", draws them.
 *
 * A block that kv_store_write() has acknowledged (done with 0) is there after a crash at any
 * moment: its data was synced before a record named it, and the record was synced before done. A
 * block's bytes are believed when its checksum agrees (kv_store_verify()), never before; so files
 * may be torn, truncated, or another's work, and the worst that follows is a block computed again.
 * Nothing here ends the process: failures of the disk are codes and a state with a sentence.
 *
 * Threads. "Engine thread" below means one thread at a time, the store's user. What touches files
 * runs on the io thread, as calls of struct io. Callbacks (done) run there too, must not block, and
 * may call kv_store_write(), kv_store_forget(), kv_store_use() and kv_store_flag(). No function but
 * open and close blocks. The lock inside guards a queue for a few instructions.
 *
 * With options.io NULL there is no thread: what is queued runs in the caller of kv_store_flush(),
 * kv_store_purge() or kv_store_close() (tools and tests). */
#ifndef DAEMON_KV_STORE_H
#define DAEMON_KV_STORE_H

#include "daemon/io/files.h"
#include "daemon/kv/key.h"
#include "daemon/kv/layout.h"
#include "format/error.h"

#define KV_STORE_FORMAT_VERSION 1u
#define KV_STORE_NAME_MAX       64
#define KV_STORE_ASIDE_MAX      2 /* sets of files that could not be used and are kept */

struct kv_store;

/* What makes blocks interchangeable. Files of another one are set aside, never read. */
struct kv_store_identity {
    uint8_t id[16]; /* hash over realm, model, adapter, numerics, ...; decides */
    uint32_t layout_version;
    uint32_t n_classes; /* 1 to KV_MAX_CLASSES */
    uint64_t block_bytes[KV_MAX_CLASSES];
    char about[128]; /* for people who look at the file; no prompt text; not compared */
};

enum kv_block_flags {
    KV_BLOCK_GENERATED = 1u << 0, /* computed while generating, not as part of a prompt */
    KV_BLOCK_PINNED = 1u << 1,
};

/* A block as its record names it. All of it is the caller's, but slot and checksum. */
struct kv_store_block {
    struct kv_key key, parent;
    uint32_t layer_class;
    uint32_t flags;    /* enum kv_block_flags; other bits are kept as they are */
    uint32_t position; /* index of the block in its sequence */
    uint32_t slot;     /* place in the class's data file; given by the store */
    int32_t tokens[KV_BLOCK_TOKENS];
    uint64_t checksum; /* XXH3-64 of the data; computed by the store */
    uint64_t used_s;   /* CLOCK_REALTIME seconds of the last use */
    uint32_t hits;
};

struct kv_store_options {
    const char *folder; /* made with mode 0700 where it is missing; its parent must exist */
    const char *name;   /* of the store: 1 to KV_STORE_NAME_MAX of [A-Za-z0-9_-] */
    const struct kv_store_identity *identity; /* copied */
    struct io *io;                            /* or NULL: see above; outlives the store */
    const struct io_files *files;             /* NULL: the system's; else outlives the store */
    uint64_t bytes_max;            /* of all files together; address space for each class */
    uint32_t pause_ms;             /* after a failure, before the next try; 0: 3000 */
    uint64_t (*now_ms)(void *arg); /* NULL: CLOCK_MONOTONIC */
    void *now_arg;
};

/* Opens or makes the store and calls on_block, in this thread, for every block that its index
 * names, in the order in which they were written (parents before children, when they were written
 * so). Blocks; for the io thread or any other but the loop and the engine. Reads the index only,
 * and verifies no data.
 *
 * Negative: nothing is open, err has a sentence:
 * -EWOULDBLOCK another process has it; -EACCES, -EPERM, -EROFS not ours to write, or others may
 * read it; -EIO; -ENOSPC; -ENOMEM; -EINVAL options out of range; else as the system says. The
 * caller serves without and tries again later. A disk that is full, or an index with a torn end,
 * does not keep a store from opening. */
int kv_store_open(const struct kv_store_options *options,
                  void (*on_block)(void *arg, const struct kv_store_block *block), void *arg,
                  struct kv_store **ret_store, struct fmt_error *err);

/* Runs what is queued for at most a few seconds, fails the rest with -ECANCELED, persists uses, and
 * frees the store. Blocks; not for the loop. From the io thread it runs there. NULL is legal. A
 * disk that never answers cannot be interrupted. Mapped data must not be in use any more. */
void kv_store_close(struct kv_store *s);

/* The same, without waiting: done comes on the io thread when s is freed. What is submitted to that
 * thread from now on runs behind it, so that the same store may be opened anew at once. -ECANCELED:
 * there is no io thread, or it ends: done does not come, and s is to be closed as above. */
int kv_store_close_begin(struct kv_store *s, void (*done)(void *arg), void *arg);

/* ---- writing: engine thread, or a callback of this store ---------------------------------- */

struct kv_store_write {
    struct kv_store_block block;         /* slot and checksum are set when done gets 0 */
    const void *data;                    /* block_bytes of the class, unchanged until done */
    void (*done)(void *arg, int result); /* io thread; the write is the caller's again */
    void *arg;
    struct kv_store_write *next; /* the store's, until done, as all below */
    uint64_t turn;
};

/* Queues a write; the caller's memory until done, which comes exactly once unless this fails.
 * done gets 0: on disk and named. -EDQUOT: bytes_max is reached and no slot free: forget blocks
 * first. -ENOSPC: the disk is full. -EIO and others: the disk failed, its slot is not used again
 * before the next open. -EAGAIN: not tried, persistence pauses. -ECANCELED: the store closes.
 * Negative here: -EINVAL layer class out of range; -ECANCELED. */
int kv_store_write(struct kv_store *s, struct kv_store_write *w);

/* The block of this slot goes; never blocks, cannot fail. The slot is used again only after a
 * record of that is synced. Nobody may be reading its data. block: layer_class and slot count. */
void kv_store_forget(struct kv_store *s, const struct kv_store_block *block);

/* Notes hits and used_s (of block) for its slot; persisted now and then, at a compaction and at
 * close. Cheap enough for every hit. */
void kv_store_use(struct kv_store *s, const struct kv_store_block *block);

/* Notes flags (of block) for its slot; persisted at once, as soon as the io thread gets to it. */
void kv_store_flag(struct kv_store *s, const struct kv_store_block *block);

struct kv_store_call {                   /* the caller's memory until done */
    void (*done)(void *arg, int result); /* io thread */
    void *arg;
    const struct kv_store_block *blocks; /* purge: these; NULL: everything */
    uint32_t n_blocks;
    struct kv_store_call *next; /* the store's, until done, as all below */
    uint64_t turn;
    bool purge;
};

/* done when everything queued before has been synced or has failed; its result is 0, or the code of
 * what of it (forgotten blocks, flags) is still to be persisted. */
void kv_store_flush(struct kv_store *s, struct kv_store_call *call);

/* Really removes blocks, and with them everything that no live block needs: their data becomes
 * holes (or zeros, where the file system makes no holes), the index is written anew without their
 * records, both synced. A block whose slot has another key by now is passed over. With blocks NULL
 * all go, and files that were set aside as well. Nobody may be reading their data. done gets 0, or
 * the first failure: then call again. */
void kv_store_purge(struct kv_store *s, struct kv_store_call *call);

/* ---- reading: any thread, while the block is neither forgotten nor purged ------------------ */

/* Address of a block's data in the read-only mapping; arithmetic only. */
const void *kv_store_data(const struct kv_store *s, uint32_t layer_class, uint32_t slot);

/* 0: the mapped bytes are those that were written; -EBADMSG: they are not; -EIO: they cannot be
 * read. Forget the block then. Reads all of it. */
int kv_store_verify(const struct kv_store *s, const struct kv_store_block *block);

/* Whether all of a block's data is in memory, so that kv_store_verify() will not wait for the disk.
 */
bool kv_store_in_memory(const struct kv_store *s, const struct kv_store_block *block);

/* Starts reading a block's data ahead; returns at once where the disk answers. */
void kv_store_will_need(const struct kv_store *s, const struct kv_store_block *block);

/* Whether zeros were read in place of any of the block's bytes (see guard.h): ask after using the
 * data and before believing what came of it. Cheap while nothing ever failed. */
bool kv_store_marked(const struct kv_store *s, const struct kv_store_block *block);

/* Whether the data files are as large as they were made: to be asked, like kv_store_marked(), after
 * data was used and before it is believed. A file that somebody cut, and that a write has made long
 * again, reads as zeros without a fault; then its blocks are marked here. A few system calls. */
bool kv_store_intact(struct kv_store *s);

/* ---- facts: any thread ---------------------------------------------------------------------- */

enum kv_store_state {
    KV_STORE_OK,
    KV_STORE_PAUSED_FULL,  /* the disk; tried again after pause_ms */
    KV_STORE_PAUSED_ERROR, /* likewise */
};

struct kv_store_stats {
    enum kv_store_state state;
    char sentence[160]; /* why; empty when ok */
    uint64_t n_blocks;
    uint64_t bytes_live;  /* of data: blocks times their size */
    uint64_t bytes_files; /* data and index files, and those set aside */
    uint64_t bytes_aside; /* of that, set aside */
    uint64_t bytes_max;
    uint64_t
        n_room[KV_MAX_CLASSES]; /* blocks that can be written before -EDQUOT, each class alone */
    /* Since the store was opened. */
    uint64_t blocks_written, bytes_data_written, bytes_index_written;
    uint64_t n_batches, n_rewrites, n_failures;
    uint64_t n_records_refused; /* of the index, when it was opened */
};
void kv_store_stats(struct kv_store *s, struct kv_store_stats *ret);

#endif
