/* Any bytes as what a daemon says after hello, to libgqa with three calls pending: whatever they
 * are, every call ends exactly once, no event comes after its end, and every value can be read. */
#include <gqa/client.h>

#include "ipc/codec.h"

#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);

#define N_CALLS   3
#define BYTES_MAX 65536 /* fits a socket's buffer: nobody reads while it is written */

struct call {
    struct gqa *g;
    unsigned n_ends;
};

static volatile uint8_t sink;

static void walk(const struct gqa_value *v)
{
    const struct gqa_value *key, *value;
    struct gqa_tensor_view tensor;
    const char *text;
    size_t n = 0;
    int32_t ids[4];
    if (gqa_value_bytes(v, &text, &n) == 0) {
        for (size_t i = 0; i < n; i++) {
            sink = (uint8_t)text[i];
        }
    }
    if (gqa_value_tensor_f32(v, &tensor) == 0 && tensor.bytes > 0) {
        sink = ((const uint8_t *)tensor.data)[tensor.bytes - 1];
    }
    gqa_value_tokens(v, ids, 4, &n);
    for (size_t i = 0; i < gqa_value_count(v); i++) {
        if (gqa_value_pair(v, i, &key, &value)) {
            walk(key);
            walk(value);
        } else {
            walk(gqa_value_at(v, i));
        }
    }
}

static void on_event(void *arg, uint32_t id, const struct gqa_value *event)
{
    const struct call *call = arg;
    if (call->n_ends > 0) {
        abort();
    }
    walk(event);
    gqa_cancel(call->g, id + 1);
}

static void on_done(void *arg, uint32_t id, int status, const struct gqa_value *result,
                    const struct gqa_error *error)
{
    struct call *call = arg;
    if (++call->n_ends > 1 || (status == 0) != (error == NULL) || status > 0) {
        abort();
    }
    walk(result);
}

static void on_notify(void *arg, const char *method, const struct gqa_value *params)
{
    walk(params);
}

static bool speak(int fd, const void *data, size_t bytes)
{
    return bytes == 0 || send(fd, data, bytes, MSG_NOSIGNAL | MSG_DONTWAIT) == (ssize_t)bytes;
}

/* Connects to a peer that has answered hello already: its id is the connection's first, 1. */
static struct gqa *connect_to(const int pair[2])
{
    struct gqa_connect_options o = {
        .struct_size = sizeof(o), .flags = GQA_CONNECT_FD, .fd = pair[0]};
    struct gqa *g = NULL;
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, 1);
    ipc_pack_map(&b, 1);
    ipc_pack_str(&b, "protocol");
    ipc_pack_u64(&b, GQA_PROTOCOL_VERSION);
    if (!speak(pair[1], b.data, b.bytes) || gqa_connect(&o, &g, NULL) < 0) {
        abort();
    }
    ipc_buffer_finish(&b);
    return g;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    struct call calls[N_CALLS] = {0};
    int pair[2];
    if (bytes > BYTES_MAX || socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0) {
        return 0;
    }
    struct gqa *g = connect_to(pair);
    gqa_set_notify(g, on_notify, NULL);
    for (size_t i = 0; i < N_CALLS; i++) {
        calls[i].g = g;
        struct gqa_call_options c = {
            .struct_size = sizeof(c), .event = on_event, .done = on_done, .arg = &calls[i]};
        if (gqa_call_async(g, "text.generate", NULL, &c, NULL) < 0) {
            abort();
        }
    }
    if (!speak(pair[1], data, bytes) || shutdown(pair[1], SHUT_WR) < 0) {
        abort();
    }
    while (gqa_process(g) > 0) {
    }
    gqa_close(g);
    close(pair[1]);
    for (size_t i = 0; i < N_CALLS; i++) {
        if (calls[i].n_ends != 1) {
            abort();
        }
    }
    return 0;
}
