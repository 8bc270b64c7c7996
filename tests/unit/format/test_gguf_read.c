/* Right files: what was stored is what the getters say. */
#include "image.h"

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

static struct gguf *open_image(const struct image *image)
{
    struct gguf *g = NULL;
    struct fmt_error err = {""};
    int rc = gguf_open_memory(image->bytes, image->n, &g, &err);
    cr_assert_eq(rc, 0, "%s", err.text);
    return g;
}

Test(gguf_read, keys_and_tensors_of_a_small_file)
{
    struct image image = {0};
    put_valid(&image);
    struct gguf *g = open_image(&image);

    cr_expect_eq(gguf_version(g), 3);
    cr_expect_eq(gguf_file_bytes(g), image.n);
    cr_expect_eq(gguf_n_files(g), 1);
    cr_expect_eq(gguf_file_fd(g, 0), -1);
    cr_expect_eq(gguf_n_keys(g), 6);
    cr_expect_eq(gguf_key_at(g, 5).bytes, strlen("test.flag"));
    cr_assert_eq(gguf_n_tensors(g), 2);
    const struct gguf_tensor *b = gguf_find_tensor(g, "b");
    cr_assert_not_null(b);
    cr_expect_eq(b->ne[0], 32);
    cr_expect_eq(b->ne[1], 1);
    cr_expect_eq(b->bytes, 18);
    cr_expect_eq(b->file_offset % 64, 0);
    cr_expect_eq(*(const uint8_t *)b->data, 64);
    cr_expect_null(gguf_find_tensor(g, ""));
    cr_expect_null(gguf_find_tensor(g, "c"));
    walk(g);
    gguf_close(g);
    free(image.bytes);
}

Test(gguf_read, getters_convert_what_fits_and_refuse_the_rest)
{
    struct image image = {0};
    put_valid(&image);
    struct gguf *g = open_image(&image);
    uint32_t u32 = 7;
    uint64_t u64 = 7;
    float f32 = 7;
    bool flag = false;
    struct gguf_string text = {0}, words[2];
    int32_t numbers[2];
    enum gguf_value_type type;
    uint64_t count;

    cr_expect_eq(gguf_get_u32(g, "absent", &u32), -ENOENT);
    cr_expect_eq(gguf_get_u64(g, "test.wide", &u64), -EINVAL, "negative");
    cr_expect_eq(gguf_get_u32(g, "test.flag", &u32), -EINVAL);
    cr_expect_eq(gguf_get_f32(g, "general.alignment", &f32), -EINVAL);
    cr_expect_eq(gguf_get_u32(g, "test.numbers", &u32), -EINVAL, "scalars only");
    cr_expect(u32 == 7 && u64 == 7 && f32 == 7, "untouched on failure");
    cr_expect_eq(gguf_get_u64(g, "general.alignment", &u64), 0);
    cr_expect_eq(u64, 64);
    cr_expect_eq(gguf_get_bool(g, "test.flag", &flag), 0);
    cr_expect(flag);
    cr_expect_eq(gguf_get_bool(g, "general.alignment", &flag), -EINVAL);
    cr_assert_eq(gguf_get_string(g, "general.architecture", &text), 0);
    cr_expect(text.bytes == 4 && memcmp(text.data, "test", 4) == 0);
    cr_expect_eq(gguf_get_string(g, "test.words", &text), -EINVAL);

    cr_assert_eq(gguf_get_array(g, "test.words", &type, &count), 0);
    cr_expect(type == GGUF_STRING && count == 2);
    cr_assert_eq(gguf_get_strings(g, "test.words", words, 2), 0);
    cr_expect(words[0].bytes == 3 && memcmp(words[0].data, "one", 3) == 0 && words[1].bytes == 0);
    cr_expect_eq(gguf_get_strings(g, "test.words", words, 1), -EINVAL);
    cr_expect_eq(gguf_get_strings(g, "test.numbers", words, 2), -EINVAL);
    cr_assert_eq(gguf_get_i32s(g, "test.numbers", numbers, 2), 0);
    cr_expect(numbers[0] == 1 && numbers[1] == -1);
    cr_expect_eq(gguf_get_f32s(g, "test.numbers", &f32, 2), -EINVAL);
    cr_expect_eq(gguf_get_i32s(g, "test.words", numbers, 2), -EINVAL);
    cr_expect_eq(gguf_get_array(g, "test.flag", &type, &count), -EINVAL);
    gguf_close(g);
    free(image.bytes);
}

