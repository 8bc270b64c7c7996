/* format/gguf_internal.h - the parsed form of a GGUF file; private to format/gguf*.c.
 *
 *   | "GGUF" | version u32 | n_tensors u64 | n_keys u64 |
 *   n_keys    x | key string | value type u32 | value |
 *   n_tensors x | name string | n_dims u32 | ne u64 x n_dims | type u32 | offset u64 |
 *   | padding to the alignment | data, where every tensor starts at its offset |
 *
 * A string is a u64 length and that many bytes; an array an element type (u32), a count (u64) and
 * the elements. Everything is little-endian.
 *
 * The mapping is shared with the file: whoever may write the file may change these bytes after they
 * were checked. Lengths and offsets are therefore copied out when they are checked and never read
 * again from the mapping (strings inside arrays, which are walked again, are checked again). When
 * the file is truncated, touching the lost pages raises SIGBUS; that is for the process to handle.
 */
#ifndef FORMAT_GGUF_INTERNAL_H
#define FORMAT_GGUF_INTERNAL_H

#include "format/gguf.h"
#include "format/types.h"

#include <string.h>

/* Limits. Everything else is bounded by the size of the file. */
#define GGUF_MAX_KEYS          65536
#define GGUF_MAX_KEY_BYTES     65535 /* the format's own limit */
#define GGUF_MAX_TENSORS       262144
#define GGUF_MAX_NAME_BYTES    128
#define GGUF_MAX_FILES         1024
#define GGUF_MIN_ALIGNMENT     8
#define GGUF_DEFAULT_ALIGNMENT 32

/* A key and where its value lies. */
struct gguf_value {
    struct gguf_string key;
    enum gguf_value_type type;         /* never GGUF_ARRAY with an element type of GGUF_ARRAY */
    enum gguf_value_type element_type; /* arrays only */
    uint64_t count;                    /* arrays: elements; otherwise 1 */
    const uint8_t *data;               /* the first element, a string's length included */
    uint64_t bytes;                    /* all elements */
};

/* One file. */
struct gguf_part {
    char *path;          /* owned */
    int fd;              /* owned; -1 for a memory image */
    const uint8_t *base; /* the mapping (owned when fd >= 0) or the caller's buffer */
    uint64_t bytes;
    uint32_t version;
    uint64_t alignment;
    uint64_t data_offset; /* where the tensors' offsets count from */
    struct gguf_value *values;
    uint32_t *by_key; /* indices of values, sorted by key */
    uint32_t n_values;
    uint32_t n_tensors;
};

struct gguf {
    struct gguf_part *parts; /* [0] has the model's keys */
    uint32_t n_parts;
    struct gguf_tensor
        *tensors;      /* of all parts, in file order; names are owned, one allocation each */
    uint32_t *by_name; /* indices of tensors, sorted by name */
    size_t n_tensors;
};

/* A place in a file's bytes. The readers return false, and do not move, when too few are left. */
struct gguf_cursor {
    const uint8_t *base;
    uint64_t bytes;
    uint64_t pos;
};

static inline uint64_t gguf_cursor_left(const struct gguf_cursor *c)
{
    return c->bytes - c->pos;
}

static inline bool gguf_cursor_read(struct gguf_cursor *c, void *dst, uint64_t n)
{
    if (n > gguf_cursor_left(c)) {
        return false;
    }
    memcpy(dst, c->base + c->pos, (size_t)n);
    c->pos += n;
    return true;
}

static inline bool gguf_cursor_skip(struct gguf_cursor *c, uint64_t n)
{
    if (n > gguf_cursor_left(c)) {
        return false;
    }
    c->pos += n;
    return true;
}

static inline bool gguf_cursor_string(struct gguf_cursor *c, struct gguf_string *ret)
{
    struct gguf_cursor at = *c;
    uint64_t n;
    if (!gguf_cursor_read(&at, &n, sizeof(n)) || n > gguf_cursor_left(&at)) {
        return false;
    }
    ret->data = (const char *)at.base + at.pos;
    ret->bytes = (size_t)n;
    c->pos = at.pos + n;
    return true;
}

/* Orders by bytes, a prefix before what it begins. */
static inline int gguf_string_compare(struct gguf_string a, struct gguf_string b)
{
    size_t n = a.bytes < b.bytes ? a.bytes : b.bytes;
    int order = n > 0 ? memcmp(a.data, b.data, n) : 0;
    return order != 0 ? order : (a.bytes > b.bytes) - (a.bytes < b.bytes);
}

/* A string from a file, fit for one line of a log: cut to 60 bytes, unprintable ones as '?'. */
struct gguf_shown {
    char text[64];
};
struct gguf_shown gguf_show(struct gguf_string s);
/* The name of a path's file, or the end of a long one: parts of a model differ there. */
struct gguf_shown gguf_show_path(const char *path);

/* Bytes of one scalar; 0 for strings, arrays and unknown types. */
uint64_t gguf_scalar_bytes(uint32_t value_type);

/* Parses a part whose path, base and bytes are set: fills the rest of it, and appends its tensors
 * to g->tensors. On failure both stay destructible. */
int gguf_parse_part(struct gguf *g, uint32_t part_index, struct fmt_error *err);

/* Parses the tensor table at the cursor (the second half of gguf_parse_part). */
int gguf_parse_tensors(struct gguf *g, uint32_t part_index, struct gguf_cursor *c,
                       uint32_t n_tensors, struct fmt_error *err);

/* Builds g->by_name and refuses duplicate names. */
int gguf_index_tensors(struct gguf *g, struct fmt_error *err);

/* Builds part->by_key and refuses duplicate keys. */
int gguf_index_keys(struct gguf_part *part, struct fmt_error *err);

/* NULL when the part has no such key. */
const struct gguf_value *gguf_part_find(const struct gguf_part *part, const char *key);

/* An unsigned integer of any width: 0, -ENOENT or -EINVAL as the public getters. */
int gguf_part_get_u64(const struct gguf_part *part, const char *key, uint64_t *ret);

/* Opens and maps one file into *ret, whose previous content is ignored. */
int gguf_part_map(const char *path, struct gguf_part *ret, struct fmt_error *err);
void gguf_part_finish(struct gguf_part *part);

/* Where part 0 says that it is the first of several: maps and parses the others. */
int gguf_open_other_parts(struct gguf *g, struct fmt_error *err);

#endif
