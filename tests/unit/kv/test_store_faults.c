/* The block store when things fail: the Nth operation of every kind in turn, a disk without space,
 * files that shrink while they are mapped, memory that is not there. */
#include "tests/unit/kv/rig.h"

#include "daemon/kv/guard.h"
#include "daemon/kv/store_internal.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static struct rig rig;

/* Allocations until one fails; negative: none does. The linker wraps calloc for this program. */
static int allocations = -1;
void *__real_calloc(size_t n, size_t bytes);
void *__wrap_calloc(size_t n, size_t bytes);

void *__wrap_calloc(size_t n, size_t bytes)
{
    return allocations >= 0 && allocations-- == 0 ? NULL : __real_calloc(n, bytes);
}

static const char *const fault_names[DISK_N_FAULTS] = {
    "open",   "read",   "write",       "sync", "allocate", "truncate", "punch",
    "rename", "unlink", "sync_folder", "list", "map",      "size"};

static void fail_from(struct disk *d, unsigned mask, long nth, long n, int code)
{
    d->fail_mask = mask;
    d->countdown = nth;
    d->n_failures = n;
    d->code = code;
    d->n_failed = 0;
}

static void never_fail(struct disk *d)
{
    d->countdown = -1;
}

static void expect_right(const char *what, long nth)
{
    const char *wrong = rig_check(&rig);
    cr_expect(wrong == NULL, "%s %ld: %s", what, nth, wrong);
}

/* A life of a store: writes, reuse of slots, a new index, a purge, opening again. Opens that fail
 * are tried again, as the daemon does. */
static void live(struct disk *d, int code)
{
    int rc = rig_open(&rig);
    if (rc < 0) {
        cr_expect(rig.err.text[0] != '\0');
        cr_expect(eq(int, rc, code), "%s", rig.err.text);
        rc = rig_open(&rig);
    }
    if (rc < 0) {
        return;
    }
    rig.store->rewrite_slack = 4;
    rig_write(&rig, 1, 6);
    rig.now_ms += 10000;
    for (unsigned k = 1; k <= 3; k++) {
        if (rig.status[k] == RIG_STORED) {
            rig_forget(&rig, k);
        }
    }
    rig_flush(&rig);
    rig.now_ms += 10000;
    rig_write(&rig, 7, 4);
    rig.now_ms += 10000;
    if (rig.status[7] == RIG_STORED) {
        rig.blocks[7].flags |= KV_BLOCK_PINNED;
        kv_store_flag(rig.store, &rig.blocks[7]);
    }
    if (rig.status[8] == RIG_STORED) {
        rig_purge(&rig, 8);
    }
    rig.now_ms += 10000;
    rig_write(&rig, 11, 3);
    rig_close(&rig);
}

/* One failure of each kind at each place: every life goes on, and what was promised holds. */
static void fail_each(enum disk_fault kind, int code, long n_failures)
{
    for (long nth = 0;; nth++) {
        struct disk *d = disk_create();
        rig_init(&rig, d);
        rig.bytes_max = 256 << 10;
        fail_from(d, 1u << kind, nth, n_failures, code);
        live(d, code);
        bool reached = d->n_failed > 0;
        never_fail(d);
        if (rig.store == NULL) {
            int rc = rig_open(&rig);
            cr_assert(eq(int, rc, 0), "%s %ld: %s", fault_names[kind], nth, rig.err.text);
        }
        expect_right(fault_names[kind], nth);
        /* The disk is well again: after the pause everything is taken. */
        rig.now_ms += 10000;
        int rc = rig_write(&rig, 20, 6);
        cr_expect(eq(int, rc, 0), "%s %ld: %d", fault_names[kind], nth, rc);
        struct kv_store_stats f;
        kv_store_stats(rig.store, &f);
        cr_expect(eq(int, (int)f.state, KV_STORE_OK));
        expect_right(fault_names[kind], nth);
        rig_close(&rig);
        cr_assert(eq(int, rig_open(&rig), 0));
        expect_right(fault_names[kind], nth);
        rig_finish(&rig);
        disk_destroy(d);
        if (!reached) {
            cr_expect(nth > 0 || kind == DISK_FAULT_TRUNCATE || kind == DISK_FAULT_UNLINK,
                      "no %s was seen", fault_names[kind]);
            break;
        }
        cr_assert(lt(int, (int)nth, 1000));
    }
}

TestSuite(kv_store_faults, .timeout = 120);

Test(kv_store_faults, every_operation_fails_once)
{
    static const int codes[] = {-EIO, -ENOSPC, -EROFS, -ENOMEM};
    for (int kind = 0; kind < DISK_N_FAULTS; kind++) {
        for (size_t i = 0; i < sizeof(codes) / sizeof(codes[0]); i++) {
            fail_each((enum disk_fault)kind, codes[i], 1);
        }
    }
}

Test(kv_store_faults, every_operation_fails_a_while)
{
    for (int kind = 0; kind < DISK_N_FAULTS; kind++) {
        fail_each((enum disk_fault)kind, -EIO, 4);
    }
}

