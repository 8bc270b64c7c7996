/* ipc/codec_read.c - MessagePack to values and messages, after the scanner.
 *
 * A value is a msgpack_object under another name; strings point into the frame. All objects of a
 * message lie in one msgpack_zone, which is the message's arena. */
#include "ipc/codec_internal.h"

#include <errno.h>
#include <msgpack.h>
#include <string.h>

/* Enough for the objects of an ordinary request; larger arrays get chunks of their own. */
#define ARENA_CHUNK_BYTES 2048u

static const msgpack_object *object_of(const struct ipc_value *v)
{
    return (const msgpack_object *)v;
}

static const struct ipc_value *value_of(const msgpack_object *o)
{
    return (const struct ipc_value *)o;
}

enum ipc_value_type ipc_value_type(const struct ipc_value *v)
{
    if (v == NULL) {
        return IPC_NIL;
    }
    switch (object_of(v)->type) {
    case MSGPACK_OBJECT_NIL:
        return IPC_NIL;
    case MSGPACK_OBJECT_BOOLEAN:
        return IPC_BOOL;
    case MSGPACK_OBJECT_POSITIVE_INTEGER:
        return IPC_UINT;
    case MSGPACK_OBJECT_NEGATIVE_INTEGER:
        return IPC_INT;
    case MSGPACK_OBJECT_FLOAT32:
    case MSGPACK_OBJECT_FLOAT64:
        return IPC_FLOAT;
    case MSGPACK_OBJECT_STR:
        return IPC_STR;
    case MSGPACK_OBJECT_BIN:
        return IPC_BIN;
    case MSGPACK_OBJECT_ARRAY:
        return IPC_ARRAY;
    case MSGPACK_OBJECT_MAP:
        return IPC_MAP;
    case MSGPACK_OBJECT_EXT:
        break;
    }
    return IPC_OTHER;
}

int ipc_value_bool(const struct ipc_value *v, bool *ret)
{
    if (v == NULL) {
        return -ENOENT;
    }
    if (ipc_value_type(v) != IPC_BOOL) {
        return -EINVAL;
    }
    *ret = object_of(v)->via.boolean;
    return 0;
}

int ipc_value_u64(const struct ipc_value *v, uint64_t *ret)
{
    if (v == NULL) {
        return -ENOENT;
    }
    switch (ipc_value_type(v)) {
    case IPC_UINT:
        *ret = object_of(v)->via.u64;
        return 0;
    case IPC_INT:
        return -ERANGE; /* negative: positive ones are IPC_UINT however they were written */
    default:
        return -EINVAL;
    }
}

int ipc_value_i64(const struct ipc_value *v, int64_t *ret)
{
    if (v == NULL) {
        return -ENOENT;
    }
    switch (ipc_value_type(v)) {
    case IPC_UINT:
        if (object_of(v)->via.u64 > INT64_MAX) {
            return -ERANGE;
        }
        *ret = (int64_t)object_of(v)->via.u64;
        return 0;
    case IPC_INT:
        *ret = object_of(v)->via.i64;
        return 0;
    default:
        return -EINVAL;
    }
}

int ipc_value_f64(const struct ipc_value *v, double *ret)
{
    if (v == NULL) {
        return -ENOENT;
    }
    switch (ipc_value_type(v)) {
    case IPC_UINT:
        *ret = (double)object_of(v)->via.u64;
        return 0;
    case IPC_INT:
        *ret = (double)object_of(v)->via.i64;
        return 0;
    case IPC_FLOAT:
        *ret = object_of(v)->via.f64;
        return 0;
    default:
        return -EINVAL;
    }
}

/* The unpacker leaves NULL where a string is empty; nobody else should have to think of that. */
static struct proto_string string_of(const char *data, size_t bytes)
{
    return (struct proto_string){bytes > 0 ? data : "", bytes};
}

int ipc_value_bytes(const struct ipc_value *v, struct proto_string *ret)
{
    if (v == NULL) {
        return -ENOENT;
    }
    const msgpack_object *o = object_of(v);
    switch (ipc_value_type(v)) {
    case IPC_STR:
        *ret = string_of(o->via.str.ptr, o->via.str.size);
        return 0;
    case IPC_BIN:
        *ret = string_of(o->via.bin.ptr, o->via.bin.size);
        return 0;
    default:
        return -EINVAL;
    }
}

size_t ipc_value_count(const struct ipc_value *v)
{
    switch (ipc_value_type(v)) {
    case IPC_ARRAY:
        return object_of(v)->via.array.size;
    case IPC_MAP:
        return object_of(v)->via.map.size;
    default:
        return 0;
    }
}

const struct ipc_value *ipc_value_at(const struct ipc_value *array, size_t index)
{
    if (ipc_value_type(array) != IPC_ARRAY || index >= object_of(array)->via.array.size) {
        return NULL;
    }
    return value_of(&object_of(array)->via.array.ptr[index]);
}

