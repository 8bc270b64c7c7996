/* daemon/kv/store_internal.h - what the files of the store share.
 *
 * Everything is the io thread's (before open has returned: the opener's), but what is said to be
 * under the lock, or atomic. */
#ifndef DAEMON_KV_STORE_INTERNAL_H
#define DAEMON_KV_STORE_INTERNAL_H

#include "daemon/kv/store.h"
#include "daemon/kv/store_format.h"

#include <pthread.h>
#include <stdatomic.h>

#define STORE_GROW_BYTES       (32ull << 20) /* data files grow by, at most */
#define STORE_INDEX_GROW_BYTES (64u << 10)
#define STORE_INDEX_BYTES_MAX  (8ull << 30) /* longer ones are set aside */
#define STORE_LIVE_MAX         7000000u /* blocks: with as many dead records it is not that long */
#define STORE_BATCH_WRITES     64u
#define STORE_BATCH_BYTES      (64ull << 20)
#define STORE_BUFFER_RECORDS   128u   /* of the index, in one read or write */
#define STORE_REWRITE_SLACK    128u   /* dead records that are not worth a rewrite */
#define STORE_USES_MS          60000u /* between two times that uses are persisted */
#define STORE_CLOSE_MS         5000u
#define STORE_NONE             UINT32_MAX
#define STORE_IDLE_PART        32u /* of bytes_max may lie in free slots that are not punched */
#define STORE_PUNCHES_MAX      64u /* in one batch: others wait for the io thread */

enum slot_state {
    SLOT_FREE,     /* bit in used is clear, as in no other state */
    SLOT_WRITING,  /* this batch's */
    SLOT_LIVE,     /* a synced record names it */
    SLOT_DROPPING, /* forgotten; the record of that is not synced yet */
    SLOT_BURNT,    /* a sync of it failed: what is on the disk is not known, until the next open */
};

struct store_slot {
    struct kv_key key;
    uint32_t record;     /* position in the index; STORE_NONE: in none */
    uint32_t record_new; /* the same in an index that is being written */
    uint32_t state;      /* enum slot_state */
    bool forgotten;      /* under the lock: is in the list of drops */
    atomic_bool dirty;   /* hits, used_s or flags differ from the record's; any thread */
    uint64_t next_drop;  /* under the lock; see store_ref() */
    _Atomic uint64_t used_s;
    _Atomic uint32_t hits, flags;
};
_Static_assert(sizeof(struct store_slot) == 56, "memory for every slot that is in use");

/* A slot of any class as one number, never 0. */
static inline uint64_t store_ref(uint32_t layer_class, uint32_t slot)
{
    return ((uint64_t)layer_class << 32 | slot) + 1;
}

struct store_class {
    int fd;
    uint64_t block_bytes, slot_bytes;
    void *map; /* n_max slots, read-only */
    uint32_t guard;
    uint32_t n_max;   /* slots that bytes_max allows */
    uint32_t n_slots; /* of the file */
    uint32_t n_free;  /* of them; SLOT_FREE */
    uint32_t n_live;
    uint32_t hint; /* where the search for a free slot goes on */
    bool unsynced; /* the current batch has written to it */
    /* Under the lock: what the file took on disk when somebody last looked, and has to take still.
     * Space is made ahead of writes, so that but for the punches only somebody who cuts the file
     * makes it less. */
    uint64_t allocated;
    uint32_t n_punches; /* under the lock: begun and ended; odd: it is being punched */
    /* Mapped for n_max slots: what is never touched takes no memory. */
    struct store_slot *slots;
    uint64_t *used; /* a bit for every slot */
    /* Slots that are free and were punched, so that other stores have their space: a bit each. They
     * are allocated anew before they are written. */
    uint64_t *holes;
    uint32_t n_holes;
};

struct store_index {
    int fd; /* -1: there is none yet */
    uint64_t epoch, base;
    uint32_t n_records; /* positions that were written, or must not be any more */
    uint64_t bytes;     /* of the file */
    bool unsynced;      /* records were written since the last sync */
    /* Nothing may be appended: there is no index, its end is torn, or an append has failed. What
     * comes next is a new one. */
    bool broken;
};

struct kv_store {
    char name[KV_STORE_NAME_MAX + 1];
    struct kv_store_identity identity;
    struct io *io; /* or NULL */
    struct io_files files;
    uint64_t bytes_max;
    uint32_t pause_ms;
    uint64_t (*now_ms)(void *arg);
    void *now_arg;

    int folder, lock_fd;
    struct store_class classes[KV_MAX_CLASSES];
    uint32_t n_classes; /* with open files; fewer than the identity's only while opening */
    struct store_index index;
    uint64_t bytes_aside;
    bool keeps_space;            /* its file system makes no holes */
    struct store_record *buffer; /* STORE_BUFFER_RECORDS, for reading */
    struct store_record *output; /* as many, for writing */
    uint32_t n_output;

    /* A pause after a failure. */
    int pause_code; /* 0: none */
    uint64_t paused_until_ms;
    uint32_t rewrite_slack;      /* STORE_REWRITE_SLACK; tests take less */
    uint64_t rewrite_ms;         /* before that, a rewrite that is not needed is not tried again */
    uint64_t uses_ms;            /* when uses were persisted last */
    uint64_t drops;              /* list of SLOT_DROPPING, through next_drop */
    struct kv_store_stats facts; /* the io thread's own copy */

