/* Any bytes as a stream of messages, as the daemon and the client take them: scanned, parsed, every
 * value walked, a request's params decoded for the method that it names (or for one that its id
 * picks, so that all rows are reached). */
#include "ipc/codec.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

static volatile uint8_t sink;

static void read_bytes(struct proto_string s)
{
    for (size_t i = 0; i < s.bytes; i++) {
        sink = (uint8_t)s.data[i];
    }
}

static void walk(const struct ipc_value *v, unsigned depth)
{
    const struct ipc_value *key, *value;
    struct proto_string s;
    uint64_t u;
    int64_t i;
    double f;
    bool b;

    if (depth > PROTO_DEPTH_MAX || ipc_value_type(v) == IPC_OTHER) {
        abort(); /* the scanner let it pass */
    }
    ipc_value_bool(v, &b);
    ipc_value_f64(v, &f);
    if (ipc_value_u64(v, &u) == 0 && u <= INT64_MAX &&
        (ipc_value_i64(v, &i) < 0 || i != (int64_t)u)) {
        abort();
    }
    if (ipc_value_bytes(v, &s) == 0) {
        read_bytes(s);
    }
    for (size_t n = 0; n < ipc_value_count(v); n++) {
        if (ipc_value_pair(v, n, &key, &value)) {
            walk(key, depth + 1);
            walk(value, depth + 1);
        } else {
            walk(ipc_value_at(v, n), depth + 1);
        }
    }
}

/* Everything that the params point to must be there. */
static void read_params(enum proto_method method, const union proto_params *params)
{
    const struct proto_method_info *info = proto_method_info(method);
    for (size_t i = 0; i < info->n_fields; i++) {
        const struct proto_field *f = &info->fields[i];
        const void *member = (const char *)params + f->offset;
        if (f->required && !*(const bool *)((const char *)params + f->has_offset)) {
            abort();
        }
        if (f->type == PROTO_NAME || f->type == PROTO_TEXT) {
            read_bytes(*(const struct proto_string *)member);
        } else if (f->type == PROTO_STRINGS || f->type == PROTO_TEXTS) {
            const struct proto_strings *strings = member;
            for (size_t n = 0; n < strings->count; n++) {
                read_bytes(strings->items[n]);
            }
        } else if (f->type == PROTO_TOKENS) {
            const struct proto_tokens *tokens = member;
            for (size_t n = 0; n < tokens->count; n++) {
                sink = (uint8_t)tokens->ids[n];
            }
        } else if (f->type == PROTO_BIASES) {
            const struct proto_biases *biases = member;
            for (size_t n = 0; n < biases->count; n++) {
                if (biases->items[n].token < 0 || biases->items[n].bias != biases->items[n].bias) {
                    abort();
                }
            }
        } else if (f->type == PROTO_F32) {
            float x = *(const float *)member;
            if (!(x >= (float)f->min.f && x <= (float)f->max.f)) {
                abort();
            }
        }
    }
}

static void decode(struct ipc_message *m)
{
    enum proto_method method = (enum proto_method)(m->id % PROTO_METHOD_COUNT);
    union proto_params params;
    struct ipc_error e = {.message = ""};

    proto_method_by_name(m->method.data, m->method.bytes, &method);
    if (ipc_params_decode(method, m, &params, &e) == 0) {
        read_params(method, &params);
    } else if (e.code == PROTO_OK || e.message[0] == '\0') {
        abort();
    }
}

static void parse(const uint8_t *frame, size_t bytes)
{
    struct ipc_message m;
    uint32_t id;
    uint8_t *copy = malloc(bytes); /* of its exact size: a byte too far is seen */
    if (copy == NULL) {
        return;
    }
    memcpy(copy, frame, bytes);
    if (ipc_message_parse(copy, bytes, &m, &id) == 0) {
        read_bytes(m.method);
        walk(m.params, 1);
        walk(m.error, 1);
        walk(m.result, 1);
        if (m.kind == IPC_REQUEST) {
            decode(&m);
        }
        ipc_message_finish(&m);
    }
    free(copy);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct ipc_scanner s;
    size_t used;

    ipc_scanner_init(&s, PROTO_FRAME_BYTES_MAX);
    while (bytes > 0 && ipc_scanner_feed(&s, data, bytes, &used) == 1) {
        parse(data, used);
        data += used;
        bytes -= used;
    }
    return 0;
}
