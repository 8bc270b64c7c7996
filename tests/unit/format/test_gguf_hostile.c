/* Wrong files: each is refused with its errno and a sentence that says what is wrong. */
#include "image.h"

#include <errno.h>
#include <stdio.h>
#include <sys/stat.h>
#include <unistd.h>

/* Opens a copy that ends exactly where the image does, so that a sanitizer sees a read behind it.
 */
static int open_exact(const uint8_t *bytes, size_t n, struct fmt_error *err)
{
    uint8_t *copy = malloc(n + 1);
    uint8_t *exact = realloc(copy, n > 0 ? n : 1);
    struct gguf *g = NULL;
    cr_assert_not_null(exact);
    memcpy(exact, bytes, n);
    err->text[0] = '\0';
    int rc = gguf_open_memory(exact, n, &g, err);
    if (rc == 0) {
        walk(g);
        gguf_close(g);
    } else {
        cr_assert_null(g, "untouched on failure");
        cr_assert_neq(err->text[0], '\0', "no sentence for %d", rc);
        cr_assert_lt(strlen(err->text), sizeof(err->text) - 1, "cut: %s", err->text);
    }
    free(exact);
    return rc;
}

static void one_tensor(struct image *i, uint32_t type, uint32_t n_dims, const uint64_t *ne,
                       uint64_t offset)
{
    put_header(i, 1, 0);
    put_tensor(i, "blk.0.attn_q.weight", type, n_dims, ne, offset);
    put_data(i, 32, 256);
}

static void two_tensors(struct image *i, const char *second, uint64_t second_offset)
{
    put_header(i, 2, 0);
    put_tensor(i, "first", FMT_TYPE_F32, 1, (uint64_t[]){16}, 0);
    put_tensor(i, second, FMT_TYPE_F32, 1, (uint64_t[]){16}, second_offset);
    put_data(i, 32, 256);
}

static void bad_magic(struct image *i)
{
    put(i, "ggjt\3\0\0\0", 8);
    put_data(i, 1, 64);
}

static void version_one(struct image *i)
{
    put(i, "GGUF\1\0\0\0", 8);
    put_data(i, 1, 64);
}

static void version_four(struct image *i)
{
    put(i, "GGUF\4\0\0\0", 8);
    put_data(i, 1, 64);
}

static void big_endian(struct image *i)
{
    put(i, "GGUF\0\0\0\3", 8);
    put_data(i, 1, 64);
}

static void big_endian_magic(struct image *i)
{
    put(i, "FUGG\0\0\0\3", 8);
    put_data(i, 1, 64);
}

static void lying_key_count(struct image *i)
{
    put_header(i, 0, UINT64_C(1) << 60);
    put_data(i, 1, 64);
}

static void lying_tensor_count(struct image *i)
{
    put_header(i, UINT64_MAX, 0);
    put_data(i, 1, 64);
}

static void key_count_too_high_by_one(struct image *i)
{
    put_header(i, 0, 2);
    put_key(i, "only.one", GGUF_STRING);
    put_string(i, "some padding, so that a second key seems possible");
}

static void too_many_keys(struct image *i)
{
    put_header(i, 0, 65537);
    put_data(i, 1, 65537 * 14);
}

static void too_many_tensors(struct image *i)
{
    put_header(i, 262145, 0);
    put_data(i, 1, 262145 * 33);
}

static void key_without_name(struct image *i)
{
    put_header(i, 0, 1);
    put_key(i, "", GGUF_U32);
    put_u64(i, 0);
}

static void key_name_too_long(struct image *i)
{
    put_header(i, 0, 1);
    put_u64(i, 65536);
    put_data(i, 1, 65536 + 8);
}

static void key_name_passes_the_end(struct image *i)
{
    put_header(i, 0, 1);
    put_u64(i, UINT64_MAX - 3);
    put_data(i, 1, 64);
}

static void duplicate_key(struct image *i)
{
    put_header(i, 0, 3);
    put_key(i, "twice", GGUF_U8);
    put_u8(i, 1);
    put_key(i, "once", GGUF_U8);
    put_u8(i, 2);
    put_key(i, "twice", GGUF_U8);
    put_u8(i, 1);
}

static void unknown_value_type(struct image *i)
{
    put_header(i, 0, 1);
    put_key(i, "strange", 13);
    put_u64(i, 0);
}

