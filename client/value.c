/* client/value.c - reading results, and results that outlive their call. */
#include "client/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* struct gqa_value is the codec's value under a public name. */
_Static_assert((int)GQA_VALUE_NIL == (int)IPC_NIL && (int)GQA_VALUE_BOOL == (int)IPC_BOOL &&
                   (int)GQA_VALUE_UINT == (int)IPC_UINT && (int)GQA_VALUE_INT == (int)IPC_INT &&
                   (int)GQA_VALUE_FLOAT == (int)IPC_FLOAT && (int)GQA_VALUE_STR == (int)IPC_STR &&
                   (int)GQA_VALUE_BIN == (int)IPC_BIN && (int)GQA_VALUE_ARRAY == (int)IPC_ARRAY &&
                   (int)GQA_VALUE_MAP == (int)IPC_MAP && (int)GQA_VALUE_OTHER == (int)IPC_OTHER,
               "client.h repeats ipc/codec.h");

enum gqa_value_type gqa_value_type(const struct gqa_value *v)
{
    return v != NULL ? (enum gqa_value_type)ipc_value_type(client_to_ipc(v)) : GQA_VALUE_NIL;
}

static bool is_absent(const struct gqa_value *v)
{
    return gqa_value_type(v) == GQA_VALUE_NIL;
}

int gqa_value_bool(const struct gqa_value *v, bool *ret)
{
    return is_absent(v) ? -ENOENT : ipc_value_bool(client_to_ipc(v), ret);
}

int gqa_value_u64(const struct gqa_value *v, uint64_t *ret)
{
    return is_absent(v) ? -ENOENT : ipc_value_u64(client_to_ipc(v), ret);
}

int gqa_value_i64(const struct gqa_value *v, int64_t *ret)
{
    return is_absent(v) ? -ENOENT : ipc_value_i64(client_to_ipc(v), ret);
}

int gqa_value_f64(const struct gqa_value *v, double *ret)
{
    return is_absent(v) ? -ENOENT : ipc_value_f64(client_to_ipc(v), ret);
}

int gqa_value_bytes(const struct gqa_value *v, const char **ret_data, size_t *ret_bytes)
{
    struct proto_string s;
    int r = is_absent(v) ? -ENOENT : ipc_value_bytes(client_to_ipc(v), &s);
    if (r < 0) {
        return r;
    }
    *ret_data = s.data;
    *ret_bytes = s.bytes;
    return 0;
}

size_t gqa_value_count(const struct gqa_value *v)
{
    return is_absent(v) ? 0 : ipc_value_count(client_to_ipc(v));
}

const struct gqa_value *gqa_value_at(const struct gqa_value *array, size_t index)
{
    return is_absent(array) ? NULL : client_from_ipc(ipc_value_at(client_to_ipc(array), index));
}

const struct gqa_value *gqa_value_get(const struct gqa_value *map, const char *key)
{
    return is_absent(map) ? NULL : client_from_ipc(ipc_value_get(client_to_ipc(map), key));
}

bool gqa_value_pair(const struct gqa_value *map, size_t index, const struct gqa_value **ret_key,
                    const struct gqa_value **ret_value)
{
    const struct ipc_value *key, *value;
    if (is_absent(map) || !ipc_value_pair(client_to_ipc(map), index, &key, &value)) {
        return false;
    }
    *ret_key = client_from_ipc(key);
    *ret_value = client_from_ipc(value);
    return true;
}

int gqa_value_tokens(const struct gqa_value *v, int32_t *ids, size_t room, size_t *ret_count)
{
    if (is_absent(v)) {
        return -ENOENT;
    }
    if (gqa_value_type(v) != GQA_VALUE_ARRAY) {
        return -EINVAL;
    }
    size_t count = gqa_value_count(v);
    for (size_t i = 0; i < count && i < room; i++) {
        int64_t id = 0;
        int r = gqa_value_i64(gqa_value_at(v, i), &id);
        if (r < 0) {
            return r == -ENOENT ? -EINVAL : r;
        }
        if (id < INT32_MIN || id > INT32_MAX) {
            return -ERANGE;
        }
        ids[i] = (int32_t)id;
    }
    *ret_count = count;
    return 0;
}

int gqa_value_tensor_f32(const struct gqa_value *v, struct gqa_tensor_view *ret)
{
    struct gqa_tensor_view t = {0};
    const struct gqa_value *shape = gqa_value_get(v, "shape");
    bool is_tensor = false;
    const char *data;
    if (is_absent(v)) {
        return -ENOENT;
    }
    if (gqa_value_bool(gqa_value_get(v, "nd"), &is_tensor) < 0 || !is_tensor ||
        gqa_value_type(shape) != GQA_VALUE_ARRAY ||
        gqa_value_bytes(gqa_value_get(v, "type"), &t.type, &t.type_bytes) < 0 ||
        gqa_value_bytes(gqa_value_get(v, "data"), &data, &t.bytes) < 0 || t.type_bytes != 3 ||
        memcmp(t.type, "<f4", 3) != 0) {
        return -EINVAL;
    }
    t.data = data;
    t.n_dims = gqa_value_count(shape);
    if (t.n_dims > sizeof(t.shape) / sizeof(t.shape[0])) {
        return -EINVAL;
    }
    uint64_t bytes = sizeof(float);
    for (size_t i = 0; i < t.n_dims; i++) {
        if (gqa_value_u64(gqa_value_at(shape, i), &t.shape[i]) < 0 ||
            __builtin_mul_overflow(bytes, t.shape[i], &bytes)) {
            return -EINVAL;
        }
    }
    if (bytes != t.bytes) {
        return -EINVAL;
    }
    *ret = t;
    return 0;
}

int client_reply_create(struct gqa *g, const uint8_t *frame, size_t bytes, struct gqa_reply **ret)
{
    struct gqa_reply *r = malloc(sizeof(*r) + bytes);
    if (r == NULL) {
        return -ENOMEM;
    }
    memcpy(r->frame, frame, bytes);
    uint32_t id;
    int err = ipc_message_parse(r->frame, bytes, &r->message, &id);
    if (err < 0) {
        free(r);
        return err;
    }
    err = g->ring != NULL ? client_ring_keep(g->ring, &r->message) : 0;
    if (err < 0) {
        gqa_reply_destroy(r);
        return err;
    }
    *ret = r;
    return 0;
}

const struct gqa_value *gqa_reply_value(const struct gqa_reply *r)
{
    return r != NULL ? client_from_ipc(r->message.result) : NULL;
}

struct gqa_reply *gqa_reply_destroy(struct gqa_reply *r)
{
    if (r != NULL) {
        ipc_message_finish(&r->message);
        free(r);
    }
    return NULL;
}
