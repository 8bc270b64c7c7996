/* daemon/model/weights_cache.h - the folder of packed weights: one file for each model and layout.
 *
 * A file is written under another name, synced and renamed, so that a name stands for a whole file;
 * whoever writes the same one at the same time writes the same bytes. Files are shared, read-only,
 * by all processes that map them. Those that were used longest ago go when the folder would become
 * larger than its bound.
 *
 * What a file holds is checked when it is mapped: header, sizes and table always, the data itself
 * once per start of the machine, when its pages have to come from the disk anyway, and whenever
 * somebody has written to the file since.
 *
 * Trouble with the folder is told in the log, once until it changes, and costs time only. All
 * functions block on files; any thread but loop and engine may call them, several at once. */
#ifndef DAEMON_MODEL_WEIGHTS_CACHE_H
#define DAEMON_MODEL_WEIGHTS_CACHE_H

#include "daemon/model/weights_format.h"
#include "daemon/model/weights_room.h"

#include <stdatomic.h>

struct weights_cache;

struct weights_cache_options {
    const char *folder;           /* its parent exists; copied */
    uint64_t bytes_max;           /* of all files together; 0: no bound */
    const struct io_files *files; /* NULL: the system's; copied */
};

/* Nothing is touched yet. -ENOMEM. */
int weights_cache_create(const struct weights_cache_options *options, struct weights_cache **ret);
void weights_cache_destroy(struct weights_cache *c); /* NULL is legal; nobody uses it any more */

/* Maps the wanted file into the room, whose size it has. -ENOENT: there is none that is good (one
 * that is not is removed, and the room is to be cleared). -ECANCELED when *cancel (or NULL) becomes
 * true. progress (or NULL) hears of the data that is checked. */
int weights_cache_map(struct weights_cache *c, const struct weights_want *want,
                      struct weights_room *room, const atomic_bool *cancel,
                      void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg);

/* Writes the room's bytes as the wanted file and maps that into the room: the memory is given back.
 * Ends with -ECANCELED soon after *cancel becomes true. After a failure the room is as it was. */
int weights_cache_save(struct weights_cache *c, const struct weights_want *want,
                       struct weights_room *room, const atomic_bool *cancel);

/* Removes the file: what was mapped of it could not be read. */
void weights_cache_discard(struct weights_cache *c, const struct weights_want *want);

/* ---- for tests and fuzzers ------------------------------------------------------------------ */

/* Header, sizes and table of an open file. *ret_table (n_pieces of the layout) is the caller's, to
 * be freed. *ret_trusted: the data need not be checked. -EBADMSG, -EIO, ... with a sentence. */
int weights_file_check(const struct io_files *files, int fd, const struct weights_want *want,
                       uint64_t **ret_table, bool *ret_trusted, struct fmt_error *err);

#endif
