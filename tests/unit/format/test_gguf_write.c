/* What the writer writes the reader reads, in one file and in several. */
#include "format/gguf_write.h"
#include "image.h"

#include <errno.h>
#include <stdio.h>
#include <sys/resource.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>
#include <dirent.h>

static char folder[] = "/tmp/gqad-format-XXXXXX";

static void make_folder(void)
{
    cr_assert_not_null(mkdtemp(folder));
}

static size_t n_files_in_folder(void)
{
    size_t n = 0;
    DIR *dir = opendir(folder);
    cr_assert_not_null(dir);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        n += entry->d_name[0] != '.';
    }
    closedir(dir);
    return n;
}

static void remove_folder(void)
{
    DIR *dir = opendir(folder);
    for (struct dirent *entry; dir != NULL && (entry = readdir(dir)) != NULL;) {
        if (entry->d_name[0] != '.') {
            unlinkat(dirfd(dir), entry->d_name, 0);
        }
    }
    closedir(dir);
    rmdir(folder);
}

TestSuite(gguf_write, .init = make_folder, .fini = remove_folder);

static const char *path_of(const char *name)
{
    static char path[256];
    snprintf(path, sizeof(path), "%s/%s", folder, name);
    return path;
}

Test(gguf_write, round_trip_of_every_kind_of_key_and_tensor)
{
    struct gguf_writer *w = NULL;
    const struct gguf_string words[] = {{"alpha", 5}, {"", 0}, {"a\0b", 3}};
    const float scores[] = {0.5f, -1e30f};
    const int32_t kinds[] = {1, -7, 3};
    const float row[6] = {1, 2, 3, 4, 5, 6};
    uint8_t block[18] = {1, 2, 3};
    cr_assert_eq(gguf_writer_create(path_of("all.gguf"), &w), 0);
    cr_expect_eq(gguf_writer_add_string(w, "general.architecture", "llama"), 0);
    cr_expect_eq(gguf_writer_add_u32(w, "general.alignment", 128), 0);
    cr_expect_eq(gguf_writer_add_u32(w, "u", UINT32_MAX), 0);
    cr_expect_eq(gguf_writer_add_f32(w, "f", 0.25f), 0);
    cr_expect_eq(gguf_writer_add_bool(w, "b", true), 0);
    cr_expect_eq(gguf_writer_add_strings(w, "words", words, 3), 0);
    cr_expect_eq(gguf_writer_add_strings(w, "none", NULL, 0), 0);
    cr_expect_eq(gguf_writer_add_f32s(w, "scores", scores, 2), 0);
    cr_expect_eq(gguf_writer_add_i32s(w, "kinds", kinds, 3), 0);
    cr_expect_eq(gguf_writer_add_tensor(w, "x", FMT_TYPE_F32, 2, (uint64_t[]){3, 2}), 0);
    cr_expect_eq(gguf_writer_add_tensor(w, "y", FMT_TYPE_Q4_0, 1, (uint64_t[]){32}), 0);
    cr_expect_eq(gguf_writer_begin_data(w), 0);
    cr_expect_eq(gguf_writer_write(w, row, 8), 0);
    cr_expect_eq(gguf_writer_write(w, row + 2, 16), 0);
    cr_expect_eq(gguf_writer_write(w, block, sizeof(block)), 0);
    cr_expect_eq(access(path_of("all.gguf"), F_OK), -1, "not before finish");
    cr_expect_eq(gguf_writer_finish(w), 0);
    gguf_writer_destroy(w);
    cr_expect_eq(n_files_in_folder(), 1);

    struct gguf *g = NULL;
    struct fmt_error err = {""};
    struct gguf_string read_words[3];
    float read_scores[2];
    int32_t read_kinds[3];
    uint32_t u;
    cr_assert_eq(gguf_open(path_of("all.gguf"), &g, &err), 0, "%s", err.text);
    cr_expect_geq(gguf_file_fd(g, 0), 0);
    cr_expect_eq(gguf_get_u32(g, "u", &u), 0);
    cr_expect_eq(u, UINT32_MAX);
    cr_assert_eq(gguf_get_strings(g, "words", read_words, 3), 0);
    cr_expect(read_words[2].bytes == 3 && memcmp(read_words[2].data, "a\0b", 3) == 0);
    cr_expect_eq(gguf_get_strings(g, "none", read_words, 0), 0);
    cr_expect_eq(gguf_get_f32s(g, "scores", read_scores, 2), 0);
    cr_expect_eq(read_scores[1], -1e30f);
    cr_expect_eq(gguf_get_i32s(g, "kinds", read_kinds, 3), 0);
    cr_expect_eq(read_kinds[1], -7);
    const struct gguf_tensor *x = gguf_find_tensor(g, "x"), *y = gguf_find_tensor(g, "y");
    cr_assert(x != NULL && y != NULL);
    cr_expect(x->ne[0] == 3 && x->ne[1] == 2 && memcmp(x->data, row, sizeof(row)) == 0);
    cr_expect(memcmp(y->data, block, sizeof(block)) == 0 && (uintptr_t)y->data % 128 == 0);
    gguf_close(g);
}