static void unknown_element_type(struct image *i)
{
    put_header(i, 0, 1);
    put_key(i, "strange", GGUF_ARRAY);
    put_u32(i, 99);
    put_u64(i, 1);
    put_u64(i, 0);
}

static void nested_array(struct image *i)
{
    put_header(i, 0, 1);
    put_key(i, "nest", GGUF_ARRAY);
    put_u32(i, GGUF_ARRAY);
    put_u64(i, 1);
    put_u64(i, 0);
}

static void array_passes_the_end(struct image *i)
{
    put_header(i, 0, 1);
    put_key(i, "long", GGUF_ARRAY);
    put_u32(i, GGUF_F64);
    put_u64(i, UINT64_C(1) << 61); /* times eight is zero */
    put_data(i, 1, 64);
}

static void strings_pass_the_end(struct image *i)
{
    put_header(i, 0, 1);
    put_key(i, "tokenizer.ggml.tokens", GGUF_ARRAY);
    put_u32(i, GGUF_STRING);
    put_u64(i, 2);
    put_string(i, "fine");
    put_u64(i, 1000);
}

static void string_value_passes_the_end(struct image *i)
{
    put_header(i, 0, 1);
    put_key(i, "general.name", GGUF_STRING);
    put_u64(i, 1000);
    put_data(i, 1, 64);
}

static void alignment(struct image *i, uint32_t type, uint32_t value)
{
    put_header(i, 0, 1);
    put_key(i, "general.alignment", type);
    put_u32(i, value);
}

static void alignment_zero(struct image *i)
{
    alignment(i, GGUF_U32, 0);
}

static void alignment_no_power(struct image *i)
{
    alignment(i, GGUF_U32, 48);
}

static void alignment_too_small(struct image *i)
{
    alignment(i, GGUF_U32, 4);
}

static void alignment_no_u32(struct image *i)
{
    alignment(i, GGUF_F32, 32);
}

static void unknown_tensor_type(struct image *i)
{
    one_tensor(i, 16, 1, (uint64_t[]){256}, 0);
}

static void removed_tensor_type(struct image *i)
{
    one_tensor(i, 4, 1, (uint64_t[]){32}, 0);
}

static void no_dimensions(struct image *i)
{
    one_tensor(i, FMT_TYPE_F32, 0, NULL, 0);
}

static void five_dimensions(struct image *i)
{
    one_tensor(i, FMT_TYPE_F32, 5, (uint64_t[]){1, 1, 1, 1, 1}, 0);
}

static void zero_dimension(struct image *i)
{
    one_tensor(i, FMT_TYPE_F32, 2, (uint64_t[]){4, 0}, 0);
}

static void overflowing_dimensions(struct image *i)
{
    one_tensor(i, FMT_TYPE_F32, 3, (uint64_t[]){UINT64_C(1) << 32, UINT64_C(1) << 32, 4}, 0);
}

static void overflowing_bytes(struct image *i)
{
    one_tensor(i, FMT_TYPE_F32, 1, (uint64_t[]){UINT64_C(1) << 62}, 0);
}

static void part_of_a_block(struct image *i)
{
    one_tensor(i, FMT_TYPE_Q4_K, 2, (uint64_t[]){128, 2}, 0);
}

static void unaligned_offset(struct image *i)
{
    one_tensor(i, FMT_TYPE_F32, 1, (uint64_t[]){4}, 8);
}

static void offset_behind_the_end(struct image *i)
{
    one_tensor(i, FMT_TYPE_F32, 1, (uint64_t[]){4}, 288);
}

static void offset_overflows(struct image *i)
{
    one_tensor(i, FMT_TYPE_F32, 1, (uint64_t[]){64}, UINT64_MAX - 31);
}

static void tensor_passes_the_end(struct image *i)
{
    one_tensor(i, FMT_TYPE_F32, 1, (uint64_t[]){65}, 0);
}

static void no_data_at_all(struct image *i)
{
    put_header(i, 1, 0);
    put_tensor(i, "weight", FMT_TYPE_F32, 1, (uint64_t[]){1}, 0);
}

static void overlapping_tensors(struct image *i)
{
    two_tensors(i, "second", 32);
}

static void same_place(struct image *i)
{
    two_tensors(i, "second", 0);
}

static void duplicate_tensor(struct image *i)
{
    two_tensors(i, "first", 64);
}

static void tensor_without_name(struct image *i)
{
    two_tensors(i, "", 64);
}

