/* tests/unit/kv/disk.h - a folder in memory that can fail, and that remembers.
 *
 * It is an io_files. While it records, every write, sync, rename, ... is kept in a log;
 * disk_crash() makes from a part of the log the folder that a crash might have left.
 * Single-threaded. The test's own bugs end the process. */
#ifndef TESTS_UNIT_KV_DISK_H
#define TESTS_UNIT_KV_DISK_H

#include "daemon/io/files.h"

#define DISK_FILE_BYTES (1u << 20) /* no file is longer */
#define DISK_MAX_FILES  256u
#define DISK_MAX_NAMES  32u

enum disk_op_kind {
    DISK_WRITE,    /* data at offset; NULL: zeros (a hole) */
    DISK_SIZE,     /* the file has so many bytes */
    DISK_SYNC,     /* of one file */
    DISK_SYNC_BAD, /* that failed: what was pending will never be on the disk */
    DISK_NAME,     /* name now means file; from: and that name is gone */
    DISK_UNNAME,
    DISK_SYNC_FOLDER,
    DISK_MARK, /* the test's: something was promised */
};

struct disk_op {
    enum disk_op_kind kind;
    uint32_t file;
    uint64_t offset;
    size_t bytes;
    unsigned char *data;
    char name[48], from[48];
    long mark;
};

struct disk_file {
    unsigned char *data; /* DISK_FILE_BYTES, mapped */
    uint64_t bytes;
};

struct disk_name {
    char name[48];
    uint32_t file;
};

struct disk {
    struct io_files files; /* what the store is given */
    struct disk_file all[DISK_MAX_FILES];
    uint32_t n_files;
    struct disk_name names[DISK_MAX_NAMES];
    uint32_t n_names;

    bool recording;
    struct disk_op *ops;
    size_t n_ops, ops_capacity;

    /* Faults: of the calls whose kind is in the mask, the one when the countdown gets to 0 fails
     * with this code, and with n_failures more than 1 those after it. */
    unsigned fail_mask; /* 1 << enum disk_fault */
    long countdown;
    long n_failures;
    int code;
    long n_failed; /* so many have */
    bool killed;   /* a sync that fails was never called: what is pending stays so */
    /* A disk of this size: writes to places beyond are -ENOSPC. 0: no limit. */
    uint64_t bytes_max;
};

enum disk_fault {
    DISK_FAULT_OPEN,
    DISK_FAULT_READ,
    DISK_FAULT_WRITE,
    DISK_FAULT_SYNC,
    DISK_FAULT_ALLOCATE,
    DISK_FAULT_TRUNCATE,
    DISK_FAULT_PUNCH,
    DISK_FAULT_RENAME,
    DISK_FAULT_UNLINK,
    DISK_FAULT_SYNC_FOLDER,
    DISK_FAULT_LIST,
    DISK_FAULT_MAP,
    DISK_FAULT_SIZE,
    DISK_N_FAULTS,
};

struct disk *disk_create(void);
void disk_destroy(struct disk *d);
void disk_record(struct disk *d); /* from now on; what is there counts as synced */
void disk_mark(struct disk *d, long mark);

/* Whether some file that has a name holds these bytes. */
bool disk_holds(const struct disk *d, const void *bytes, size_t n);
/* The file of a name, or NULL. */
struct disk_file *disk_file(struct disk *d, const char *name);

/* ---- crashes ------------------------------------------------------------------------------- */

struct disk_replay { /* walks through a log: what is on the disk, and what is only pending */
    const struct disk *log;
    size_t at;           /* operations before it have happened */
    struct disk *synced; /* the folder, were nothing else written */
    size_t pending[512]; /* indices of operations, in order */
    size_t n_pending;
};

/* start: a copy of the folder as it was when recording began; becomes the replay's. */
void disk_replay_init(struct disk_replay *r, const struct disk *log, struct disk *start);
void disk_replay_finish(struct disk_replay *r);
bool disk_replay_step(struct disk_replay *r); /* false: the log is at its end */

/* How a crash treats the pending operations. */
struct disk_crash {
    bool (*survives)(const void *arg, size_t index, size_t n); /* pending[index] */
    const void *arg;
    size_t swap; /* pending[swap] and the next come in the other order; SIZE_MAX: none */
    size_t torn; /* pending[torn] keeps bytes [torn_from, torn_to) only; SIZE_MAX: none */
    size_t torn_from, torn_to;
};
/* The folder after that, into ret, which is emptied first. */
void disk_crash(const struct disk_replay *r, const struct disk_crash *c, struct disk *ret);
void disk_copy(const struct disk *from, struct disk *to);

#endif
