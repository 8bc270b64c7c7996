/* format/gguf_parse.c - header and keys of one GGUF file. Layout: gguf_internal.h. */
#include "format/gguf_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#define MIN_KEY_BYTES    (8 + 1 + 4 + 1) /* length, one byte of key, type, a one-byte value */
#define MIN_TENSOR_BYTES (8 + 1 + 4 + 8 + 4 + 8) /* as a name of one byte with one dimension */

static const char *const value_type_names[] = {
    "u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool", "string", "array", "u64", "i64", "f64",
};

uint64_t gguf_scalar_bytes(uint32_t value_type)
{
    switch (value_type) {
    case GGUF_U8:
    case GGUF_I8:
    case GGUF_BOOL:
        return 1;
    case GGUF_U16:
    case GGUF_I16:
        return 2;
    case GGUF_U32:
    case GGUF_I32:
    case GGUF_F32:
        return 4;
    case GGUF_U64:
    case GGUF_I64:
    case GGUF_F64:
        return 8;
    default:
        return 0;
    }
}

/* The value at the cursor when it, or one element of it, is a string; bounds only. */
static bool skip_strings(struct gguf_cursor *c, uint64_t count)
{
    for (uint64_t i = 0; i < count; i++) {
        struct gguf_string ignored;
        if (!gguf_cursor_string(c, &ignored)) {
            return false;
        }
    }
    return true;
}

static int parse_array_header(const struct gguf_part *part, struct gguf_cursor *c,
                              struct gguf_value *value, struct fmt_error *err)
{
    struct gguf_shown path = gguf_show_path(part->path), key = gguf_show(value->key);
    uint64_t at = c->pos;
    uint32_t element_type;
    if (!gguf_cursor_read(c, &element_type, 4) || !gguf_cursor_read(c, &value->count, 8)) {
        return fmt_fail(err, -EINVAL,
                        "%s: key '%s' at offset %" PRIu64 ": the file ends inside an array header",
                        path.text, key.text, at);
    }
    if (element_type == GGUF_ARRAY) {
        return fmt_fail(err, -EINVAL,
                        "%s: key '%s' at offset %" PRIu64 ": arrays nested in arrays are not legal",
                        path.text, key.text, at);
    }
    uint64_t min_bytes = element_type == GGUF_STRING ? 8 : gguf_scalar_bytes(element_type);
    if (min_bytes == 0) {
        return fmt_fail(err, -EINVAL,
                        "%s: key '%s' at offset %" PRIu64 ": unknown array element type %" PRIu32
                        " (known 0..12)",
                        path.text, key.text, at, element_type);
    }
    if (value->count > gguf_cursor_left(c) / min_bytes) {
        return fmt_fail(err, -EINVAL,
                        "%s: key '%s' at offset %" PRIu64 ": an array of %" PRIu64
                        " x %s passes the end of the file, %" PRIu64 " bytes further",
                        path.text, key.text, at, value->count, value_type_names[element_type],
                        gguf_cursor_left(c));
    }
    value->element_type = (enum gguf_value_type)element_type;
    return 0;
}

/* Fills value's type, count, data and bytes from the cursor and moves behind it. */
static int parse_value(const struct gguf_part *part, struct gguf_cursor *c,
                       struct gguf_value *value, struct fmt_error *err)
{
    struct gguf_shown path = gguf_show_path(part->path), key = gguf_show(value->key);
    uint64_t at = c->pos;
    uint32_t type;
    if (!gguf_cursor_read(c, &type, 4)) {
        return fmt_fail(err, -EINVAL, "%s: key '%s' at offset %" PRIu64 ": the file ends here",
                        path.text, key.text, at);
    }
    if (type > GGUF_F64) {
        return fmt_fail(err, -EINVAL,
                        "%s: key '%s' at offset %" PRIu64 ": unknown value type %" PRIu32
                        " (known 0..12)",
                        path.text, key.text, at, type);
    }
    value->type = (enum gguf_value_type)type;
    value->count = 1;
    uint32_t scalar_type = type;
    if (type == GGUF_ARRAY) {
        int rc = parse_array_header(part, c, value, err);
        if (rc < 0) {
            return rc;
        }
        scalar_type = value->element_type;
    }
    value->data = c->base + c->pos;
    uint64_t start = c->pos;
    /* The product cannot overflow: an array's count was checked against the bytes left. */
    bool fits = scalar_type == GGUF_STRING
                    ? skip_strings(c, value->count)
                    : gguf_cursor_skip(c, value->count * gguf_scalar_bytes(scalar_type));
    if (!fits) {
        return fmt_fail(err, -EINVAL,
                        "%s: key '%s' at offset %" PRIu64
                        ": the %s passes the end of the file at %" PRIu64,
                        path.text, key.text, at, value_type_names[type], c->bytes);
    }
    value->bytes = c->pos - start;
    return 0;
}

