/* Files of packed weights: what was written is what is mapped, and nothing else ever is. Files that
 * are cut, lie or belong to other weights; folders that are full, cannot be written or are not
 * there; two who write at once, and one who dies while it writes. */
#include "daemon/kv/guard.h"
#include "daemon/model/weights_cache.h"
#include "tests/unit/engine/folder.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define DATA_BYTES  (WEIGHTS_PIECE_BYTES + 3 * WEIGHTS_PAGE_BYTES) /* two pieces */
#define SMALL_BYTES (4 * WEIGHTS_PAGE_BYTES)

static struct folder folder;
static struct io_files files; /* the system's, with faults */
static struct weights_cache *cache;
static const atomic_bool go_on;

/* ---- the system's files, which fail -------------------------------------------------------- */

static struct io_files real;
static struct {
    int open_folder, open_new, allocate, rename, map; /* what these return, or 0 */
    long writes_left;                                 /* until writing fails; negative: never */
    long syncs_left;
    bool dies_at_rename;
    int others_make_room; /* so many times when a file was just made and is not locked yet */
} fault;

static void other_makes_room(void);

static int bad_open_folder(void *self, const char *path, int *ret)
{
    return fault.open_folder != 0 ? fault.open_folder : real.open_folder(self, path, ret);
}

static int bad_open(void *self, int dir, const char *name, enum io_open how, int *ret)
{
    bool writes = how != IO_OPEN_READ;
    int rc = writes && fault.open_new != 0 ? fault.open_new : real.open(self, dir, name, how, ret);
    if (rc == 0 && how == IO_OPEN_EMPTY && fault.others_make_room > 0) {
        fault.others_make_room--;
        other_makes_room();
    }
    return rc;
}

static int bad_allocate(void *self, int fd, uint64_t offset, uint64_t bytes)
{
    return fault.allocate != 0 ? fault.allocate : real.allocate(self, fd, offset, bytes);
}

static int bad_write(void *self, struct io_span *spans, size_t n)
{
    return fault.writes_left >= 0 && fault.writes_left-- == 0 ? -EIO : real.write(self, spans, n);
}

static int bad_sync(void *self, int fd)
{
    return fault.syncs_left >= 0 && fault.syncs_left-- == 0 ? -EIO : real.sync(self, fd);
}

static int bad_rename(void *self, int dir, const char *from, const char *to)
{
    if (fault.dies_at_rename) {
        _exit(7);
    }
    return fault.rename != 0 ? fault.rename : real.rename(self, dir, from, to);
}

static int bad_map(void *self, int fd, uint64_t offset, size_t bytes, void *at, void **ret)
{
    return fault.map != 0 ? fault.map : real.map(self, fd, offset, bytes, at, ret);
}

static void no_faults(void)
{
    memset(&fault, 0, sizeof(fault));
    fault.writes_left = fault.syncs_left = -1;
}

/* ---- rigging ------------------------------------------------------------------------------- */

static void open_cache(uint64_t bytes_max)
{
    const struct weights_cache_options options = {
        .folder = folder.path, .bytes_max = bytes_max, .files = &files};
    weights_cache_destroy(cache);
    cr_assert(eq(int, weights_cache_create(&options, &cache), 0));
}

static void setup(void)
{
    folder_init(&folder);
    cr_assert(eq(int, kv_guard_install(), 0));
    io_files_system(NULL, &real);
    files = real;
    files.open_folder = bad_open_folder;
    files.open = bad_open;
    files.allocate = bad_allocate;
    files.write = bad_write;
    files.sync = bad_sync;
    files.rename = bad_rename;
    files.map = bad_map;
    no_faults();
    open_cache(0);
}

static void teardown(void)
{
    weights_cache_destroy(cache);
    cache = NULL;
    folder_finish(&folder);
}

TestSuite(weights_cache, .init = setup, .fini = teardown, .timeout = 120);

static struct weights_want want_of(uint8_t which, uint64_t bytes)
{
    struct weights_want w = {.backend = "cpu", .pack_id = "cpu-x", .data_bytes = bytes};
    memset(w.key, which, sizeof(w.key));
    memset(w.digest, which + 1, sizeof(w.digest));
    return w;
}

static const char *path_of(const struct weights_want *w)
{
    char name[64] = "";
    for (size_t i = 0; i < sizeof(w->key); i++) {
        snprintf(name + 2 * i, 3, "%02x", w->key[i]);
    }
    strcat(name, ".packed");
    return folder_path(&folder, name);
}

