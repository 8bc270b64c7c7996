/* ipc/params_field.c - one value against one row of the table: type, range, size, items. */
#include "ipc/codec_internal.h"

#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

#define REFUSE(d, ...) (ipc_error_set((d)->error, PROTO_E_INVALID_PARAMS, __VA_ARGS__), -EINVAL)

static const char *type_words(const struct ipc_value *v)
{
    switch (ipc_value_type(v)) {
    case IPC_NIL:
        return "nil";
    case IPC_BOOL:
        return "a boolean";
    case IPC_UINT:
    case IPC_INT:
        return "an integer";
    case IPC_FLOAT:
        return "a float";
    case IPC_STR:
        return "a string";
    case IPC_BIN:
        return "binary";
    case IPC_ARRAY:
        return "an array";
    case IPC_MAP:
        return "a map";
    case IPC_OTHER:
        break;
    }
    return "something else";
}

static int refuse_type(const struct field_decoder *d, const struct ipc_value *v)
{
    return REFUSE(d, "'%s' must be of the type %s; it is %s", d->field->name,
                  proto_field_type_name(d->field->type), type_words(v));
}

static int refuse_memory(const struct field_decoder *d)
{
    ipc_error_set(d->error, PROTO_E_NO_MEMORY, "no memory for '%s'", d->field->name);
    return -ENOMEM;
}

/* ---- scalars ----------------------------------------------------------------------------- */

static int decode_bool(const struct field_decoder *d, const struct ipc_value *v, void *ret)
{
    return ipc_value_bool(v, ret) < 0 ? refuse_type(d, v) : 0;
}

/* U32 and U64. */
static int decode_unsigned(const struct field_decoder *d, const struct ipc_value *v, uint64_t *ret)
{
    const struct proto_field *f = d->field;
    uint64_t value;
    int64_t negative;
    int rc = ipc_value_u64(v, &value);

    if (rc == -ERANGE && ipc_value_i64(v, &negative) == 0) {
        return REFUSE(d, "'%s' is %" PRId64 "; it must be %" PRIu64 " to %" PRIu64, f->name,
                      negative, f->min.u, f->max.u);
    }
    if (rc < 0) {
        return refuse_type(d, v);
    }
    if (value < f->min.u || value > f->max.u) {
        return REFUSE(d, "'%s' is %" PRIu64 "; it must be %" PRIu64 " to %" PRIu64, f->name, value,
                      f->min.u, f->max.u);
    }
    *ret = value;
    return 0;
}

static int decode_u32(const struct field_decoder *d, const struct ipc_value *v, uint32_t *ret)
{
    uint64_t value;
    int rc = decode_unsigned(d, v, &value);
    if (rc == 0) {
        *ret = (uint32_t)value;
    }
    return rc;
}

static int decode_i32(const struct field_decoder *d, const struct ipc_value *v, int32_t *ret)
{
    const struct proto_field *f = d->field;
    int64_t value = 0;
    uint64_t huge = 0;
    int rc = ipc_value_i64(v, &value);

    if (rc == -ERANGE && ipc_value_u64(v, &huge) == 0) {
        return REFUSE(d, "'%s' is %" PRIu64 "; it must be %" PRId64 " to %" PRId64, f->name, huge,
                      f->min.i, f->max.i);
    }
    if (rc < 0) {
        return refuse_type(d, v);
    }
    if (value < f->min.i || value > f->max.i) {
        return REFUSE(d, "'%s' is %" PRId64 "; it must be %" PRId64 " to %" PRId64, f->name, value,
                      f->min.i, f->max.i);
    }
    *ret = (int32_t)value;
    return 0;
}

