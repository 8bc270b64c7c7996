/* format/gguf_tensors.c - the tensor table of one GGUF file, and the index over all parts' names.
 */
#include "format/gguf_internal.h"
#include "format/checked.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

/* "F32, F16, ...": all that fmt_type_at() knows. */
struct type_list {
    char text[160];
};

static struct type_list list_types(void)
{
    struct type_list list = {.text = ""};
    size_t used = 0;
    for (size_t i = 0; fmt_type_at(i) != NULL && used < sizeof(list.text); i++) {
        int n = snprintf(list.text + used, sizeof(list.text) - used, "%s%s", i == 0 ? "" : ", ",
                         fmt_type_at(i)->name);
        used += n > 0 ? (size_t)n : 0;
    }
    return list;
}

/* What the file says of one tensor, before it is checked. */
struct raw_tensor {
    uint64_t at; /* offset of this entry, for messages */
    struct gguf_string name;
    uint32_t n_dims, type;
    uint64_t ne[GGUF_MAX_DIMS];
    uint64_t offset;
};

static bool read_raw(struct gguf_cursor *c, struct raw_tensor *ret)
{
    struct raw_tensor raw = {.at = c->pos, .ne = {1, 1, 1, 1}};
    if (!gguf_cursor_string(c, &raw.name) || !gguf_cursor_read(c, &raw.n_dims, 4)) {
        return false;
    }
    /* Too many dimensions are refused by check_name_dims(); there is nothing further to read. */
    if (raw.n_dims >= 1 && raw.n_dims <= GGUF_MAX_DIMS) {
        for (uint32_t i = 0; i < raw.n_dims; i++) {
            if (!gguf_cursor_read(c, &raw.ne[i], 8)) {
                return false;
            }
        }
        if (!gguf_cursor_read(c, &raw.type, 4) || !gguf_cursor_read(c, &raw.offset, 8)) {
            return false;
        }
    }
    *ret = raw;
    return true;
}

static int check_name_dims(const struct gguf_part *part, const struct raw_tensor *raw,
                           struct fmt_error *err)
{
    struct gguf_shown path = gguf_show_path(part->path), name = gguf_show(raw->name);
    if (raw->name.bytes == 0 || raw->name.bytes > GGUF_MAX_NAME_BYTES ||
        memchr(raw->name.data, '\0', raw->name.bytes) != NULL) {
        return fmt_fail(err, -EINVAL,
                        "%s: tensor '%s' at offset %" PRIu64
                        ": a name of %zu bytes (1..%d without NUL are legal)",
                        path.text, name.text, raw->at, raw->name.bytes, GGUF_MAX_NAME_BYTES);
    }
    if (raw->n_dims < 1 || raw->n_dims > GGUF_MAX_DIMS) {
        return fmt_fail(err, -EINVAL,
                        "%s: tensor '%s' at offset %" PRIu64 ": %" PRIu32
                        " dimensions (1..%d are legal)",
                        path.text, name.text, raw->at, raw->n_dims, GGUF_MAX_DIMS);
    }
    return 0;
}

/* Type known, size computed without overflow: returns it. */
static int check_size(const struct gguf_part *part, const struct raw_tensor *raw,
                      uint64_t *ret_bytes, struct fmt_error *err)
{
    struct gguf_shown path = gguf_show_path(part->path), name = gguf_show(raw->name);
    const struct fmt_type_info *info = fmt_type_info(raw->type);
    if (info == NULL) {
        return fmt_fail(err, -ENOTSUP, "%s: tensor '%s': type %" PRIu32 " is none of %s", path.text,
                        name.text, raw->type, list_types().text);
    }
    if (raw->ne[0] % info->n_block != 0) {
        return fmt_fail(err, -EINVAL,
                        "%s: tensor '%s': rows of %" PRIu64
                        " values are no multiple of the %" PRIu32 " that a block of %s holds",
                        path.text, name.text, raw->ne[0], info->n_block, info->name);
    }
    uint64_t n = 1;
    for (uint32_t i = 0; i < raw->n_dims; i++) {
        if (raw->ne[i] == 0 || !checked_mul_u64(n, raw->ne[i], &n)) {
            return fmt_fail(
                err, -EINVAL,
                "%s: tensor '%s' at offset %" PRIu64 ": dimension %" PRIu32 " is %" PRIu64 ", %s",
                path.text, name.text, raw->at, i, raw->ne[i],
                raw->ne[i] == 0 ? "which is not legal" : "and the size overflows 64 bits");
        }
    }
    uint64_t bytes = fmt_type_bytes(info, n);
    if (bytes == 0) {
        return fmt_fail(err, -EINVAL,
                        "%s: tensor '%s' at offset %" PRIu64 ": its size overflows 64 bits",
                        path.text, name.text, raw->at);
    }
    *ret_bytes = bytes;
    return 0;
}

