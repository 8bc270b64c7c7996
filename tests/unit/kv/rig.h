/* tests/unit/kv/rig.h - a block store with blocks that can be told apart.
 *
 * Block number k (1 to RIG_MAX) has a key, a layer class, tokens and data that follow from k. The
 * rig remembers what the store promised. On a disk that records, promises are marked in its log. */
#ifndef TESTS_UNIT_KV_RIG_H
#define TESTS_UNIT_KV_RIG_H

#include "daemon/kv/store.h"
#include "tests/unit/kv/disk.h"

#include <semaphore.h>

#define RIG_MAX       400u
#define RIG_MAX_BYTES (1u << 20)

enum rig_status {
    RIG_UNKNOWN,
    RIG_QUEUED,
    RIG_STORED,    /* done(0): it must be there after a crash */
    RIG_FORGOTTEN, /* it may be there */
    RIG_DROPPED,   /* synced: it must not be there */
    RIG_PURGED,    /* and none of its bytes */
    RIG_FAILED,
};

struct rig {
    struct disk *disk; /* or NULL: real files in folder */
    char folder[64];
    struct io *io;
    struct kv_store_identity identity;
    uint64_t bytes_max;
    uint64_t now_ms;
    struct kv_store *store;
    struct kv_store_block blocks[RIG_MAX + 1]; /* as stored, or as found at open */
    enum rig_status status[RIG_MAX + 1];
    int results[RIG_MAX + 1]; /* of the last write */
    struct kv_store_write writes[RIG_MAX + 1];
    unsigned char *data[RIG_MAX + 1]; /* of writes that are queued */
    bool found[RIG_MAX + 1];          /* when the store was opened last, and not dropped since */
    bool written[RIG_MAX + 1];        /* since then */
    unsigned n_found, n_strange;      /* strange: a block that nobody wrote */
    unsigned found_order[RIG_MAX + 1];
    struct fmt_error err;
    sem_t done;
    int call_result;
};

/* A store of two layer classes, 6400 and 2048 bytes a block, odd numbers in the first. */
void rig_init(struct rig *r, struct disk *disk);
void rig_init_folder(struct rig *r, struct io *io); /* real files */
void rig_finish(struct rig *r);                     /* closes the store; removes the folder */

uint32_t rig_class(unsigned k);
void rig_block(unsigned k, struct kv_store_block *ret);
void rig_data(const struct rig *r, unsigned k, unsigned char *ret); /* block_bytes of its class */
void rig_canary(unsigned k, unsigned char ret[32]); /* in the data of k, and nowhere else */

int rig_open(struct rig *r); /* r->err has the sentence */
void rig_close(struct rig *r);
void rig_queue(struct rig *r, unsigned k); /* a write */
int rig_flush(struct rig *r);
int rig_write(struct rig *r, unsigned first, unsigned n); /* queue and flush; first failed result */
void rig_forget(struct rig *r, unsigned k);
int rig_purge(struct rig *r, unsigned k); /* 0: everything */

/* 0: the store's bytes of k are right and verify; else the code of verify, or 1: they verify, and
 * are wrong. */
int rig_verify(struct rig *r, unsigned k);

/* Everything in status[] holds for the open store: what is stored verifies, what was found and
 * verifies has its own bytes, what is dropped was not found. A sentence about what does not, or
 * NULL. */
const char *rig_check(struct rig *r);

/* Marks of the log, applied to a table of what was promised. */
void rig_apply_mark(enum rig_status *status, long mark);

#endif
