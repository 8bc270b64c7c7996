/* format/gguf_split.c - models in several files: NAME-00001-of-000NN.gguf and its siblings.
 *
 * Every part has the keys split.no (from 0) and split.count; the first also has the model's own
 * keys and split.tensors.count. The names are derived from the first part's path. */
#include "format/gguf_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

#define SUFFIX_BYTES (sizeof("-00001-of-00001.gguf") - 1)

/* Checks split.no and split.count of a part. */
static int check_place(const struct gguf_part *part, uint64_t no, uint64_t count,
                       struct fmt_error *err)
{
    uint64_t stored_no, stored_count;
    if (gguf_part_get_u64(part, "split.no", &stored_no) < 0 ||
        gguf_part_get_u64(part, "split.count", &stored_count) < 0) {
        return fmt_fail(err, -EINVAL, "%s: key 'split.no' or 'split.count' is missing or no number",
                        gguf_show_path(part->path).text);
    }
    if (stored_no != no || stored_count != count) {
        return fmt_fail(err, -EINVAL,
                        "%s: keys 'split.no', 'split.count' are %" PRIu64 ", %" PRIu64
                        ", expected %" PRIu64 ", %" PRIu64 "%s",
                        gguf_show_path(part->path).text, stored_no, stored_count, no, count,
                        no == 0 ? "; open the first part" : "");
    }
    return 0;
}

/* The path of part no (from 0), to be freed by the caller; the name of the first must follow the
 * scheme. */
static int derive_path(const char *first, uint32_t no, uint32_t count, char **ret,
                       struct fmt_error *err)
{
    char suffix[32];
    size_t bytes = strlen(first);
    snprintf(suffix, sizeof(suffix), "-00001-of-%05" PRIu32 ".gguf", count);
    if (bytes <= SUFFIX_BYTES || strcmp(first + bytes - SUFFIX_BYTES, suffix) != 0) {
        return fmt_fail(err, -EINVAL, "%s: the first of %" PRIu32 " parts must be named NAME%s",
                        gguf_show_path(first).text, count, suffix);
    }
    char *path = NULL;
    if (asprintf(&path, "%.*s-%05" PRIu32 "-of-%05" PRIu32 ".gguf", (int)(bytes - SUFFIX_BYTES),
                 first, no + 1, count) < 0) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", gguf_show_path(first).text);
    }
    *ret = path;
    return 0;
}

static int open_part(struct gguf *g, uint32_t no, uint32_t count, struct fmt_error *err)
{
    char *path = NULL;
    int rc = derive_path(gguf_path(g), no, count, &path, err);
    if (rc < 0) {
        return rc;
    }
    rc = gguf_part_map(path, &g->parts[no], err);
    free(path);
    if (rc < 0) {
        return rc;
    }
    g->n_parts = no + 1;
    rc = gguf_parse_part(g, no, err);
    return rc < 0 ? rc : check_place(&g->parts[no], no, count, err);
}

int gguf_open_other_parts(struct gguf *g, struct fmt_error *err)
{
    const struct gguf_value *value = gguf_part_find(&g->parts[0], "split.count");
    uint64_t count;
    if (value == NULL) {
        return 0;
    }
    if (gguf_part_get_u64(&g->parts[0], "split.count", &count) < 0) {
        return fmt_fail(err, -EINVAL, "%s: key 'split.count' is no number",
                        gguf_show_path(gguf_path(g)).text);
    }
    if (count <= 1) {
        return 0;
    }
    if (count > GGUF_MAX_FILES) {
        return fmt_fail(err, -EFBIG, "%s: key 'split.count' is %" PRIu64 ", the limit is %d",
                        gguf_show_path(gguf_path(g)).text, count, GGUF_MAX_FILES);
    }
    int rc = check_place(&g->parts[0], 0, count, err);
    if (rc < 0) {
        return rc;
    }
    struct gguf_part *grown = realloc(g->parts, (size_t)count * sizeof(*grown));
    if (grown == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", gguf_show_path(gguf_path(g)).text);
    }
    g->parts = grown;
    for (uint32_t no = 1; no < count; no++) {
        rc = open_part(g, no, (uint32_t)count, err);
        if (rc < 0) {
            return rc;
        }
    }
    uint64_t n_tensors = g->n_tensors;
    rc = gguf_part_get_u64(&g->parts[0], "split.tensors.count", &n_tensors);
    if ((rc < 0 && rc != -ENOENT) || n_tensors != g->n_tensors) {
        return fmt_fail(err, -EINVAL,
                        "%s: key 'split.tensors.count' does not say the %zu tensors of the %" PRIu64
                        " parts",
                        gguf_show_path(gguf_path(g)).text, g->n_tensors, count);
    }
    return 0;
}
