/* daemon/model/weights_room.h - a place in memory for packed weights: filled once, or a mapped
 * file.
 *
 * The place keeps its address whatever lies there, so that a file can take over from the memory
 * that it was written from while steps read. It begins at a multiple of 2 MiB, as the data of a
 * file does: where the file system keeps large pages, they are mapped as such. It is known to the
 * guard (kv/guard.h) from its beginning to its end. */
#ifndef DAEMON_MODEL_WEIGHTS_ROOM_H
#define DAEMON_MODEL_WEIGHTS_ROOM_H

#include "daemon/io/files.h"

struct weights_room {
    void *memory;
    uint64_t bytes;
    void *reserved; /* the address space around it */
    size_t reserved_bytes;
    uint32_t guard;
};

/* Address space for so many bytes, whole pages and more than none. -ENOMEM, -ENOSPC (guard). */
int weights_room_init(struct weights_room *r, uint64_t bytes);
void weights_room_finish(struct weights_room *r); /* of zeros is legal */

/* Zeroed memory lies there from now on, to be written; seal: it is complete, and constant. */
int weights_room_clear(struct weights_room *r);
void weights_room_seal(struct weights_room *r);

/* The bytes of fd from offset on lie there from now on. Whoever reads meanwhile sees what was there
 * before or what is there now, page by page. After a failure what is there counts as lost. */
int weights_room_map(struct weights_room *r, const struct io_files *files, int fd, uint64_t offset);

/* Brings in all pages of a mapped file that memory has room for. -EIO: some cannot be read. */
int weights_room_populate(struct weights_room *r);

/* Whether zeros may have been read there in place of what the file holds. */
bool weights_room_is_damaged(const struct weights_room *r);

#endif
