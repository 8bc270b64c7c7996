/* Any bytes as a file of packed weights: it is the wanted one, or refused with a sentence, and
 * never read beyond its end. Checksums are all right in this build.
 *
 * The first byte says what is put right, so that more than the first check is reached: 1: the
 * header; and how long the data is that is wanted, in pages. */
#include "tests/unit/kv/disk.h"

#include "daemon/model/weights_cache.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static int set_file(struct disk *d, const uint8_t *data, size_t bytes)
{
    int fd;
    struct io_files *f = &d->files;
    struct io_span span = {.data = data, .bytes = bytes};
    f->open(f->self, 1, "test.packed", IO_OPEN_EMPTY, &fd);
    f->truncate(f->self, fd, bytes);
    span.fd = fd;
    f->write(f->self, &span, 1);
    return fd;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct disk *d;
    struct weights_want want = {.key = "key", .digest = "digest", .backend = "b", .pack_id = "p"};
    struct weights_layout l;
    struct weights_header h;
    struct fmt_error err = {""};
    uint64_t *table = NULL, zero[2] = {0};
    bool trusted;
    if (bytes < 1 || bytes > DISK_FILE_BYTES / 2) {
        return 0;
    }
    d = d == NULL ? disk_create() : d;
    d->n_names = d->n_files = 0;
    want.data_bytes = (uint64_t)(data[0] >> 1) * WEIGHTS_PAGE_BYTES;
    int fd = set_file(d, data + 1, bytes - 1);
    if ((data[0] & 1) != 0 && weights_layout_of(want.data_bytes, &l) == 0) {
        weights_header_make(&want, zero, &h);
        struct io_span span = {.fd = fd, .data = &h, .bytes = sizeof(h)};
        d->files.write(d->files.self, &span, 1);
    }
    int rc = weights_file_check(&d->files, fd, &want, &table, &trusted, &err);
    if (rc < 0 && (err.text[0] == '\0' || table != NULL)) {
        abort();
    }
    uint64_t size = 0;
    d->files.size(d->files.self, fd, &size);
    if (rc == 0 && (weights_layout_of(want.data_bytes, &l) < 0 || size != l.file_bytes)) {
        abort();
    }
    free(table);
    return 0;
}
