/* daemon/model/weights_file.h - reading and writing one file of packed weights; private to
 * weights_*.c. */
#ifndef DAEMON_MODEL_WEIGHTS_FILE_H
#define DAEMON_MODEL_WEIGHTS_FILE_H

#include "daemon/model/weights_cache.h"

/* Compares the room, where the file is mapped, with its table. -EBADMSG, -EIO, -ECANCELED. */
int weights_file_verify(const struct weights_room *room, const uint64_t *table,
                        const atomic_bool *cancel,
                        void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg,
                        struct fmt_error *err);

/* Notes in the file that its data was found good. fd must be writable. */
int weights_file_mark(const struct io_files *files, int fd);

/* Writes a whole file and syncs it. */
int weights_file_write(const struct io_files *files, int fd, const struct weights_want *want,
                       const struct weights_room *room, const atomic_bool *cancel);

int64_t weights_now_ns(void); /* in the clock of file times */

#endif