static void tensor_name_too_long(struct image *i)
{
    char name[130];
    memset(name, 'x', 129);
    name[129] = '\0';
    two_tensors(i, name, 64);
}

static void tensor_name_with_nul(struct image *i)
{
    two_tensors(i, "NUL", 64);
    uint8_t *at = memmem(i->bytes, i->n, "NUL", 3);
    at[1] = '\0';
}

static void first_of_split_in_memory_is_whole(struct image *i)
{
    put_header(i, 1, 2);
    put_key(i, "split.count", GGUF_U32);
    put_u32(i, 3);
    put_key(i, "split.no", GGUF_U32);
    put_u32(i, 0);
    put_tensor(i, "beyond", FMT_TYPE_F32, 1, (uint64_t[]){1024}, 0);
}

Test(gguf_hostile, every_kind_of_lie_is_refused_by_name)
{
    static const struct {
        const char *name;
        void (*build)(struct image *);
        int rc;
        const char *word, *other_word; /* both appear in the sentence */
    } rows[] = {
        {"bad magic", bad_magic, -EINVAL, "not a GGUF file", "(memory)"},
        {"version 1", version_one, -ENOTSUP, "version 1", "2 and 3"},
        {"version 4", version_four, -ENOTSUP, "version 4", "2 and 3"},
        {"big endian", big_endian, -ENOTSUP, "big-endian", "(memory)"},
        {"big endian magic", big_endian_magic, -ENOTSUP, "big-endian", "(memory)"},
        {"lying key count", lying_key_count, -EINVAL, "1152921504606846976 keys", "64 bytes"},
        {"lying tensor count", lying_tensor_count, -EINVAL, "18446744073709551615 tensors", "64"},
        {"one key too few", key_count_too_high_by_one, -EINVAL, "key 1 of 2", "end of the file"},
        {"too many keys", too_many_keys, -EFBIG, "65537 keys", "limit 65536"},
        {"too many tensors", too_many_tensors, -EFBIG, "262145 tensors", "limit 262144"},
        {"nameless key", key_without_name, -EINVAL, "key 0", "0 bytes"},
        {"long key", key_name_too_long, -EINVAL, "65536 bytes", "65535"},
        {"key passes the end", key_name_passes_the_end, -EINVAL, "key 0", "offset 24"},
        {"duplicate key", duplicate_key, -EINVAL, "'twice'", "appears twice"},
        {"value type", unknown_value_type, -EINVAL, "'strange'", "type 13"},
        {"element type", unknown_element_type, -EINVAL, "'strange'", "type 99"},
        {"nested array", nested_array, -EINVAL, "'nest'", "nested"},
        {"array count", array_passes_the_end, -EINVAL, "'long'", "2305843009213693952 x f64"},
        {"strings", strings_pass_the_end, -EINVAL, "'tokenizer.ggml.tokens'", "passes the end"},
        {"string", string_value_passes_the_end, -EINVAL, "'general.name'", "string"},
        {"alignment 0", alignment_zero, -EINVAL, "general.alignment", "is 0"},
        {"alignment 48", alignment_no_power, -EINVAL, "general.alignment", "is 48"},
        {"alignment 4", alignment_too_small, -EINVAL, "general.alignment", "is 4"},
        {"alignment f32", alignment_no_u32, -EINVAL, "general.alignment", "f32"},
        {"tensor type", unknown_tensor_type, -ENOTSUP, "type 16", "MXFP4"},
        {"removed type", removed_tensor_type, -ENOTSUP, "'blk.0.attn_q.weight'", "F32, F16"},
        {"0 dimensions", no_dimensions, -EINVAL, "'blk.0.attn_q.weight'", "0 dimensions"},
        {"5 dimensions", five_dimensions, -EINVAL, "5 dimensions", "1..4"},
        {"zero dimension", zero_dimension, -EINVAL, "dimension 1 is 0", "offset 24"},
        {"dimensions", overflowing_dimensions, -EINVAL, "dimension 1", "overflows"},
        {"bytes", overflowing_bytes, -EINVAL, "'blk.0.attn_q.weight'", "overflows"},
        {"part of a block", part_of_a_block, -EINVAL, "rows of 128", "256 that a block of Q4_K"},
        {"unaligned", unaligned_offset, -EINVAL, "offset 8", "aligned to 32"},
        {"offset", offset_behind_the_end, -EINVAL, "offset 288", "256 bytes"},
        {"offset overflows", offset_overflows, -EINVAL, "18446744073709551584", "end"},
        {"passes the end", tensor_passes_the_end, -EINVAL, "260 bytes", "end of the data section"},
        {"no data", no_data_at_all, -EINVAL, "'weight'", "truncated?"},
        {"overlap", overlapping_tensors, -EINVAL, "'second'", "overlaps 'first'"},
        {"same place", same_place, -EINVAL, "'second'", "overlaps"},
        {"duplicate tensor", duplicate_tensor, -EINVAL, "'first'", "appears twice"},
        {"nameless tensor", tensor_without_name, -EINVAL, "tensor ''", "0 bytes"},
        {"long tensor name", tensor_name_too_long, -EINVAL, "129 bytes", "1..128"},
        {"NUL in a name", tensor_name_with_nul, -EINVAL, "'N?L'", "NUL"},
        {"split, truncated", first_of_split_in_memory_is_whole, -EINVAL, "'beyond'", "truncated"},
    };
    for (size_t r = 0; r < sizeof(rows) / sizeof(rows[0]); r++) {
        struct image image = {0};
        struct fmt_error err;
        rows[r].build(&image);
        int rc = open_exact(image.bytes, image.n, &err);
        cr_expect_eq(rc, rows[r].rc, "%s: %d, %s", rows[r].name, rc, err.text);
        cr_expect(strstr(err.text, rows[r].word) != NULL && strstr(err.text, rows[r].other_word),
                  "%s: no '%s' and '%s' in: %s", rows[r].name, rows[r].word, rows[r].other_word,
                  err.text);
        free(image.bytes);
    }
}

