#include "daemon/model/weights_format.h"

#include <errno.h>
#include <string.h>
#include <xxhash.h>

/* The kernel's start is now minus the time since: the clock is adjusted meanwhile. */
#define BOOT_TOLERANCE_NS 5000000000

static const char magic[8] = "GQAPACK";

uint64_t weights_checksum(const void *data, size_t bytes)
{
#ifdef GQAD_FUZZING
    return 0; /* fuzzers get past every checksum */
#else
    return XXH3_64bits(data, bytes);
#endif
}

int weights_layout_of(uint64_t data_bytes, struct weights_layout *ret)
{
    struct weights_layout l;
    uint64_t n = data_bytes / WEIGHTS_PIECE_BYTES + (data_bytes % WEIGHTS_PIECE_BYTES != 0);
    if (data_bytes == 0 || data_bytes % WEIGHTS_PAGE_BYTES != 0 || n > UINT32_MAX ||
        data_bytes > INT64_MAX / 2) {
        return -EFBIG;
    }
    uint64_t align = data_bytes < WEIGHTS_HUGE_BYTES ? WEIGHTS_PAGE_BYTES : WEIGHTS_HUGE_BYTES;
    l.n_pieces = (uint32_t)n;
    l.table_bytes = n * sizeof(uint64_t);
    l.data_offset = (WEIGHTS_TABLE_OFFSET + l.table_bytes + align - 1) / align * align;
    l.file_bytes = l.data_offset + data_bytes;
    *ret = l;
    return 0;
}

static uint64_t header_checksum(const struct weights_header *h)
{
    return weights_checksum(h, offsetof(struct weights_header, checksum));
}

void weights_header_make(const struct weights_want *want, const uint64_t *table,
                         struct weights_header *ret)
{
    struct weights_layout l;
    struct weights_header h = {.version = WEIGHTS_VERSION, .header_bytes = sizeof(h)};
    if (weights_layout_of(want->data_bytes, &l) < 0) {
        l = (struct weights_layout){0};
    }
    memcpy(h.magic, magic, sizeof(h.magic));
    memcpy(h.key, want->key, sizeof(h.key));
    memcpy(h.digest, want->digest, sizeof(h.digest));
    memcpy(h.backend, want->backend, sizeof(h.backend));
    memcpy(h.pack_id, want->pack_id, sizeof(h.pack_id));
    h.file_bytes = l.file_bytes;
    h.data_offset = l.data_offset;
    h.data_bytes = want->data_bytes;
    h.piece_bytes = WEIGHTS_PIECE_BYTES;
    h.n_pieces = l.n_pieces;
    h.table_checksum = weights_checksum(table, l.table_bytes);
    h.checksum = header_checksum(&h);
    *ret = h;
}

int weights_header_check(const struct weights_header *h, const struct weights_want *want,
                         uint64_t file_bytes, struct fmt_error *err)
{
    struct weights_layout l;
    if (memcmp(h->magic, magic, sizeof(h->magic)) != 0 || h->version != WEIGHTS_VERSION ||
        h->header_bytes != sizeof(*h)) {
        return fmt_fail(err, -EBADMSG, "not a file of packed weights, version %u", WEIGHTS_VERSION);
    }
    if (h->checksum != header_checksum(h)) {
        return fmt_fail(err, -EBADMSG, "the header is damaged");
    }
    if (memcmp(h->key, want->key, sizeof(h->key)) != 0 ||
        memcmp(h->digest, want->digest, sizeof(h->digest)) != 0 ||
        memcmp(h->backend, want->backend, sizeof(h->backend)) != 0 ||
        memcmp(h->pack_id, want->pack_id, sizeof(h->pack_id)) != 0 ||
        h->data_bytes != want->data_bytes) {
        return fmt_fail(err, -EBADMSG, "it holds the weights of another model or backend");
    }
    if (weights_layout_of(want->data_bytes, &l) < 0 || h->piece_bytes != WEIGHTS_PIECE_BYTES ||
        h->n_pieces != l.n_pieces || h->data_offset != l.data_offset ||
        h->file_bytes != l.file_bytes) {
        return fmt_fail(err, -EBADMSG, "its sizes contradict each other");
    }
    if (file_bytes != l.file_bytes) {
        return fmt_fail(err, -EBADMSG, "it has %llu bytes in place of %llu",
                        (unsigned long long)file_bytes, (unsigned long long)l.file_bytes);
    }
    return 0;
}

void weights_mark_make(int64_t boot_ns, int64_t written_ns, struct weights_mark *ret)
{
    *ret = (struct weights_mark){.boot_ns = boot_ns, .written_ns = written_ns};
    ret->checksum = weights_checksum(ret, offsetof(struct weights_mark, checksum));
}

bool weights_mark_holds(const struct weights_mark *m, int64_t boot_ns, int64_t written_ns)
{
    int64_t off;
    return m->checksum == weights_checksum(m, offsetof(struct weights_mark, checksum)) &&
           m->written_ns == written_ns && !__builtin_sub_overflow(m->boot_ns, boot_ns, &off) &&
           off > -BOOT_TOLERANCE_NS && off < BOOT_TOLERANCE_NS;
}
