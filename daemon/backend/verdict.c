#include "daemon/backend/verdict.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <gnu/libc-version.h>
#include <inttypes.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#define HEAD            "gqad verdict 1 "
#define SUFFIX          ".verdict"
#define NEW_SUFFIX      ".new"
#define NEW_SECONDS_MAX 60 /* a writer that has not renamed its file by then is dead */
#define BOOT_ID_FILE    "/proc/sys/kernel/random/boot_id"

_Static_assert(VERDICT_HEAD_BYTES == sizeof(HEAD) - 1 + 32 + 1 + 16 + 1, "the first line");

/* ---- the key ----------------------------------------------------------------------------- */

static int hash_file(XXH3_state_t *h, int fd)
{
    char piece[65536];
    uint64_t at = 0;
    for (;;) {
        ssize_t n = pread(fd, piece, sizeof(piece), (off_t)at);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            return -errno;
        }
        if (n == 0) {
            XXH3_128bits_update(h, &at, sizeof(at)); /* where one file ends and the next begins */
            return 0;
        }
        XXH3_128bits_update(h, piece, (size_t)n);
        at += (uint64_t)n;
    }
}

static int hash_path(XXH3_state_t *h, const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return -errno;
    }
    int rc = hash_file(h, fd);
    close(fd);
    return rc;
}

static void hash_text(XXH3_state_t *h, const char *text)
{
    XXH3_128bits_update(h, text, strlen(text) + 1);
}

/* What the processor is and can do: all that software may ask it, but not which of its cores asks.
 */
static void hash_processor(XXH3_state_t *h)
{
#if defined(__x86_64__)
    static const struct {
        unsigned leaf, subleaf;
    } asked[] = {{0, 0},          {1, 0},         {7, 0},          {7, 1},          {7, 2},
                 {0xd, 0},        {0xd, 1},       {0x19, 0},       {0x1d, 0},       {0x1d, 1},
                 {0x1e, 0},       {0x24, 0},      {0x80000001, 0}, {0x80000002, 0}, {0x80000003, 0},
                 {0x80000004, 0}, {0x80000008, 0}};
    for (size_t i = 0; i < sizeof(asked) / sizeof(asked[0]); i++) {
        unsigned r[4] = {0};
        __get_cpuid_count(asked[i].leaf, asked[i].subleaf, &r[0], &r[1], &r[2], &r[3]);
        r[1] = asked[i].leaf == 1 ? 0 : r[1]; /* holds the core's own number */
        XXH3_128bits_update(h, r, sizeof(r));
        if (asked[i].leaf == 1 && (r[2] & bit_OSXSAVE) != 0) {
            unsigned low, high;
            __asm__("xgetbv"
                    : "=a"(low), "=d"(high)
                    : "c"(0)); /* registers that the kernel saves */
            XXH3_128bits_update(h, &low, sizeof(low));
            XXH3_128bits_update(h, &high, sizeof(high));
        }
    }
#endif
    const unsigned long capabilities[] = {getauxval(AT_HWCAP), getauxval(AT_HWCAP2)};
    const char *platform = (const char *)getauxval(AT_PLATFORM);
    XXH3_128bits_update(h, capabilities, sizeof(capabilities));
    hash_text(h, platform != NULL ? platform : "");
}

int verdict_key(const char *check_program, int image_fd, const char *options,
                struct verdict_key *ret)
{
    XXH3_state_t *h = XXH3_createState();
    if (h == NULL) {
        return -ENOMEM;
    }
    XXH3_128bits_reset(h);
    hash_text(h, HEAD);
    hash_text(h, options);
    hash_text(h, gnu_get_libc_version());
    hash_processor(h);
    int rc = hash_file(h, image_fd);
    rc = rc < 0 ? rc : hash_path(h, check_program);
    rc = rc < 0 ? rc : hash_path(h, BOOT_ID_FILE);
    XXH128_hash_t v = XXH3_128bits_digest(h);
    XXH3_freeState(h);
    if (rc == 0) {
        snprintf(ret->text, sizeof(ret->text), "%016" PRIx64 "%016" PRIx64, (uint64_t)v.high64,
                 (uint64_t)v.low64);
    }
    return rc;
}

/* ---- what a file says -------------------------------------------------------------------- */

bool verdict_may_be_kept(const struct plugin_report *r)
{
    return r->complete && r->probe.usable && r->probe.n_devices == 0 && plugin_report_has_name(r);
}

/* The first line, of a report that follows. */
static void write_head(const struct verdict_key *key, const char *report, size_t bytes,
                       char ret[VERDICT_HEAD_BYTES + 1])
{
    snprintf(ret, VERDICT_HEAD_BYTES + 1, HEAD "%s %016" PRIx64 "\n", key->text,
             (uint64_t)XXH3_64bits(report, bytes));
}

bool verdict_parse(const char *file, size_t bytes, const struct verdict_key *key,
                   struct plugin_report *ret)
{
    char head[VERDICT_HEAD_BYTES + 1];
    if (bytes < VERDICT_HEAD_BYTES || bytes > VERDICT_FILE_BYTES_MAX) {
        return false;
    }
    const char *report = file + VERDICT_HEAD_BYTES;
    write_head(key, report, bytes - VERDICT_HEAD_BYTES, head);
    if (memcmp(file, head, VERDICT_HEAD_BYTES) != 0) {
        return false;
    }
    struct plugin_report r;
    plugin_report_parse(report, bytes - VERDICT_HEAD_BYTES, &r);
    if (!verdict_may_be_kept(&r)) {
        return false;
    }
    r.remembered = true;
    *ret = r;
    return true;
}