static void fill(struct weights_room *room, uint8_t which)
{
    cr_assert(eq(int, weights_room_clear(room), 0));
    uint64_t *at = room->memory;
    for (uint64_t i = 0; i < room->bytes / 8; i++) {
        at[i] = (i + 1) * 0x9e3779b97f4a7c15u + which;
    }
    weights_room_seal(room);
}

static bool is_filled(const struct weights_room *room, uint8_t which)
{
    const uint64_t *at = room->memory;
    for (uint64_t i = 0; i < room->bytes / 8; i++) {
        if (at[i] != (i + 1) * 0x9e3779b97f4a7c15u + which) {
            return false;
        }
    }
    return true;
}

static int save(uint8_t which, uint64_t bytes)
{
    struct weights_want w = want_of(which, bytes);
    struct weights_room room;
    cr_assert(eq(int, weights_room_init(&room, bytes), 0));
    fill(&room, which);
    int rc = weights_cache_save(cache, &w, &room, &go_on);
    cr_expect(is_filled(&room, which)); /* from the file or from memory */
    cr_expect(not(weights_room_is_damaged(&room)));
    weights_room_finish(&room);
    return rc;
}

static uint64_t checked_bytes;

static void on_checked(void *arg, uint64_t done, uint64_t total)
{
    checked_bytes = done;
}

/* Maps and compares. -ENOENT: there is none. */
static int find(uint8_t which, uint64_t bytes)
{
    struct weights_want w = want_of(which, bytes);
    struct weights_room room;
    checked_bytes = 0;
    cr_assert(eq(int, weights_room_init(&room, bytes), 0));
    int rc = weights_cache_map(cache, &w, &room, NULL, on_checked, NULL);
    cr_expect(rc < 0 || is_filled(&room, which));
    weights_room_finish(&room);
    return rc;
}

static unsigned n_files(void)
{
    unsigned n = 0;
    DIR *d = opendir(folder.path);
    cr_assert(d != NULL);
    for (struct dirent *e; (e = readdir(d)) != NULL;) {
        n += e->d_name[0] != '.';
    }
    closedir(d);
    return n;
}

static void patch(const char *path, uint64_t offset, const void *data, size_t bytes)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    cr_assert(fd >= 0);
    cr_assert(eq(int, pwrite(fd, data, bytes, (off_t)offset) == (ssize_t)bytes, 1));
    close(fd);
}

/* ---- tests --------------------------------------------------------------------------------- */

Test(weights_cache, what_was_saved_is_mapped)
{
    const uint64_t sizes[] = {WEIGHTS_PAGE_BYTES, SMALL_BYTES, WEIGHTS_HUGE_BYTES,
                              WEIGHTS_PIECE_BYTES, DATA_BYTES};
    for (uint8_t i = 0; i < 5; i++) {
        cr_expect(eq(int, find(i, sizes[i]), -ENOENT));
        cr_expect(eq(int, save(i, sizes[i]), 0));
        cr_expect(eq(int, find(i, sizes[i]), 0));
        cr_expect(eq(u64, checked_bytes, 0)); /* written since the machine started */
        cr_expect(eq(u32, n_files(), i + 1u));
    }
}

Test(weights_cache, whoever_has_written_to_a_file_has_it_checked)
{
    struct weights_want w = want_of(1, DATA_BYTES);
    struct weights_layout l;
    cr_assert(eq(int, save(1, DATA_BYTES), 0));
    cr_assert(eq(int, weights_layout_of(DATA_BYTES, &l), 0));
    const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = 1000000}};
    cr_assert(eq(int, utimensat(AT_FDCWD, path_of(&w), times, 0), 0));
    cr_expect(eq(int, find(1, DATA_BYTES), 0));
    cr_expect(eq(u64, checked_bytes, DATA_BYTES));
    cr_expect(eq(int, find(1, DATA_BYTES), 0));
    cr_expect(eq(u64, checked_bytes, 0)); /* once */
    patch(path_of(&w), l.data_offset + DATA_BYTES - 1, "x", 1);
    cr_expect(eq(int, find(1, DATA_BYTES), -ENOENT));
    cr_expect(eq(u32, n_files(), 0)); /* what is bad goes */
    cr_expect(eq(int, save(1, DATA_BYTES), 0));
    cr_expect(eq(int, find(1, DATA_BYTES), 0));
}

