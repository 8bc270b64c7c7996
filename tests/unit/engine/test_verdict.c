/* Remembered self-tests: when a plugin is checked again, and which files are believed. The fixture
 * "counted" leaves a byte for each probe, so that a check is seen. */
#include "daemon/backend/backend.h"
#include "daemon/backend/verdict.h"
#include "tests/unit/engine/folder.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static struct folder folder;
static char verdicts[128], program[256];

static void setup(void)
{
    folder_init(&folder);
    snprintf(verdicts, sizeof(verdicts), "%s/verdicts", folder.path);
    snprintf(program, sizeof(program), "%s", getenv("GQAD_TEST_CHECK"));
    setenv("GQAD_TEST_WITNESS", folder_path(&folder, "witness"), 1);
}

static void remove_verdicts(void)
{
    DIR *list = opendir(verdicts);
    for (const struct dirent *d; list != NULL && (d = readdir(list)) != NULL;) {
        unlinkat(dirfd(list), d->d_name, 0);
    }
    if (list != NULL) {
        closedir(list);
    }
    rmdir(verdicts);
}

static void teardown(void)
{
    chmod(verdicts, 0700);
    remove_verdicts();
    folder_finish(&folder);
}

static void install(const char *fixture)
{
    char path[512];
    size_t bytes;
    snprintf(path, sizeof(path), "%s/%s.so", getenv("GQAD_TEST_PLUGINS"), fixture);
    unsigned char *data = file_read(path, &bytes);
    folder_write(&folder, "it.so", data, bytes, 0755);
    free(data);
}

/* A daemon's start: scans, tells what it found, and forgets all but the files. */
static struct backend_info start(const char *remember_in)
{
    const char *dirs[] = {folder.path};
    const struct backend_catalogue_options options = {
        .dirs = dirs, .n_dirs = 1, .check_program = program, .verdicts = remember_in};
    struct backend_catalogue *c;
    struct backend_info info[2];
    cr_assert(eq(int, backend_catalogue_create(&options, &c), 0));
    cr_assert(eq(sz, backend_catalogue_list(c, info, 2), 1));
    backend_catalogue_destroy(c);
    return info[0];
}

static long n_checks(void)
{
    struct stat st;
    return stat(folder_path(&folder, "witness"), &st) == 0 ? (long)st.st_size : 0;
}

/* Files of the folder; the path of one of them. */
static unsigned n_files(char *ret_path, size_t bytes)
{
    unsigned n = 0;
    DIR *list = opendir(verdicts);
    for (const struct dirent *d; list != NULL && (d = readdir(list)) != NULL;) {
        if (d->d_name[0] != '.') {
            n++;
            if (ret_path != NULL) {
                snprintf(ret_path, bytes, "%s/%s", verdicts, d->d_name);
            }
        }
    }
    if (list != NULL) {
        closedir(list);
    }
    return n;
}

TestSuite(verdict, .init = setup, .fini = teardown, .timeout = 120);

Test(verdict, the_second_start_checks_nothing_and_knows_all)
{
    install("counted");
    struct backend_info first = start(verdicts);
    cr_assert(first.usable && !first.remembered, "%s", first.reason);
    cr_expect(eq(long, n_checks(), 1));
    struct backend_info second = start(verdicts);
    cr_expect(second.usable && second.remembered);
    cr_expect(eq(long, n_checks(), 1));
    second.remembered = false;
    cr_expect(eq(int, memcmp(&first, &second, sizeof(first)), 0));
    struct stat st;
    char path[512];
    cr_assert(eq(uint, n_files(path, sizeof(path)), 1));
    cr_assert(eq(int, stat(path, &st), 0));
    cr_expect(eq(uint, st.st_mode & 07777, 0600));
    cr_assert(eq(int, stat(verdicts, &st), 0));
    cr_expect(eq(uint, st.st_mode & 07777, 0700));
}

Test(verdict, without_a_folder_each_start_checks)
{
    install("counted");
    for (long i = 1; i <= 2; i++) {
        cr_expect(not(start(NULL).remembered));
        cr_expect(eq(long, n_checks(), i));
    }
}

Test(verdict, a_failure_is_never_remembered)
{
    static const char *const bad[] = {"wrong", "nan", "crash_probe", "unusable", "quits"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        install(bad[i]);
        cr_expect(not(start(verdicts).usable));
        cr_expect(eq(uint, n_files(NULL, 0), 0), "%s", bad[i]);
    }
}