/* ---- the folder -------------------------------------------------------------------------- */

/* Ours alone: somebody else's word counts for nothing. */
static bool is_private(int fd, mode_t kind)
{
    struct stat st;
    return fstat(fd, &st) == 0 && (st.st_mode & S_IFMT) == kind && st.st_uid == geteuid() &&
           (st.st_mode & (S_IRWXG | S_IRWXO)) == 0;
}

/* The folder's descriptor, or -1. */
static int open_folder(const char *folder)
{
    int dir = open(folder, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (dir >= 0 && !is_private(dir, S_IFDIR)) {
        close(dir);
        return -1;
    }
    return dir;
}

static void name_of(const struct verdict_key *key, char *ret, size_t bytes)
{
    snprintf(ret, bytes, "%s%s", key->text, SUFFIX);
}

/* All of a file, which is longer than max where that many bytes come. */
static size_t read_all(int fd, char *ret, size_t max)
{
    size_t used = 0;
    while (used < max) {
        ssize_t n = read(fd, ret + used, max - used);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return n < 0 ? 0 : used;
        }
        used += (size_t)n;
    }
    return used;
}

bool verdict_recall(const char *folder, const struct verdict_key *key, struct plugin_report *ret)
{
    char name[64], text[VERDICT_FILE_BYTES_MAX + 1];
    int dir = open_folder(folder);
    if (dir < 0) {
        return false;
    }
    name_of(key, name, sizeof(name));
    int fd = openat(dir, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    close(dir);
    if (fd < 0) {
        return false;
    }
    size_t bytes = is_private(fd, S_IFREG) ? read_all(fd, text, sizeof(text)) : 0;
    close(fd);
    return verdict_parse(text, bytes, key, ret);
}

static bool ends_with(const char *name, const char *suffix)
{
    size_t n = strlen(name), k = strlen(suffix);
    return n > k && strcmp(name + n - k, suffix) == 0;
}

/* Removes what dead writers left; returns how many verdicts there are, and the oldest one's name.
 */
static uint32_t survey(int dir, DIR *list, char *ret_oldest, size_t bytes)
{
    uint32_t n = 0;
    time_t oldest = 0, now = time(NULL);
    rewinddir(list);
    for (const struct dirent *d; (d = readdir(list)) != NULL;) {
        struct stat st;
        if (fstatat(dir, d->d_name, &st, AT_SYMLINK_NOFOLLOW) < 0) {
            continue;
        }
        if (ends_with(d->d_name, NEW_SUFFIX) && st.st_mtime < now - NEW_SECONDS_MAX) {
            unlinkat(dir, d->d_name, 0);
        } else if (ends_with(d->d_name, SUFFIX) && (n++ == 0 || st.st_mtime < oldest)) {
            oldest = st.st_mtime;
            snprintf(ret_oldest, bytes, "%s", d->d_name);
        }
    }
    return n;
}

/* Leaves room for one. */
static void make_room(int dir)
{
    int copy = fcntl(dir, F_DUPFD_CLOEXEC, 0);
    DIR *list = copy >= 0 ? fdopendir(copy) : NULL;
    if (list == NULL) {
        if (copy >= 0) {
            close(copy);
        }
        return;
    }
    char oldest[NAME_MAX + 1];
    while (survey(dir, list, oldest, sizeof(oldest)) >= VERDICTS_MAX &&
           unlinkat(dir, oldest, 0) == 0) {
    }
    closedir(list);
}

static bool write_all(int fd, const char *data, size_t bytes)
{
    while (bytes > 0) {
        ssize_t n = write(fd, data, bytes);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            return false;
        }
        data += n;
        bytes -= (size_t)n;
    }
    return true;
}

void verdict_remember(const char *folder, const struct verdict_key *key, const char *report,
                      size_t bytes)
{
    char head[VERDICT_HEAD_BYTES + 1], name[64], fresh[96];
    int dir = mkdir(folder, 0700) == 0 || errno == EEXIST ? open_folder(folder) : -1;
    if (dir < 0) {
        return;
    }
    make_room(dir);
    write_head(key, report, bytes, head);
    name_of(key, name, sizeof(name));
    snprintf(fresh, sizeof(fresh), "%s.%ld%s", key->text, (long)gettid(), NEW_SUFFIX);
    int fd = openat(dir, fresh, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd >= 0) {
        bool whole = write_all(fd, head, VERDICT_HEAD_BYTES) && write_all(fd, report, bytes);
        whole = close(fd) == 0 && whole;
        if (!whole || renameat(dir, fresh, dir, name) < 0) {
            unlinkat(dir, fresh, 0);
        }
    }
    close(dir);
}

void verdict_forget(const char *folder, const struct verdict_key *key)
{
    char name[64];
    int dir = open_folder(folder);
    if (dir >= 0) {
        name_of(key, name, sizeof(name));
        unlinkat(dir, name, 0);
        close(dir);
    }
}
