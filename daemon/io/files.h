/* daemon/io/files.h - the one seam through which files of the cache are touched.
 *
 * A table of functions: the system's (io_files_system()), or a test's that records, refuses, fails
 * or keeps files in memory. Every function returns 0 or -errno and blocks until it is done; so they
 * are for the io thread, or for any other but the loop and the engine. Names are names in a folder,
 * without slashes. Descriptors are the seam's own numbers. */
#ifndef DAEMON_IO_FILES_H
#define DAEMON_IO_FILES_H

#include "daemon/io/io.h"

enum io_open {
    IO_OPEN_EXISTING, /* -ENOENT where there is none */
    IO_OPEN_CREATE,   /* made where there is none */
    IO_OPEN_EMPTY,    /* the same, and cut to nothing */
    IO_OPEN_READ, /* one that is there, only to be read: folders that nobody can write have some */
};

#define IO_TIME_KEEP INT64_MIN

struct io_files {
    void *self; /* first argument of every function */

    /* A folder of our own: made with mode 0700 where it is missing. -EPERM: it is another user's,
     * or others have access. */
    int (*open_folder)(void *self, const char *path, int *ret_folder);
    /* Every file of the folder; bytes are those that it takes on disk. A non-zero return of on_name
     * ends the list with that code. */
    int (*list)(void *self, int folder, int (*on_name)(void *arg, const char *name, uint64_t bytes),
                void *arg);
    /* A regular file, mode 0600, never through a symbolic link. -EPERM: another user's, or others
     * have access, or it has a second name. */
    int (*open)(void *self, int folder, const char *name, enum io_open how, int *ret_fd);
    void (*close)(void *self, int fd); /* of files and folders; releases the lock */
    int (*lock)(void *self, int fd);   /* -EWOULDBLOCK: another process has it */
    int (*size)(void *self, int fd, uint64_t *ret_bytes);
    /* Bytes that it takes on disk. Any thread. NULL: nobody knows. */
    int (*allocated)(void *self, int fd, uint64_t *ret_bytes);

    int (*read)(void *self, int fd, void *data, size_t bytes, uint64_t offset); /* -EIO: short */
    /* Writes all spans, several in flight at once. Every span gets its own result; returns the
     * first failure. */
    int (*write)(void *self, struct io_span *spans, size_t n_spans);
    int (*sync)(void *self, int fd); /* data, and what is needed to find it again */
    /* Space for [offset, offset + bytes), so that writing there finds the disk full only where the
     * file system cannot promise; the file is at least that long afterwards. */
    int (*allocate)(void *self, int fd, uint64_t offset, uint64_t bytes);
    int (*truncate)(void *self, int fd, uint64_t bytes);
    int (*punch)(void *self, int fd, uint64_t offset,
                 uint64_t bytes); /* reads as zeros, no space */
    int (*rename)(void *self, int folder, const char *from, const char *to); /* replaces */
    int (*unlink)(void *self, int folder, const char *name);
    int (*sync_folder)(void *self, int folder); /* names made, changed and removed before */

    /* Read-only, shared, out of core dumps; may reach beyond the file's end. With at, it takes the
     * place of the pages there. */
    int (*map)(void *self, int fd, uint64_t offset, size_t bytes, void *at, void **ret);
    void (*unmap)(void *self, void *memory, size_t bytes);

    /* When the file was used and written last, in ns since the epoch; set_times changes what is not
     * IO_TIME_KEEP. The system sets the latter with every write; the former it may not keep. */
    int (*times)(void *self, int fd, int64_t *ret_used_ns, int64_t *ret_written_ns);
    int (*set_times)(void *self, int fd, int64_t used_ns, int64_t written_ns);
};

/* The system's files. On the io thread of io, writes and syncs go through its ring and registered
 * buffers; on other threads, or with io NULL, they are plain calls. */
void io_files_system(struct io *io, struct io_files *ret);

#endif