static int decode_f32(const struct field_decoder *d, const struct ipc_value *v, float *ret)
{
    const struct proto_field *f = d->field;
    double value;

    if (ipc_value_f64(v, &value) < 0) {
        return refuse_type(d, v);
    }
    /* Compared as floats: a limit such as 0.01 may come as its nearest float, which is below it. A
     * NaN fails every comparison. */
    float narrow = (float)value;
    if (!(narrow >= (float)f->min.f && narrow <= (float)f->max.f)) {
        return REFUSE(d, "'%s' is %.9g; it must be %.9g to %.9g", f->name, value, f->min.f,
                      f->max.f);
    }
    *ret = narrow;
    return 0;
}

/* ---- strings and arrays ------------------------------------------------------------------ */

static int check_size(const struct field_decoder *d, uint64_t size)
{
    const struct proto_field *f = d->field;
    if (size < f->min.u || size > f->max.u) {
        return REFUSE(d, "'%s' has a %s of %" PRIu64 "; it must be %" PRIu64 " to %" PRIu64,
                      f->name, f->type == PROTO_NAME || f->type == PROTO_TEXT ? "length" : "count",
                      size, f->min.u, f->max.u);
    }
    return 0;
}

static int decode_string(const struct field_decoder *d, const struct ipc_value *v,
                         struct proto_string *ret)
{
    struct proto_string s;

    /* Binary does for names too: a path need not be UTF-8. */
    if (ipc_value_bytes(v, &s) < 0) {
        return refuse_type(d, v);
    }
    int rc = check_size(d, s.bytes);
    if (rc < 0) {
        return rc;
    }
    if (d->field->type == PROTO_NAME && memchr(s.data, '\0', s.bytes) != NULL) {
        return REFUSE(d, "'%s' contains a NUL byte", d->field->name);
    }
    *ret = s;
    return 0;
}

/* A token id inside an array. */
static int decode_token(const struct field_decoder *d, size_t index, const struct ipc_value *v,
                        int32_t *ret)
{
    int64_t id = -1;
    int rc = ipc_value_i64(v, &id);
    if (rc == -EINVAL || rc == -ENOENT) {
        return REFUSE(d, "'%s', item %zu: a token id must be an integer; it is %s", d->field->name,
                      index, type_words(v));
    }
    if (rc < 0 || id < 0 || id > INT32_MAX) {
        return REFUSE(d, "'%s', item %zu: a token id must be 0 to %d", d->field->name, index,
                      INT32_MAX);
    }
    *ret = (int32_t)id;
    return 0;
}

/* Memory for count items; never NULL for none of them. */
static void *alloc_items(const struct field_decoder *d, size_t count, size_t item_bytes)
{
    return ipc_message_alloc(d->message, (count > 0 ? count : 1) * item_bytes);
}

/* Binary: ids of 32 bits, little-endian as this machine has it. */
static int decode_packed_tokens(const struct field_decoder *d, const struct ipc_value *v,
                                struct proto_tokens *ret)
{
    struct proto_string s = {"", 0};
    ipc_value_bytes(v, &s);
    size_t count = s.bytes / sizeof(int32_t);
    if (s.bytes % sizeof(int32_t) != 0) {
        return REFUSE(d, "'%s': binary token ids have 4 bytes each; there are %zu bytes",
                      d->field->name, s.bytes);
    }
    int rc = check_size(d, count);
    if (rc < 0) {
        return rc;
    }
    int32_t *ids = alloc_items(d, count, sizeof(*ids));
    if (ids == NULL) {
        return refuse_memory(d);
    }
    memcpy(ids, s.data, s.bytes);
    for (size_t i = 0; i < count; i++) {
        if (ids[i] < 0) {
            return REFUSE(d, "'%s', item %zu: a token id must be 0 to %d", d->field->name, i,
                          INT32_MAX);
        }
    }
    *ret = (struct proto_tokens){ids, count};
    return 0;
}