bool ipc_value_pair(const struct ipc_value *map, size_t index, const struct ipc_value **ret_key,
                    const struct ipc_value **ret_value)
{
    if (ipc_value_type(map) != IPC_MAP || index >= object_of(map)->via.map.size) {
        return false;
    }
    const msgpack_object_kv *pair = &object_of(map)->via.map.ptr[index];
    *ret_key = value_of(&pair->key);
    *ret_value = value_of(&pair->val);
    return true;
}

const struct ipc_value *ipc_value_get(const struct ipc_value *map, const char *key)
{
    const struct ipc_value *k, *value;
    struct proto_string name;
    size_t bytes = strlen(key);
    for (size_t i = 0; ipc_value_pair(map, i, &k, &value); i++) {
        if (ipc_value_bytes(k, &name) == 0 && name.bytes == bytes &&
            memcmp(name.data, key, bytes) == 0) {
            return value;
        }
    }
    return NULL;
}

/* ---- messages ---------------------------------------------------------------------------- */

static bool read_id(const struct ipc_value *v, uint32_t *ret)
{
    uint64_t id;
    if (ipc_value_u64(v, &id) < 0 || id > UINT32_MAX) {
        return false;
    }
    *ret = (uint32_t)id;
    return true;
}

static bool read_method(const struct ipc_value *v, struct proto_string *ret)
{
    return ipc_value_type(v) == IPC_STR && ipc_value_bytes(v, ret) == 0;
}

/* [0, id, method, params]. *ret_id is set as soon as it is known. */
static int read_request(const struct ipc_value *array, struct ipc_message *m, uint32_t *ret_id)
{
    if (!read_id(ipc_value_at(array, 1), &m->id)) {
        return -EPROTO;
    }
    *ret_id = m->id;
    m->params = ipc_value_at(array, 3);
    if (ipc_value_count(array) != 4 || !read_method(ipc_value_at(array, 2), &m->method) ||
        ipc_value_type(m->params) != IPC_MAP) {
        return -EPROTO;
    }
    return 0;
}

/* [1, id, error|nil, result]. */
static int read_response(const struct ipc_value *array, struct ipc_message *m)
{
    if (ipc_value_count(array) != 4 || !read_id(ipc_value_at(array, 1), &m->id)) {
        return -EPROTO;
    }
    const struct ipc_value *error = ipc_value_at(array, 2);
    switch (ipc_value_type(error)) {
    case IPC_NIL:
        m->result = ipc_value_at(array, 3);
        return 0;
    case IPC_MAP:
        m->error = error;
        return 0;
    default:
        return -EPROTO;
    }
}

/* [2, method, params]. */
static int read_notification(const struct ipc_value *array, struct ipc_message *m)
{
    m->params = ipc_value_at(array, 2);
    enum ipc_value_type type = ipc_value_type(m->params);
    if (ipc_value_count(array) != 3 || !read_method(ipc_value_at(array, 1), &m->method) ||
        (type != IPC_ARRAY && type != IPC_MAP)) {
        return -EPROTO;
    }
    return 0;
}

static int read_message(const struct ipc_value *array, struct ipc_message *m, uint32_t *ret_id)
{
    uint64_t kind;
    if (ipc_value_u64(ipc_value_at(array, 0), &kind) < 0 || kind > IPC_NOTIFICATION) {
        return -EPROTO;
    }
    m->kind = (enum ipc_message_kind)kind;
    switch (m->kind) {
    case IPC_REQUEST:
        return read_request(array, m, ret_id);
    case IPC_RESPONSE:
        return read_response(array, m);
    case IPC_NOTIFICATION:
        return read_notification(array, m);
    }
    return -EPROTO;
}

_Static_assert(sizeof(msgpack_object) == IPC_VALUE_BYTES, "what a value takes is known");

int ipc_request_id(const uint8_t *head, size_t bytes, uint32_t *ret_id)
{
    if (bytes < 3 || head[0] != 0x94 || head[1] != IPC_REQUEST) {
        return -EPROTO;
    }
    /* A number below 128 is its own type byte; the types of 1, 2, 4 and 8 bytes follow each other.
     */
    uint8_t type = head[2];
    size_t n = type >= 0xcc && type <= 0xcf ? (size_t)1 << (type - 0xcc) : 0;
    uint64_t id = n > 0 ? 0 : type;
    if ((n == 0 && type > 0x7f) || bytes < 3 + n) {
        return -EPROTO;
    }
    for (size_t i = 0; i < n; i++) {
        id = id << 8 | head[3 + i];
    }
    if (id >= UINT32_MAX) {
        return -EPROTO;
    }
    *ret_id = (uint32_t)id;
    return 0;
}