static int parse_keys(struct gguf_part *part, struct gguf_cursor *c, uint32_t n_keys,
                      struct fmt_error *err)
{
    part->values = calloc((size_t)n_keys + 1, sizeof(*part->values));
    if (part->values == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", gguf_show_path(part->path).text);
    }
    for (uint32_t i = 0; i < n_keys; i++) {
        struct gguf_value *value = &part->values[i];
        uint64_t at = c->pos;
        if (!gguf_cursor_string(c, &value->key)) {
            return fmt_fail(err, -EINVAL,
                            "%s: key %" PRIu32 " of %" PRIu32 " at offset %" PRIu64
                            ": its name passes the end of the file at %" PRIu64,
                            gguf_show_path(part->path).text, i, n_keys, at, c->bytes);
        }
        if (value->key.bytes == 0 || value->key.bytes > GGUF_MAX_KEY_BYTES) {
            return fmt_fail(
                err, -EINVAL,
                "%s: key %" PRIu32 " at offset %" PRIu64 ": a name of %zu bytes (1..%d are legal)",
                gguf_show_path(part->path).text, i, at, value->key.bytes, GGUF_MAX_KEY_BYTES);
        }
        int rc = parse_value(part, c, value, err);
        if (rc < 0) {
            return rc;
        }
        part->n_values = i + 1;
    }
    return gguf_index_keys(part, err);
}

static int check_version(const struct gguf_part *part, uint32_t magic, uint32_t version,
                         struct fmt_error *err)
{
    struct gguf_shown path = gguf_show_path(part->path);
    const uint32_t expected = 0x46554747; /* "GGUF" */
    if (magic != expected && magic != __builtin_bswap32(expected)) {
        return fmt_fail(err, -EINVAL, "%s: not a GGUF file (it begins with 0x%08" PRIx32 ")",
                        path.text, magic);
    }
    /* Big-endian files keep the magic's byte order or swap it with everything else. */
    if (magic != expected || (version != 0 && (version & 0xffff) == 0)) {
        return fmt_fail(err, -ENOTSUP,
                        "%s: a big-endian GGUF file; only little-endian is supported", path.text);
    }
    if (version != 2 && version != 3) {
        return fmt_fail(err, -ENOTSUP, "%s: GGUF version %" PRIu32 "; 2 and 3 are supported",
                        path.text, version);
    }
    return 0;
}

/* Counts are believed only as far as the bytes that are left could hold them. */
static int check_count(const struct gguf_part *part, const char *what, uint64_t count,
                       uint64_t min_bytes, uint64_t left, uint64_t limit, struct fmt_error *err)
{
    struct gguf_shown path = gguf_show_path(part->path);
    if (count > left / min_bytes) {
        return fmt_fail(err, -EINVAL,
                        "%s: header: %" PRIu64 " %s cannot lie in the %" PRIu64
                        " bytes that follow",
                        path.text, count, what, left);
    }
    if (count > limit) {
        return fmt_fail(err, -EFBIG, "%s: header: %" PRIu64 " %s, more than the limit %" PRIu64,
                        path.text, count, what, limit);
    }
    return 0;
}

static int read_alignment(struct gguf_part *part, struct fmt_error *err)
{
    uint64_t alignment = GGUF_DEFAULT_ALIGNMENT;
    const struct gguf_value *value = gguf_part_find(part, "general.alignment");
    if (value != NULL) {
        if (value->type != GGUF_U32) {
            return fmt_fail(err, -EINVAL, "%s: key 'general.alignment' is a %s, not a u32",
                            gguf_show_path(part->path).text, value_type_names[value->type]);
        }
        uint32_t stored;
        memcpy(&stored, value->data, sizeof(stored));
        alignment = stored;
    }
    if (alignment < GGUF_MIN_ALIGNMENT || (alignment & (alignment - 1)) != 0) {
        return fmt_fail(err, -EINVAL,
                        "%s: key 'general.alignment' is %" PRIu64
                        ", not a power of two of at least %d",
                        gguf_show_path(part->path).text, alignment, GGUF_MIN_ALIGNMENT);
    }
    part->alignment = alignment;
    return 0;
}

int gguf_parse_part(struct gguf *g, uint32_t part_index, struct fmt_error *err)
{
    struct gguf_part *part = &g->parts[part_index];
    struct gguf_cursor c = {.base = part->base, .bytes = part->bytes};
    uint32_t magic;
    uint64_t n_tensors, n_keys;

    if (!gguf_cursor_read(&c, &magic, 4) || !gguf_cursor_read(&c, &part->version, 4)) {
        return fmt_fail(err, -EINVAL, "%s: %" PRIu64 " bytes are too short for a GGUF header",
                        gguf_show_path(part->path).text, part->bytes);
    }
    int rc = check_version(part, magic, part->version, err);
    if (rc < 0) {
        return rc;
    }
    if (!gguf_cursor_read(&c, &n_tensors, 8) || !gguf_cursor_read(&c, &n_keys, 8)) {
        return fmt_fail(err, -EINVAL, "%s: %" PRIu64 " bytes are too short for a GGUF header",
                        gguf_show_path(part->path).text, part->bytes);
    }
    rc = check_count(part, "keys", n_keys, MIN_KEY_BYTES, gguf_cursor_left(&c), GGUF_MAX_KEYS, err);
    if (rc == 0) {
        rc = check_count(part, "tensors", n_tensors, MIN_TENSOR_BYTES, gguf_cursor_left(&c),
                         GGUF_MAX_TENSORS - g->n_tensors, err);
    }
    if (rc == 0) {
        rc = parse_keys(part, &c, (uint32_t)n_keys, err);
    }
    if (rc == 0) {
        rc = read_alignment(part, err);
    }
    if (rc < 0) {
        return rc;
    }
    return gguf_parse_tensors(g, part_index, &c, (uint32_t)n_tensors, err);
}