Test(verdict, a_device_is_checked_each_time)
{
    install("counted_device");
    for (long i = 1; i <= 2; i++) {
        cr_expect(start(verdicts).usable);
        cr_expect(eq(long, n_checks(), i));
    }
    cr_expect(eq(uint, n_files(NULL, 0), 0));
}

/* ---- what it depends on ------------------------------------------------------------------ */

static bool same(const struct verdict_key *a, const struct verdict_key *b)
{
    return strcmp(a->text, b->text) == 0;
}

Test(verdict, bytes_options_and_the_program_make_the_key)
{
    static const char data[] = "the bytes of a plugin";
    folder_write(&folder, "a", data, sizeof(data), 0600);
    folder_write(&folder, "b", data, sizeof(data) - 1, 0600);
    int a = open(folder_path(&folder, "a"), O_RDONLY),
        b = open(folder_path(&folder, "b"), O_RDONLY);
    struct verdict_key key, again, other;
    cr_assert(eq(int, verdict_key(program, a, "", &key), 0));
    cr_assert(eq(int, verdict_key(program, a, "", &again), 0));
    cr_expect(same(&key, &again));
    cr_expect(eq(sz, strlen(key.text), 32));
    cr_assert(eq(int, verdict_key(program, b, "", &other), 0));
    cr_expect(not(same(&key, &other)));
    cr_assert(eq(int, verdict_key(program, a, "isa=c", &other), 0));
    cr_expect(not(same(&key, &other)));
    cr_assert(eq(int, verdict_key("/bin/sh", a, "", &other), 0));
    cr_expect(not(same(&key, &other)));
    cr_expect(lt(int, verdict_key("/nonexistent", a, "", &other), 0));
    cr_expect(lt(int, verdict_key(program, -1, "", &other), 0));
    close(a);
    close(b);
}

Test(verdict, another_file_under_the_name_is_checked)
{
    install("counted");
    start(verdicts);
    install("good");
    struct backend_info info = start(verdicts);
    cr_expect(not(info.remembered));
    cr_expect(eq(str, info.name, (char *)"good"));
    install("counted");
    cr_expect(start(verdicts).remembered);
    cr_expect(eq(long, n_checks(), 1));
}

Test(verdict, another_check_program_checks)
{
    install("counted");
    start(verdicts);
    size_t bytes;
    unsigned char *data = file_read(program, &bytes);
    data = realloc(data, bytes + 1);
    cr_assert(data != NULL);
    data[bytes] = '\0'; /* behind all that is loaded: it works, and is another file */
    folder_write(&folder, "check", data, bytes + 1, 0755);
    free(data);
    snprintf(program, sizeof(program), "%s", folder_path(&folder, "check"));
    struct backend_info info = start(verdicts);
    cr_expect(info.usable && !info.remembered, "%s", info.reason);
    cr_expect(eq(long, n_checks(), 2));
}

/* ---- files that are not believed --------------------------------------------------------- */

/* The next start checks, and puts things right where it can. */
static void check_disbelieved(const char *what)
{
    long before = n_checks();
    struct backend_info info = start(verdicts);
    cr_expect(info.usable && !info.remembered, "%s: %s", what, info.reason);
    cr_expect(eq(long, n_checks(), before + 1), "%s", what);
}

/* The bytes of the one file, with some room behind them. */
static char *one_file(char *path, size_t path_bytes, size_t *ret_bytes)
{
    install("counted");
    start(verdicts);
    cr_assert(eq(uint, n_files(path, path_bytes), 1));
    char *text = (char *)file_read(path, ret_bytes);
    text = realloc(text, *ret_bytes + VERDICT_FILE_BYTES_MAX);
    cr_assert(text != NULL);
    return text;
}

static void overwrite(const char *path, const char *data, size_t bytes)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    cr_assert(ge(int, fd, 0));
    cr_assert(eq(sz, (size_t)write(fd, data, bytes), bytes));
    close(fd);
}