Test(gguf_write, misuse_is_refused_and_leaves_no_file)
{
    const uint64_t ne[] = {32};
    for (int misuse = 0; misuse < 9; misuse++) {
        struct gguf_writer *w = NULL;
        int rc = 0, expected = -EINVAL;
        cr_assert_eq(gguf_writer_create(path_of("bad.gguf"), &w), 0);
        cr_assert_eq(gguf_writer_add_u32(w, "key", 1), 0);
        cr_assert_eq(gguf_writer_add_tensor(w, "t", FMT_TYPE_Q8_0, 1, ne), 0);
        switch (misuse) {
        case 0:
            rc = gguf_writer_add_u32(w, "key", 2);
            expected = -EEXIST;
            break;
        case 1:
            rc = gguf_writer_add_tensor(w, "t", FMT_TYPE_F32, 1, ne);
            expected = -EEXIST;
            break;
        case 2:
            rc = gguf_writer_add_tensor(w, "u", FMT_TYPE_Q4_K, 1, ne);
            break;
        case 3:
            rc = gguf_writer_add_tensor(w, "u", 4, 1, ne);
            break;
        case 4:
            rc = gguf_writer_write(w, ne, 1);
            break;
        case 5:
            gguf_writer_begin_data(w);
            rc = gguf_writer_finish(w);
            break;
        case 6:
            gguf_writer_begin_data(w);
            rc = gguf_writer_write(w, (uint8_t[35]){0}, 35);
            break;
        case 7:
            gguf_writer_begin_data(w);
            rc = gguf_writer_add_bool(w, "late", true);
            break;
        case 8:
            rc = gguf_writer_add_u32(w, "general.alignment", 64);
            break;
        }
        cr_expect_eq(rc, expected, "misuse %d: %d", misuse, rc);
        cr_expect_eq(gguf_writer_finish(w), expected, "misuse %d: the error sticks", misuse);
        gguf_writer_destroy(w);
        cr_expect_eq(n_files_in_folder(), 0, "misuse %d", misuse);
    }
}

Test(gguf_write, a_full_disk_is_an_error_and_leaves_no_file)
{
    struct gguf_writer *w = NULL;
    static uint8_t piece[1 << 20];
    signal(SIGXFSZ, SIG_IGN);
    cr_assert_eq(gguf_writer_create(path_of("full.gguf"), &w), 0);
    cr_assert_eq(gguf_writer_add_tensor(w, "t", FMT_TYPE_F32, 1, (uint64_t[]){2 << 20}), 0);
    cr_assert_eq(gguf_writer_begin_data(w), 0);
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &(struct rlimit){1 << 20, RLIM_INFINITY}), 0);
    int rc = 0;
    for (int i = 0; i < 8 && rc == 0; i++) {
        rc = gguf_writer_write(w, piece, sizeof(piece));
    }
    if (rc == 0) {
        rc = gguf_writer_finish(w);
    }
    cr_assert_eq(setrlimit(RLIMIT_FSIZE, &(struct rlimit){RLIM_INFINITY, RLIM_INFINITY}), 0);
    cr_expect_eq(rc, -EFBIG, "%d", rc);
    gguf_writer_destroy(w);
    cr_expect_eq(n_files_in_folder(), 0);
}

Test(gguf_write, a_folder_that_does_not_exist_is_an_error)
{
    struct gguf_writer *w = NULL;
    cr_expect_eq(gguf_writer_create(path_of("no/such/model.gguf"), &w), -ENOENT);
    cr_expect_null(w);
    gguf_writer_destroy(NULL);
}

