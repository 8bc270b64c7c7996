/* format/gguf_kv.c - keys and values: the index by key and the typed getters. */
#include "format/gguf_internal.h"

#include <errno.h>
#include <float.h>
#include <limits.h>
#include <stdlib.h>

static int compare_keys(const void *a, const void *b, void *context)
{
    const struct gguf_value *values = context;
    const uint32_t *x = a, *y = b;
    return gguf_string_compare(values[*x].key, values[*y].key);
}

int gguf_index_keys(struct gguf_part *part, struct fmt_error *err)
{
    part->by_key = calloc((size_t)part->n_values + 1, sizeof(*part->by_key));
    if (part->by_key == NULL) {
        return fmt_fail(err, -ENOMEM, "%s: out of memory", gguf_show_path(part->path).text);
    }
    for (uint32_t i = 0; i < part->n_values; i++) {
        part->by_key[i] = i;
    }
    qsort_r(part->by_key, part->n_values, sizeof(*part->by_key), compare_keys, part->values);
    for (uint32_t i = 1; i < part->n_values; i++) {
        const struct gguf_value *before = &part->values[part->by_key[i - 1]];
        const struct gguf_value *after = &part->values[part->by_key[i]];
        if (gguf_string_compare(before->key, after->key) == 0) {
            return fmt_fail(err, -EINVAL, "%s: key '%s' appears twice",
                            gguf_show_path(part->path).text, gguf_show(after->key).text);
        }
    }
    return 0;
}

