/* What a peer reads and writes; no test framework, for it also runs in fake_gqad. */
#include "peer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define BAD 2 /* exit status of a script that met what it did not expect */

/* Reads byte by byte: slow, but it never takes what belongs to the next message. */
static uint8_t *read_frame(int fd, size_t *ret_bytes)
{
    struct ipc_scanner scanner;
    uint8_t *frame = NULL;
    size_t bytes = 0, room = 0, used;
    ipc_scanner_init(&scanner, PROTO_FRAME_BYTES_MAX);
    for (;;) {
        if (bytes == room) {
            room = room > 0 ? 2 * room : 256;
            frame = realloc(frame, room);
        }
        ssize_t n = frame != NULL ? read(fd, frame + bytes, 1) : -1;
        if (n <= 0) {
            _exit(0); /* the client is gone, as some tests want */
        }
        int r = ipc_scanner_feed(&scanner, frame + bytes, 1, &used);
        bytes++;
        if (r < 0) {
            _exit(BAD);
        }
        if (r > 0) {
            *ret_bytes = bytes;
            return frame;
        }
    }
}

void peer_read(int fd, struct peer_request *ret)
{
    size_t bytes;
    uint32_t id;
    uint64_t cancelled;
    memset(ret, 0, sizeof(*ret));
    ret->frame = read_frame(fd, &bytes);
    if (ipc_message_parse(ret->frame, bytes, &ret->message, &id) < 0 ||
        ret->message.method.bytes >= sizeof(ret->method)) {
        _exit(BAD);
    }
    memcpy(ret->method, ret->message.method.data, ret->message.method.bytes);
    ret->id = ret->message.id;
    if (ret->message.kind == IPC_NOTIFICATION) {
        if (strcmp(ret->method, "$cancel") != 0 ||
            ipc_value_u64(ipc_value_at(ret->message.params, 0), &cancelled) < 0) {
            _exit(BAD);
        }
        ret->is_cancel = true;
        ret->id = (uint32_t)cancelled;
    }
}

void peer_request_finish(struct peer_request *r)
{
    ipc_message_finish(&r->message);
    free(r->frame);
}

void peer_write(int fd, const void *data, size_t bytes)
{
    const uint8_t *at = data;
    while (bytes > 0) {
        ssize_t n = send(fd, at, bytes, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR) {
            _exit(0);
        }
        at += n > 0 ? n : 0;
        bytes -= n > 0 ? (size_t)n : 0;
    }
}

void peer_send(int fd, struct ipc_buffer *b)
{
    peer_write(fd, b->data, b->bytes);
    ipc_buffer_finish(b);
}

uint32_t peer_expect(int fd, const char *method)
{
    struct peer_request r;
    peer_read(fd, &r);
    if (strcmp(r.method, method) != 0) {
        _exit(BAD);
    }
    uint32_t id = r.id;
    peer_request_finish(&r);
    return id;
}

void peer_hello(int fd, uint32_t version)
{
    struct ipc_buffer b;
    uint32_t id = peer_expect(fd, "gqa.hello");
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, id);
    ipc_pack_map(&b, 2);
    ipc_pack_str(&b, "server");
    ipc_pack_str(&b, "peer");
    ipc_pack_str(&b, "protocol");
    ipc_pack_u64(&b, version);
    peer_send(fd, &b);
}

void peer_answer(int fd, uint32_t id)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, id);
    ipc_pack_map(&b, 0);
    peer_send(fd, &b);
}

void peer_step(int fd, uint32_t id, uint32_t seq, const char *text, int32_t token)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_event(&b, id, seq);
    ipc_pack_map(&b, 2);
    ipc_pack_str(&b, "text");
    ipc_pack_str(&b, text);
    ipc_pack_str(&b, "tokens");
    ipc_pack_tokens(&b, &token, 1);
    peer_send(fd, &b);
}

void peer_end(int fd, uint32_t id, const char *finish)
{
    struct ipc_buffer b;
    ipc_buffer_init(&b);
    ipc_pack_response_ok(&b, id);
    ipc_pack_map(&b, 1);
    ipc_pack_str(&b, "finish");
    ipc_pack_str(&b, finish);
    peer_send(fd, &b);
}
