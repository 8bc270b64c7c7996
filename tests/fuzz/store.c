/* Any bytes as the index of a block store, with data files of any length: opening must refuse, set
 * aside or take what holds, never name a slot twice or one that is not there, and go on from it.
 *
 * The first byte says what is put right, so that more than the first check is reached: 1: the
 * header, 2: generations. The second and third are the data files' lengths in slots. Checksums are
 * all right in this build. */
#include "tests/unit/kv/disk.h"

#include "daemon/kv/store_internal.h"

#include <stdlib.h>
#include <string.h>

#define MAX_FOUND 8192u
#define N_SLOTS   24u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static const struct kv_store_identity identity = {
    .id = "rig-identity-16",
    .layout_version = 1,
    .n_classes = 2,
    .block_bytes = {6400, 2048},
    .about = "a test",
};

static struct kv_store_block found[MAX_FOUND];
static uint32_t n_found;

static void on_block(void *arg, const struct kv_store_block *b)
{
    if (n_found == MAX_FOUND || b->layer_class > 1 || b->slot > 2 * N_SLOTS) {
        abort();
    }
    for (uint32_t i = 0; i < n_found; i++) {
        if (found[i].layer_class == b->layer_class &&
            (found[i].slot == b->slot || kv_key_equal(found[i].key, b->key))) {
            abort();
        }
    }
    found[n_found++] = *b;
}

static void set_file(struct disk *d, const char *name, const void *data, size_t bytes)
{
    int fd;
    struct io_files *f = &d->files;
    struct io_span span = {.data = data, .bytes = data != NULL ? bytes : 0};
    f->open(f->self, 1, name, IO_OPEN_EMPTY, &fd);
    f->truncate(f->self, fd, bytes);
    span.fd = fd;
    f->write(f->self, &span, 1);
}

static void put_right(uint8_t *image, size_t bytes, uint8_t what)
{
    struct store_header h;
    if ((what & 1) != 0 && bytes >= sizeof(h)) {
        memcpy(&h, image, sizeof(h));
        store_header_make(&h, &identity, h.epoch, h.base);
        memcpy(image, &h, sizeof(h));
    }
    for (size_t at = 512; (what & 2) != 0 && at + 512 <= bytes; at += 512) {
        uint64_t generation;
        memcpy(&h, image, sizeof(h));
        generation = h.base + at / 512 - 1;
        memcpy(image + at + 8, &generation, sizeof(generation));
    }
}

static uint64_t now(void *arg)
{
    return *(uint64_t *)arg += 10000;
}

static void done(void *arg, int result)
{
    *(int *)arg = result;
}

static struct kv_store *open_store(struct disk *d, uint64_t *clock)
{
    const struct kv_store_options options = {
        .folder = "memory",
        .name = "test",
        .identity = &identity,
        .files = &d->files,
        .bytes_max = 512 << 10,
        .now_ms = now,
        .now_arg = clock,
    };
    struct kv_store *s = NULL;
    struct fmt_error err = {""};
    n_found = 0;
    int rc = kv_store_open(&options, on_block, NULL, &s, &err);
    if (rc < 0 && err.text[0] == '\0') {
        abort();
    }
    return rc < 0 ? NULL : s;
}

/* What is named is read, forgotten, written over and purged. */
static void use_store(struct kv_store *s)
{
    static uint8_t block[6400];
    int result = 1, flushed = 1;
    for (uint32_t i = 0; i < n_found; i++) {
        kv_store_verify(s, &found[i]);
        found[i].flags ^= KV_BLOCK_PINNED;
        if (i % 3 == 0) {
            kv_store_forget(s, &found[i]);
        } else if (i % 3 == 1) {
            kv_store_flag(s, &found[i]);
        }
    }
    struct kv_store_write w = {.data = block, .done = done, .arg = &result};
    struct kv_store_call call = {.done = done, .arg = &flushed};
    w.block.key.low = 77;
    kv_store_write(s, &w);
    kv_store_flush(s, &call);
    if (result > 0 || flushed > 0) {
        abort();
    }
    if (result == 0 && kv_store_verify(s, &w.block) != 0) {
        abort();
    }
    call.blocks = n_found > 1 ? &found[1] : NULL;
    call.n_blocks = 1;
    kv_store_purge(s, &call);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static struct disk *d;
    uint64_t clock = 0;
    if (bytes < 3 || bytes - 3 > DISK_FILE_BYTES / 2) {
        return 0;
    }
    if (d == NULL) {
        d = disk_create();
    }
    d->n_names = d->n_files = 0;
    uint8_t *image = malloc(bytes - 3 + 1);
    if (image == NULL) {
        return 0;
    }
    memcpy(image, data + 3, bytes - 3);
    put_right(image, bytes - 3, data[0]);
    set_file(d, "test.index", image, bytes - 3);
    set_file(d, "test.c0", NULL, data[1] % N_SLOTS * 8192u + data[1] / N_SLOTS * 700u);
    set_file(d, "test.c1", NULL, data[2] % N_SLOTS * 4096u + data[2] / N_SLOTS * 400u);
    free(image);
    for (int round = 0; round < 2; round++) {
        struct kv_store *s = open_store(d, &clock);
        if (s == NULL) {
            break;
        }
        use_store(s);
        kv_store_close(s);
    }
    return 0;
}