const struct gguf_value *gguf_part_find(const struct gguf_part *part, const char *key)
{
    struct gguf_string wanted = {key, strlen(key)};
    uint32_t low = 0, high = part->n_values;
    while (low < high) {
        uint32_t middle = low + (high - low) / 2;
        const struct gguf_value *value = &part->values[part->by_key[middle]];
        int order = gguf_string_compare(wanted, value->key);
        if (order == 0) {
            return value;
        }
        if (order < 0) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return NULL;
}

/* An integer of any width: magnitude and sign, so that every value of every type fits. */
struct integer {
    bool negative;
    uint64_t magnitude;
};

static bool load_integer(const uint8_t *at, enum gguf_value_type type, struct integer *ret)
{
    union {
        uint8_t u8;
        int8_t i8;
        uint16_t u16;
        int16_t i16;
        uint32_t u32;
        int32_t i32;
        uint64_t u64;
        int64_t i64;
    } raw = {0};
    memcpy(&raw, at, (size_t)gguf_scalar_bytes(type));
    int64_t value;
    switch (type) {
    case GGUF_U8:
        value = raw.u8;
        break;
    case GGUF_I8:
        value = raw.i8;
        break;
    case GGUF_U16:
        value = raw.u16;
        break;
    case GGUF_I16:
        value = raw.i16;
        break;
    case GGUF_U32:
        value = raw.u32;
        break;
    case GGUF_I32:
        value = raw.i32;
        break;
    case GGUF_I64:
        value = raw.i64;
        break;
    case GGUF_U64:
        *ret = (struct integer){false, raw.u64};
        return true;
    default:
        return false;
    }
    *ret = (struct integer){value < 0, value < 0 ? 0 - (uint64_t)value : (uint64_t)value};
    return true;
}

static bool load_float(const uint8_t *at, enum gguf_value_type type, float *ret)
{
    if (type == GGUF_F32) {
        memcpy(ret, at, sizeof(*ret));
        return true;
    }
    if (type != GGUF_F64) {
        return false;
    }
    double wide;
    memcpy(&wide, at, sizeof(wide));
    /* Infinities and NaN convert; finite values must stay finite. */
    if (wide - wide == 0.0 && (wide > (double)FLT_MAX || wide < -(double)FLT_MAX)) {
        return false;
    }
    *ret = (float)wide;
    return true;
}

int gguf_part_get_u64(const struct gguf_part *part, const char *key, uint64_t *ret)
{
    const struct gguf_value *value = gguf_part_find(part, key);
    struct integer integer;
    if (value == NULL) {
        return -ENOENT;
    }
    if (!load_integer(value->data, value->type, &integer) || integer.negative) {
        return -EINVAL;
    }
    *ret = integer.magnitude;
    return 0;
}

size_t gguf_n_keys(const struct gguf *g)
{
    return g->parts[0].n_values;
}

struct gguf_string gguf_key_at(const struct gguf *g, size_t i)
{
    return g->parts[0].values[i].key;
}

bool gguf_has_key(const struct gguf *g, const char *key)
{
    return gguf_part_find(&g->parts[0], key) != NULL;
}

int gguf_get_u64(const struct gguf *g, const char *key, uint64_t *ret)
{
    return gguf_part_get_u64(&g->parts[0], key, ret);
}

int gguf_get_u32(const struct gguf *g, const char *key, uint32_t *ret)
{
    uint64_t wide;
    int rc = gguf_part_get_u64(&g->parts[0], key, &wide);
    if (rc < 0) {
        return rc;
    }
    if (wide > UINT32_MAX) {
        return -EINVAL;
    }
    *ret = (uint32_t)wide;
    return 0;
}

int gguf_get_f32(const struct gguf *g, const char *key, float *ret)
{
    const struct gguf_value *value = gguf_part_find(&g->parts[0], key);
    if (value == NULL) {
        return -ENOENT;
    }
    return load_float(value->data, value->type, ret) ? 0 : -EINVAL;
}

int gguf_get_bool(const struct gguf *g, const char *key, bool *ret)
{
    const struct gguf_value *value = gguf_part_find(&g->parts[0], key);
    if (value == NULL) {
        return -ENOENT;
    }
    if (value->type != GGUF_BOOL) {
        return -EINVAL;
    }
    *ret = value->data[0] != 0;
    return 0;
}

int gguf_get_string(const struct gguf *g, const char *key, struct gguf_string *ret)
{
    const struct gguf_value *value = gguf_part_find(&g->parts[0], key);
    if (value == NULL) {
        return -ENOENT;
    }
    if (value->type != GGUF_STRING) {
        return -EINVAL;
    }
    /* value->bytes was derived from the length at parse time: the length is not read again. */
    *ret = (struct gguf_string){(const char *)value->data + 8, (size_t)value->bytes - 8};
    return 0;
}

/* 0 and the array, -ENOENT, or -EINVAL when it is no array or does not have count elements. */
static int find_array(const struct gguf *g, const char *key, uint64_t count,
                      const struct gguf_value **ret)
{
    const struct gguf_value *value = gguf_part_find(&g->parts[0], key);
    if (value == NULL) {
        return -ENOENT;
    }
    if (value->type != GGUF_ARRAY || value->count != count) {
        return -EINVAL;
    }
    *ret = value;
    return 0;
}

int gguf_get_array(const struct gguf *g, const char *key, enum gguf_value_type *ret_type,
                   uint64_t *ret_count)
{
    const struct gguf_value *value = gguf_part_find(&g->parts[0], key);
    if (value == NULL) {
        return -ENOENT;
    }
    if (value->type != GGUF_ARRAY) {
        return -EINVAL;
    }
    *ret_type = value->element_type;
    *ret_count = value->count;
    return 0;
}

int gguf_get_strings(const struct gguf *g, const char *key, struct gguf_string *ret, uint64_t count)
{
    const struct gguf_value *value;
    int rc = find_array(g, key, count, &value);
    if (rc < 0) {
        return rc;
    }
    if (value->element_type != GGUF_STRING) {
        return -EINVAL;
    }
    struct gguf_cursor c = {.base = value->data, .bytes = value->bytes};
    for (uint64_t i = 0; i < count; i++) {
        if (!gguf_cursor_string(&c, &ret[i])) {
            return -EINVAL; /* only when the file was changed after it was parsed */
        }
    }
    return 0;
}

int gguf_get_f32s(const struct gguf *g, const char *key, float *ret, uint64_t count)
{
    const struct gguf_value *value;
    int rc = find_array(g, key, count, &value);
    if (rc < 0) {
        return rc;
    }
    uint64_t stride = gguf_scalar_bytes(value->element_type);
    for (uint64_t i = 0; i < count; i++) {
        if (!load_float(value->data + i * stride, value->element_type, &ret[i])) {
            return -EINVAL;
        }
    }
    return 0;
}

static bool load_i32(const uint8_t *at, enum gguf_value_type type, int32_t *ret)
{
    struct integer integer;
    if (type == GGUF_BOOL) {
        *ret = *at != 0;
        return true;
    }
    if (!load_integer(at, type, &integer) ||
        integer.magnitude > (uint64_t)INT32_MAX + (integer.negative ? 1 : 0)) {
        return false;
    }
    int64_t magnitude = (int64_t)integer.magnitude;
    *ret = (int32_t)(integer.negative ? -magnitude : magnitude);
    return true;
}

int gguf_get_i32s(const struct gguf *g, const char *key, int32_t *ret, uint64_t count)
{
    const struct gguf_value *value;
    int rc = find_array(g, key, count, &value);
    if (rc < 0) {
        return rc;
    }
    uint64_t stride = gguf_scalar_bytes(value->element_type);
    for (uint64_t i = 0; i < count; i++) {
        if (!load_i32(value->data + i * stride, value->element_type, &ret[i])) {
            return -EINVAL;
        }
    }
    return 0;
}
