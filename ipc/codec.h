/* ipc/codec.h - messages to bytes and back; the only place that knows msgpack.
 *
 * Wire: MessagePack-RPC on a byte stream, no extra framing. Request [0, id, method, params],
 * response [1, id, error|nil, result], notification [2, method, params]; params is one map.
 * Incoming bytes pass the resumable scanner first (depth, counts and sizes are checked before
 * anything is unpacked or allocated), then ipc_message_parse.
 *
 * No function logs. Objects belong to one thread at a time. */
#ifndef IPC_CODEC_H
#define IPC_CODEC_H

#include "ipc/protocol.h"

/* ---- writing ---------------------------------------------------------------------------------
 * A growable buffer with a sticky error: packers after a failure do nothing; check error once. */
struct ipc_buffer {
    uint8_t *data; /* malloc'ed */
    size_t bytes, capacity;
    int error; /* 0; -ENOMEM; -EMSGSIZE: a string or a count above UINT32_MAX */
};

void ipc_buffer_init(struct ipc_buffer *b);
void ipc_buffer_finish(struct ipc_buffer *b); /* frees; b is then as after init */
/* Appending so many bytes will not fail for lack of memory. -ENOMEM; the error above is not set. */
int ipc_buffer_reserve(struct ipc_buffer *b, size_t more);

void ipc_pack_nil(struct ipc_buffer *b);
void ipc_pack_bool(struct ipc_buffer *b, bool value);
void ipc_pack_u64(struct ipc_buffer *b, uint64_t value);
void ipc_pack_i64(struct ipc_buffer *b, int64_t value);
void ipc_pack_f32(struct ipc_buffer *b, float value);
void ipc_pack_f64(struct ipc_buffer *b, double value);
void ipc_pack_str(struct ipc_buffer *b, const char *text); /* terminated */
void ipc_pack_text(struct ipc_buffer *b, const char *data,
                   size_t bytes); /* str; bin if not UTF-8 */
void ipc_pack_bin(struct ipc_buffer *b, const void *data, size_t bytes);
void ipc_pack_array(struct ipc_buffer *b, size_t count);
void ipc_pack_map(struct ipc_buffer *b, size_t count);
void ipc_pack_tokens(struct ipc_buffer *b, const int32_t *ids, size_t count);
/* {nd: true, type: "<f4", shape: [...], data: bin}, as python's msgpack-numpy reads it: the keys
 * are binary, because it looks for bytes. ipc_value_get finds them all the same. */
void ipc_pack_tensor_f32(struct ipc_buffer *b, const float *data, const uint64_t *shape,
                         size_t n_dims);
/* The same with its data in a ring's data area. */
struct ipc_handle;
void ipc_pack_tensor_f32_by_handle(struct ipc_buffer *b, const struct ipc_handle *handle,
                                   const uint64_t *shape, size_t n_dims);
/* {ring: offset, bytes: n}: so many bytes in a ring's data area, in the place of binary. */
void ipc_pack_handle(struct ipc_buffer *b, const struct ipc_handle *handle);
/* Raw msgpack bytes of one value, made elsewhere with the same packers. */
void ipc_pack_raw(struct ipc_buffer *b, const void *data, size_t bytes);

/* Message heads; the params, error or result is packed by the caller next. */
void ipc_pack_request(struct ipc_buffer *b, uint32_t id, const char *method);
void ipc_pack_response_ok(struct ipc_buffer *b, uint32_t id); /* then the result */
void ipc_pack_notification(struct ipc_buffer *b, const char *method);
/* "gqa.event" [id, seq, {...}]: the map is packed by the caller next. */
void ipc_pack_event(struct ipc_buffer *b, uint32_t id, uint32_t seq);

struct ipc_error {
    enum proto_error_code code;
    uint32_t retry_after_ms; /* 0: no hint */
    char message[384];       /* one sentence; names field, value, limit */
};
/* Clears the hint. What the arguments bring in of control characters or broken UTF-8 becomes '?'.
 */
