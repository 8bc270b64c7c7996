/* daemon/backend/image.h - a plugin's file, checked and frozen before any of its code runs.
 *
 * The file must belong to root or the daemon's user and be writable by nobody else; its bytes are
 * copied into a sealed memfd, so that nothing can change them afterwards; its ELF note must name
 * this ABI. The memfd's number stays open for as long as the library is loaded from it, since
 * dlopen knows libraries by name and would hand out the old one under a number used again. */
#ifndef DAEMON_BACKEND_IMAGE_H
#define DAEMON_BACKEND_IMAGE_H

#include <gqa/plugin.h>
#include <stdbool.h>
#include <sys/stat.h>

#define PLUGIN_FILE_BYTES_MAX (512ull << 20)

struct plugin_image {
    int fd; /* sealed memfd, CLOEXEC */
    dev_t device;
    ino_t inode;
    off_t bytes;
    struct timespec modified;
    struct gqa_note_desc note;
};

/* 0, or -errno with a reason: -EACCES (owner or mode), -ENOEXEC (no plugin, or a foreign ABI). */
int plugin_image_load(const char *path, struct plugin_image *ret, struct gqa_reason *reason);
void plugin_image_unload(struct plugin_image *image);

/* Whether the file at path is still the one that was loaded. */
bool plugin_image_is_current(const struct plugin_image *image, const char *path);

/* Formats into reason and returns rc. */
int reason_fail(struct gqa_reason *reason, int rc, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

#endif