static int decode_tokens(const struct field_decoder *d, const struct ipc_value *v,
                         struct proto_tokens *ret)
{
    if (ipc_value_type(v) == IPC_BIN) {
        return decode_packed_tokens(d, v, ret);
    }
    size_t count = ipc_value_count(v);
    int rc = ipc_value_type(v) == IPC_ARRAY ? check_size(d, count) : refuse_type(d, v);
    if (rc < 0) {
        return rc;
    }
    int32_t *ids = alloc_items(d, count, sizeof(*ids));
    if (ids == NULL) {
        return refuse_memory(d);
    }
    for (size_t i = 0; i < count; i++) {
        rc = decode_token(d, i, ipc_value_at(v, i), &ids[i]);
        if (rc < 0) {
            return rc;
        }
    }
    *ret = (struct proto_tokens){ids, count};
    return 0;
}

/* STRINGS are short, and not empty; TEXTS are as long as a text may be. */
static int decode_strings(const struct field_decoder *d, const struct ipc_value *v,
                          struct proto_strings *ret)
{
    const char *name = d->field->name;
    bool texts = d->field->type == PROTO_TEXTS;
    size_t min = texts ? 0 : 1, max = texts ? PROTO_TEXT_BYTES_MAX : PROTO_STOP_BYTES_MAX;
    size_t count = ipc_value_count(v);
    int rc = ipc_value_type(v) == IPC_ARRAY ? check_size(d, count) : refuse_type(d, v);
    if (rc < 0) {
        return rc;
    }
    struct proto_string *items = alloc_items(d, count, sizeof(*items));
    if (items == NULL) {
        return refuse_memory(d);
    }
    for (size_t i = 0; i < count; i++) {
        const struct ipc_value *item = ipc_value_at(v, i);
        if (ipc_value_bytes(item, &items[i]) < 0) {
            return REFUSE(d, "'%s', item %zu: must be a string; it is %s", name, i,
                          type_words(item));
        }
        if (items[i].bytes < min || items[i].bytes > max) {
            return REFUSE(d, "'%s', item %zu: has a length of %zu; it must be %zu to %zu", name, i,
                          items[i].bytes, min, max);
        }
    }
    *ret = (struct proto_strings){items, count};
    return 0;
}

/* -inf, and false in its place, forbid a token. */
static int decode_bias(const struct field_decoder *d, size_t index, const struct ipc_value *token,
                       const struct ipc_value *bias, struct proto_bias *ret)
{
    double value;
    bool allowed = true;
    int rc = decode_token(d, index, token, &ret->token);
    if (rc < 0) {
        return rc;
    }
    if (ipc_value_bool(bias, &allowed) == 0 && !allowed) {
        ret->bias = -INFINITY;
        return 0;
    }
    if (ipc_value_f64(bias, &value) < 0) {
        return REFUSE(d, "'%s', item %zu: a bias must be a number or false; it is %s",
                      d->field->name, index,
                      allowed && ipc_value_type(bias) == IPC_BOOL ? "true" : type_words(bias));
    }
    ret->bias = (float)value;
    if (!isfinite(ret->bias) && value != -INFINITY) {
        return REFUSE(d, "'%s', item %zu: a bias of %.9g; it must be finite, or -inf",
                      d->field->name, index, value);
    }
    return 0;
}

/* [[token, bias], ...] or {token: bias, ...}. */
static int decode_biases(const struct field_decoder *d, const struct ipc_value *v,
                         struct proto_biases *ret)
{
    enum ipc_value_type type = ipc_value_type(v);
    size_t count = ipc_value_count(v);
    int rc = type == IPC_ARRAY || type == IPC_MAP ? check_size(d, count) : refuse_type(d, v);
    if (rc < 0) {
        return rc;
    }
    struct proto_bias *items = alloc_items(d, count, sizeof(*items));
    if (items == NULL) {
        return refuse_memory(d);
    }
    for (size_t i = 0; i < count; i++) {
        const struct ipc_value *token, *bias;
        if (!ipc_value_pair(v, i, &token, &bias)) {
            const struct ipc_value *pair = ipc_value_at(v, i);
            token = ipc_value_at(pair, 0);
            bias = ipc_value_at(pair, 1);
            if (ipc_value_type(pair) != IPC_ARRAY || ipc_value_count(pair) != 2) {
                return REFUSE(d, "'%s', item %zu: must be [token, bias]", d->field->name, i);
            }
        }
        rc = decode_bias(d, i, token, bias, &items[i]);
        if (rc < 0) {
            return rc;
        }
    }
    *ret = (struct proto_biases){items, count};
    return 0;
}