Test(gguf_hostile, a_file_cut_at_any_byte_is_refused)
{
    struct image image = {0};
    struct fmt_error err;
    put_valid(&image);
    cr_assert_eq(open_exact(image.bytes, image.n, &err), 0, "%s", err.text);
    for (size_t n = 0; n < image.n; n++) {
        cr_expect_eq(open_exact(image.bytes, n, &err), -EINVAL, "cut at %zu", n);
    }
    free(image.bytes);
}

Test(gguf_hostile, any_byte_changed_is_refused_or_harmless)
{
    static const uint8_t changes[] = {0x01, 0x80, 0xff};
    struct image image = {0};
    size_t n_refused = 0;
    put_valid(&image);
    for (size_t i = 0; i < image.n; i++) {
        for (size_t c = 0; c < sizeof(changes); c++) {
            struct fmt_error err;
            image.bytes[i] ^= changes[c];
            n_refused += open_exact(image.bytes, image.n, &err) < 0;
            image.bytes[i] ^= changes[c];
        }
    }
    cr_expect_gt(n_refused, 0);
    free(image.bytes);
}

Test(gguf_hostile, a_null_error_is_legal)
{
    struct gguf *g = NULL;
    cr_expect_eq(gguf_open_memory("GGUF", 4, &g, NULL), -EINVAL);
    cr_expect_eq(gguf_open("/nonexistent/model.gguf", &g, NULL), -ENOENT);
    gguf_close(NULL);
}

Test(gguf_hostile, what_is_no_regular_file_is_refused_without_waiting)
{
    char folder[] = "/tmp/gqad-format-XXXXXX", path[64];
    struct gguf *g = NULL;
    struct fmt_error err;
    cr_assert_not_null(mkdtemp(folder));
    cr_expect_eq(gguf_open(folder, &g, &err), -EINVAL);
    cr_expect_not_null(strstr(err.text, "not a regular file"), "%s", err.text);

    snprintf(path, sizeof(path), "%s/fifo.gguf", folder);
    cr_assert_eq(mkfifo(path, 0600), 0);
    cr_expect_eq(gguf_open(path, &g, &err), -EINVAL);
    cr_expect_eq(strncmp(err.text, "fifo.gguf: ", 11), 0, "'%s' names the folder", err.text);
    unlink(path);

    cr_expect_eq(gguf_open(path, &g, &err), -ENOENT);
    cr_expect_not_null(strstr(err.text, "No such file"), "%s", err.text);

    FILE *file = fopen(path, "wb");
    cr_assert_not_null(file);
    fclose(file);
    cr_expect_eq(gguf_open(path, &g, &err), -EINVAL);
    cr_expect_not_null(strstr(err.text, "empty"), "%s", err.text);
    unlink(path);
    rmdir(folder);
}
