/* The block store, on real files through the io thread, and on files in memory. */
#include "tests/unit/kv/rig.h"

#include "daemon/kv/guard.h"
#include "daemon/kv/store_internal.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static struct rig rig; /* large; each test runs in a process of its own */
static struct io *io;

static void begin(void)
{
    cr_assert(eq(int, io_create(false, &io), 0));
    rig_init_folder(&rig, io);
}

static void finish(void)
{
    rig_finish(&rig);
    io_destroy(io);
}

static void reopen(void)
{
    rig_close(&rig);
    int rc = rig_open(&rig);
    cr_assert(eq(int, rc, 0), "%s", rig.err.text);
}

static void expect_right(void)
{
    const char *wrong = rig_check(&rig);
    cr_expect(wrong == NULL, "%s", wrong);
}

static const char *path_of(const char *name)
{
    static char path[128];
    snprintf(path, sizeof(path), "%s/%s", rig.folder, name);
    return path;
}

static bool exists(const char *name)
{
    return access(path_of(name), F_OK) == 0;
}

TestSuite(kv_store, .timeout = 60);

Test(kv_store, what_is_written_is_found_and_verifies)
{
    struct kv_store_stats f;
    begin();
    cr_assert(eq(int, rig_open(&rig), 0), "%s", rig.err.text);
    cr_expect(eq(uint, rig.n_found, 0));
    cr_expect(eq(int, rig_write(&rig, 1, 20), 0));
    for (unsigned k = 1; k <= 20; k++) {
        cr_expect(eq(int, rig_verify(&rig, k), 0), "block %u", k);
        kv_store_will_need(rig.store, &rig.blocks[k]);
        cr_expect(not(kv_store_marked(rig.store, &rig.blocks[k])));
    }
    kv_store_stats(rig.store, &f);
    cr_expect(eq(int, (int)f.state, KV_STORE_OK));
    cr_expect(eq(u64, f.n_blocks, 20));
    cr_expect(eq(u64, f.bytes_live, 10 * 6400 + 10 * 2048));
    cr_expect(eq(u64, f.bytes_data_written, f.bytes_live));
    cr_expect(eq(u64, f.bytes_files <= f.bytes_max, 1));
    reopen();
    cr_expect(eq(uint, rig.n_found, 20));
    for (unsigned i = 0; i < 20; i++) {
        cr_expect(eq(uint, rig.found_order[i], i + 1), "in the order of writing");
    }
    expect_right();
    finish();
}

Test(kv_store, folder_and_files_are_private)
{
    struct stat st;
    begin();
    rmdir(rig.folder);
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 2), 0));
    cr_expect(eq(int, stat(rig.folder, &st), 0));
    cr_expect(eq(uint, st.st_mode & 07777, 0700));
    static const char *const names[] = {"test.index", "test.c0", "test.c1", "test.lock"};
    for (size_t i = 0; i < 4; i++) {
        cr_expect(eq(int, stat(path_of(names[i]), &st), 0), "%s", names[i]);
        cr_expect(eq(uint, st.st_mode & 07777, 0600), "%s", names[i]);
    }
    cr_expect(not(exists("test.index.new")));
    for (size_t i = 0; i < 4; i++) {
        rig_close(&rig);
        cr_expect(eq(int, chmod(path_of(names[i]), 0640), 0));
        int rc = rig_open(&rig);
        cr_expect(eq(int, rc, -EPERM), "%s", names[i]);
        cr_expect(strstr(rig.err.text, names[i]) != NULL, "%s", rig.err.text);
        cr_expect(eq(int, chmod(path_of(names[i]), 0600), 0));
    }
    cr_expect(eq(int, chmod(rig.folder, 0710), 0));
    cr_expect(eq(int, rig_open(&rig), -EPERM));
    cr_expect(eq(int, chmod(rig.folder, 0700), 0));
    cr_expect(eq(int, rig_open(&rig), 0));
    expect_right();
    finish();
}

