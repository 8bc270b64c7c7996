/* format/gguf_write.c - writing GGUF v3. Layout: gguf_internal.h.
 *
 * Keys and the tensor table are gathered in memory, because the header counts them; the data is
 * streamed. The first error sticks: every later call returns it. */
#include "format/checked.h"
#include "format/gguf_write_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define TEMPORARY_TRIES    100
#define WRITE_BUFFER_BYTES (1 << 20)

/* Opens a new file beside w->path, with the permissions that an ordinary file would have. */
static int open_temporary(struct gguf_writer *w)
{
    for (int i = 0; i < TEMPORARY_TRIES; i++) {
        if (asprintf(&w->temporary, "%s.%ld.%d.tmp", w->path, (long)getpid(), i) < 0) {
            w->temporary = NULL;
            return -ENOMEM;
        }
        int fd = open(w->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        int rc = fd < 0 ? -errno : 0;
        if (rc == 0) {
            w->file = fdopen(fd, "wb");
            if (w->file != NULL) {
                setvbuf(w->file, NULL, _IOFBF, WRITE_BUFFER_BYTES);
                return 0;
            }
            rc = -errno;
            close(fd);
            unlink(w->temporary);
        }
        free(w->temporary);
        w->temporary = NULL;
        if (rc != -EEXIST) {
            return rc;
        }
    }
    return -EEXIST;
}

int gguf_writer_create(const char *path, struct gguf_writer **ret)
{
    struct gguf_writer *w = calloc(1, sizeof(*w));
    if (w == NULL) {
        return -ENOMEM;
    }
    w->alignment = GGUF_DEFAULT_ALIGNMENT;
    w->path = strdup(path);
    int rc = w->path == NULL ? -ENOMEM : open_temporary(w);
    if (rc < 0) {
        gguf_writer_destroy(w);
        return rc;
    }
    *ret = w;
    return 0;
}

void gguf_writer_destroy(struct gguf_writer *w)
{
    if (w == NULL) {
        return;
    }
    if (w->file != NULL) {
        fclose(w->file);
    }
    if (w->temporary != NULL) {
        unlink(w->temporary);
    }
    for (size_t i = 0; i < w->n_keys; i++) {
        free(w->key_names[i]);
    }
    for (size_t i = 0; i < w->n_tensors; i++) {
        free(w->tensors[i].name);
    }
    free(w->key_names);
    free(w->tensors);
    free(w->keys);
    free(w->temporary);
    free(w->path);
    free(w);
}

/* The size of a tensor; 0 when the shape is not legal for the type. */
static uint64_t shape_bytes(uint32_t type, uint32_t n_dims, const uint64_t *ne)
{
    const struct fmt_type_info *info = fmt_type_info(type);
    uint64_t n = 1;
    if (info == NULL || n_dims < 1 || n_dims > GGUF_MAX_DIMS || ne[0] % info->n_block != 0) {
        return 0;
    }
    for (uint32_t i = 0; i < n_dims; i++) {
        if (!checked_mul_u64(n, ne[i], &n)) {
            return 0;
        }
    }
    return fmt_type_bytes(info, n);
}

int gguf_writer_add_tensor(struct gguf_writer *w, const char *name, uint32_t type, uint32_t n_dims,
                           const uint64_t *ne)
{
    struct declared_tensor tensor = {.type = type, .n_dims = n_dims};
    size_t name_bytes = strlen(name);
    if (w->rc < 0) {
        return w->rc;
    }
    tensor.bytes = shape_bytes(type, n_dims, ne);
    if (w->in_data || name_bytes == 0 || name_bytes > GGUF_MAX_NAME_BYTES || tensor.bytes == 0) {
        return gguf_writer_fail(w, -EINVAL);
    }
    memcpy(tensor.ne, ne, n_dims * sizeof(*ne));
    uint64_t end;
    if (w->n_tensors == GGUF_MAX_TENSORS ||
        !checked_align_u64(w->data_bytes, w->alignment, &tensor.offset) ||
        !checked_add_u64(tensor.offset, tensor.bytes, &end)) {
        return gguf_writer_fail(w, -EFBIG);
    }
    for (size_t i = 0; i < w->n_tensors; i++) {
        if (strcmp(w->tensors[i].name, name) == 0) {
            return gguf_writer_fail(w, -EEXIST);
        }
    }
    struct declared_tensor *grown = realloc(w->tensors, (w->n_tensors + 1) * sizeof(*grown));
    if (grown == NULL) {
        return gguf_writer_fail(w, -ENOMEM);
    }
    w->tensors = grown;
    tensor.name = strdup(name);
    if (tensor.name == NULL) {
        return gguf_writer_fail(w, -ENOMEM);
    }
    w->tensors[w->n_tensors++] = tensor;
    w->data_bytes = end;
    return 0;
}

static int put(struct gguf_writer *w, const void *data, size_t bytes)
{
    if (w->rc < 0) {
        return w->rc;
    }
    errno = 0;
    if (bytes > 0 && fwrite(data, 1, bytes, w->file) != bytes) {
        return gguf_writer_fail(w, errno != 0 ? -errno : -EIO);
    }
    return 0;
}

/* Zeros up to the next multiple of the alignment from position. */
static int put_padding(struct gguf_writer *w, uint64_t position)
{
    static const uint8_t zeros[256];
    uint64_t n = -position & (w->alignment - 1);
    while (n > 0 && w->rc == 0) {
        size_t piece = n < sizeof(zeros) ? (size_t)n : sizeof(zeros);
        put(w, zeros, piece);
        n -= piece;
    }
    return w->rc;
}

int gguf_writer_begin_data(struct gguf_writer *w)
{
    const uint32_t version = 3;
    const uint64_t n_tensors = w->n_tensors, n_keys = w->n_keys;
    if (w->rc == 0 && w->in_data) {
        return gguf_writer_fail(w, -EINVAL);
    }
    w->in_data = true;
    put(w, "GGUF", 4);
    put(w, &version, sizeof(version));
    put(w, &n_tensors, sizeof(n_tensors));
    put(w, &n_keys, sizeof(n_keys));
    put(w, w->keys, w->keys_bytes);
    uint64_t position = 24 + w->keys_bytes;
    for (size_t i = 0; i < w->n_tensors && w->rc == 0; i++) {
        const struct declared_tensor *tensor = &w->tensors[i];
        uint64_t name_bytes = strlen(tensor->name);
        put(w, &name_bytes, sizeof(name_bytes));
        put(w, tensor->name, (size_t)name_bytes);
        put(w, &tensor->n_dims, sizeof(tensor->n_dims));
        put(w, tensor->ne, tensor->n_dims * sizeof(tensor->ne[0]));
        put(w, &tensor->type, sizeof(tensor->type));
        put(w, &tensor->offset, sizeof(tensor->offset));
        position += 8 + name_bytes + 4 + tensor->n_dims * sizeof(tensor->ne[0]) + 4 + 8;
    }
    return w->n_tensors > 0 ? put_padding(w, position) : w->rc;
}

int gguf_writer_write(struct gguf_writer *w, const void *data, size_t bytes)
{
    if (w->rc < 0) {
        return w->rc;
    }
    if (bytes == 0) {
        return 0;
    }
    if (!w->in_data || w->current == w->n_tensors ||
        bytes > w->tensors[w->current].bytes - w->written) {
        return gguf_writer_fail(w, -EINVAL);
    }
    put(w, data, bytes);
    w->written += bytes;
    if (w->written == w->tensors[w->current].bytes) {
        put_padding(w, w->tensors[w->current].offset + w->written);
        w->current++;
        w->written = 0;
    }
    return w->rc;
}

/* Makes a rename in path's folder survive a power cut. */
static int sync_folder(const char *path)
{
    char *copy = strdup(path);
    if (copy == NULL) {
        return -ENOMEM;
    }
    int rc = 0;
    int fd = open(dirname(copy), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fsync(fd) < 0) {
        rc = -errno;
    }
    if (fd >= 0) {
        close(fd);
    }
    free(copy);
    return rc;
}

int gguf_writer_finish(struct gguf_writer *w)
{
    if (w->rc < 0) {
        return w->rc;
    }
    if (!w->in_data || w->current != w->n_tensors || w->file == NULL) {
        return gguf_writer_fail(w, -EINVAL);
    }
    if (fflush(w->file) != 0 || fsync(fileno(w->file)) < 0) {
        return gguf_writer_fail(w, -errno);
    }
    int closed = fclose(w->file);
    w->file = NULL;
    if (closed != 0 || rename(w->temporary, w->path) < 0) {
        return gguf_writer_fail(w, -errno);
    }
    free(w->temporary);
    w->temporary = NULL;
    int rc = sync_folder(w->path);
    return rc < 0 ? gguf_writer_fail(w, rc) : 0;
}