Test(gguf_read, numbers_at_the_edges_of_their_types)
{
    struct image image = {0};
    const int64_t edges[] = {INT32_MIN, INT32_MAX};
    const int64_t beyond[] = {(int64_t)INT32_MIN - 1, (int64_t)INT32_MAX + 1};
    const double huge = 1e300, infinite = INFINITY, small = 0.5;
    put_header(&image, 0, 8);
    put_key(&image, "max64", GGUF_U64);
    put_u64(&image, UINT64_MAX);
    put_key(&image, "min64", GGUF_I64);
    put_u64(&image, (uint64_t)INT64_MIN);
    put_key(&image, "edges", GGUF_ARRAY);
    put_u32(&image, GGUF_I64);
    put_u64(&image, 2);
    put(&image, edges, sizeof(edges));
    for (int i = 0; i < 2; i++) {
        put_key(&image, i == 0 ? "below" : "above", GGUF_ARRAY);
        put_u32(&image, GGUF_I64);
        put_u64(&image, 1);
        put(&image, &beyond[i], sizeof(beyond[i]));
    }
    put_key(&image, "huge", GGUF_F64);
    put(&image, &huge, sizeof(huge));
    put_key(&image, "infinite", GGUF_F64);
    put(&image, &infinite, sizeof(infinite));
    put_key(&image, "small", GGUF_F64);
    put(&image, &small, sizeof(small));
    struct gguf *g = open_image(&image);

    uint32_t u32;
    uint64_t u64;
    int32_t i32s[2];
    float f32;
    cr_expect_eq(gguf_get_u64(g, "max64", &u64), 0);
    cr_expect_eq(u64, UINT64_MAX);
    cr_expect_eq(gguf_get_u32(g, "max64", &u32), -EINVAL);
    cr_expect_eq(gguf_get_u64(g, "min64", &u64), -EINVAL);
    cr_expect_eq(gguf_get_i32s(g, "edges", i32s, 2), 0);
    cr_expect(i32s[0] == INT32_MIN && i32s[1] == INT32_MAX);
    cr_expect_eq(gguf_get_i32s(g, "below", i32s, 1), -EINVAL);
    cr_expect_eq(gguf_get_i32s(g, "above", i32s, 1), -EINVAL);
    cr_expect_eq(gguf_get_f32(g, "huge", &f32), -EINVAL);
    cr_expect_eq(gguf_get_f32(g, "infinite", &f32), 0);
    cr_expect(isinf(f32));
    cr_expect_eq(gguf_get_f32(g, "small", &f32), 0);
    cr_expect_eq(f32, 0.5f);
    gguf_close(g);
    free(image.bytes);
}

Test(gguf_read, version_two_has_the_same_layout)
{
    struct image image = {0};
    put_valid(&image);
    image.bytes[4] = 2;
    struct gguf *g = open_image(&image);
    cr_expect_eq(gguf_version(g), 2);
    cr_expect_eq(gguf_n_tensors(g), 2);
    gguf_close(g);
    free(image.bytes);
}

Test(gguf_read, a_file_changed_after_opening_cannot_lead_a_getter_astray)
{
    struct image image = {0};
    struct gguf_string words[2], text;
    put_valid(&image);
    struct gguf *g = open_image(&image);
    uint8_t *word = memmem(image.bytes, image.n, "one", 3);
    uint8_t *value = memmem(image.bytes, image.n, "\x04\0\0\0\0\0\0\0test", 12);
    cr_assert(word != NULL && value != NULL);
    memset(word - 8, 0xff, 8);
    memset(value, 0xff, 8);
    cr_expect_eq(gguf_get_strings(g, "test.words", words, 2), -EINVAL);
    cr_expect_eq(gguf_get_string(g, "general.architecture", &text), 0);
    cr_expect_eq(text.bytes, 4, "the length that was checked, not the one stored now");
    gguf_close(g);
    free(image.bytes);
}

/* Opens every .gguf in folder and below it; returns how many. */
static size_t open_all(const char *folder)
{
    size_t n_opened = 0;
    DIR *dir = opendir(folder);
    cr_assert_not_null(dir, "%s", folder);
    for (struct dirent *entry; (entry = readdir(dir)) != NULL;) {
        char path[4096];
        struct stat st;
        size_t bytes = strlen(entry->d_name);
        snprintf(path, sizeof(path), "%s/%s", folder, entry->d_name);
        if (entry->d_name[0] == '.' || stat(path, &st) < 0) {
            continue;
        }
        if (S_ISDIR(st.st_mode)) {
            n_opened += open_all(path);
        } else if (bytes > 5 && strcmp(entry->d_name + bytes - 5, ".gguf") == 0) {
            struct gguf *g = NULL;
            struct fmt_error err = {""};
            cr_assert_eq(gguf_open(path, &g, &err), 0, "%s", err.text);
            cr_expect_eq(gguf_file_bytes(g), (uint64_t)st.st_size);
            cr_expect(gguf_has_key(g, "general.architecture"));
            walk(g);
            gguf_close(g);
            n_opened++;
        }
    }
    closedir(dir);
    return n_opened;
}

Test(gguf_read, every_golden_model_and_vocabulary_opens)
{
    const char *root = getenv("GQAD_TEST_GOLDEN");
    char path[4096];
    snprintf(path, sizeof(path), "%s/models", root != NULL ? root : "/nonexistent");
    if (access(path, R_OK) < 0) {
        fprintf(stderr, "SKIPPED: no golden data\n");
        cr_skip_test("no golden data");
    }
    cr_expect_gt(open_all(path), 0);
    snprintf(path, sizeof(path), "%s/tokenizers", root);
    cr_expect_gt(open_all(path), 0);
}