Test(kv_store, one_process_at_a_time)
{
    static struct rig other;
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 2), 0));
    rig_init(&other, NULL);
    strcpy(other.folder, rig.folder);
    cr_expect(eq(int, rig_open(&other), -EWOULDBLOCK));
    cr_expect(strstr(other.err.text, "another process") != NULL, "%s", other.err.text);
    rig_close(&rig);
    cr_expect(eq(int, rig_open(&other), 0));
    cr_expect(eq(uint, other.n_found, 2));
    rig_close(&other);
    finish();
}

/* ---- slots --------------------------------------------------------------------------------- */

/* The bound holds, and forgotten slots are used again. */
Test(kv_store, full_and_used_again)
{
    struct kv_store_stats f;
    begin();
    rig.bytes_max = 256 << 10;
    cr_assert(eq(int, rig_open(&rig), 0));
    unsigned n = 0;
    while (n < 100 && rig_write(&rig, 2 * n + 1, 1) == 0) {
        n++;
    }
    cr_expect(eq(int, rig.results[2 * n + 1], -EDQUOT));
    kv_store_stats(rig.store, &f);
    cr_expect(eq(int, (int)f.state, KV_STORE_OK), "%s", f.sentence);
    cr_expect(le(u64, f.bytes_files, rig.bytes_max));
    cr_expect(ge(uint, n, 20));
    cr_expect(eq(u64, f.n_room[0], 0));
    for (unsigned round = 0; round < 4; round++) {
        for (unsigned i = 0; i < 5; i++) {
            rig_forget(&rig, 2 * (round * 5 + i) + 1);
        }
        cr_expect(eq(int, rig_flush(&rig), 0));
        kv_store_stats(rig.store, &f);
        cr_expect(eq(u64, f.n_room[0], 5));
        for (unsigned i = 0; i < 5; i++) {
            cr_expect(eq(int, rig_write(&rig, 2 * (n + round * 5 + i) + 1, 1), 0));
        }
    }
    expect_right();
    reopen();
    cr_expect(eq(uint, rig.n_found, n));
    expect_right();
    finish();
}

Test(kv_store, forgetting_twice_or_nothing_is_harmless)
{
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 4), 0));
    rig_forget(&rig, 1);
    rig_forget(&rig, 1);
    struct kv_store_block nowhere = {.layer_class = 1, .slot = 20};
    kv_store_forget(rig.store, &nowhere);
    nowhere.layer_class = 7;
    kv_store_forget(rig.store, &nowhere);
    nowhere = (struct kv_store_block){.slot = UINT32_MAX};
    kv_store_forget(rig.store, &nowhere);
    kv_store_use(rig.store, &nowhere);
    kv_store_flag(rig.store, &nowhere);
    cr_expect(eq(int, kv_store_verify(rig.store, &nowhere), -EBADMSG));
    cr_expect(eq(int, rig_flush(&rig), 0));
    rig_forget(&rig, 1);
    cr_expect(eq(int, rig_flush(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 5, 4), 0));
    reopen();
    cr_expect(eq(uint, rig.n_found, 7));
    expect_right();
    struct kv_store_write w = {.block = {.layer_class = 2}};
    cr_expect(eq(int, kv_store_write(rig.store, &w), -EINVAL));
    finish();
}

/* ---- what the index keeps -------------------------------------------------------------------- */

static void change(unsigned k, uint32_t hits, uint64_t used_s)
{
    rig.blocks[k].hits = hits;
    rig.blocks[k].used_s = used_s;
    kv_store_use(rig.store, &rig.blocks[k]);
}

static void expect_kept(unsigned k, uint32_t hits, uint64_t used_s, uint32_t flags)
{
    cr_assert(rig.found[k]);
    cr_expect(eq(u32, rig.blocks[k].hits, hits), "block %u", k);
    cr_expect(eq(u64, rig.blocks[k].used_s, used_s), "block %u", k);
    cr_expect(eq(u32, rig.blocks[k].flags, flags), "block %u", k);
}

static void pin(unsigned k)
{
    rig.blocks[k].flags |= KV_BLOCK_PINNED;
    kv_store_flag(rig.store, &rig.blocks[k]);
}