/* ---- a full disk ---------------------------------------------------------------------------- */

Test(kv_store_faults, a_full_disk_pauses_and_resumes)
{
    struct disk *d = disk_create();
    struct kv_store_stats f;
    rig_init(&rig, d);
    cr_assert(eq(int, rig_open(&rig), 0));
    d->bytes_max = 150 << 10;
    unsigned k = 1;
    while (k < 100 && rig_write(&rig, k, 1) == 0) {
        k += 2;
    }
    cr_expect(eq(int, rig.results[k], -ENOSPC));
    cr_expect(ge(uint, k, 5));
    kv_store_stats(rig.store, &f);
    cr_expect(eq(int, (int)f.state, KV_STORE_PAUSED_FULL));
    cr_expect(strstr(f.sentence, "space") != NULL, "%s", f.sentence);
    cr_expect(eq(int, rig_write(&rig, k, 1), -EAGAIN), "not tried while it pauses");
    /* A slot that is free needs no space: dropping is possible on a full disk. */
    rig.now_ms += 1000;
    rig_forget(&rig, 1);
    cr_expect(eq(int, rig_flush(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, k, 1), 0));
    kv_store_stats(rig.store, &f);
    cr_expect(eq(int, (int)f.state, KV_STORE_OK));
    cr_expect(eq(int, rig_write(&rig, k + 2, 1), -ENOSPC));
    d->bytes_max = 0;
    cr_expect(eq(int, rig_write(&rig, k + 2, 1), -EAGAIN));
    rig.now_ms += 1000;
    cr_expect(eq(int, rig_write(&rig, k + 2, 1), 0), "by itself");
    expect_right("full", 0);
    rig_close(&rig);
    cr_assert(eq(int, rig_open(&rig), 0));
    expect_right("full", 1);
    rig_finish(&rig);
    disk_destroy(d);
}

/* The same on a real file system of 1 MiB. */
Test(kv_store_faults, a_small_file_system)
{
    struct io *io;
    rig_init_folder(&rig, NULL);
    if (unshare(CLONE_NEWNS) < 0 || mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
        mount("none", rig.folder, "tmpfs", 0, "size=1m,mode=0700") < 0) {
        rig_finish(&rig);
        cr_skip_test("no file system may be mounted here");
    }
    cr_assert(eq(int, io_create(false, &io), 0));
    rig.io = io;
    rig.bytes_max = 64 << 20;
    cr_assert(eq(int, rig_open(&rig), 0), "%s", rig.err.text);
    unsigned k = 1;
    while (k < RIG_MAX && rig_write(&rig, k, 1) == 0) {
        k++;
    }
    cr_expect(eq(int, rig.results[k], -ENOSPC));
    cr_expect(ge(uint, k, 20));
    expect_right("small", 0);
    for (unsigned i = 1; i <= 10; i++) {
        rig_forget(&rig, i);
    }
    rig.now_ms += 1000;
    cr_expect(eq(int, rig_flush(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, RIG_MAX - 5, 4), 0), "slots that are free");
    rig_close(&rig);
    cr_assert(eq(int, rig_open(&rig), 0), "%s", rig.err.text);
    expect_right("small", 1);
    rig_close(&rig);
    io_destroy(io);
    umount(rig.folder);
    rig_finish(&rig);
}

/* ---- files ---------------------------------------------------------------------------------- */

