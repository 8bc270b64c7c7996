#include "daemon/model/weight_scan.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static int by_offset(const void *a, const void *b)
{
    const struct gguf_tensor *x = *(const struct gguf_tensor *const *)a;
    const struct gguf_tensor *y = *(const struct gguf_tensor *const *)b;
    return (x->file_offset > y->file_offset) - (x->file_offset < y->file_offset);
}

int weight_scan_init(struct weight_scan *s, const struct gguf *g, uint32_t file,
                     struct fmt_error *err)
{
    *s = (struct weight_scan){.g = g, .file = file, .err = err};
    s->tensors = calloc(gguf_n_tensors(g) + 1, sizeof(const struct gguf_tensor *));
    if (s->tensors == NULL) {
        return fmt_fail(err, -ENOMEM, "no memory to look through the weights");
    }
    for (size_t i = 0; i < gguf_n_tensors(g); i++) {
        const struct gguf_tensor *t = gguf_tensor_at(g, i);
        if (t->file_index == file && t->bytes > 0) {
            s->tensors[s->n_tensors++] = t;
        }
    }
    qsort(s->tensors, s->n_tensors, sizeof(const struct gguf_tensor *), by_offset);
    return 0;
}

void weight_scan_finish(struct weight_scan *s)
{
    free(s->tensors);
    s->tensors = NULL;
}

/* Whole blocks of a tensor, of which the first is block number first. */
static int check_blocks(const struct weight_scan *s, const struct gguf_tensor *t, uint64_t first,
                        const uint8_t *data, uint64_t n_blocks)
{
    const struct fmt_type_info *type = fmt_type_info(t->type);
    uint64_t index;
    if (fmt_type_finite(type, data, n_blocks * type->n_block, &index)) {
        return 0;
    }
    index += first * type->n_block;
    return fmt_fail(s->err, -EINVAL,
                    "%s: tensor %s: value %llu is infinite or not a number: the file is damaged or "
                    "was made from a model that was",
                    fmt_file_name(gguf_file_path(s->g, s->file)), t->name.data,
                    (unsigned long long)index);
}

/* The bytes [at, at + bytes) of a tensor. */
static int check_part(struct weight_scan *s, const struct gguf_tensor *t, uint64_t at,
                      const uint8_t *data, size_t bytes)
{
    size_t block_bytes = fmt_type_info(t->type)->block_bytes;
    int rc = 0;
    if (s->carry_bytes > 0) {
        size_t missing = block_bytes - s->carry_bytes;
        size_t n = bytes < missing ? bytes : missing;
        memcpy(s->carry + s->carry_bytes, data, n);
        s->carry_bytes += n;
        if (s->carry_bytes < block_bytes) {
            return 0;
        }
        s->carry_bytes = 0;
        rc = check_blocks(s, t, at / block_bytes, s->carry, 1);
        at += n;
        data += n;
        bytes -= n;
    }
    size_t whole = bytes / block_bytes;
    rc = rc < 0 ? rc : check_blocks(s, t, at / block_bytes, data, whole);
    s->carry_bytes = bytes - whole * block_bytes;
    memcpy(s->carry, data + whole * block_bytes, s->carry_bytes);
    return rc;
}

int weight_scan_bytes(struct weight_scan *s, uint64_t offset, const void *data, size_t bytes)
{
    const uint8_t *at = data;
    uint64_t end = offset + bytes;
    while (s->next < s->n_tensors) {
        const struct gguf_tensor *t = s->tensors[s->next];
        uint64_t t_end = t->file_offset + t->bytes;
        uint64_t from = t->file_offset > offset ? t->file_offset : offset;
        uint64_t to = t_end < end ? t_end : end;
        if (from >= to) {
            return 0; /* it lies behind what has come so far */
        }
        int rc = check_part(s, t, from - t->file_offset, at + (from - offset), (size_t)(to - from));
        if (rc < 0 || to < t_end) {
            return rc;
        }
        s->next++;
    }
    return 0;
}
