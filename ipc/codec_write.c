/* ipc/codec_write.c - values and message heads to MessagePack, into a buffer that grows. */
#include "ipc/codec_internal.h"

#include <errno.h>
#include <msgpack.h>
#include <stdlib.h>
#include <string.h>

#define BUFFER_BYTES_FIRST 512u

void ipc_buffer_init(struct ipc_buffer *b)
{
    memset(b, 0, sizeof(*b));
}

void ipc_buffer_finish(struct ipc_buffer *b)
{
    free(b->data);
    ipc_buffer_init(b);
}

/* Doubles, so that appending is linear in all. */
int ipc_buffer_reserve(struct ipc_buffer *b, size_t more)
{
    if (more <= b->capacity - b->bytes) {
        return 0;
    }
    if (more > SIZE_MAX / 2 - b->bytes) {
        return -ENOMEM;
    }
    size_t capacity = b->capacity > 0 ? b->capacity : BUFFER_BYTES_FIRST;
    while (capacity < b->bytes + more) {
        capacity *= 2;
    }
    uint8_t *data = realloc(b->data, capacity);
    if (data == NULL) {
        return -ENOMEM;
    }
    b->data = data;
    b->capacity = capacity;
    return 0;
}

static int append(void *buffer, const char *data, size_t bytes)
{
    struct ipc_buffer *b = buffer;
    if (b->error == 0) {
        b->error = ipc_buffer_reserve(b, bytes);
    }
    if (b->error < 0) {
        return -1;
    }
    if (bytes > 0) {
        memcpy(b->data + b->bytes, data, bytes);
        b->bytes += bytes;
    }
    return 0;
}

static msgpack_packer packer_of(struct ipc_buffer *b)
{
    return (msgpack_packer){.data = b, .callback = append};
}

/* MessagePack has 32 bits for lengths and counts. */
static bool fits_length(struct ipc_buffer *b, size_t n)
{
    if (n > UINT32_MAX && b->error == 0) {
        b->error = -EMSGSIZE;
    }
    return b->error == 0;
}

void ipc_pack_nil(struct ipc_buffer *b)
{
    msgpack_packer p = packer_of(b);
    msgpack_pack_nil(&p);
}

void ipc_pack_bool(struct ipc_buffer *b, bool value)
{
    msgpack_packer p = packer_of(b);
    if (value) {
        msgpack_pack_true(&p);
    } else {
        msgpack_pack_false(&p);
    }
}

void ipc_pack_u64(struct ipc_buffer *b, uint64_t value)
{
    msgpack_packer p = packer_of(b);
    msgpack_pack_uint64(&p, value);
}

void ipc_pack_i64(struct ipc_buffer *b, int64_t value)
{
    msgpack_packer p = packer_of(b);
    msgpack_pack_int64(&p, value);
}

void ipc_pack_f32(struct ipc_buffer *b, float value)
{
    msgpack_packer p = packer_of(b);
    msgpack_pack_float(&p, value);
}

void ipc_pack_f64(struct ipc_buffer *b, double value)
{
    msgpack_packer p = packer_of(b);
    msgpack_pack_double(&p, value);
}

static void pack_str_bytes(struct ipc_buffer *b, const char *data, size_t bytes)
{
    msgpack_packer p = packer_of(b);
    if (fits_length(b, bytes)) {
        msgpack_pack_str(&p, bytes);
        append(b, data, bytes);
    }
}

void ipc_pack_str(struct ipc_buffer *b, const char *text)
{
    pack_str_bytes(b, text, strlen(text));
}

void ipc_pack_text(struct ipc_buffer *b, const char *data, size_t bytes)
{
    if (ipc_utf8_valid_bytes(data, bytes) == bytes) {
        pack_str_bytes(b, data, bytes);
    } else {
        ipc_pack_bin(b, data, bytes);
    }
}

void ipc_pack_bin(struct ipc_buffer *b, const void *data, size_t bytes)
{
    msgpack_packer p = packer_of(b);
    if (fits_length(b, bytes)) {
        msgpack_pack_bin(&p, bytes);
        append(b, data, bytes);
    }
}

void ipc_pack_array(struct ipc_buffer *b, size_t count)
{
    msgpack_packer p = packer_of(b);
    if (fits_length(b, count)) {
        msgpack_pack_array(&p, count);
    }
}

void ipc_pack_map(struct ipc_buffer *b, size_t count)
{
    msgpack_packer p = packer_of(b);
    if (fits_length(b, count)) {
        msgpack_pack_map(&p, count);
    }
}