/* Checks where the data lies, relative to the data section; part->data_offset is not known yet when
 * the first tensors are read, so this is a second pass over the part's tensors. */
static int place_tensor(const struct gguf_part *part, struct gguf_tensor *tensor,
                        struct fmt_error *err)
{
    struct gguf_shown path = gguf_show_path(part->path), name = gguf_show(tensor->name);
    uint64_t offset = tensor->file_offset; /* as stored: relative */
    uint64_t room = part->bytes > part->data_offset ? part->bytes - part->data_offset : 0;
    if (offset % part->alignment != 0) {
        return fmt_fail(err, -EINVAL,
                        "%s: tensor '%s': offset %" PRIu64 " is not aligned to %" PRIu64, path.text,
                        name.text, offset, part->alignment);
    }
    if (offset > room || tensor->bytes > room - offset) {
        return fmt_fail(err, -EINVAL,
                        "%s: tensor '%s': %" PRIu64 " bytes at offset %" PRIu64
                        " pass the end of the data section of %" PRIu64 " bytes (truncated?)",
                        path.text, name.text, tensor->bytes, offset, room);
    }
    tensor->file_offset = part->data_offset + offset;
    tensor->data = part->base + tensor->file_offset;
    return 0;
}

static int compare_places(const void *a, const void *b)
{
    const struct gguf_tensor *const *x = a, *const *y = b;
    return ((*x)->file_offset > (*y)->file_offset) - ((*x)->file_offset < (*y)->file_offset);
}

static int check_overlaps(const struct gguf_part *part, const struct gguf_tensor *tensors,
                          uint32_t n, struct fmt_error *err)
{
    const struct gguf_tensor **order = calloc((size_t)n + 1, sizeof(struct gguf_tensor *));
    if (order == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", gguf_show_path(part->path).text);
    }
    for (uint32_t i = 0; i < n; i++) {
        order[i] = &tensors[i];
    }
    qsort(order, n, sizeof(struct gguf_tensor *), compare_places);
    int rc = 0;
    for (uint32_t i = 1; i < n && rc == 0; i++) {
        const struct gguf_tensor *before = order[i - 1], *after = order[i];
        if (after->file_offset - before->file_offset < before->bytes) {
            rc = fmt_fail(err, -EINVAL,
                          "%s: tensor '%s' at offset %" PRIu64 " overlaps '%s' at %" PRIu64,
                          gguf_show_path(part->path).text, gguf_show(after->name).text,
                          after->file_offset, gguf_show(before->name).text, before->file_offset);
        }
    }
    free(order);
    return rc;
}

static int add_tensor(struct gguf *g, uint32_t part_index, const struct raw_tensor *raw,
                      struct fmt_error *err)
{
    const struct gguf_part *part = &g->parts[part_index];
    struct gguf_tensor tensor = {
        .type = raw->type,
        .n_dims = raw->n_dims,
        .file_index = part_index,
        .file_offset = raw->offset,
    };
    memcpy(tensor.ne, raw->ne, sizeof(tensor.ne));
    int rc = check_size(part, raw, &tensor.bytes, err);
    if (rc < 0) {
        return rc;
    }
    char *name = malloc(raw->name.bytes + 1);
    if (name == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", gguf_show_path(part->path).text);
    }
    memcpy(name, raw->name.data, raw->name.bytes);
    name[raw->name.bytes] = '\0';
    /* Measured on the copy, so that it is a C string even if the file changes under us. */
    tensor.name = (struct gguf_string){name, strlen(name)};
    g->tensors[g->n_tensors++] = tensor;
    return 0;
}