Test(kv_store, uses_and_pins_are_kept)
{
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 60), 0));
    for (unsigned k = 1; k <= 50; k++) {
        change(k, 100 + k, 5000 + k);
    }
    pin(3);
    pin(4);
    reopen(); /* close keeps them */
    for (unsigned k = 1; k <= 60; k++) {
        uint32_t flags =
            (k % 3 == 0 ? KV_BLOCK_GENERATED : 0) | (k == 3 || k == 4 ? KV_BLOCK_PINNED : 0);
        expect_kept(k, k <= 50 ? 100 + k : k, k <= 50 ? 5000 + k : 1000 + k, flags);
    }
    change(7, 1, 2); /* and a rewrite */
    ((struct kv_store *)rig.store)->rewrite_slack = 0;
    for (unsigned k = 61; k < 130; k++) {
        rig_forget(&rig, k - 20);
        cr_expect(eq(int, rig_write(&rig, k, 1), 0));
    }
    struct kv_store_stats f;
    kv_store_stats(rig.store, &f);
    cr_expect(lt(u64, 0, f.n_rewrites));
    reopen();
    expect_kept(7, 1, 2, 0);
    expect_kept(3, 103, 5003, KV_BLOCK_GENERATED | KV_BLOCK_PINNED);
    expect_right();
    finish();
}

/* Pins at once, uses when a minute has passed: a copy of the index shows what a crash would leave.
 */
Test(kv_store, pins_at_once_and_uses_after_a_while)
{
    struct disk *disk = disk_create(), *crashed = disk_create();
    static struct rig after;
    rig_init(&rig, disk);
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 4), 0));
    pin(1);
    change(2, 77, 78);
    cr_expect(eq(int, rig_write(&rig, 5, 1), 0));
    change(3, 87, 88);
    cr_expect(eq(int, rig_write(&rig, 6, 1), 0));
    disk_copy(disk, crashed);
    rig_init(&after, crashed);
    cr_assert(eq(int, rig_open(&after), 0));
    cr_expect(eq(u32, after.blocks[1].flags, KV_BLOCK_PINNED));
    cr_expect(eq(u32, after.blocks[3].hits, 3), "not yet");
    rig_finish(&after);

    rig.now_ms += STORE_USES_MS;
    cr_expect(eq(int, rig_write(&rig, 7, 1), 0));
    disk_copy(disk, crashed);
    rig_init(&after, crashed);
    cr_assert(eq(int, rig_open(&after), 0));
    cr_expect(eq(u32, after.blocks[3].hits, 87));
    rig_finish(&after);
    rig_finish(&rig);
    disk_destroy(disk);
    disk_destroy(crashed);
}

Test(kv_store, dead_records_do_not_pile_up)
{
    struct kv_store_stats f;
    struct stat st;
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    for (unsigned round = 0; round < 60; round++) {
        for (unsigned k = 1; k <= 10; k++) {
            if (rig.status[k] == RIG_STORED) {
                rig_forget(&rig, k);
            }
        }
        cr_expect(eq(int, rig_flush(&rig), 0));
        cr_assert(eq(int, rig_write(&rig, 1, 10), 0));
    }
    kv_store_stats(rig.store, &f);
    cr_expect(lt(u64, 2, f.n_rewrites));
    cr_expect(eq(int, stat(path_of("test.index"), &st), 0));
    cr_expect(lt(u64, (uint64_t)st.st_size, 256 << 10));
    reopen();
    cr_expect(eq(uint, rig.n_found, 10));
    expect_right();
    finish();
}

/* ---- the ratio ------------------------------------------------------------------------------- */

Test(kv_store, little_more_is_written_than_cached)
{
    struct kv_store_stats f;
    begin();
    rig.identity.block_bytes[0] = 256 << 10;
    rig.identity.block_bytes[1] = 64 << 10;
    rig.bytes_max = 64 << 20;
    cr_assert(eq(int, rig_open(&rig), 0));
    for (unsigned k = 1; k <= 200; k += 8) {
        for (unsigned i = 0; i < 8 && k > 100; i++) {
            rig_forget(&rig, k + i - 100);
        }
        cr_assert(eq(int, rig_write(&rig, k, 8), 0));
    }
    kv_store_stats(rig.store, &f);
    cr_expect(eq(u64, f.bytes_data_written, 100 * (256 << 10) + 100 * (64 << 10)));
    cr_expect(
        lt(u64, f.bytes_data_written + f.bytes_index_written, f.bytes_data_written * 11 / 10));
    expect_right();
    reopen();
    expect_right();
    finish();
}