void ipc_pack_tokens(struct ipc_buffer *b, const int32_t *ids, size_t count)
{
    msgpack_packer p = packer_of(b);
    ipc_pack_array(b, count);
    for (size_t i = 0; i < count && b->error == 0; i++) {
        msgpack_pack_int32(&p, ids[i]);
    }
}

/* data: (shape[0], ..., shape[n_dims - 1]), row-major, little-endian as this machine has it. */
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "tensors travel as they lie in memory");

static uint64_t tensor_bytes(const uint64_t *shape, size_t n_dims)
{
    uint64_t bytes = sizeof(float);
    for (size_t i = 0; i < n_dims; i++) {
        if (__builtin_mul_overflow(bytes, shape[i], &bytes)) {
            return UINT64_MAX; /* packing the data will refuse it */
        }
    }
    return bytes;
}

/* All of a tensor's map but the value of its last key. */
static void begin_tensor(struct ipc_buffer *b, const uint64_t *shape, size_t n_dims)
{
    ipc_pack_map(b, 4);
    ipc_pack_bin(b, "nd", 2);
    ipc_pack_bool(b, true);
    ipc_pack_bin(b, "type", 4);
    ipc_pack_str(b, "<f4");
    ipc_pack_bin(b, "shape", 5);
    ipc_pack_array(b, n_dims);
    for (size_t i = 0; i < n_dims; i++) {
        ipc_pack_u64(b, shape[i]);
    }
    ipc_pack_bin(b, "data", 4);
}

void ipc_pack_tensor_f32(struct ipc_buffer *b, const float *data, const uint64_t *shape,
                         size_t n_dims)
{
    begin_tensor(b, shape, n_dims);
    ipc_pack_bin(b, data, tensor_bytes(shape, n_dims));
}

void ipc_pack_handle(struct ipc_buffer *b, const struct ipc_handle *handle)
{
    ipc_pack_map(b, 2);
    ipc_pack_str(b, "ring");
    ipc_pack_u64(b, handle->offset);
    ipc_pack_str(b, "bytes");
    ipc_pack_u64(b, handle->bytes);
}

void ipc_pack_tensor_f32_by_handle(struct ipc_buffer *b, const struct ipc_handle *handle,
                                   const uint64_t *shape, size_t n_dims)
{
    begin_tensor(b, shape, n_dims);
    ipc_pack_handle(b, handle);
}

void ipc_pack_raw(struct ipc_buffer *b, const void *data, size_t bytes)
{
    append(b, data, bytes);
}

/* ---- messages ---------------------------------------------------------------------------- */

void ipc_pack_request(struct ipc_buffer *b, uint32_t id, const char *method)
{
    ipc_pack_array(b, 4);
    ipc_pack_u64(b, 0);
    ipc_pack_u64(b, id);
    ipc_pack_str(b, method);
}

void ipc_pack_response_ok(struct ipc_buffer *b, uint32_t id)
{
    ipc_pack_array(b, 4);
    ipc_pack_u64(b, 1);
    ipc_pack_u64(b, id);
    ipc_pack_nil(b);
}

void ipc_pack_notification(struct ipc_buffer *b, const char *method)
{
    ipc_pack_array(b, 3);
    ipc_pack_u64(b, 2);
    ipc_pack_str(b, method);
}

void ipc_pack_event(struct ipc_buffer *b, uint32_t id, uint32_t seq)
{
    ipc_pack_notification(b, "gqa.event");
    ipc_pack_array(b, 3);
    ipc_pack_u64(b, id);
    ipc_pack_u64(b, seq);
}

void ipc_pack_response_error(struct ipc_buffer *b, uint32_t id, const struct ipc_error *e)
{
    bool hint = e->retry_after_ms > 0;
    ipc_pack_array(b, 4);
    ipc_pack_u64(b, 1);
    ipc_pack_u64(b, id);
    ipc_pack_map(b, hint ? 4 : 3);
    ipc_pack_str(b, "code");
    ipc_pack_u64(b, e->code);
    ipc_pack_str(b, "name");
    ipc_pack_str(b, proto_error_name(e->code));
    ipc_pack_str(b, "message");
    ipc_pack_str(b, e->message);
    if (hint) {
        ipc_pack_str(b, "retry_after_ms");
        ipc_pack_u64(b, e->retry_after_ms);
    }
    ipc_pack_nil(b);
}
