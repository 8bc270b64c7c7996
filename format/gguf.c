/* format/gguf.c - opening, mapping and closing GGUF files; the accessors of the parsed form. */
#include "format/gguf_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct gguf_shown gguf_show(struct gguf_string s)
{
    struct gguf_shown shown;
    size_t limit = sizeof(shown.text) - 4;
    size_t n = s.bytes < limit ? s.bytes : limit;
    for (size_t i = 0; i < n; i++) {
        shown.text[i] = s.data[i] >= ' ' && s.data[i] <= '~' ? s.data[i] : '?';
    }
    memcpy(shown.text + n, s.bytes > n ? "..." : "", s.bytes > n ? 4 : 1);
    return shown;
}

struct gguf_shown gguf_show_path(const char *path)
{
    struct gguf_shown shown;
    path = fmt_file_name(path);
    size_t bytes = strlen(path), limit = sizeof(shown.text) - 1;
    if (bytes <= limit) {
        memcpy(shown.text, path, bytes + 1);
    } else {
        memcpy(shown.text, "...", 3);
        memcpy(shown.text + 3, path + bytes - (limit - 3), limit - 3 + 1);
    }
    return shown;
}

/* Checks that fd is a file that can be mapped. */
static int check_file(int fd, const char *path, uint64_t *ret_bytes, struct fmt_error *err)
{
    struct stat st;
    if (fstat(fd, &st) < 0) {
        int rc = -errno;
        return fmt_fail(err, rc, "%s: %s", gguf_show_path(path).text, strerror(-rc));
    }
    if (!S_ISREG(st.st_mode)) {
        return fmt_fail(err, -EINVAL, "%s: not a regular file", gguf_show_path(path).text);
    }
    if (st.st_size == 0) {
        return fmt_fail(err, -EINVAL, "%s: the file is empty", gguf_show_path(path).text);
    }
    *ret_bytes = (uint64_t)st.st_size;
    return 0;
}

int gguf_part_map(const char *path, struct gguf_part *ret, struct fmt_error *err)
{
    struct gguf_part part = {.fd = -1};
    int rc;

    /* O_NONBLOCK so that a FIFO cannot hold us; taken off again because io_uring honours it. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK);
    if (fd < 0) {
        rc = -errno;
        return fmt_fail(err, rc, "%s: %s", gguf_show_path(path).text, strerror(-rc));
    }
    rc = check_file(fd, path, &part.bytes, err);
    if (rc < 0) {
        goto err_close;
    }
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0 || fcntl(fd, F_SETFL, flags & ~O_NONBLOCK) < 0) {
        rc = fmt_fail(err, -errno, "%s: fcntl failed", gguf_show_path(path).text);
        goto err_close;
    }
    part.path = strdup(path);
    if (part.path == NULL) {
        rc = fmt_fail(err, -ENOMEM, "%s: out of memory", gguf_show_path(path).text);
        goto err_close;
    }
    void *base = mmap(NULL, (size_t)part.bytes, PROT_READ, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        rc = -errno;
        fmt_fail(err, rc, "%s: cannot map %llu bytes: %s", gguf_show_path(path).text,
                 (unsigned long long)part.bytes, strerror(-rc));
        goto err_free;
    }
    part.base = base;
    part.fd = fd;
    *ret = part;
    return 0;

err_free:
    free(part.path);
err_close:
    close(fd);
    return rc;
}

void gguf_part_finish(struct gguf_part *part)
{
    if (part->fd >= 0) {
        munmap((void *)part->base, (size_t)part->bytes);
        close(part->fd);
    }
    free(part->path);
    free(part->values);
    free(part->by_key);
}

/* A gguf with room for one part; that part is empty but destructible. */
static struct gguf *create_with_one_part(void)
{
    struct gguf *g = calloc(1, sizeof(*g));
    if (g == NULL) {
        return NULL;
    }
    g->parts = calloc(1, sizeof(*g->parts));
    if (g->parts == NULL) {
        free(g);
        return NULL;
    }
    g->parts[0].fd = -1;
    g->n_parts = 1;
    return g;
}

int gguf_open(const char *path, struct gguf **ret, struct fmt_error *err)
{
    struct gguf *g = create_with_one_part();
    if (g == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", gguf_show_path(path).text);
    }
    int rc = gguf_part_map(path, &g->parts[0], err);
    if (rc == 0) {
        rc = gguf_parse_part(g, 0, err);
    }
    if (rc == 0) {
        rc = gguf_open_other_parts(g, err);
    }
    if (rc == 0) {
        rc = gguf_index_tensors(g, err);
    }
    if (rc < 0) {
        gguf_close(g);
        return rc;
    }
    *ret = g;
    return 0;
}

int gguf_open_memory(const void *data, size_t bytes, struct gguf **ret, struct fmt_error *err)
{
    struct gguf *g = create_with_one_part();
    if (g == NULL || (g->parts[0].path = strdup("(memory)")) == NULL) {
        gguf_close(g);
        return fmt_fail(err, -ENOMEM, "(memory): out of memory");
    }
    g->parts[0].base = data;
    g->parts[0].bytes = bytes;
    int rc = gguf_parse_part(g, 0, err);
    if (rc == 0) {
        rc = gguf_index_tensors(g, err);
    }
    if (rc < 0) {
        gguf_close(g);
        return rc;
    }
    *ret = g;
    return 0;
}

void gguf_close(struct gguf *g)
{
    if (g == NULL) {
        return;
    }
    for (uint32_t i = 0; i < g->n_parts; i++) {
        gguf_part_finish(&g->parts[i]);
    }
    for (size_t i = 0; i < g->n_tensors; i++) {
        free((char *)g->tensors[i].name.data);
    }
    free(g->parts);
    free(g->tensors);
    free(g->by_name);
    free(g);
}

const char *gguf_path(const struct gguf *g)
{
    return g->parts[0].path;
}

const char *gguf_name(const struct gguf *g)
{
    return fmt_file_name(gguf_path(g));
}

uint32_t gguf_version(const struct gguf *g)
{
    return g->parts[0].version;
}

uint64_t gguf_file_bytes(const struct gguf *g)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < g->n_parts; i++) {
        sum += g->parts[i].bytes;
    }
    return sum;
}

uint32_t gguf_n_files(const struct gguf *g)
{
    return g->n_parts;
}

const char *gguf_file_path(const struct gguf *g, uint32_t index)
{
    return g->parts[index].path;
}

uint64_t gguf_one_file_bytes(const struct gguf *g, uint32_t index)
{
    return g->parts[index].bytes;
}

int gguf_file_fd(const struct gguf *g, uint32_t index)
{
    return g->parts[index].fd;
}

const void *gguf_file_map(const struct gguf *g, uint32_t index)
{
    return g->parts[index].base;
}

size_t gguf_n_tensors(const struct gguf *g)
{
    return g->n_tensors;
}

const struct gguf_tensor *gguf_tensor_at(const struct gguf *g, size_t i)
{
    return &g->tensors[i];
}