Test(weights_cache, a_file_of_before_this_start_of_the_machine_is_checked)
{
    struct weights_want w = want_of(1, DATA_BYTES);
    struct weights_mark mark;
    struct stat st;
    cr_assert(eq(int, save(1, DATA_BYTES), 0));
    cr_assert(eq(int, stat(path_of(&w), &st), 0));
    int64_t written = (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec;
    weights_mark_make(written - 86400ll * 1000000000 * 365, written, &mark);
    patch(path_of(&w), WEIGHTS_MARK_OFFSET, &mark, sizeof(mark));
    const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, st.st_mtim};
    cr_assert(eq(int, utimensat(AT_FDCWD, path_of(&w), times, 0), 0));
    cr_expect(eq(int, find(1, DATA_BYTES), 0));
    cr_expect(eq(u64, checked_bytes, DATA_BYTES));
}

Test(weights_cache, marks_hold_for_one_start_and_one_writing)
{
    struct weights_mark m;
    weights_mark_make(1000, 2000, &m);
    cr_expect(weights_mark_holds(&m, 1000, 2000));
    cr_expect(weights_mark_holds(&m, 1000 + 1000000000, 2000)); /* the clock was adjusted */
    cr_expect(not(weights_mark_holds(&m, 1000 + 60000000000, 2000)));
    cr_expect(not(weights_mark_holds(&m, 1000, 2001)));
    cr_expect(not(weights_mark_holds(&m, INT64_MIN, 2000)));
    m.boot_ns++;
    cr_expect(not(weights_mark_holds(&m, 1001, 2000)));
}

Test(weights_cache, a_file_that_is_cut_or_longer_is_refused)
{
    struct weights_want w = want_of(1, SMALL_BYTES);
    struct weights_layout l;
    cr_assert(eq(int, weights_layout_of(SMALL_BYTES, &l), 0));
    const uint64_t lengths[] = {0,
                                1,
                                sizeof(struct weights_header) - 1,
                                sizeof(struct weights_header),
                                WEIGHTS_TABLE_OFFSET,
                                l.data_offset,
                                l.file_bytes - 1,
                                l.file_bytes + 1,
                                2 * l.file_bytes};
    for (size_t i = 0; i < sizeof(lengths) / sizeof(lengths[0]); i++) {
        cr_assert(eq(int, save(1, SMALL_BYTES), 0));
        cr_assert(eq(int, truncate(path_of(&w), (off_t)lengths[i]), 0));
        cr_expect(eq(int, find(1, SMALL_BYTES), -ENOENT), "%llu bytes",
                  (unsigned long long)lengths[i]);
        cr_expect(eq(u32, n_files(), 0));
    }
}

/* Every byte of header and table counts. */
Test(weights_cache, a_header_that_lies_is_refused)
{
    struct weights_want w = want_of(1, SMALL_BYTES);
    char path[256];
    size_t bytes;
    snprintf(path, sizeof(path), "%s", path_of(&w));
    cr_assert(eq(int, save(1, SMALL_BYTES), 0));
    unsigned char *image = file_read(path, &bytes);
    for (size_t at = 0; at < sizeof(struct weights_header) + sizeof(uint64_t); at++) {
        size_t offset = at < sizeof(struct weights_header)
                            ? at
                            : WEIGHTS_TABLE_OFFSET + at - sizeof(struct weights_header);
        image[offset] ^= 0x40;
        folder_write(&folder, strrchr(path, '/') + 1, image, bytes, 0600);
        image[offset] ^= 0x40;
        cr_expect(eq(int, find(1, SMALL_BYTES), -ENOENT), "byte %zu", offset);
    }
    free(image);
}

/* The same with checksums that are right: fields are compared, not only summed. */
Test(weights_cache, a_header_of_other_weights_is_refused)
{
    struct weights_want w = want_of(1, SMALL_BYTES), others[5];
    struct weights_layout l;
    struct weights_header h;
    struct fmt_error err;
    uint64_t table[1] = {7};
    for (size_t i = 0; i < 5; i++) {
        others[i] = w;
    }
    others[0].key[3]++;
    others[1].digest[15]++;
    strcpy(others[2].backend, "gpu");
    strcpy(others[3].pack_id, "cpu-y");
    others[4].data_bytes += WEIGHTS_PAGE_BYTES;
    weights_header_make(&w, table, &h);
    cr_assert(eq(int, weights_layout_of(SMALL_BYTES, &l), 0));
    cr_expect(eq(int, weights_header_check(&h, &w, l.file_bytes, &err), 0), "%s", err.text);
    cr_expect(eq(int, weights_header_check(&h, &w, l.file_bytes + 1, &err), -EBADMSG));
    for (size_t i = 0; i < 5; i++) {
        weights_header_make(&others[i], table, &h);
        cr_expect(eq(int, weights_header_check(&h, &w, l.file_bytes, &err), -EBADMSG), "%zu", i);
        cr_expect(strstr(err.text, "another model") != NULL, "%s", err.text);
    }
    cr_expect(eq(int, weights_layout_of(0, &l), -EFBIG));
    cr_expect(eq(int, weights_layout_of(WEIGHTS_PAGE_BYTES + 1, &l), -EFBIG));
    cr_expect(eq(int, weights_layout_of(UINT64_MAX / WEIGHTS_PAGE_BYTES * WEIGHTS_PAGE_BYTES, &l),
                 -EFBIG));
}

