/* How long a block store of 10 GiB takes to open, and how fast blocks are written.
 *
 *   bench_store [FOLDER]     (default: a temporary folder under /tmp)
 *
 * The store that is opened is sparse: an index as long as that of 10 GiB, and data files with no
 * data in them, since opening reads none. Blocks that are written go through the io thread as the
 * daemon's do, synced. */
#include "daemon/kv/store_format.h"

#include <errno.h>
#include <fcntl.h>
#include <semaphore.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define STORE_BYTES (10ull << 30)
#define N_WRITES    128u

static char folder[4096];

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void need(int rc, const char *what)
{
    if (rc < 0) {
        fprintf(stderr, "bench_store: %s: %s\n", what, strerror(-rc));
        exit(1);
    }
}

static const char *path_of(const char *name)
{
    static char path[4200];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    return path;
}

static void remove_files(void)
{
    static const char *const names[] = {"bench.index", "bench.c0", "bench.lock", "bench.index.new"};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        unlink(path_of(names[i]));
    }
}

static void make_index(const struct kv_store_identity *id, uint32_t n_blocks)
{
    FILE *f = fopen(path_of("bench.index"), "we");
    union {
        struct store_header header;
        struct store_record record;
    } sector;
    if (f == NULL || fchmod(fileno(f), 0600) < 0) {
        need(-errno, "bench.index");
    }
    store_header_make(&sector.header, id, 42, 1);
    fwrite(&sector, sizeof(sector), 1, f);
    for (uint32_t i = 0; i < n_blocks; i++) {
        struct kv_store_block b = {.key = {i + 1, i}, .parent = {i, i}, .slot = i, .position = i};
        store_put_make(&sector.record, &b, id->block_bytes[0]);
        store_record_seal(&sector.record, 42, 1 + (uint64_t)i);
        fwrite(&sector, sizeof(sector), 1, f);
    }
    if (fclose(f) != 0) {
        need(-EIO, "bench.index");
    }
}

static void make_data(uint64_t bytes)
{
    int fd = open(path_of("bench.c0"), O_CREAT | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 || ftruncate(fd, (off_t)bytes) < 0) {
        need(-errno, "bench.c0");
    }
    close(fd);
}

static void count(void *arg, const struct kv_store_block *block)
{
    (*(uint32_t *)arg)++;
}

static struct kv_store *open_store(const struct kv_store_identity *id, struct io *io,
                                   uint32_t *ret_n)
{
    const struct kv_store_options options = {.folder = folder,
                                             .name = "bench",
                                             .identity = id,
                                             .io = io,
                                             .bytes_max = STORE_BYTES + (1ull << 30)};
    struct kv_store *s;
    struct fmt_error err;
    *ret_n = 0;
    int rc = kv_store_open(&options, count, ret_n, &s, &err);
    need(rc, err.text);
    return s;
}

static void bench_open(uint64_t block_bytes)
{
    struct kv_store_identity id = {
        .layout_version = 1, .n_classes = 1, .block_bytes = {block_bytes}};
    uint32_t n_blocks = (uint32_t)(STORE_BYTES / block_bytes), n;
    make_index(&id, n_blocks);
    make_data(n_blocks * block_bytes);
    for (int round = 0; round < 3; round++) {
        double start = now_s();
        struct kv_store *s = open_store(&id, NULL, &n);
        double seconds = now_s() - start;
        printf("open   10 GiB, blocks of %7llu bytes: %7u blocks, index %6.1f MB, %7.1f ms\n",
               (unsigned long long)block_bytes, n, (n_blocks + 1) * 512e-6, 1e3 * seconds);
        kv_store_close(s);
        need(n == n_blocks ? 0 : -EIO, "blocks are missing");
    }
    remove_files();
}

static void on_done(void *arg, int result)
{
    need(result, "a write");
    sem_post(arg);
}

static void bench_write(uint64_t block_bytes)
{
    struct kv_store_identity id = {
        .layout_version = 1, .n_classes = 1, .block_bytes = {block_bytes}};
    static struct kv_store_write writes[N_WRITES];
    struct kv_store_stats f;
    struct io *io = NULL;
    uint32_t n;
    sem_t done;
    unsigned char *data = malloc(block_bytes);
    need(data != NULL ? io_create(false, &io) : -ENOMEM, "the io thread");
    memset(data, 0x5a, block_bytes);
    sem_init(&done, 0, 0);
    struct kv_store *s = open_store(&id, io, &n);
    double start = now_s();
    for (uint32_t i = 0; i < N_WRITES; i++) {
        writes[i] = (struct kv_store_write){.data = data, .done = on_done, .arg = &done};
        writes[i].block.key = (struct kv_key){i + 1, i};
        need(kv_store_write(s, &writes[i]), "a write");
    }
    for (uint32_t i = 0; i < N_WRITES; i++) {
        while (sem_wait(&done) < 0) {
        }
    }
    double seconds = now_s() - start;
    kv_store_stats(s, &f);
    start = now_s();
    for (uint32_t i = 0; i < N_WRITES; i++) {
        need(kv_store_verify(s, &writes[i].block), "verify");
    }
    double verify_s = now_s() - start;
    double bytes = (double)f.bytes_data_written;
    printf("write  %u blocks of %7llu bytes: %6.0f MB/s synced in %llu batches, %.4f bytes written "
           "per byte; verify %.1f GB/s\n",
           N_WRITES, (unsigned long long)block_bytes, 1e-6 * bytes / seconds,
           (unsigned long long)f.n_batches, (bytes + (double)f.bytes_index_written) / bytes,
           1e-9 * bytes / verify_s);
    kv_store_close(s);
    io_destroy(io);
    sem_destroy(&done);
    free(data);
    remove_files();
}

int main(int argc, char **argv)
{
    snprintf(folder, sizeof(folder), "%s", argc > 1 ? argv[1] : "/tmp/gqad-bench-XXXXXX");
    if (argc <= 1 && mkdtemp(folder) == NULL) {
        need(-errno, folder);
    }
    bench_open(22 * 65536);
    bench_open(65536);
    bench_write(22 * 65536);
    bench_write(65536);
    if (argc <= 1) {
        rmdir(folder);
    }
    return 0;
}