Test(verdict, every_byte_counts)
{
    char path[512];
    size_t bytes;
    char *text = one_file(path, sizeof(path), &bytes);
    struct verdict_key key;
    struct plugin_report report;
    snprintf(key.text, sizeof(key.text), "%.32s", strrchr(path, '/') + 1);
    cr_assert(verdict_parse(text, bytes, &key, &report));
    for (size_t i = 0; i < bytes; i++) {
        text[i] ^= 1;
        cr_expect(not(verdict_parse(text, bytes, &key, &report)), "byte %zu", i);
        cr_expect(not(verdict_parse(text, i, &key, &report)), "cut at %zu", i);
        text[i] ^= 1;
    }
    memset(text + bytes, '\n', VERDICT_FILE_BYTES_MAX);
    cr_expect(not(verdict_parse(text, bytes + 1, &key, &report)));
    cr_expect(not(verdict_parse(text, bytes + VERDICT_FILE_BYTES_MAX, &key, &report)));
    key.text[0] = key.text[0] == '0' ? '1' : '0';
    cr_expect(not(verdict_parse(text, bytes, &key, &report)));
    free(text);
}

Test(verdict, a_file_that_is_wrong_is_as_good_as_none)
{
    char path[512];
    size_t bytes;
    char *text = one_file(path, sizeof(path), &bytes);
    overwrite(path, text, 0);
    check_disbelieved("empty");
    overwrite(path, text, bytes / 2);
    check_disbelieved("cut");
    text[bytes - 3] ^= 1;
    overwrite(path, text, bytes);
    check_disbelieved("damaged");
    cr_expect(start(verdicts).remembered); /* and put right by the check */
    cr_assert(eq(int, chmod(path, 0640), 0));
    check_disbelieved("others may read it");
    unlink(path);
    cr_assert(eq(int, symlink("/dev/zero", path), 0));
    check_disbelieved("a link");
    unlink(path);
    cr_assert(eq(int, mkfifo(path, 0600), 0));
    check_disbelieved("a pipe");
    cr_expect(start(verdicts).remembered);
    free(text);
}

Test(verdict, a_folder_that_others_reach_is_not_used)
{
    install("counted");
    start(verdicts);
    cr_assert(eq(int, chmod(verdicts, 0755), 0));
    check_disbelieved("others may look");
    cr_assert(eq(int, chmod(verdicts, 0700), 0));
    cr_expect(start(verdicts).remembered);
    remove_verdicts();
    folder_write(&folder, "verdicts", "", 0, 0600);
    check_disbelieved("a file in the folder's place");
    unlink(verdicts);
}

Test(verdict, the_oldest_of_many_go)
{
    install("counted");
    start(verdicts);
    char ours[512], path[512];
    cr_assert(eq(uint, n_files(ours, sizeof(ours)), 1));
    for (unsigned i = 0; i < VERDICTS_MAX + 20; i++) {
        snprintf(path, sizeof(path), "%s/%032u.verdict", verdicts, i);
        overwrite(path, "x", 1);
        const struct timespec old[2] = {{.tv_sec = 1000 + i}, {.tv_sec = 1000 + i}};
        cr_assert(eq(int, utimensat(AT_FDCWD, path, old, 0), 0));
    }
    snprintf(path, sizeof(path), "%s/%032u.1.new", verdicts, 0);
    overwrite(path, "x", 1);
    const struct timespec old[2] = {{.tv_sec = 1000}, {.tv_sec = 1000}};
    cr_assert(eq(int, utimensat(AT_FDCWD, path, old, 0), 0));
    install("good");
    start(verdicts);
    cr_expect(eq(uint, n_files(NULL, 0), VERDICTS_MAX));
    cr_expect(eq(int, access(ours, F_OK), 0));
    cr_expect(eq(int, access(path, F_OK), -1)); /* what a dead writer left */
    cr_expect(start(verdicts).remembered);
}

Test(verdict, what_is_forgotten_is_gone)
{
    char path[512];
    size_t bytes;
    char *text = one_file(path, sizeof(path), &bytes);
    struct verdict_key key;
    snprintf(key.text, sizeof(key.text), "%.32s", strrchr(path, '/') + 1);
    verdict_forget(verdicts, &key);
    cr_expect(eq(uint, n_files(NULL, 0), 0));
    verdict_forget(verdicts, &key); /* of nothing */
    verdict_forget("/nonexistent", &key);
    verdict_remember("/nonexistent/x", &key, text, 10);
    free(text);
}