/* Somebody else's file, or one that others can write, is no file of ours; and is replaced. */
Test(weights_cache, a_file_that_others_have_access_to_is_not_used)
{
    struct weights_want w = want_of(1, SMALL_BYTES);
    cr_assert(eq(int, save(1, SMALL_BYTES), 0));
    cr_assert(eq(int, chmod(path_of(&w), 0666), 0));
    cr_expect(eq(int, find(1, SMALL_BYTES), -ENOENT));
    cr_expect(eq(int, save(1, SMALL_BYTES), 0));
    cr_expect(eq(int, find(1, SMALL_BYTES), 0));
}

Test(weights_cache, a_mapped_file_that_is_cut_is_damage_and_no_end)
{
    struct weights_want w = want_of(1, DATA_BYTES);
    struct weights_room room;
    cr_assert(eq(int, save(1, DATA_BYTES), 0));
    cr_assert(eq(int, weights_room_init(&room, DATA_BYTES), 0));
    cr_assert(eq(int, weights_cache_map(cache, &w, &room, NULL, NULL, NULL), 0));
    cr_expect(not(weights_room_is_damaged(&room)));
    cr_assert(eq(int, truncate(path_of(&w), WEIGHTS_HUGE_BYTES), 0));
    cr_expect(not(is_filled(&room, 1)));
    cr_expect(weights_room_is_damaged(&room));
    weights_cache_discard(cache, &w);
    weights_room_finish(&room);
    cr_expect(eq(u32, n_files(), 0));
}

Test(weights_cache, trouble_with_the_folder_costs_time_only)
{
    const struct {
        int *what;
        int code;
    } troubles[] = {
        {&fault.open_folder, -EROFS}, {&fault.open_folder, -ENOENT}, {&fault.open_new, -EROFS},
        {&fault.open_new, -EACCES},   {&fault.allocate, -ENOSPC},    {&fault.rename, -EIO},
        {&fault.open_folder, -EPERM},
    };
    for (size_t i = 0; i < sizeof(troubles) / sizeof(troubles[0]); i++) {
        *troubles[i].what = troubles[i].code;
        cr_expect(eq(int, save(1, SMALL_BYTES), troubles[i].code), "%zu", i);
        cr_expect(eq(int, find(1, SMALL_BYTES), -ENOENT), "%zu", i);
        no_faults();
        cr_expect(eq(u32, n_files(), 0), "%zu", i);
    }
    /* Each write and each sync in turn. */
    int rc = -EIO;
    for (long nth = 0; rc < 0; nth++) {
        no_faults();
        fault.writes_left = nth;
        rc = save(1, DATA_BYTES);
        cr_expect(eq(u32, n_files(), rc == 0 ? 1 : 0), "write %ld", nth);
        cr_assert(lt(long, nth, 20));
    }
    no_faults();
    fault.syncs_left = 0;
    cr_expect(eq(int, save(2, DATA_BYTES), -EIO));
    no_faults();
    cr_expect(eq(int, find(2, DATA_BYTES), -ENOENT));
    cr_expect(eq(int, find(1, DATA_BYTES), 0));
}

/* What is there serves where nothing can be written: it is checked every time, since the mark that
 * spares that cannot be written either. */
Test(weights_cache, a_folder_that_cannot_be_written_serves)
{
    struct weights_want w = want_of(1, SMALL_BYTES);
    cr_assert(eq(int, save(1, SMALL_BYTES), 0));
    const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = 1000000}};
    cr_assert(eq(int, utimensat(AT_FDCWD, path_of(&w), times, 0), 0));
    fault.open_new = -EROFS;
    for (int i = 0; i < 2; i++) {
        cr_expect(eq(int, find(1, SMALL_BYTES), 0));
        cr_expect(eq(u64, checked_bytes, SMALL_BYTES));
    }
}

