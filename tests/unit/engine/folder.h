/* tests/unit/engine/folder.h - a temporary folder of a test, and files in it.
 *
 * Errors end the process: these are the test's own bugs or a machine without space. */
#ifndef TESTS_UNIT_ENGINE_FOLDER_H
#define TESTS_UNIT_ENGINE_FOLDER_H

#include <stddef.h>
#include <sys/types.h>

struct folder {
    char path[64];
};

void folder_init(struct folder *f);
void folder_finish(struct folder *f); /* removes it with its files */

/* The full path of a name in it; valid until the second call after this one. */
const char *folder_path(const struct folder *f, const char *name);

/* A file of those bytes and that mode; replaces one of the same name by renaming. */
void folder_write(const struct folder *f, const char *name, const void *data, size_t bytes,
                  mode_t mode);

/* All bytes of a file; malloc'ed. */
unsigned char *file_read(const char *path, size_t *ret_bytes);

#endif