/* ---- set aside ------------------------------------------------------------------------------- */

static void reopen_as(unsigned n_found, const char *what)
{
    rig_close(&rig);
    int rc = rig_open(&rig);
    cr_assert(eq(int, rc, 0), "%s: %s", what, rig.err.text);
    cr_expect(eq(uint, rig.n_found, n_found), "%s", what);
    cr_expect(eq(uint, rig.n_strange, 0), "%s", what);
    if (n_found == 0) {
        cr_expect(eq(int, rig_write(&rig, 1, 3), 0));
    }
}

static void damage(const char *name, off_t offset)
{
    unsigned char byte;
    int fd = open(path_of(name), O_RDWR | O_CLOEXEC);
    cr_assert(ge(int, fd, 0));
    cr_assert(eq(int, (int)pread(fd, &byte, 1, offset), 1));
    byte ^= 0x40;
    cr_assert(eq(int, (int)pwrite(fd, &byte, 1, offset), 1));
    close(fd);
}

Test(kv_store, what_is_not_of_this_identity_is_set_aside)
{
    struct kv_store_stats f;
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 3), 0));
    rig.identity.id[3] ^= 1;
    reopen_as(0, "another identity");
    cr_expect(exists("test.aside-1.index") && exists("test.aside-1.c0"));
    kv_store_stats(rig.store, &f);
    cr_expect(lt(u64, 6400, f.bytes_aside));
    rig.identity.layout_version++;
    reopen_as(0, "another layout");
    cr_expect(exists("test.aside-2.index") && exists("test.aside-2.c1"));
    rig.identity.block_bytes[1] += 64;
    reopen_as(0, "other sizes");
    cr_expect(exists("test.aside-3.index") && exists("test.aside-2.index"));
    cr_expect(not(exists("test.aside-1.index") || exists("test.aside-1.c0")));
    rig_close(&rig);
    damage("test.index", 300);
    reopen_as(0, "a damaged header");
    rig_close(&rig);
    damage("test.index", 8);
    reopen_as(0, "another version");
    rig_close(&rig);
    cr_expect(eq(int, truncate(path_of("test.index"), 100), 0));
    reopen_as(0, "a short index");
    rig_close(&rig);
    cr_expect(eq(int, truncate(path_of("test.index"), 0), 0));
    reopen_as(0, "an empty index");
    reopen_as(3, "the same");
    cr_expect(eq(int, rig_purge(&rig, 0), 0));
    cr_expect(not(exists("test.aside-6.index") || exists("test.aside-7.index")));
    kv_store_stats(rig.store, &f);
    cr_expect(eq(u64, f.bytes_aside, 0));
    finish();
}

/* Space goes to blocks that can be used. */
Test(kv_store, what_is_set_aside_gives_way)
{
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    for (unsigned k = 1; k < 80; k += 2) {
        cr_expect(eq(int, rig_write(&rig, k, 1), 0));
    }
    rig.identity.id[0]++;
    memset(rig.status, 0, sizeof(rig.status));
    reopen_as(0, "another identity");
    cr_expect(exists("test.aside-1.index"));
    for (unsigned k = 5; k < 60; k += 2) {
        cr_expect(eq(int, rig_write(&rig, k, 1), 0));
    }
    cr_expect(not(exists("test.aside-1.index")));
    expect_right();
    finish();
}

/* ---- files that changed ---------------------------------------------------------------------- */

Test(kv_store, a_damaged_record_costs_one_block)
{
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 10), 0));
    rig_close(&rig);
    damage("test.index", 512 * 5 + 300);
    rig.status[5] = RIG_FORGOTTEN;
    reopen_as(9, "one record");
    expect_right();
    cr_expect(eq(int, rig_write(&rig, 11, 5), 0));
    reopen();
    cr_expect(eq(uint, rig.n_found, 14));
    expect_right();
    struct kv_store_stats f;
    kv_store_stats(rig.store, &f);
    cr_expect(eq(u64, f.n_records_refused, 0), "the index was written anew");
    finish();
}