Test(weights_cache, what_was_used_longest_ago_goes_first)
{
    struct weights_layout l;
    cr_assert(eq(int, weights_layout_of(SMALL_BYTES, &l), 0));
    open_cache(3 * l.file_bytes);
    for (uint8_t i = 1; i <= 3; i++) {
        struct weights_want w = want_of(i, SMALL_BYTES);
        cr_assert(eq(int, save(i, SMALL_BYTES), 0));
        const struct timespec times[2] = {{.tv_sec = 1000000 + i}, {.tv_nsec = UTIME_OMIT}};
        cr_assert(eq(int, utimensat(AT_FDCWD, path_of(&w), times, 0), 0));
    }
    cr_expect(eq(int, find(1, SMALL_BYTES), 0)); /* used: now the second is the oldest */
    cr_expect(eq(int, save(4, SMALL_BYTES), 0));
    cr_expect(eq(int, find(2, SMALL_BYTES), -ENOENT));
    cr_expect(eq(int, find(1, SMALL_BYTES), 0));
    cr_expect(eq(int, find(3, SMALL_BYTES), 0));
    cr_expect(eq(int, find(4, SMALL_BYTES), 0));
    cr_expect(eq(int, save(4, SMALL_BYTES), 0)); /* in its own place: nobody has to go */
    cr_expect(eq(u32, n_files(), 3));
    cr_expect(eq(int, save(5, DATA_BYTES), -EFBIG));
    cr_expect(eq(u32, n_files(), 3)); /* what cannot fit chases nobody away */
}

static void *save_main(void *arg)
{
    return save(1, DATA_BYTES) == 0 ? arg : NULL;
}

Test(weights_cache, two_writers_leave_one_whole_file)
{
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        cr_assert(eq(int, pthread_create(&threads[i], NULL, save_main, threads), 0));
    }
    for (int i = 0; i < 2; i++) {
        void *ok;
        pthread_join(threads[i], &ok);
        cr_expect(ok != NULL);
    }
    cr_expect(eq(int, find(1, DATA_BYTES), 0));
    cr_expect(eq(u32, n_files(), 1));
}

/* Another process saves other weights in the same folder. */
static void other_makes_room(void)
{
    struct weights_cache *ours = cache;
    struct io_files faulty = files;
    cache = NULL;
    files = real;
    open_cache(0);
    cr_expect(eq(int, save(2, SMALL_BYTES), 0));
    weights_cache_destroy(cache);
    files = faulty;
    cache = ours;
}

Test(weights_cache, a_file_that_another_took_for_left_over_is_begun_again)
{
    fault.others_make_room = 2;
    cr_expect(eq(int, save(1, SMALL_BYTES), 0));
    cr_expect(eq(int, fault.others_make_room, 0));
    cr_expect(eq(int, find(1, SMALL_BYTES), 0));
    cr_expect(eq(int, find(2, SMALL_BYTES), 0));
    cr_expect(eq(u32, n_files(), 2));
}

Test(weights_cache, a_writer_that_dies_leaves_nothing_for_long)
{
    int status;
    pid_t child = fork();
    if (child == 0) {
        fault.dies_at_rename = true;
        save(1, SMALL_BYTES);
        _exit(0);
    }
    cr_assert(eq(int, waitpid(child, &status, 0), child));
    bool died = WIFEXITED(status) && WEXITSTATUS(status) == 7;
    cr_assert(died);
    cr_expect(eq(u32, n_files(), 1)); /* unfinished */
    cr_expect(eq(int, find(1, SMALL_BYTES), -ENOENT));
    cr_expect(eq(int, save(2, SMALL_BYTES), 0)); /* cleans up */
    cr_expect(eq(u32, n_files(), 1));
    cr_expect(eq(int, find(2, SMALL_BYTES), 0));
}

Test(weights_cache, saving_ends_when_it_is_told_to)
{
    static const atomic_bool stop = true;
    struct weights_want w = want_of(1, SMALL_BYTES);
    struct weights_room room;
    cr_assert(eq(int, weights_room_init(&room, SMALL_BYTES), 0));
    fill(&room, 1);
    cr_expect(eq(int, weights_cache_save(cache, &w, &room, &stop), -ECANCELED));
    cr_expect(is_filled(&room, 1));
    weights_room_finish(&room);
    cr_expect(eq(u32, n_files(), 0));
}