void ipc_error_set(struct ipc_error *e, enum proto_error_code code, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
/* A whole error response: {code, name, message, retry_after_ms?}. */
void ipc_pack_response_error(struct ipc_buffer *b, uint32_t id, const struct ipc_error *e);

/* ---- scanning --------------------------------------------------------------------------------
 * Finds where a message ends, over input that comes in pieces, without allocating. */
struct ipc_scanner {
    uint32_t depth;
    uint32_t n_elements;
    uint32_t message_elements;          /* of the message that ended last: what parsing it costs */
    uint64_t bytes;                     /* of the message so far */
    uint64_t skip;                      /* bytes of the current string or number left */
    uint64_t left[PROTO_DEPTH_MAX + 1]; /* values still to come at each depth */
    uint8_t head[9];
    uint32_t head_bytes;
    uint32_t frame_bytes_max;
};

void ipc_scanner_init(struct ipc_scanner *s, uint32_t frame_bytes_max);

/* Consumes input. Returns 1 when a message ended (*ret_used bytes belong to it; the scanner is
 * ready for the next), 0 when all input was used and more is needed, or -EPROTO (a type byte that
 * does not exist, or an extension type: the protocol has none), -EMSGSIZE (frame or element limit),
 * -ELOOP (depth): the connection is then beyond repair. */
int ipc_scanner_feed(struct ipc_scanner *s, const uint8_t *data, size_t bytes, size_t *ret_used);

/* ---- reading ----------------------------------------------------------------------------- */

/* A value inside a message, opaque; lives as long as the message. All getters accept NULL (absent)
 * and answer -ENOENT then; -EINVAL for another type; -ERANGE when the number does not fit. NULL has
 * the type IPC_NIL and no elements. Keys match whether they came as string or binary. */
struct ipc_value;

enum ipc_value_type {
    IPC_NIL,
    IPC_BOOL,
    IPC_UINT,
    IPC_INT,
    IPC_FLOAT,
    IPC_STR,
    IPC_BIN,
    IPC_ARRAY,
    IPC_MAP,
    IPC_OTHER
};

enum ipc_value_type ipc_value_type(const struct ipc_value *v);
int ipc_value_bool(const struct ipc_value *v, bool *ret);
int ipc_value_u64(const struct ipc_value *v, uint64_t *ret);
int ipc_value_i64(const struct ipc_value *v, int64_t *ret);
int ipc_value_f64(const struct ipc_value *v, double *ret); /* integers convert */
/* str and bin; data is never NULL. */
int ipc_value_bytes(const struct ipc_value *v, struct proto_string *ret);
size_t ipc_value_count(const struct ipc_value *v); /* of an array or map; else 0 */
const struct ipc_value *ipc_value_at(const struct ipc_value *array, size_t index);   /* or NULL */
const struct ipc_value *ipc_value_get(const struct ipc_value *map, const char *key); /* or NULL */
/* The index-th pair of a map; false past the end. */
bool ipc_value_pair(const struct ipc_value *map, size_t index, const struct ipc_value **ret_key,
                    const struct ipc_value **ret_value);

/* A map that stands for bytes in a ring's data area. */
struct ipc_handle {
    uint64_t offset, bytes;
};
/* -EINVAL: it is none; -ENOENT. */
int ipc_value_handle(const struct ipc_value *v, struct ipc_handle *ret);

enum ipc_message_kind { IPC_REQUEST = 0, IPC_RESPONSE = 1, IPC_NOTIFICATION = 2 };

struct ipc_message {
    enum ipc_message_kind kind;
    uint32_t id;                    /* requests and responses */
    struct proto_string method;     /* requests and notifications */
    const struct ipc_value *params; /* a map, or a notification's array; never NULL for these two */
    const struct ipc_value *error;  /* responses: a map, or NULL when the call succeeded */
    const struct ipc_value *result; /* responses: NULL when it failed */
    void *arena;                    /* owns all values */
    /* What handles in a request's params may name; none where area_bytes is 0. Shared with the
     * client: ipc_params_decode copies before it looks. */
    const uint8_t *area;
    uint64_t area_bytes;
    uint64_t fetched_bytes; /* copied of it; PROTO_FRAME_BYTES_MAX at most */
};

/* Memory that a value of a parsed message takes, beside its bytes in the frame. */
#define IPC_VALUE_BYTES 24u

/* The id of the request that begins with these bytes, of which IPC_HEAD_BYTES are enough. -EPROTO:
 * it is none, or not written in the shortest form. */
#define IPC_HEAD_BYTES 11u
int ipc_request_id(const uint8_t *head, size_t bytes, uint32_t *ret_id);

/* Parses one message that the scanner delimited. The bytes must stay until ipc_message_finish:
 * strings point into them. -EPROTO when it is no message of the protocol; -ENOMEM. On -EPROTO,
 * *ret_id tells a request's id where one could be read (else UINT32_MAX), so that an error can
 * answer it; otherwise it is untouched. */
int ipc_message_parse(const uint8_t *frame, size_t bytes, struct ipc_message *ret,
                      uint32_t *ret_id);
void ipc_message_finish(struct ipc_message *m);

/* Puts binary in the place of every handle in a parsed message. find tells where a handle's bytes
 * are, or a -errno, which ends it; they are not copied. */
typedef int (*ipc_find_fn)(void *arg, const struct ipc_handle *handle, const uint8_t **ret);
int ipc_message_resolve(struct ipc_message *m, ipc_find_fn find, void *arg);
/* Copies the bytes of all binary that lies in [first, first + bytes) into the message's memory.
 * -ENOMEM. */
int ipc_message_own(struct ipc_message *m, const uint8_t *first, uint64_t bytes);

/* Checks a request's params against the table and fills the method's struct: defaults for absent
 * optional fields (their has_ is false; strings and arrays are empty, never with NULL data),
 * unknown keys ignored, duplicates refused. -EINVAL with e naming field, value and limit; -ENOMEM,
 * also told in e. Arrays are allocated in the message's arena. NaN is refused everywhere; infinity
 * too, but for a bias of -inf, for which false may stand. Biases also come as a map {token: bias}.
 * Token ids are an array of integers, or binary: 32 bits each, little-endian. A handle stands for
 * binary of the message's area. Token ids are 0 to INT32_MAX here; whether a vocabulary has them is
 * for the model to say. */
int ipc_params_decode(enum proto_method method, struct ipc_message *m, union proto_params *ret,
                      struct ipc_error *e);

/* The result of gqa.api_info, from the table. */
void ipc_pack_api_info(struct ipc_buffer *b);

#endif