/* Writes part no (from 0) of count, with one tensor "t<no>" of four floats, all no. */
static void write_part(uint32_t no, uint32_t count, uint32_t claimed_no, uint32_t claimed_total)
{
    char name[64], tensor[16];
    struct gguf_writer *w = NULL;
    const float row[4] = {(float)no, (float)no, (float)no, (float)no};
    snprintf(name, sizeof(name), "m-%05u-of-%05u.gguf", no + 1, count);
    snprintf(tensor, sizeof(tensor), "t%u", no);
    cr_assert_eq(gguf_writer_create(path_of(name), &w), 0);
    gguf_writer_add_u32(w, "split.no", claimed_no);
    gguf_writer_add_u32(w, "split.count", count);
    if (no == 0) {
        gguf_writer_add_string(w, "general.architecture", "llama");
        gguf_writer_add_u32(w, "split.tensors.count", claimed_total);
    }
    gguf_writer_add_tensor(w, tensor, FMT_TYPE_F32, 1, (uint64_t[]){4});
    gguf_writer_begin_data(w);
    gguf_writer_write(w, row, sizeof(row));
    cr_assert_eq(gguf_writer_finish(w), 0);
    gguf_writer_destroy(w);
}

Test(gguf_write, a_model_in_three_parts_opens_by_its_first)
{
    struct gguf *g = NULL;
    struct fmt_error err = {""};
    for (uint32_t no = 0; no < 3; no++) {
        write_part(no, 3, no, 3);
    }
    cr_assert_eq(gguf_open(path_of("m-00001-of-00003.gguf"), &g, &err), 0, "%s", err.text);
    cr_expect_eq(gguf_n_files(g), 3);
    cr_expect_eq(gguf_n_tensors(g), 3);
    cr_expect_eq(gguf_file_bytes(g),
                 gguf_one_file_bytes(g, 0) + gguf_one_file_bytes(g, 1) + gguf_one_file_bytes(g, 2));
    cr_expect(gguf_has_key(g, "general.architecture"));
    const struct gguf_tensor *t2 = gguf_find_tensor(g, "t2");
    float value;
    cr_assert_not_null(t2);
    cr_expect_eq(t2->file_index, 2);
    cr_assert_eq(pread(gguf_file_fd(g, 2), &value, sizeof(value), (off_t)t2->file_offset), 4);
    cr_expect_eq(value, 2.0f);
    cr_expect_str_eq(gguf_file_path(g, 2), path_of("m-00003-of-00003.gguf"));
    walk(g);
    gguf_close(g);
}

Test(gguf_write, parts_that_do_not_belong_together_are_refused)
{
    struct gguf *g = NULL;
    struct fmt_error err = {""};
    write_part(0, 2, 0, 2);
    cr_expect_eq(gguf_open(path_of("m-00001-of-00002.gguf"), &g, &err), -ENOENT);
    cr_expect_not_null(strstr(err.text, "m-00002-of-00002.gguf"), "%s", err.text);

    write_part(1, 2, 1, 2);
    cr_expect_eq(gguf_open(path_of("m-00002-of-00002.gguf"), &g, &err), -EINVAL);
    cr_expect_not_null(strstr(err.text, "open the first part"), "%s", err.text);

    write_part(1, 2, 0, 2);
    cr_expect_eq(gguf_open(path_of("m-00001-of-00002.gguf"), &g, &err), -EINVAL);
    cr_expect_not_null(strstr(err.text, "expected 1, 2"), "%s", err.text);

    write_part(0, 2, 0, 3);
    write_part(1, 2, 1, 3);
    cr_expect_eq(gguf_open(path_of("m-00001-of-00002.gguf"), &g, &err), -EINVAL);
    cr_expect_not_null(strstr(err.text, "split.tensors.count"), "%s", err.text);

    char other[256];
    snprintf(other, sizeof(other), "%s", path_of("renamed.gguf"));
    cr_assert_eq(rename(path_of("m-00001-of-00002.gguf"), other), 0);
    cr_expect_eq(gguf_open(other, &g, &err), -EINVAL);
    cr_expect_not_null(strstr(err.text, "must be named"), "%s", err.text);
    cr_expect_null(g);
}