int ipc_message_parse(const uint8_t *frame, size_t bytes, struct ipc_message *ret, uint32_t *ret_id)
{
    struct ipc_message m = {.kind = IPC_REQUEST};
    uint32_t id = UINT32_MAX;
    msgpack_object *root;
    size_t used = 0;
    int rc;

    msgpack_zone *zone = msgpack_zone_new(ARENA_CHUNK_BYTES);
    if (zone == NULL) {
        return -ENOMEM;
    }
    root = msgpack_zone_malloc(zone, sizeof(*root));
    if (root == NULL) {
        rc = -ENOMEM;
        goto err_free;
    }
    switch (msgpack_unpack((const char *)frame, bytes, &used, zone, root)) {
    case MSGPACK_UNPACK_SUCCESS:
        rc = read_message(value_of(root), &m, &id);
        break;
    case MSGPACK_UNPACK_NOMEM_ERROR:
        rc = -ENOMEM;
        break;
    default: /* cut short, bytes behind its end, or no MessagePack at all */
        rc = -EPROTO;
        break;
    }
    if (rc < 0) {
        goto err_free;
    }
    m.arena = zone;
    *ret = m;
    return 0;

err_free:
    msgpack_zone_free(zone);
    if (rc == -EPROTO) {
        *ret_id = id;
    }
    return rc;
}

void ipc_message_finish(struct ipc_message *m)
{
    if (m->arena != NULL) {
        msgpack_zone_free(m->arena);
    }
    memset(m, 0, sizeof(*m));
}

void *ipc_message_alloc(struct ipc_message *m, size_t bytes)
{
    return msgpack_zone_malloc(m->arena, bytes);
}

/* ---- handles ----------------------------------------------------------------------------- */

int ipc_value_handle(const struct ipc_value *v, struct ipc_handle *ret)
{
    struct ipc_handle h;
    if (v == NULL) {
        return -ENOENT;
    }
    if (ipc_value_type(v) != IPC_MAP || ipc_value_count(v) != 2 ||
        ipc_value_u64(ipc_value_get(v, "ring"), &h.offset) < 0 ||
        ipc_value_u64(ipc_value_get(v, "bytes"), &h.bytes) < 0) {
        return -EINVAL;
    }
    *ret = h;
    return 0;
}

static void become_bin(msgpack_object *o, const void *data, uint32_t bytes)
{
    o->type = MSGPACK_OBJECT_BIN;
    o->via.bin.ptr = data;
    o->via.bin.size = bytes;
}

const struct ipc_value *ipc_message_make_bin(struct ipc_message *m, const void *data,
                                             uint32_t bytes)
{
    msgpack_object *o = ipc_message_alloc(m, sizeof(*o));
    if (o != NULL) {
        become_bin(o, data, bytes);
    }
    return o != NULL ? value_of(o) : NULL;
}

/* Calls visit for every value inside of o, itself first; the scanner has bounded the depth. */
static int walk(msgpack_object *o, int (*visit)(void *arg, msgpack_object *o), void *arg)
{
    int rc = visit(arg, o);
    if (o->type == MSGPACK_OBJECT_ARRAY) {
        for (uint32_t i = 0; rc == 0 && i < o->via.array.size; i++) {
            rc = walk(&o->via.array.ptr[i], visit, arg);
        }
    } else if (o->type == MSGPACK_OBJECT_MAP) {
        for (uint32_t i = 0; rc == 0 && i < o->via.map.size; i++) {
            rc = walk(&o->via.map.ptr[i].val, visit, arg);
        }
    }
    return rc;
}

/* The values of a message are its own, though readers see them as constant. */
static int walk_message(struct ipc_message *m, int (*visit)(void *arg, msgpack_object *o),
                        void *arg)
{
    const struct ipc_value *of = m->kind == IPC_RESPONSE ? m->result : m->params;
    return of != NULL ? walk((msgpack_object *)object_of(of), visit, arg) : 0;
}

struct resolving {
    ipc_find_fn find;
    void *arg;
};

static int resolve(void *arg, msgpack_object *o)
{
    const struct resolving *r = arg;
    struct ipc_handle h;
    const uint8_t *data = NULL;
    if (ipc_value_handle(value_of(o), &h) < 0) {
        return 0;
    }
    int rc = h.bytes <= UINT32_MAX ? r->find(r->arg, &h, &data) : -EPROTO;
    if (rc == 0) {
        become_bin(o, data, (uint32_t)h.bytes);
    }
    return rc;
}

int ipc_message_resolve(struct ipc_message *m, ipc_find_fn find, void *arg)
{
    struct resolving r = {find, arg};
    return walk_message(m, resolve, &r);
}

struct owning {
    struct ipc_message *message;
    const uint8_t *first;
    uint64_t bytes;
};

static int own(void *arg, msgpack_object *o)
{
    const struct owning *w = arg;
    if (o->type != MSGPACK_OBJECT_BIN || (const uint8_t *)o->via.bin.ptr < w->first ||
        (const uint8_t *)o->via.bin.ptr >= w->first + w->bytes) {
        return 0;
    }
    char *copy = ipc_message_alloc(w->message, o->via.bin.size + 1u);
    if (copy == NULL) {
        return -ENOMEM;
    }
    memcpy(copy, o->via.bin.ptr, o->via.bin.size);
    o->via.bin.ptr = copy;
    return 0;
}

int ipc_message_own(struct ipc_message *m, const uint8_t *first, uint64_t bytes)
{
    struct owning w = {m, first, bytes};
    return walk_message(m, own, &w);
}
