/* daemon/model/digest.h - what names a model's weights: a hash over the bytes of its files.
 *
 * Computed once, while the file is read anyway, and remembered in a small file by device, inode,
 * size and times. The file is advice: without it, or with one that cannot be read or written, the
 * digest is computed again. Loader thread (and, for update, the io thread while that waits). */
#ifndef DAEMON_MODEL_DIGEST_H
#define DAEMON_MODEL_DIGEST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct gguf;
struct digest;

struct digest_value {
    uint8_t bytes[16];
};

/* -ENOMEM. */
int digest_create(struct digest **ret);
void digest_destroy(struct digest *d); /* NULL is legal */
/* The next bytes of the model's files, in their order. */
void digest_update(struct digest *d, const void *data, size_t bytes);
struct digest_value digest_value(const struct digest *d);

/* Whether the digest of these very files is remembered. memory: the file's path, or NULL. */
bool digest_recall(const char *memory, const struct gguf *g, struct digest_value *ret);
/* Remembers it; failures are nobody's trouble. */
void digest_remember(const char *memory, const struct gguf *g, const struct digest_value *value);

#endif