/* Runs fn as somebody without privileges, in a child: root may write anywhere. */
static int as_nobody(int (*fn)(void))
{
    int status;
    pid_t pid = fork();
    cr_assert(ge(int, pid, 0));
    if (pid == 0) {
        if (geteuid() == 0 && (setgid(65534) < 0 || setuid(65534) < 0)) {
            _exit(99);
        }
        _exit(fn());
    }
    cr_assert(eq(int, waitpid(pid, &status, 0), pid));
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static char nobodys[] = "/tmp/gqad-test-XXXXXX";

static int open_read_only(void)
{
    static struct rig r;
    rig_init(&r, NULL);
    strcpy(r.folder, nobodys);
    if (chmod(nobodys, 0500) < 0) {
        return 98;
    }
    int rc = rig_open(&r);
    chmod(nobodys, 0700);
    if (rc != -EACCES || r.err.text[0] == '\0') {
        return 1;
    }
    rc = rig_open(&r); /* later */
    if (rc != 0 || rig_write(&r, 1, 2) != 0) {
        return 2;
    }
    rig_finish(&r);
    return 0;
}

Test(kv_store_faults, a_read_only_folder)
{
    cr_assert(mkdtemp(nobodys) != NULL);
    if (geteuid() == 0) {
        cr_assert(eq(int, chown(nobodys, 65534, 65534), 0));
    }
    cr_expect(eq(int, as_nobody(open_read_only), 0));
    rmdir(nobodys);
}

/* A data file is cut while it is mapped. The block behind the end cannot be read, which verify says
 * with and without the kernel's help; all else goes on, its slot too. */
Test(kv_store_faults, a_file_that_shrinks_while_mapped)
{
    struct io *io;
    char path[128];
    cr_assert(eq(int, kv_guard_install(), 0));
    cr_assert(eq(int, io_create(false, &io), 0));
    rig_init_folder(&rig, io);
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 20), 0));
    snprintf(path, sizeof(path), "%s/test.c0", rig.folder);
    cr_assert(eq(int, truncate(path, 3 * 8192), 0));
    for (unsigned k = 1; k <= 19; k += 2) {
        bool there = rig.blocks[k].slot < 3;
        cr_expect(eq(int, rig_verify(&rig, k), there ? 0 : -EIO), "block %u", k);
    }
    /* Somebody reads without having asked: zeros, and a mark. */
    const struct kv_store_block *b = &rig.blocks[11];
    const volatile unsigned char *data = kv_store_data(rig.store, b->layer_class, b->slot);
    cr_expect(not(kv_store_marked(rig.store, b)));
    cr_expect(eq(int, data[100], 0));
    cr_expect(kv_store_marked(rig.store, b));
    cr_expect(not(kv_store_marked(rig.store, &rig.blocks[1])));
    cr_expect(eq(int, rig_verify(&rig, 11), -EIO));
    for (unsigned k = 7; k <= 19; k += 2) {
        rig_forget(&rig, k);
    }
    cr_expect(eq(int, rig_flush(&rig), 0));
    for (unsigned k = 101; k <= 131; k += 2) {
        cr_expect(eq(int, rig_write(&rig, k, 1), 0));
    }
    expect_right("shrunk", 0);
    rig_close(&rig);
    cr_assert(eq(int, rig_open(&rig), 0));
    expect_right("shrunk", 1);
    rig_finish(&rig);
    io_destroy(io);
}

static uint64_t bytes_taken;
static unsigned purged_meanwhile; /* 0: none */

/* What the file takes; the first to look is overtaken by a purge. */
static int look(void *self, int fd, uint64_t *ret)
{
    if (purged_meanwhile != 0) {
        unsigned k = purged_meanwhile;
        purged_meanwhile = 0;
        cr_assert(eq(int, rig_purge(&rig, k), 0));
        bytes_taken /= 2;
    }
    *ret = bytes_taken;
    return 0;
}

/* A file that takes less since its dead blocks were punched just while somebody looked was not cut;
 * one that takes less without was. */
Test(kv_store_faults, a_file_that_is_punched_while_looked_at)
{
    struct disk *d = disk_create();
    d->files.allocated = look;
    bytes_taken = 1u << 20;
    rig_init(&rig, d);
    cr_assert(eq(int, rig_open(&rig), 0));
    cr_expect(eq(int, rig_write(&rig, 1, 20), 0));
    cr_expect(kv_store_intact(rig.store));
    uint64_t faults = kv_guard_faults();
    purged_meanwhile = 5;
    cr_expect(kv_store_intact(rig.store));
    cr_expect(eq(u32, purged_meanwhile, 0));
    cr_expect(kv_store_intact(rig.store));
    cr_expect(eq(u64, kv_guard_faults(), faults));
    expect_right("punched", 0);
    bytes_taken /= 2;
    cr_expect(not(kv_store_intact(rig.store)));
    cr_expect(kv_store_marked(rig.store, &rig.blocks[1]));
    rig_finish(&rig);
    disk_destroy(d);
}

/* ---- memory --------------------------------------------------------------------------------- */

Test(kv_store_faults, every_allocation_fails_once)
{
    struct disk *d = disk_create();
    rig_init(&rig, d);
    rig.bytes_max = 1 << 20;
    cr_assert(eq(int, rig_open(&rig), 0));
    for (unsigned k = 2; k <= 300; k += 2) {
        cr_assert(eq(int, rig_write(&rig, k, 1), 0));
    }
    rig_close(&rig);
    int n_failed = 0;
    for (;; n_failed++) {
        allocations = n_failed;
        int rc = rig_open(&rig);
        bool reached = allocations < 0;
        allocations = -1;
        if (!reached) {
            cr_expect(eq(int, rc, 0));
            break;
        }
        cr_expect(eq(int, rc, -ENOMEM));
        cr_expect(rig.store == NULL);
        cr_expect(strcasestr(rig.err.text, "memory") != NULL, "%s", rig.err.text);
    }
    cr_expect(ge(int, n_failed, 4));
    expect_right("memory", 0);
    /* Nothing is allocated while it runs. */
    allocations = 0;
    cr_expect(eq(int, rig_write(&rig, 301, 10), 0));
    rig_forget(&rig, 302);
    cr_expect(eq(int, rig_purge(&rig, 303), 0));
    cr_expect(eq(int, allocations, 0));
    allocations = -1;
    expect_right("memory", 1);
    rig_finish(&rig);
    disk_destroy(d);
}