Test(kv_store, damaged_data_does_not_verify)
{
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 10), 0));
    damage("test.c0", (off_t)rig.blocks[3].slot * 8192 + 6399);
    damage("test.c0", (off_t)rig.blocks[5].slot * 8192 + 6400); /* behind the block's end */
    cr_expect(eq(int, rig_verify(&rig, 1), 0));
    cr_expect(eq(int, rig_verify(&rig, 3), -EBADMSG));
    cr_expect(eq(int, rig_verify(&rig, 5), 0));
    finish();
}

Test(kv_store, data_files_that_went_away)
{
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 10), 0));
    rig_close(&rig);
    cr_expect(eq(int, unlink(path_of("test.c1")), 0));
    for (unsigned k = 2; k <= 10; k += 2) {
        rig.status[k] = RIG_FORGOTTEN;
    }
    reopen_as(5, "without c1");
    expect_right();
    rig_close(&rig);
    cr_expect(eq(int, truncate(path_of("test.c0"), 2 * 8192), 0));
    for (unsigned k = 1; k <= 10; k++) {
        rig.status[k] = rig.blocks[k].slot < 2 && k % 2 == 1 ? RIG_STORED : RIG_FORGOTTEN;
    }
    reopen_as(2, "a short c0");
    expect_right();
    cr_expect(eq(int, rig_write(&rig, 11, 8), 0));
    expect_right();
    rig_close(&rig);
    cr_expect(eq(int, unlink(path_of("test.index")), 0));
    memset(rig.status, 0, sizeof(rig.status));
    reopen_as(0, "without an index");
    expect_right();
    finish();
}

Test(kv_store, a_smaller_bound_cuts)
{
    struct kv_store_stats f;
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    for (unsigned k = 1; k < 60; k += 2) {
        cr_expect(eq(int, rig_write(&rig, k, 1), 0));
    }
    rig.bytes_max = 100 << 10;
    rig_close(&rig);
    for (unsigned k = 1; k < 60; k += 2) {
        rig.status[k] = rig.blocks[k].slot < (100 << 10) / 8192 ? RIG_STORED : RIG_FORGOTTEN;
    }
    reopen_as(12, "a smaller bound");
    kv_store_stats(rig.store, &f);
    cr_expect(eq(u64, f.n_room[1], 0));
    expect_right();
    finish();
}

/* ---- purge ----------------------------------------------------------------------------------- */

/* Whether a file of the folder holds these bytes. */
static bool folder_holds(const void *bytes, size_t n)
{
    static const char *const names[] = {"test.index", "test.c0", "test.c1", "test.index.new"};
    bool holds = false;
    for (size_t i = 0; i < 4; i++) {
        int fd = open(path_of(names[i]), O_RDONLY | O_CLOEXEC);
        struct stat st;
        if (fd < 0 || fstat(fd, &st) < 0) {
            continue;
        }
        char *data = malloc((size_t)st.st_size + 1);
        ssize_t got = pread(fd, data, (size_t)st.st_size, 0);
        holds |= got > 0 && memmem(data, (size_t)got, bytes, n) != NULL;
        free(data);
        close(fd);
    }
    return holds;
}

static bool holds_block(unsigned k)
{
    unsigned char canary[32];
    struct kv_store_block b;
    rig_canary(k, canary);
    rig_block(k, &b);
    return folder_holds(canary, sizeof(canary)) || folder_holds(b.tokens, sizeof(b.tokens));
}

Test(kv_store, purged_is_gone_from_the_files)
{
    begin();
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 12), 0));
    rig_forget(&rig, 5);
    cr_expect(eq(int, rig_flush(&rig), 0));
    for (unsigned k = 1; k <= 12; k++) {
        cr_expect(holds_block(k), "block %u", k);
    }
    cr_expect(eq(int, rig_purge(&rig, 4), 0));
    for (unsigned k = 1; k <= 12; k++) {
        cr_expect(eq(int, holds_block(k), k != 4 && k != 5), "block %u", k);
    }
    expect_right();
    cr_expect(eq(int, rig_write(&rig, 13, 4), 0));
    reopen();
    cr_expect(eq(uint, rig.n_found, 14));
    expect_right();
    cr_expect(eq(int, rig_purge(&rig, 0), 0));
    for (unsigned k = 1; k <= 16; k++) {
        cr_expect(not(holds_block(k)), "block %u", k);
    }
    cr_expect(eq(int, rig_write(&rig, 20, 4), 0));
    reopen();
    cr_expect(eq(uint, rig.n_found, 4));
    expect_right();
    finish();
}