int gguf_parse_tensors(struct gguf *g, uint32_t part_index, struct gguf_cursor *c,
                       uint32_t n_tensors, struct fmt_error *err)
{
    struct gguf_part *part = &g->parts[part_index];
    size_t first = g->n_tensors;
    struct gguf_tensor *grown =
        realloc(g->tensors, (first + n_tensors + 1) * sizeof(struct gguf_tensor));
    if (grown == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", gguf_show_path(part->path).text);
    }
    g->tensors = grown;

    for (uint32_t i = 0; i < n_tensors; i++) {
        struct raw_tensor raw;
        uint64_t at = c->pos;
        if (!read_raw(c, &raw)) {
            return fmt_fail(err, -EINVAL,
                            "%s: tensor %" PRIu32 " of %" PRIu32 " at offset %" PRIu64
                            ": its entry passes the end of the file at %" PRIu64,
                            gguf_show_path(part->path).text, i, n_tensors, at, c->bytes);
        }
        int rc = check_name_dims(part, &raw, err);
        if (rc == 0) {
            rc = add_tensor(g, part_index, &raw, err);
        }
        if (rc < 0) {
            return rc;
        }
        part->n_tensors++;
    }
    /* Cannot overflow: positions and alignments are below 2^63 and 2^32. */
    part->data_offset = (c->pos + part->alignment - 1) & ~(part->alignment - 1);
    for (uint32_t i = 0; i < n_tensors; i++) {
        int rc = place_tensor(part, &g->tensors[first + i], err);
        if (rc < 0) {
            return rc;
        }
    }
    return check_overlaps(part, g->tensors + first, n_tensors, err);
}

/* qsort_r's context is the tensors' or values' array, its elements are indices into it. Sorting,
 * unlike hashing, has no bad case that a hostile file could aim at. */
static int compare_names(const void *a, const void *b, void *context)
{
    const struct gguf_tensor *tensors = context;
    const uint32_t *x = a, *y = b;
    return gguf_string_compare(tensors[*x].name, tensors[*y].name);
}

int gguf_index_tensors(struct gguf *g, struct fmt_error *err)
{
    g->by_name = calloc(g->n_tensors + 1, sizeof(*g->by_name));
    if (g->by_name == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", gguf_show_path(gguf_path(g)).text);
    }
    for (size_t i = 0; i < g->n_tensors; i++) {
        g->by_name[i] = (uint32_t)i;
    }
    qsort_r(g->by_name, g->n_tensors, sizeof(*g->by_name), compare_names, g->tensors);
    for (size_t i = 1; i < g->n_tensors; i++) {
        const struct gguf_tensor *before = &g->tensors[g->by_name[i - 1]];
        const struct gguf_tensor *after = &g->tensors[g->by_name[i]];
        if (gguf_string_compare(before->name, after->name) == 0) {
            return fmt_fail(err, -EINVAL, "%s: tensor '%s' appears twice",
                            gguf_show_path(g->parts[after->file_index].path).text,
                            gguf_show(after->name).text);
        }
    }
    return 0;
}

const struct gguf_tensor *gguf_find_tensor(const struct gguf *g, const char *name)
{
    struct gguf_string wanted = {name, strlen(name)};
    size_t low = 0, high = g->n_tensors;
    while (low < high) {
        size_t middle = low + (high - low) / 2;
        const struct gguf_tensor *tensor = &g->tensors[g->by_name[middle]];
        int order = gguf_string_compare(wanted, tensor->name);
        if (order == 0) {
            return tensor;
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}
