/* format/gguf_write_internal.h - the writer's state; private to format/gguf_write*.c. */
#ifndef FORMAT_GGUF_WRITE_INTERNAL_H
#define FORMAT_GGUF_WRITE_INTERNAL_H

#include "format/gguf_internal.h"
#include "format/gguf_write.h"

#include <stdio.h>

struct declared_tensor {
    char *name; /* owned */
    uint32_t type, n_dims;
    uint64_t ne[GGUF_MAX_DIMS];
    uint64_t bytes;
    uint64_t offset; /* in the data section */
};

struct gguf_writer {
    int rc; /* the first error; 0 while all is well */
    char *path, *temporary;
    FILE *file;
    uint64_t alignment;

    uint8_t *keys; /* the encoded keys and values */
    size_t keys_bytes, keys_capacity;
    char **key_names; /* to refuse duplicates */
    size_t n_keys;

    struct declared_tensor *tensors;
    size_t n_tensors;
    uint64_t data_bytes; /* of the data section as declared so far */

    bool in_data;
    size_t current;   /* the tensor that the next bytes belong to */
    uint64_t written; /* bytes of it that were written */
};

/* Makes rc the writer's error unless it has one, and returns its error. */
static inline int gguf_writer_fail(struct gguf_writer *w, int rc)
{
    if (w->rc == 0) {
        w->rc = rc;
    }
    return w->rc;
}

#endif