/* ---- ends ------------------------------------------------------------------------------------ */

Test(kv_store, close_with_a_full_queue_answers_every_write)
{
    begin();
    for (int round = 0; round < 20; round++) {
        memset(rig.status, 0, sizeof(rig.status));
        cr_assert(eq(int, rig_open(&rig), 0));
        for (unsigned k = 1; k <= 40; k++) {
            rig_queue(&rig, k);
        }
        rig_close(&rig);
        for (unsigned k = 1; k <= 40; k++) {
            cr_expect(rig.status[k] == RIG_STORED, "block %u: %d", k, rig.results[k]);
        }
        cr_assert(eq(int, rig_open(&rig), 0));
        cr_expect(eq(uint, rig.n_found, 40));
        expect_right();
        cr_expect(eq(int, rig_purge(&rig, 0), 0));
        rig_close(&rig);
    }
    finish();
}

struct closing {
    struct rig *rig;
    sem_t done;
};

static int close_there(void *arg)
{
    rig_close(((struct closing *)arg)->rig);
    return 0;
}

static void closed_there(void *arg, int result)
{
    sem_post(&((struct closing *)arg)->done);
}

/* Closed on the io thread, while a call of the store's own is still behind it in the queue. */
Test(kv_store, close_on_the_io_thread)
{
    begin();
    for (int round = 0; round < 50; round++) {
        struct closing c = {.rig = &rig};
        struct io_call_job job = {.fn = close_there, .done = closed_there, .arg = &c};
        sem_init(&c.done, 0, 0);
        cr_assert(eq(int, rig_open(&rig), 0));
        for (unsigned k = 1; k <= 3; k++) {
            if (rig.found[k]) {
                rig_forget(&rig, k);
            }
            rig_queue(&rig, k);
        }
        cr_assert(eq(int, io_submit_call(io, &job), 0));
        while (sem_wait(&c.done) < 0) {
        }
        sem_destroy(&c.done);
        for (unsigned k = 1; k <= 3; k++) {
            cr_expect(rig.status[k] == RIG_STORED, "block %u: %d", k, rig.results[k]);
        }
    }
    cr_assert(eq(int, rig_open(&rig), 0));
    expect_right();
    finish();
}

Test(kv_store, options_out_of_range)
{
    static const char *const names[] = {
        "",         "a/b",
        "..",       "a b",
        "\xc3\xa9", "0123456789012345678901234567890123456789012345678901234567890123456789"};
    struct kv_store *s = NULL;
    struct fmt_error err;
    begin();
    struct kv_store_options o = {
        .folder = rig.folder, .name = "x", .identity = &rig.identity, .bytes_max = 1 << 20};
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        o.name = names[i];
        cr_expect(eq(int, kv_store_open(&o, NULL, NULL, &s, &err), -EINVAL), "%s", names[i]);
    }
    o.name = "x";
    static const uint64_t bounds[] = {0, 4096, 6400, 10000, UINT64_MAX};
    for (size_t i = 0; i < 5; i++) {
        o.bytes_max = bounds[i];
        cr_expect(eq(int, kv_store_open(&o, NULL, NULL, &s, &err), -EINVAL), "%zu", i);
    }
    o.bytes_max = 1 << 20;
    rig.identity.block_bytes[1] = 0;
    cr_expect(eq(int, kv_store_open(&o, NULL, NULL, &s, &err), -EINVAL));
    rig.identity.n_classes = 9;
    cr_expect(eq(int, kv_store_open(&o, NULL, NULL, &s, &err), -EINVAL));
    rig.identity.n_classes = 0;
    cr_expect(eq(int, kv_store_open(&o, NULL, NULL, &s, &err), -EINVAL));
    cr_expect(s == NULL);
    kv_store_close(NULL);
    finish();
}