/* ---- any field --------------------------------------------------------------------------- */

/* Whether a handle may stand there, and for so many bytes: before anything is copied. */
static int check_handle(const struct field_decoder *d, const struct ipc_handle *h)
{
    switch (d->field->type) {
    case PROTO_NAME:
    case PROTO_TEXT:
        return check_size(d, h->bytes);
    case PROTO_TOKENS:
        return check_size(d, h->bytes / sizeof(int32_t));
    default:
        return REFUSE(d, "'%s' must be of the type %s; it is a handle, which stands for binary",
                      d->field->name, proto_field_type_name(d->field->type));
    }
}

/* A copy of what a handle names: the client may change the area at any time. */
static int fetch(const struct field_decoder *d, const struct ipc_handle *h,
                 const struct ipc_value **ret)
{
    struct ipc_message *m = d->message;
    if (m->area_bytes == 0) {
        return REFUSE(d, "'%s' is a handle, and the connection has no rings", d->field->name);
    }
    if (h->offset > m->area_bytes || h->bytes > m->area_bytes - h->offset) {
        return REFUSE(d,
                      "'%s' is a handle of %" PRIu64 " bytes at %" PRIu64 "; the client's part of "
                      "the data area has %" PRIu64,
                      d->field->name, h->bytes, h->offset, m->area_bytes);
    }
    int rc = check_handle(d, h);
    if (rc < 0) {
        return rc;
    }
    if (h->bytes > PROTO_FRAME_BYTES_MAX - m->fetched_bytes) {
        return REFUSE(d,
                      "'%s' is a handle of %" PRIu64 " bytes, and others before it have named "
                      "%" PRIu64 "; one message's may name %u",
                      d->field->name, h->bytes, m->fetched_bytes, PROTO_FRAME_BYTES_MAX);
    }
    m->fetched_bytes += h->bytes;
    void *copy = ipc_message_alloc(m, h->bytes + 1);
    if (copy == NULL) {
        return refuse_memory(d);
    }
    memcpy(copy, m->area + h->offset, h->bytes);
    *ret = ipc_message_make_bin(m, copy, (uint32_t)h->bytes);
    return *ret != NULL ? 0 : refuse_memory(d);
}

int ipc_field_decode(const struct field_decoder *d, const struct ipc_value *v, void *ret_member)
{
    struct ipc_handle handle;
    if (ipc_value_handle(v, &handle) == 0) {
        int rc = fetch(d, &handle, &v);
        if (rc < 0) {
            return rc;
        }
    }
    switch (d->field->type) {
    case PROTO_BOOL:
        return decode_bool(d, v, ret_member);
    case PROTO_U32:
        return decode_u32(d, v, ret_member);
    case PROTO_I32:
        return decode_i32(d, v, ret_member);
    case PROTO_U64:
        return decode_unsigned(d, v, ret_member);
    case PROTO_F32:
        return decode_f32(d, v, ret_member);
    case PROTO_NAME:
    case PROTO_TEXT:
        return decode_string(d, v, ret_member);
    case PROTO_TOKENS:
        return decode_tokens(d, v, ret_member);
    case PROTO_STRINGS:
    case PROTO_TEXTS:
        return decode_strings(d, v, ret_member);
    case PROTO_BIASES:
        return decode_biases(d, v, ret_member);
    }
    return refuse_type(d, v);
}
