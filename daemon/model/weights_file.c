#include "daemon/model/weights_file.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define SECOND_NS 1000000000

static int64_t read_clock(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (int64_t)t.tv_sec * SECOND_NS + t.tv_nsec;
}

int64_t weights_now_ns(void)
{
    return read_clock(CLOCK_REALTIME);
}

/* When the kernel started, in the clock of file times. */
static int64_t boot_ns(void)
{
    return read_clock(CLOCK_REALTIME) - read_clock(CLOCK_BOOTTIME);
}

/* ---- reading ----------------------------------------------------------------------------- */

static bool is_trusted(const struct io_files *files, int fd)
{
    struct weights_mark mark;
    int64_t used, written;
    return files->read(files->self, fd, &mark, sizeof(mark), WEIGHTS_MARK_OFFSET) == 0 &&
           files->times != NULL && files->times(files->self, fd, &used, &written) == 0 &&
           weights_mark_holds(&mark, boot_ns(), written);
}

static int read_table(const struct io_files *files, int fd, const struct weights_header *h,
                      uint64_t **ret, struct fmt_error *err)
{
    size_t bytes = (size_t)h->n_pieces * sizeof(uint64_t);
    uint64_t *table = malloc(bytes);
    if (table == NULL) {
        return fmt_fail(err, -ENOMEM, "no memory for its table");
    }
    int rc = files->read(files->self, fd, table, bytes, WEIGHTS_TABLE_OFFSET);
    if (rc < 0) {
        fmt_fail(err, rc, "its table cannot be read: %s", strerror(-rc));
    } else if (weights_checksum(table, bytes) != h->table_checksum) {
        rc = fmt_fail(err, -EBADMSG, "its table is damaged");
    }
    if (rc < 0) {
        free(table);
        return rc;
    }
    *ret = table;
    return 0;
}

int weights_file_check(const struct io_files *files, int fd, const struct weights_want *want,
                       uint64_t **ret_table, bool *ret_trusted, struct fmt_error *err)
{
    struct weights_header h;
    uint64_t bytes;
    int rc = files->size(files->self, fd, &bytes);
    if (rc == 0 && bytes < sizeof(h)) {
        return fmt_fail(err, -EBADMSG, "it is too short for a header");
    }
    rc = rc < 0 ? rc : files->read(files->self, fd, &h, sizeof(h), 0);
    if (rc < 0) {
        return fmt_fail(err, rc, "its header cannot be read: %s", strerror(-rc));
    }
    rc = weights_header_check(&h, want, bytes, err);
    rc = rc < 0 ? rc : read_table(files, fd, &h, ret_table, err);
    if (rc == 0) {
        *ret_trusted = is_trusted(files, fd);
    }
    return rc;
}

int weights_file_verify(const struct weights_room *room, const uint64_t *table,
                        const atomic_bool *cancel,
                        void (*progress)(void *arg, uint64_t done, uint64_t total), void *arg,
                        struct fmt_error *err)
{
    for (uint64_t at = 0; at < room->bytes; at += WEIGHTS_PIECE_BYTES) {
        uint64_t left = room->bytes - at;
        size_t bytes = left < WEIGHTS_PIECE_BYTES ? (size_t)left : WEIGHTS_PIECE_BYTES;
        uint64_t sum = weights_checksum((const uint8_t *)room->memory + at, bytes);
        /* In this order: zeros that stand in for what cannot be read have another checksum. */
        if (weights_room_is_damaged(room)) {
            return fmt_fail(err, -EIO, "the disk cannot read it");
        }
        if (sum != table[at / WEIGHTS_PIECE_BYTES]) {
            return fmt_fail(err, -EBADMSG, "the data at %llu MiB is damaged",
                            (unsigned long long)(at >> 20));
        }
        if (cancel != NULL && *cancel) {
            return -ECANCELED;
        }
        if (progress != NULL) {
            progress(arg, at + bytes, room->bytes);
        }
    }
    return 0;
}

/* ---- writing ----------------------------------------------------------------------------- */

static int write_bytes(const struct io_files *files, int fd, const void *data, size_t bytes,
                       uint64_t offset)
{
    struct io_span span = {.fd = fd, .offset = offset, .data = data, .bytes = bytes};
    return files->write(files->self, &span, 1);
}

/* Whole seconds: every file system keeps them. */
static int64_t mark_time(void)
{
    return weights_now_ns() / SECOND_NS * SECOND_NS;
}

int weights_file_mark(const struct io_files *files, int fd)
{
    struct weights_mark mark;
    int64_t written = mark_time();
    weights_mark_make(boot_ns(), written, &mark);
    int rc = write_bytes(files, fd, &mark, sizeof(mark), WEIGHTS_MARK_OFFSET);
    return rc < 0 ? rc : files->set_times(files->self, fd, IO_TIME_KEEP, written);
}

static int write_data(const struct io_files *files, int fd, const struct weights_room *room,
                      uint64_t offset, uint64_t *table, const atomic_bool *cancel)
{
    const uint8_t *data = room->memory;
    int rc = 0;
    for (uint64_t at = 0; rc == 0 && at < room->bytes; at += WEIGHTS_PIECE_BYTES) {
        uint64_t left = room->bytes - at;
        size_t bytes = left < WEIGHTS_PIECE_BYTES ? (size_t)left : WEIGHTS_PIECE_BYTES;
        table[at / WEIGHTS_PIECE_BYTES] = weights_checksum(data + at, bytes);
        rc = *cancel ? -ECANCELED : write_bytes(files, fd, data + at, bytes, offset + at);
    }
    return rc;
}

int weights_file_write(const struct io_files *files, int fd, const struct weights_want *want,
                       const struct weights_room *room, const atomic_bool *cancel)
{
    struct weights_layout l;
    struct weights_header h;
    int rc = weights_layout_of(want->data_bytes, &l);
    if (rc < 0) {
        return rc;
    }
    uint64_t *table = calloc(l.n_pieces, sizeof(*table));
    if (table == NULL) {
        return -ENOMEM;
    }
    rc = files->allocate(files->self, fd, 0, l.file_bytes);
    rc = rc < 0 ? rc : write_data(files, fd, room, l.data_offset, table, cancel);
    if (rc == 0) {
        weights_header_make(want, table, &h);
        rc = write_bytes(files, fd, table, l.table_bytes, WEIGHTS_TABLE_OFFSET);
    }
    free(table);
    rc = rc < 0 ? rc : write_bytes(files, fd, &h, sizeof(h), 0);
    rc = rc < 0 ? rc : weights_file_mark(files, fd);
    return rc < 0 ? rc : files->sync(files->self, fd);
}