    atomic_bool uses_wait;  /* a slot is dirty; persisted now and then */
    atomic_bool flags_wait; /* likewise; at once */

    pthread_mutex_t lock;
    pthread_cond_t closed_wake;
    struct { /* under the lock */
        struct kv_store_write *writes, **writes_end;
        struct kv_store_call *calls, **calls_end;
        uint64_t drops; /* forgotten; list through next_drop */
        uint64_t turn;
        bool scheduled;              /* run is in the io thread's queue, or runs */
        bool closing;                /* nothing is taken any more */
        bool closed;                 /* files are closed; freed by whoever comes last */
        struct kv_store_stats facts; /* what kv_store_stats() returns */
    } shared;
    struct io_call_job run;
    struct io_call_job close;
    void (*close_done)(void *arg); /* nobody waits for the end: it is told */
    void *close_arg;
};

/* ---- store_slots.c: data files ------------------------------------------------------------- */

/* Opens, or makes, the class's data file and maps it. fresh: no index names anything in it, so it
 * is cut to nothing. *ret_made: the folder must be synced before anything is acknowledged. */
int store_class_open(struct kv_store *s, uint32_t layer_class, bool fresh, bool *ret_made,
                     struct fmt_error *err);
void store_class_close(struct kv_store *s, uint32_t layer_class);

/* Whether the data file is as long as it was made. Where somebody has cut it, what lay behind is
 * marked (guard.h), before a write makes the file long again and the loss shows as zeros. */
int store_class_check(struct kv_store *s, uint32_t layer_class);
/* The same by what the file takes on disk: a write of ours may have made a cut file long again. Any
 * thread. False: it was cut, and all of it is marked. */
bool store_class_intact(struct kv_store *s, uint32_t layer_class);
/* A free slot becomes SLOT_WRITING; the file grows if need be. */
int store_slot_take(struct kv_store *s, uint32_t layer_class, uint32_t *ret_slot);
void store_slot_free(struct kv_store *s, uint32_t layer_class, uint32_t slot);
void store_slot_live(struct kv_store *s, const struct kv_store_block *b, uint32_t record);
/* When opening: a record names this slot. */
void store_slot_claim(struct kv_store *s, const struct kv_store_block *b, uint32_t record);
uint64_t store_bytes_files(const struct kv_store *s);

/* Holes in place of everything that is not SLOT_LIVE, synced. */
int store_punch_dead(struct kv_store *s);
/* Holes in place of some of the free slots, where there are many: what was evicted for another
 * store's sake takes no space any more. */
void store_punch_idle(struct kv_store *s);

/* ---- store_index.c: the index file --------------------------------------------------------- */

/* Opens the index and applies its records to the slots of classes, which are open. */
int store_index_read(struct kv_store *s, struct fmt_error *err);
/* Every live record, in order. */
int store_index_list(struct kv_store *s,
                     void (*on_block)(void *arg, const struct kv_store_block *block), void *arg);
/* 0: s->index is open and of this identity; 1: there is none, or what there was is set aside. */
int store_index_open(struct kv_store *s, struct fmt_error *err);

/* A zeroed record at the end of the output, which goes out when it is full. */
int store_output_next(struct kv_store *s, struct store_record **ret);
/* Writes what is in the output and syncs all that was written. On failure either nothing of it is
 * in the file, or the index is broken. */
int store_output_sync(struct kv_store *s);

/* A new index with nothing but the live blocks takes the place of the old one. What was forgotten
 * is free afterwards. On failure the old one is still in use, unless s->index.broken. */
int store_index_rewrite(struct kv_store *s);
uint32_t store_n_live(const struct kv_store *s);

/* ---- store_aside.c -------------------------------------------------------------------------- */

/* Sets of files that cannot be used are renamed: NAME.aside-N.index, NAME.aside-N.c0, ... */
int store_set_aside(struct kv_store *s);
/* Removes the oldest sets until n_kept remain, and counts those into s->bytes_aside. */
int store_aside_keep(struct kv_store *s, uint32_t n_kept);

/* Name of one of the store's files: "index", "c0", ... */
#define STORE_FILE_NAME_BYTES (KV_STORE_NAME_MAX + 48)
void store_file_name(const struct kv_store *s, const char *what, char *ret);

/* ---- store_batch.c, store_purge.c: the io thread's work -------------------------------------- */

/* Runs a batch, and the call whose turn it is then. False: there was nothing to do. */
bool store_run_once(struct kv_store *s);
/* Fails what is queued. */
void store_cancel(struct kv_store *s);
/* Everything that can be dirty, persisted; for close. */
void store_persist_uses(struct kv_store *s);

int store_purge_run(struct kv_store *s, const struct kv_store_call *call);

/* Both under the lock. The first moves what was forgotten from the shared list to s->drops; the
 * second puts a live slot there, after the first was called. */
void store_take_drops(struct kv_store *s);
void store_drop_slot(struct kv_store *s, uint32_t layer_class, uint32_t slot);
/* Slots of s->drops are free: it is synced that they hold nothing. */
void store_free_drops(struct kv_store *s);

void store_pause(struct kv_store *s, int rc, const char *what);
void store_publish(struct kv_store *s); /* facts for kv_store_stats() */
int store_write_one(struct kv_store *s, int fd, const void *data, size_t bytes, uint64_t offset);

#endif
