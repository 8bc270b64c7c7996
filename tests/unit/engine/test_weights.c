/* Weights that are no numbers are refused by name, in every type, wherever the file is cut into
 * pieces, and before anything is computed with them. */
#include "daemon/model/weight_scan.h"
#include "tests/unit/engine/parts.h"

#include <criterion/criterion.h>
#include <criterion/new/assert.h>

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static struct parts parts;

static void setup(void)
{
    parts_init(&parts, 1);
}

static void teardown(void)
{
    parts_finish(&parts);
}

TestSuite(weights, .init = setup, .fini = teardown, .timeout = 120);

/* ---- the scan alone ------------------------------------------------------------------------ */

#define N_BLOCKS 5u

/* A file with a tensor of every type, of zeros: "t.Q4_0" and so on. */
static void write_types(const char *path)
{
    static const uint8_t zeros[N_BLOCKS * FMT_MAX_BLOCK_BYTES];
    const struct fmt_type_info *type;
    struct gguf_writer *w;
    cr_assert(eq(int, gguf_writer_create(path, &w), 0));
    gguf_writer_add_string(w, "general.architecture", "none");
    for (size_t i = 0; (type = fmt_type_at(i)) != NULL; i++) {
        char name[32];
        uint64_t ne = (uint64_t)N_BLOCKS * type->n_block;
        snprintf(name, sizeof(name), "t.%s", type->name);
        cr_assert(eq(int, gguf_writer_add_tensor(w, name, type->type, 1, &ne), 0));
    }
    cr_assert(eq(int, gguf_writer_begin_data(w), 0));
    for (size_t i = 0; (type = fmt_type_at(i)) != NULL; i++) {
        cr_assert(eq(int, gguf_writer_write(w, zeros, N_BLOCKS * type->block_bytes), 0));
    }
    cr_assert(eq(int, gguf_writer_finish(w), 0));
    gguf_writer_destroy(w);
}

/* Scans data (the whole file) in pieces of that size. */
static int scan(const struct gguf *g, const uint8_t *data, size_t bytes, size_t piece,
                struct fmt_error *err)
{
    struct weight_scan s;
    int rc = weight_scan_init(&s, g, 0, err);
    for (size_t at = 0; rc == 0 && at < bytes; at += piece) {
        rc = weight_scan_bytes(&s, at, data + at, bytes - at < piece ? bytes - at : piece);
    }
    weight_scan_finish(&s);
    return rc;
}

/* Sets the bytes of a scale (or of the value) to ones, wherever in the block that is: where its
 * first value is no number then. */
static bool spoil(const struct fmt_type_info *type, uint8_t *block)
{
    for (uint32_t at = 0; at + 2 <= type->block_bytes; at++) {
        float values[FMT_MAX_BLOCK_VALUES];
        uint8_t kept[4];
        size_t n = type->block_bytes - at < 4 ? type->block_bytes - at : 4;
        memcpy(kept, block + at, n);
        memset(block + at, 0xff, type->type == FMT_TYPE_F32 ? n : 2);
        type->dequantise(block, values, type->n_block);
        if (!isfinite(values[0])) {
            return true;
        }
        memcpy(block + at, kept, n);
    }
    return false;
}

Test(weights, of_every_type_are_looked_at_in_pieces_of_any_size)
{
    static const size_t pieces[] = {1, 2, 7, 100, 4096, 1u << 20};
    const char *path = folder_path(&parts.folder, "types.gguf");
    struct fmt_error err = {""};
    struct gguf *g;
    size_t bytes;
    write_types(path);
    cr_assert(eq(int, gguf_open(path, &g, &err), 0), "%s", err.text);
    uint8_t *data = file_read(gguf_path(g), &bytes);
    for (size_t p = 0; p < sizeof(pieces) / sizeof(pieces[0]); p++) {
        cr_expect(eq(int, scan(g, data, bytes, pieces[p], &err), 0), "%s", err.text);
    }
    for (size_t i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(g, i);
        const struct fmt_type_info *type = fmt_type_info(t->type);
        for (uint32_t b = 0; b < N_BLOCKS; b++) {
            uint8_t *block = data + t->file_offset + (size_t)b * type->block_bytes;
            uint8_t kept[FMT_MAX_BLOCK_BYTES];
            char value[64];
            memcpy(kept, block, type->block_bytes);
            if (!spoil(type, block)) {
                cr_fail("%s: nothing makes a block of it no number", type->name);
                continue;
            }
            snprintf(value, sizeof(value), "tensor %s: value %u is", t->name.data,
                     b * type->n_block);
            for (size_t p = 0; p < sizeof(pieces) / sizeof(pieces[0]); p++) {
                cr_expect(eq(int, scan(g, data, bytes, pieces[p], &err), -EINVAL));
                cr_expect(strstr(err.text, value) != NULL, "'%s' lacks '%s'", err.text, value);
            }
            memcpy(block, kept, type->block_bytes);
        }
    }
    free(data);
    gguf_close(g);
}

/* ---- a load -------------------------------------------------------------------------------- */

/* Writes one value of a tensor of F32 into the file. */
static void patch(const char *path, const char *tensor, uint64_t index, float value)
{
    struct fmt_error err = {""};
    struct gguf *g;
    cr_assert(eq(int, gguf_open(path, &g, &err), 0), "%s", err.text);
    const struct gguf_tensor *t = gguf_find_tensor(g, tensor);
    off_t at = (off_t)(t->file_offset + index * sizeof(value));
    gguf_close(g);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    cr_assert(eq(int, (int)pwrite(fd, &value, sizeof(value), at), (int)sizeof(value)));
    close(fd);
}

Test(weights, that_are_no_numbers_fail_the_load)
{
    static const struct {
        const char *tensor;
        uint64_t index;
        float value;
    } cases[] = {
        {"token_embd.weight", 0, NAN},
        {"token_embd.weight", 32 * TINY_VOCAB - 1, INFINITY},
        {"blk.0.attn_norm.weight", 31, -INFINITY},
        {"blk.1.ffn_down.weight", 1000, NAN},
        {"output_norm.weight", 5, NAN},
        {"output.weight", 77, -NAN},
    };
    struct tiny tiny = tiny_default();
    struct model_options o = parts_model_options();
    char path[128];
    snprintf(path, sizeof(path), "%s", folder_path(&parts.folder, "it.gguf"));
    o.path = path;
    o.name = "it";
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct model *m = NULL;
        struct fmt_error err = {""};
        char wanted[128];
        tiny_write(&tiny, path);
        patch(path, cases[i].tensor, cases[i].index, cases[i].value);
        cr_expect(eq(
            int, model_load(&o, parts.catalogue, parts.pool, parts.io, NULL, NULL, NULL, &m, &err),
            -EINVAL));
        snprintf(wanted, sizeof(wanted), "it.gguf: tensor %s: value %llu is infinite or not",
                 cases[i].tensor, (unsigned long long)cases[i].index);
        cr_expect(strstr(err.text, wanted) != NULL, "'%s' lacks '%s'", err.text, wanted);
        cr_expect(m == NULL);
    }
}
