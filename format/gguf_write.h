/* format/gguf_write.h - writing GGUF v3 files, tensor by tensor, in little memory.
 *
 * Order of calls: create, add keys, add tensors (declares shapes), begin_data, write each tensor's
 * bytes in the order declared (in as many pieces as wanted), finish. The file appears under its
 * name only at finish (written beside it under a temporary name, synced, renamed). Any call may
 * return -errno; after an error only gguf_writer_destroy is legal, which removes the temporary (any
 * other call returns the same error again). Calls out of order, illegal names and shapes, and more
 * or fewer bytes than declared are -EINVAL; a key or tensor added twice is -EEXIST.
 *
 * "general.alignment" may be given with gguf_writer_add_u32 before the first tensor. */
#ifndef FORMAT_GGUF_WRITE_H
#define FORMAT_GGUF_WRITE_H

#include "format/gguf.h"

struct gguf_writer;

int gguf_writer_create(const char *path, struct gguf_writer **ret);
int gguf_writer_add_u32(struct gguf_writer *w, const char *key, uint32_t value);
int gguf_writer_add_f32(struct gguf_writer *w, const char *key, float value);
int gguf_writer_add_bool(struct gguf_writer *w, const char *key, bool value);
int gguf_writer_add_string(struct gguf_writer *w, const char *key, const char *value);
int gguf_writer_add_strings(struct gguf_writer *w, const char *key,
                            const struct gguf_string *values, uint64_t count);
int gguf_writer_add_f32s(struct gguf_writer *w, const char *key, const float *values,
                         uint64_t count);
int gguf_writer_add_i32s(struct gguf_writer *w, const char *key, const int32_t *values,
                         uint64_t count);
/* The index-th key of g's with its value, of whatever type, as it lies in the file. */
int gguf_writer_copy_key(struct gguf_writer *w, const struct gguf *g, size_t index);
int gguf_writer_add_tensor(struct gguf_writer *w, const char *name, uint32_t type, uint32_t n_dims,
                           const uint64_t *ne);
int gguf_writer_begin_data(struct gguf_writer *w);
int gguf_writer_write(struct gguf_writer *w, const void *data, size_t bytes);
int gguf_writer_finish(struct gguf_writer *w);   /* then destroy it all the same */
void gguf_writer_destroy(struct gguf_writer *w); /* NULL is legal */

#endif
