/* From a stream of bytes to whole messages: the same way for both transports. */
#include "daemon/peer_internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define FRAME_FIRST_BYTES 256u
#define FRAME_AHEAD_BYTES (1u << 20) /* room made at once for a text that has begun */

void peer_input_init(struct peer_input *in)
{
    *in = (struct peer_input){0};
    ipc_scanner_init(&in->scanner, PROTO_FRAME_BYTES_MAX);
}

void peer_input_finish(struct peer_input *in)
{
    free(in->frame);
    free(in->rest);
    in->frame = in->rest = NULL;
}

bool peer_may_take(const struct peer *p)
{
    return !p->closed && !p->ending && !p->caller.parsing && !p->caller.congested;
}

bool peer_may_read(const struct peer *p, const struct peer_input *in)
{
    return peer_may_take(p) && in->rest_bytes == 0;
}

/* A text that has begun tells how long it is: room for what comes of it spares moving the frame as
 * it grows. Memory that is not written to costs nothing, so its word is taken up to a limit. */
static int frame_append(struct peer_input *in, const uint8_t *data, size_t bytes)
{
    size_t wanted = in->frame_bytes + bytes;
    if (wanted > in->frame_capacity) {
        uint64_t ahead = in->scanner.skip;
        size_t capacity = in->frame_capacity ? in->frame_capacity * 2 : FRAME_FIRST_BYTES;
        wanted += ahead < FRAME_AHEAD_BYTES ? (size_t)ahead : FRAME_AHEAD_BYTES;
        if (capacity < wanted) {
            capacity = wanted;
        }
        uint8_t *frame = realloc(in->frame, capacity);
        if (!frame) {
            return -ENOMEM;
        }
        in->frame = frame;
        in->frame_capacity = capacity;
    }
    memcpy(in->frame + in->frame_bytes, data, bytes);
    in->frame_bytes += bytes;
    return 0;
}

static void refuse(struct peer *p, int rc)
{
    struct ipc_error e;
    if (rc == -EMSGSIZE) {
        ipc_error_set(&e, PROTO_E_INVALID_REQUEST,
                      "a message is longer than %u bytes or has more than %u values",
                      PROTO_FRAME_BYTES_MAX, PROTO_ELEMENTS_MAX);
    } else if (rc == -ELOOP) {
        ipc_error_set(&e, PROTO_E_INVALID_REQUEST, "a message is nested deeper than %u",
                      PROTO_DEPTH_MAX);
    } else if (rc == -ENOMEM) {
        ipc_error_set(&e, PROTO_E_NO_MEMORY, "no memory for a message");
    } else {
        ipc_error_set(&e, PROTO_E_INVALID_REQUEST, "not MessagePack");
    }
    caller_notify_error(&p->caller, &e);
    p->ending = true;
    if (rc != -ENOMEM) {
        peer_strike(p, PENALTY_VIOLATION);
    }
}

static void deliver_frame(struct peer *p, struct peer_input *in)
{
    uint8_t *frame = in->frame;
    size_t bytes = in->frame_bytes;
    in->frame = NULL;
    in->frame_bytes = in->frame_capacity = 0;
    p->greeted = true;
    caller_message(&p->caller, frame, bytes, in->scanner.message_elements);
}

/* Looks at bytes until they are used or the peer has to wait. Returns how many were used. */
static size_t consume(struct peer *p, struct peer_input *in, const uint8_t *data, size_t bytes)
{
    size_t done = 0;
    bool some = false;
    while (done < bytes && peer_may_take(p) && !(some && peer_step_is_over(p->host))) {
        size_t used = 0;
        int rc = ipc_scanner_feed(&in->scanner, data + done, bytes - done, &used);
        if (rc == 0) {
            used = bytes - done;
        }
        if (rc >= 0) {
            int appended = frame_append(in, data + done, used);
            rc = appended < 0 ? appended : rc;
        }
        if (rc < 0) {
            refuse(p, rc);
            return bytes;
        }
        done += used;
        if (rc > 0) {
            some = true;
            deliver_frame(p, in);
        }
    }
    return p->ending ? bytes : done;
}

void peer_feed(struct peer *p, struct peer_input *in, const uint8_t *data, size_t bytes)
{
    size_t used = consume(p, in, data, bytes);
    if (used == bytes) {
        return;
    }
    uint8_t *rest = malloc(bytes - used);
    if (!rest) {
        refuse(p, -ENOMEM);
        return;
    }
    memcpy(rest, data + used, bytes - used);
    in->rest = rest;
    in->rest_bytes = bytes - used;
}

void peer_feed_rest(struct peer *p, struct peer_input *in)
{
    uint8_t *rest = in->rest;
    size_t bytes = in->rest_bytes;
    if (rest && peer_may_take(p)) {
        in->rest = NULL;
        in->rest_bytes = 0;
        peer_feed(p, in, rest, bytes);
        free(rest);
    }
}
